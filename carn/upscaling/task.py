"""What is to be made of a slide, and what decides whether it has been made already."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from urllib.parse import quote

from carn import storage
from carn.slides.slide_output import OutputSpec, SlideFormat
from carn.upscaling.lr_view import InputConfig
from carn.upscaling.suitability import TrainingRange

# Longest file name that a slide's own name becomes: file systems take 255 bytes with suffixes.
MAX_KEY = 150


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """How pixels are made."""

    pooling: Literal["slide", "block"] = "slide"
    """What a network that pools over the whole image (CARN, RCAN, SWD-Net) pools over. `slide`: a
    sample of the slide's tissue, once, so that neighbouring blocks agree. `block`: each window for
    itself, as patches in training; neighbours may then differ by several grey levels."""
    background: Literal["enlarge", "infer"] = "enlarge"
    """What lies far from tissue is enlarged bicubically, or super-resolved like the rest."""
    seed: int = 1
    """Of the choice of the tissue that is pooled over."""


@dataclass(frozen=True, kw_only=True)
class SlideTask:
    """What is to be made of one slide; decides what a finished output must say to be left alone.

    Attributes:
        name: below the output.
        uri, identity: of the input.
        is_image: a plain image.
        checkpoint, checkpoint_hash, model, scale: the network.
        halo_px: LR px of context that it wants round what it makes.
        input, pixels, precision, self_ensemble, format: how.
        output: folder or prefix of all slides.
        block_px: side of a block in SR px.
        code_version: of the run; workers must not each look at their own.
        told: how LR was made, for an adaptive network, as `AdaptiveCarn.tell` takes it; empty where
            it estimates that itself.
        trained: what the network was trained on; decides nothing but what is warned of.
    """

    name: str
    uri: str
    identity: str
    is_image: bool
    checkpoint: str
    checkpoint_hash: str
    model: str
    scale: int
    halo_px: int
    input: InputConfig
    pixels: PixelConfig
    precision: str
    format: SlideFormat
    output: str
    block_px: int
    code_version: str
    self_ensemble: bool = False
    told: Mapping[str, float] = field(default_factory=dict)
    trained: TrainingRange | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Equal where input, checkpoint and config are: 16 hexadecimal digits."""
        return _digest([self.identity, self.checkpoint_hash, self.settings()])

    def settings(self) -> dict[str, Any]:
        """All that decides the pixels, beside the input and the network."""
        every = asdict(self)
        settings = {name: every[name] for name in ("pixels", "precision", "format")}
        settings["input"] = self.input.settings()
        # Left out where they are off, for slides that were finished before there was a choice.
        settings |= {"self_ensemble": True} if self.self_ensemble else {}
        return settings | ({"told": dict(self.told)} if self.told else {})

    def provenance(self) -> dict[str, Any]:
        """What the output says of its making; names of files and folders stay out of it."""
        return {
            "digest": self.digest,
            "input_identity": self.identity,
            "model": self.model,
            "scale": self.scale,
            "checkpoint_hash": self.checkpoint_hash,
            "settings": self.settings(),
            "code_version": self.code_version,
        }

    @property
    def output_uri(self) -> str:
        """The finished slide."""
        suffix = ".ome.zarr" if self.format.container == "ome-zarr" else ".tif"
        return storage.join(self.output, self.name + suffix)

    @property
    def committed_uri(self) -> str:
        """The object that is there when the slide is finished, and not before."""
        is_folder = self.format.container == "ome-zarr"
        return storage.join(self.output_uri, "zarr.json") if is_folder else self.output_uri

    @property
    def work_root(self) -> str:
        """Folder of all unfinished work on this slide, whatever its settings."""
        return storage.join(self.output, "_work", key_of(self.name))

    @property
    def work_uri(self) -> str:
        """Folder of the unfinished work: blocks of two settings or programs never mix."""
        state = [self.digest, self.block_px, self.code_version]
        return storage.join(self.work_root, _digest(state))

    @property
    def done_uri(self) -> str:
        """What says that the slide is finished with just these settings."""
        return storage.join(self.output, "_state", "done", f"{key_of(self.name)}@{self.digest}")

    def to_json(self) -> str:
        """Itself as text, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "SlideTask":
        """The task of `to_json`."""
        content = json.loads(text)
        given = content["input"]
        given["mpp_range"] = given["mpp_range"] and tuple(given["mpp_range"])
        content["input"] = InputConfig(**given)
        content["pixels"] = PixelConfig(**content["pixels"])
        content["format"] = SlideFormat(**content["format"])
        content["trained"] = TrainingRange.from_json_values(content["trained"])
        return cls(**content)


@dataclass(frozen=True, kw_only=True)
class SlidePlan:
    """A slide that was looked at, and what is left to do.

    Attributes:
        task: what is to be made of it.
        spec: the output.
        lr_extent: (width, height) of the input in LR px.
        mpp: um per LR px, (x, y).
        downsample: level-0 px of the input per LR px, (x, y).
        l0_extent: (width, height) of the input in level-0 px.
        num_blocks: of the whole slide.
        done: blocks that are on storage already.
        tissue_share: share of the cells that are inferred.
        compression: how the level that is read is stored, in words.
        notes: what was decided against the file's own word.
        foreign_levels: levels of the file that are not the slide made smaller.
        warnings: in what the file is unlike what the network was trained on.
        show: the block whose crop is shown; its right neighbour shows the seam.
        show_cell: (x, y) LR px of the top-left corner of the crop.
    """

    task: SlideTask
    spec: OutputSpec
    lr_extent: tuple[int, int]
    mpp: tuple[float, float] | None
    downsample: tuple[float, float]
    l0_extent: tuple[int, int]
    num_blocks: int
    done: tuple[int, ...]
    tissue_share: float
    compression: str
    notes: tuple[str, ...]
    foreign_levels: tuple[int, ...]
    warnings: tuple[str, ...]
    show: int
    show_cell: tuple[int, int]

    def to_json(self) -> str:
        """Itself as text, for another process."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps(content | {"task": self.task.to_json(), "spec": self.spec.to_json()})

    @classmethod
    def from_json(cls, text: str) -> "SlidePlan":
        """The plan of `to_json`."""
        content = json.loads(text)
        content["task"] = SlideTask.from_json(content["task"])
        content["spec"] = OutputSpec.from_json(content["spec"])
        pairs = ("lr_extent", "mpp", "downsample", "l0_extent", "show_cell")
        for name in (*pairs, "done", "notes", "foreign_levels", "warnings"):
            content[name] = None if content[name] is None else tuple(content[name])
        return cls(**content)


def key_of(name: str) -> str:
    """A slide's name as one plain file name; long ones are cut, and told apart by a hash."""
    # Names of files need not be UTF-8.
    key = quote(name, safe="", errors="surrogateescape").replace(
        ".", "%2E", 1 * name.startswith(".")
    )
    if len(key) <= MAX_KEY:
        return key
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    return f"{key[: MAX_KEY - 20]}-{digest[:16]}"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
