"""An evaluation in parts that any process can do, and that need no doing again: who is scored, on
which tiles, and what is kept of it.

    scores/<digest>-<tiles>.parquet    one entrant on one stretch of tiles
    timings/<digest>.json              one entrant on one machine
    crops/<digest>-<number>.json       one crop of all entrants of a scale
    scores.parquet, table2.csv, significance.csv, timings.csv, summary.json, report.html
"""

import base64
import functools
import hashlib
import io
import json
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
from carn.errors import CheckpointError, MissingObjectError
from carn.evaluation.crops import CropStrip, crop_strip
from carn.evaluation.lpips import Lpips, load_lpips
from carn.evaluation.scoring import SCORES, Protocol, score_tiles
from carn.evaluation.timing import Timing, paper_lr_px, time_model
from carn.models.checkpoint import Checkpoint, checkpoint_hash, load_model, read_checkpoint
from carn.models.table import MODELS, ModelName, build_model
from carn.slides.slide import Rgb
from carn.training.recipes import flat
from carn.version import code_version

# Tiles that are scored at a stretch: what is lost when a process is.
TILES_PER_STRETCH = 8
BEST = "best.json"
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
        steps: updates that it was trained for.
        trained_on: digest of its dataset.
        training: settings of its training by name, as text.
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
    trained_on: str
    training: tuple[tuple[str, str], ...] = ()

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
    """

    dataset: str
    split: str
    protocol: Protocol
    max_tiles: int | None
    lpips: tuple[str, str] | None

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


def find_entrants(uris: Sequence[str]) -> list[Entrant]:
    """The networks that runs, checkpoints and folders of runs hold.

    Args:
        uris: each a run's folder (its best checkpoint counts), a checkpoint, a weights file, or a
            folder whose folders are runs.

    Raises:
        CheckpointError: one holds none.
        ValueError: the same weights twice.
    """
    entrants = []
    for uri in uris:
        places = _runs_of(storage.normalize(uri).rstrip("/"))
        entrants += [_entrant(read_checkpoint(place)) for place in places]
    seen: dict[str, str] = {}
    for entrant in entrants:
        if entrant.checkpoint_hash in seen:
            raise ValueError(
                f"{entrant.checkpoint} and {seen[entrant.checkpoint_hash]} are the same weights; "
                "name each once"
            )
        seen[entrant.checkpoint_hash] = str(entrant.checkpoint)
    return entrants


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


def _entrant(checkpoint: Checkpoint) -> Entrant:
    training = dict(checkpoint.training or {})
    seed = training.pop("seed", None)
    loss = (training.get("loss") or {}).get("loss")
    key: Any = checkpoint.model_name
    defaults = MODELS[key].config()
    changed = [
        f"{name}={value}"
        for name, value in checkpoint.model_config.items()
        if name in ("num_blocks", "channels", "reduction")
        and value != getattr(defaults, name, value)
    ]
    dataset = dict(checkpoint.dataset or {})
    recipe = {
        "training": training,
        "config": {k: v for k, v in checkpoint.model_config.items() if k != "mean"},
        "dataset": dataset.get("digest"),
        # Weights from elsewhere say nothing of how they came about.
        "weights": None if training else checkpoint.weights_sha256,
    }
    return Entrant(
        key=checkpoint.model_name,
        scale=checkpoint.scale,
        checkpoint=checkpoint.uri,
        checkpoint_hash=checkpoint_hash(checkpoint),
        seed=None if seed is None else int(seed),
        variant="MSE" if checkpoint.model_name == "carn" and loss == "mse" else "",
        architecture=", ".join(changed),
        settings=", ".join(changed),
        recipe=_digest(recipe),
        steps=checkpoint.step,
        trained_on=str(dataset.get("digest") or ""),
        training=tuple((name, f"{value}") for name, value in sorted(flat(training).items())),
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
        trained_on="",
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


def timing_uri(output: str, entrant: Entrant, *, machine: str) -> str:
    """Where the timing of an entrant on a kind of machine is kept."""
    name = _digest([entrant.key, entrant.scale, entrant.architecture, machine, code_version()])
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


def read_timing(uri: str) -> Timing | None:
    """A timing that was kept; None where there is none."""
    try:
        content = json.loads(storage.read_bytes(uri))
    except MissingObjectError:
        return None
    content["lr_px"] = tuple(content["lr_px"])
    content["seconds_iqr"] = tuple(content["seconds_iqr"])
    return Timing(**content)


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
    """The place of a tile where entrants differ most, as JSON with PNGs."""
    ((row, hr),) = read_tiles(dataset, measure.split, [tile])
    scale = next(iter(entrants.values())).scale
    models = {name: model_of(entrant, device) for name, entrant in entrants.items()}
    strip = crop_strip(models, row, hr, scale=scale, protocol=measure.protocol)
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


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
