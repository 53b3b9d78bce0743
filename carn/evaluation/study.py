"""An evaluation in parts that any process can do, and that need no doing again: who is scored, on
which tiles, and what is kept of it.

    scores/<digest>-<tiles>.parquet    one entrant on one stretch of tiles under one condition
    timings/<digest>.json              one entrant on one machine
    took.json                          how long all this took so far, and on what machine
    crops/<digest>-<number>.json       one crop of all entrants of a scale
    scores.parquet, table2.csv, conditions.csv, significance.csv, timings.csv, summary.json,
    report.html
"""

import base64
import functools
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from carn import storage
from carn.bcsr.build import group_of
from carn.bcsr.dataset import BcsrDataset, group_tiles
from carn.degradation.scanner import BICUBIC, Degradation
from carn.errors import CheckpointError, MissingObjectError
from carn.evaluation.crops import CropStrip, crop_strip
from carn.evaluation.lpips import Lpips, load_lpips
from carn.evaluation.published import architecture_changes, loss_changes, loss_of, row_of
from carn.evaluation.scoring import SCORES, Protocol, score_tiles
from carn.evaluation.timing import Timing, paper_lr_px, time_model
from carn.models.checkpoint import (
    Checkpoint,
    checkpoint_hash,
    checkpoint_uri,
    load_model,
    read_checkpoint,
)
from carn.models.table import MODELS, ModelName, build_model
from carn.slides.slide import Rgb
from carn.training.recipes import flat
from carn.version import code_version

logger = logging.getLogger(__name__)

# Tiles that are scored at a stretch: what is lost when a process is.
TILES_PER_STRETCH = 8
BEST, LAST, TOOK = "best.json", "last.json", "took.json"
# Networks that a process keeps at hand.
MAX_MODELS = 4

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A network with its weights, as it is scored.

    Attributes:
        key: of the table of models.
        scale: SR factor.
        checkpoint: where its weights are; None for bicubic interpolation.
        checkpoint_hash: of its weights and config; "" for bicubic.
        seed: of its training; None where nothing is known.
        variant: "MSE" for CARN that was trained by the squared error alone, else "".
        architecture: what tells the network from the paper's, such as "num_blocks=4".
        settings: the same, and what else tells it from others of its name.
        recipe: hash of how it was trained but for its seed: equal ones are averaged.
        steps: updates that were done in its training; None where nobody knows.
        planned_steps: updates that its training was to have.
        best_step: the update after which its weights were taken, as the best of its training.
        validation_psnr_db: of its weights in training; None where nobody knows.
        trained_on: digest of its dataset.
        training: settings of its training by name, as text.
        paper_row: of the paper's tables, see `carn.evaluation.published.row_of`.
    """

    key: str
    scale: int
    checkpoint: str | None
    checkpoint_hash: str
    seed: int | None
    variant: str
    architecture: str
    settings: str
    recipe: str
    steps: int | None
    planned_steps: int | None
    best_step: int | None
    validation_psnr_db: float | None
    trained_on: str
    training: tuple[tuple[str, str], ...] = ()
    paper_row: str | None = None

    @property
    def is_unfinished(self) -> bool:
        """Whether its training was to go on."""
        return None not in (self.steps, self.planned_steps) and self.steps != self.planned_steps

    @property
    def title(self) -> str:
        """Its name in print, without its variant: `CARN`, `CARN num_blocks=4`."""
        entry: Any = MODELS
        name: str = entry[self.key].title
        return f"{name} {self.settings}" if self.settings else name


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How entrants are scored.

    Attributes:
        dataset: URI of a finished bcSR dataset.
        split: of it.
        protocol: how LR is made.
        max_tiles: tiles that are scored, spread evenly over the split; None for all.
        lpips: URIs of AlexNet's and of the linear weights; None for no LPIPS.
        way: that of the condition LR is made under. Its name decides nothing.
    """

    dataset: str
    split: str
    protocol: Protocol
    max_tiles: int | None
    lpips: tuple[str, str] | None
    way: Degradation = BICUBIC

    def digest(self, dataset_digest: str) -> str:
        """What tells scores by this measure from others'."""
        facts = {**asdict(self), "dataset": dataset_digest, "code": code_version()}
        facts.pop("max_tiles")  # more tiles are more stretches
        return _digest(facts)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Tiles that are scored together, by their numbers in the split, ascending."""

    tiles: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of what is kept of it."""
        return _digest(list(self.tiles))[:10]


def find_entrants(uris: Sequence[str]) -> tuple[list[Entrant], list[Entrant]]:
    """The networks that runs, checkpoints and folders of runs hold.

    Of the runs below a folder only the finished ones count: one that was interrupted, stopped by a
    scheduler or diverged would otherwise be averaged with the seeds that went on to the end. A run
    that is named itself counts as it is.

    Args:
        uris: each a run's folder (its best checkpoint counts), a checkpoint, a weights file, or a
            folder whose folders are runs.

    Returns:
        Those that are scored, and unfinished ones that are left out.

    Raises:
        CheckpointError: one holds none, or only unfinished ones.
        ValueError: the same weights twice.
    """
    entrants: list[Entrant] = []
    left_out: list[Entrant] = []
    for uri in uris:
        place = checkpoint_uri(uri)
        runs = _runs_of(place)
        found = [_entrant_of(run) for run in runs]
        finished = [entrant for entrant in found if runs == [place] or not entrant.is_unfinished]
        if not finished:
            raise CheckpointError(
                f"{uri} holds no finished run ({len(found)} are not); name a run itself to have it "
                "scored as it is"
            )
        entrants += finished
        left_out += [entrant for entrant in found if entrant not in finished]
    for entrant in left_out:
        logger.warning("left out, its training is not finished: %s", describe_unfinished(entrant))
    seen: dict[str, str] = {}
    for entrant in entrants:
        if entrant.checkpoint_hash in seen:
            raise ValueError(
                f"{entrant.checkpoint} and {seen[entrant.checkpoint_hash]} are the same weights; "
                "name each once"
            )
        seen[entrant.checkpoint_hash] = str(entrant.checkpoint)
    return entrants, left_out


def describe_unfinished(entrant: Entrant) -> str:
    """Where an unfinished run is, and how far it has come."""
    run = _run_of(str(entrant.checkpoint))
    return f"{run} (update {entrant.steps:,} of {entrant.planned_steps:,})"


def _runs_of(uri: str) -> list[str]:
    try:
        read_checkpoint(uri)
        return [uri]
    except CheckpointError as error:
        below = sorted(
            item.uri.rpartition("/")[0]
            for item in storage.list_objects(uri)
            if storage.name_of(item.uri) == BEST
        )
        if not below:
            raise CheckpointError(
                f"{uri} holds neither a checkpoint nor folders of training runs: {error}"
            ) from error
        return below


def _run_of(checkpoint: str) -> str:
    """The folder of the run that a checkpoint is of; itself where it is of none."""
    return checkpoint.rpartition("/checkpoints/")[0] or checkpoint


def _entrant_of(place: str) -> Entrant:
    """What a run (by its best checkpoint), a checkpoint or a weights file is."""
    checkpoint = read_checkpoint(place)
    folder, _, name = place.rpartition("/")
    if checkpoint.uri in (place, folder):
        # Named itself: what came after it in its training is of no interest.
        return _entrant(checkpoint, last=checkpoint)
    run = folder if name in (BEST, LAST) else place
    try:
        return _entrant(checkpoint, last=read_checkpoint(storage.join(run, LAST)))
    except CheckpointError as error:
        logger.warning("%s: how far its training went is not known: %s", run, error)
        return _entrant(checkpoint, last=None)


def _entrant(checkpoint: Checkpoint, *, last: Checkpoint | None) -> Entrant:
    """An entrant by its weights and by the last checkpoint of its training."""
    # A run may have been made longer after its best validation.
    training = dict((last or checkpoint).training or {})
    seed = training.pop("seed", None)
    planned_steps = training.get("steps")
    architecture = architecture_changes(checkpoint)
    is_mse = checkpoint.model_name == "carn" and loss_of(checkpoint) == "mse"
    changed = architecture if is_mse else (*architecture, *loss_changes(checkpoint))
    steps = None if last is None else last.step
    dataset = dict(checkpoint.dataset or {})
    recipe = {
        "training": training,
        "config": {k: v for k, v in checkpoint.model_config.items() if k != "mean"},
        "dataset": dataset.get("digest"),
        # One that was cut short is no other seed of one that was not.
        "steps": steps,
        # Weights from elsewhere say nothing of how they came about.
        "weights": None if training else checkpoint.weights_sha256,
    }
    return Entrant(
        key=checkpoint.model_name,
        scale=checkpoint.scale,
        checkpoint=checkpoint.uri,
        checkpoint_hash=checkpoint_hash(checkpoint),
        seed=None if seed is None else int(seed),
        variant="MSE" if is_mse else "",
        architecture=", ".join(architecture),
        settings=", ".join(changed),
        recipe=_digest(recipe),
        steps=steps,
        planned_steps=None if planned_steps is None else int(planned_steps),
        best_step=checkpoint.step if training else None,
        validation_psnr_db=checkpoint.metrics.get("psnr"),
        trained_on=str(dataset.get("digest") or ""),
        training=tuple(
            (name, f"{value}")
            for name, value in sorted((flat(training) | {"updates_done": steps}).items())
        ),
        paper_row=row_of(checkpoint),
    )


def bicubic(scale: int) -> Entrant:
    """Bicubic interpolation as an entrant."""
    return Entrant(
        key="bicubic",
        scale=scale,
        checkpoint=None,
        checkpoint_hash="",
        seed=None,
        variant="",
        architecture="",
        settings="",
        recipe="bicubic",
        steps=None,
        planned_steps=None,
        best_step=None,
        validation_psnr_db=None,
        trained_on="",
        paper_row="bicubic",
    )


def stretches(num_tiles: int, *, max_tiles: int | None) -> list[Stretch]:
    """The tiles that are scored, in stretches."""
    count = num_tiles if max_tiles is None else min(num_tiles, max_tiles)
    chosen = np.unique(np.linspace(0, num_tiles - 1, count).round().astype(np.int64))
    tiles = chosen.tolist()
    return [
        Stretch(tiles=tuple(tiles[start : start + TILES_PER_STRETCH]))
        for start in range(0, len(tiles), TILES_PER_STRETCH)
    ]


def read_tiles(dataset: BcsrDataset, split: str, tiles: Sequence[int]) -> Iterator[tuple[Row, Rgb]]:
    """Some tiles of a split by their numbers, ascending, each with its row.

    Where the dataset was split by a pattern of slide names, `slide` is what that finds: pictures
    of one patient are not independent, whatever their files are called.

    Raises:
        DatasetError: a shard or a tile is damaged.
    """
    rows = dataset.table(split)
    select = dataset.manifest.get("config", {}).get("select", {})
    wanted = set(tiles)
    for group in dataset.groups(split):
        numbers = [n for n in range(group.first, group.first + group.count) if n in wanted]
        if not numbers:
            continue
        pixels = group_tiles(group)
        for number in numbers:
            (row,) = rows.slice(number, 1).to_pylist()
            row["slide"] = group_of(row["slide"], select.get("group_regex"))
            yield row, pixels[number - group.first]


# ------------------------------------------------------------------------------------ the parts


def model_of(entrant: Entrant, device: str) -> nn.Module:
    """The network, in evaluation mode on a device; the last few are kept at hand.

    Raises:
        CheckpointError: its weights are damaged or gone.
    """
    return _model(entrant.key, entrant.scale, entrant.checkpoint, entrant.checkpoint_hash, device)


@functools.lru_cache(maxsize=MAX_MODELS)
def _model(
    key: ModelName, scale: int, checkpoint: str | None, _hash: str, device: str
) -> nn.Module:
    if checkpoint is None:
        return build_model(key, scale=scale).eval().to(device)
    return load_model(checkpoint, device=device, expect_scale=scale)


@functools.lru_cache(maxsize=2)
def _lpips(paths: tuple[str, str], device: str) -> Lpips:
    return load_lpips(alexnet=paths[0], linear=paths[1]).to(torch.device(device))


def score_uri(output: str, entrant: Entrant, stretch: Stretch, *, measure: str) -> str:
    """Where the scores of an entrant on a stretch are kept; `measure` is its digest."""
    name = _digest([entrant.key, entrant.scale, entrant.checkpoint_hash, measure])
    return storage.join(output, "scores", f"{name}-{stretch.name}.parquet")


def score_stretch(
    entrant: Entrant, dataset: BcsrDataset, stretch: Stretch, *, measure: Measure, device: str
) -> bytes:
    """The scores of an entrant on a stretch, as a Parquet file of SCORES.

    Raises:
        CarnError, ValueError: weights or tiles are damaged, or memory does not suffice.
    """
    table = score_tiles(
        model_of(entrant, device),
        read_tiles(dataset, measure.split, stretch.tiles),
        scale=entrant.scale,
        protocol=measure.protocol,
        way=measure.way,
        lpips=None if measure.lpips is None else _lpips(measure.lpips, device),
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def read_scores(uri: str) -> pa.Table | None:
    """Scores that were kept; None where there are none."""
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)), schema=SCORES)
    except MissingObjectError:
        return None
    except pa.ArrowInvalid:  # written by half, on a disk that was full
        return None


def timing_uri(
    output: str, entrant: Entrant, *, machine: str, repeats: int, max_seconds: float
) -> str:
    """Where the timing of an entrant on a kind of machine is kept, with so much care."""
    network = [entrant.key, entrant.scale, entrant.architecture]
    name = _digest([*network, machine, repeats, max_seconds, code_version()])
    return storage.join(output, "timings", f"{name}.json")


def time_entrant(entrant: Entrant, *, device: str, repeats: int, max_seconds: float) -> bytes:
    """How long an entrant takes for the paper's image of 1024 HR px, as JSON."""
    timing = time_model(
        model_of(entrant, device),
        scale=entrant.scale,
        lr_px=paper_lr_px(entrant.scale),
        device=device,
        repeats=repeats,
        max_seconds=max_seconds,
    )
    return json.dumps(asdict(timing)).encode()


def read_took(output: str) -> tuple[float, str]:
    """Seconds that an evaluation took so far, and on what machine; 0 where nothing is known."""
    try:
        content = json.loads(storage.read_bytes(storage.join(output, TOOK)))
        return float(content["seconds"]), str(content["machine"])
    except (MissingObjectError, ValueError, KeyError, TypeError):
        return 0.0, ""


def note_took(output: str, *, seconds: float, machine: str) -> None:
    """Keep how long an evaluation took so far.

    Raises:
        AccessDeniedError, StorageError: it cannot be written.
    """
    text = json.dumps({"seconds": round(seconds, 1), "machine": machine}) + "\n"
    storage.write_bytes(storage.join(output, TOOK), text.encode())


def read_timing(uri: str) -> Timing | None:
    """A timing that was kept; None where there is none."""
    try:
        content = json.loads(storage.read_bytes(uri))
    except MissingObjectError:
        return None
    content["lr_px"] = tuple(content["lr_px"])
    content["seconds_iqr"] = tuple(content["seconds_iqr"])
    return Timing(**content)


def judged(entrants: Mapping[str, Entrant]) -> list[str]:
    """The names of those whose differences decide which crops are shown.

    Bicubic interpolation differs most from whatever is trained, everywhere: it counts only where
    there are no two networks.
    """
    trained = [name for name, entrant in entrants.items() if entrant.checkpoint is not None]
    return trained if len(trained) > 1 else list(entrants)


def crop_uri(output: str, entrants: Mapping[str, Entrant], tile: int, *, measure: str) -> str:
    """Where the crop of a tile by some entrants is kept."""
    facts = {name: entrant.checkpoint_hash for name, entrant in entrants.items()}
    scale = next(iter(entrants.values())).scale
    name = _digest([facts, scale, measure])
    return storage.join(output, "crops", f"{name}-{tile}.json")


def cut_crop(
    entrants: Mapping[str, Entrant],
    dataset: BcsrDataset,
    tile: int,
    *,
    measure: Measure,
    device: str,
) -> bytes:
    """The place of a tile where networks differ most, as JSON with PNGs; see `judged`."""
    ((row, hr),) = read_tiles(dataset, measure.split, [tile])
    scale = next(iter(entrants.values())).scale
    models = {name: model_of(entrant, device) for name, entrant in entrants.items()}
    strip = crop_strip(
        models,
        row,
        hr,
        scale=scale,
        protocol=measure.protocol,
        way=measure.way,
        judged=judged(entrants),
    )
    pictures = [
        [name, base64.b64encode(png).decode(), psnr_db] for name, png, psnr_db in strip.pictures
    ]
    return json.dumps({**asdict(strip), "pictures": pictures}).encode()


def read_crop(uri: str) -> CropStrip | None:
    """A crop that was kept; None where there is none."""
    try:
        content = json.loads(storage.read_bytes(uri))
    except MissingObjectError:
        return None
    content["pictures"] = tuple(
        (name, base64.b64decode(png), psnr_db) for name, png, psnr_db in content["pictures"]
    )
    return CropStrip(**content)


def find_removed(dataset: BcsrDataset, removed: BcsrDataset) -> tuple[list[int], int]:
    """Test tiles of a second dataset that a network trained on the first has not seen.

    That is: none that the first has in any of its splits, and none of a slide (or of whatever its
    split kept together) that it has in training or validation, whose tissue the network knows.
    The second dataset was split by itself, so its test slides may be among them. Where the first
    was split at random, its own test tiles are of such slides, too, and these are kept.

    Returns:
        Their numbers, ascending, and how many others were left out for their slides.
    """
    select = dataset.manifest.get("config", {}).get("select", {})
    regex = select.get("group_regex")
    tables = {split: dataset.table(split) for split in ("train", "validation", "test")}
    known = {tile_id for table in tables.values() for tile_id in table["tile_id"].to_pylist()}
    seen = {
        group_of(slide, regex)
        for split in ("train", "validation")
        for slide in tables[split]["slide"].to_pylist()
    }
    if is_split_at_random(dataset):
        seen = set()
    rows = removed.table("test").select(["tile_id", "slide"]).to_pylist()
    others = [number for number, row in enumerate(rows) if row["tile_id"] not in known]
    unseen = [number for number in others if group_of(rows[number]["slide"], regex) not in seen]
    return unseen, len(others) - len(unseen)


def is_split_at_random(dataset: BcsrDataset) -> bool:
    """Whether tiles of one slide may be on several sides of its split, as in the paper."""
    split: str | None = dataset.manifest.get("config", {}).get("select", {}).get("split")
    return split == "paper"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
