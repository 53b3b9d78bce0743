"""What super_resolve.py can be asked to do, as its command line and its report have it."""

import dataclasses
import fnmatch
import json
import os
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import tyro

from carn import storage
from carn.slides.listing import pattern_folder
from carn.slides.slide_output import SlideFormat
from carn.upscaling.engine import EngineConfig
from carn.upscaling.lr_view import InputConfig
from carn.upscaling.task import PixelConfig

# Names below the output that lead to pictures of a report: runs/<id>/pictures/<picture>.
PICTURES_DEPTH = 4


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the run goes. Nothing here changes the pixels."""

    limit: int | None = None
    """Most slides to begin in this run."""
    deadline: str | None = None
    """When to stop, as `06:00` (the next one, in this machine's time) or `2026-11-25T06:00`. Blocks
    at hand are finished; the next run goes on from there."""
    dry_run: bool = False
    """Say what would be done, its pixels and the time it may take; do nothing."""
    overwrite: bool = False
    """Replace finished slides that were made from other input, weights or settings."""
    on_bad_slide: Literal["fail", "skip"] = "fail"
    """Exit status when a slide failed: 1, or 0."""
    block_px: int = 4096
    """Side of a block in SR px: what one worker makes at a time and a killed run loses at most."""
    consistency_db: float = 30.0
    """Places where SR, made small again, is farther than this from the input are listed."""
    lease_minutes: float = 10.0
    """How long a slide stays claimed by a run that died; a live one renews its claims."""
    outage_minutes: float = 5.0
    """How long the run waits for an output that cannot be written; what failed meanwhile is done
    again. 0 ends the run at once."""
    abandon_days: float = 7.0
    """Age at which unfinished work on slides that are not among the inputs, and uploads that no
    work speaks of, are removed."""
    num_pictures: int = 24
    """Slides that the report shows with pictures."""
    progress_s: float = 10.0
    """Seconds between two lines of progress."""
    request_payer: bool = False
    """Say to the object store that this account pays for what it reads, as some buckets want."""
    log_format: Literal["text", "json"] = "text"
    """`json`: the log is one JSON object a line, and each slide has one with all that is known of
    it; `text`: it is for people, and those lines are in the run's slides.jsonl alone."""

    def __post_init__(self) -> None:
        for name in ("limit", "block_px", "num_pictures"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "num_pictures" else 1):
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("lease_minutes", "abandon_days", "progress_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not self.outage_minutes >= 0:
            raise ValueError(f"outage_minutes={self.outage_minutes} must not be negative")
        if self.deadline is not None:
            parse_deadline(self.deadline, now=datetime.now().astimezone())


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Who works. Nothing here changes the pixels beyond roundings."""

    gpus_per_actor: float | None = None
    """GPUs of an actor that super-resolves, such as 0.5; None for one where the cluster has any."""
    cpus_per_actor: float | None = None
    """CPUs of such an actor; None for 2, or what a smaller node has."""
    min_actors: int = 1
    """Actors to begin with."""
    max_actors: int | None = None
    """Most actors that super-resolve; None for what the cluster holds now. Say it where the cluster
    grows with its load."""
    num_readers: int | None = None
    """Most actors that read, where GPUs super-resolve; None for two per GPU actor."""
    pipeline: Literal["auto", "fused", "split"] = "auto"
    """`split`: reading has actors of its own, as it should be with GPUs; `fused`: it has not."""
    blocks_per_task: int | None = None
    """Blocks handed to an actor at a time; None for 2 on CPUs and 4 on GPUs."""

    def __post_init__(self) -> None:
        for name in ("min_actors", "max_actors", "num_readers", "blocks_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("gpus_per_actor", "cpus_per_actor"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")


@dataclass(frozen=True, kw_only=True)
class SuperResolveJob:
    """What `super_resolve.py` is asked to do."""

    output: str
    """Folder or s3:// prefix of the super-resolved slides."""
    checkpoint: str | None = None
    """Training run, checkpoint or .safetensors file, local or s3://, or the name of a network that
    comes with the project; None for the one that does at this scale, such as carn-x2."""
    slides: tuple[str, ...] = ()
    """Slides: folders or s3:// prefixes, searched at any depth; globs; files; or manifests: a .txt
    with a URI on each line, a .csv with the header uri[,mpp][,name]."""
    images: tuple[str, ...] = ()
    """Plain images (PNG, JPEG, TIFF) likewise, which need not say their MPP."""
    scale: int | None = None
    """What the checkpoint must be made for; None for whatever it is, and 2 without one."""
    lr_like: str | None = None
    """How LR was made, said by hand to a network that adapts to it: a condition by name, such as
    jpeg80-420, or a .yaml file with one (docs/degradation.md). None: it is estimated for each
    slide."""
    input: InputConfig = field(default_factory=InputConfig)
    pixels: PixelConfig = field(default_factory=PixelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    format: SlideFormat = field(default_factory=SlideFormat)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.output is tyro.MISSING:
            return  # not a job yet: the defaults of the command line
        if not self.slides and not self.images:
            raise ValueError("say where the slides are: --slides, or --images for plain images")
        for roots, is_image in ((self.slides, False), (self.images, True)):
            for root in roots:
                if _reads_results(root, self.output, is_image=is_image):
                    where = f"--output {self.output} lies in {root}, which is read"
                    raise ValueError(
                        f"{where}: the next run would take its results for input; choose another"
                    )
        side = self.format.tile_px
        if self.run.block_px % side or (self.run.block_px // side).bit_count() != 1:
            raise ValueError(
                f"block_px={self.run.block_px} must be tile_px={side} times a power of two"
            )

    def settings(self) -> dict[str, Any]:
        """The resolved configuration as JSON values."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return content


def _reads_results(root: str, output: str, *, is_image: bool) -> bool:
    """Whether a folder, prefix or glob of inputs would find what a run writes below `output`."""
    given = [storage.normalize(name) for name in (root, output)]
    spellings = [given]
    if not any(map(storage.is_s3, given)):
        spellings.append([os.path.realpath(name) for name in given])  # links and ".." lead there
    return any(_finds_results(*names, is_image=is_image) for names in spellings)


def _finds_results(root: str, output: str, *, is_image: bool) -> bool:
    folder = pattern_folder(root)
    base = root if folder is None else folder
    own, wanted = output.rstrip("/").split("/"), root.split("/")
    # What comes of a folder below the output, such as an inbox in it, does not lie there.
    is_within = f"{output.rstrip('/')}/".startswith(f"{base.rstrip('/')}/")
    if folder is None or not is_within:
        return is_within
    # The slides that a glob finds are known by their provenance; the pictures are not.
    depth = len(wanted) - len(own)
    if not is_image or depth < 1 or not all(map(fnmatch.fnmatchcase, own, wanted)):
        return False
    tail = re.split(r"[*?\]]", wanted[-1])[-1].lower()
    endings = [".consistency.png"] + ([".png", ".jpg"] if depth == PICTURES_DEPTH else [])
    return any(ending.endswith(tail) or tail.endswith(ending) for ending in endings)


def parse_deadline(text: str, *, now: datetime) -> datetime:
    """The moment that `06:00` (the next) or an ISO date and time means, with a time zone.

    Raises:
        ValueError: neither, or a moment that has passed.
    """
    clock = re.fullmatch(r"(\d{1,2}):(\d{2})", text)
    try:
        if clock:
            moment = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
            return moment if moment > now else moment + timedelta(days=1)
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"deadline={text!r} is neither a time of day (06:00) nor a moment (2026-11-25T06:00)"
        ) from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=now.tzinfo)
    if moment <= now:
        raise ValueError(f"deadline={text!r} has passed")
    return moment
