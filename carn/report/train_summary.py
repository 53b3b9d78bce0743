"""From a training run's folder to its report page; at any time, of a finished run or a running one.

`python -m carn.report.train_summary RUN` writes it.
"""

import io
import logging
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import nn

from carn import storage
from carn.bcsr.dataset import open_dataset
from carn.errors import CarnError, RunError
from carn.metrics import psnr
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.models.checkpoint import Checkpoint, load_model, read_checkpoint
from carn.models.cost import count_parameters
from carn.models.table import MODELS
from carn.report.train_report import CropRow, Curve, TrainReport, render
from carn.slides.slide import Rgb
from carn.training.config import TrainConfig
from carn.training.group import WorkerGroup
from carn.training.recipes import with_values
from carn.training.recording import Row, loss_terms, read_metrics
from carn.training.run_folder import CONFIG, RunFolder
from carn.training.tiles import load_tiles
from carn.training.validation import Scores, Validator, validation_maker

REPORT = "report.html"
# Crops in the report, in HR px: small enough to see single nuclei in.
NUM_CROPS = 4
CROP_PX = 96


def write_report(run_uri: str) -> str:
    """Write `report.html` of a run and return some lines that say what it came to.

    Raises:
        RunError: no training run is there, or it has no checkpoint yet.
        CarnError: its dataset or its checkpoints cannot be read.
    """
    run_uri = storage.normalize(run_uri)
    facts = RunFolder(uri=run_uri, keep_checkpoints=1).facts()
    if facts is None:
        raise RunError(f"{run_uri} holds no training run: {CONFIG} is missing")
    rows = read_metrics(run_uri)
    best = storage.join(run_uri, "best.json")
    if not storage.is_file(best):
        raise RunError(f"{run_uri} has no checkpoint yet; there is nothing to show")
    checkpoint = read_checkpoint(best)
    report = _report(run_uri, facts, rows, checkpoint)
    uri = storage.join(run_uri, REPORT)
    storage.write_bytes(uri, render(report).encode())
    return _summary(report, checkpoint, uri)


def _report(
    run_uri: str, facts: dict[str, Any], rows: Sequence[Row], checkpoint: Checkpoint
) -> TrainReport:
    model = load_model(checkpoint)
    look = _look(facts, model)
    config = facts["config"]
    terms = [name for name in loss_terms(rows) if name != "loss"]
    title = MODELS[config["network"]["model"]].title
    best_step = checkpoint.metrics.get("best_step")
    return TrainReport(
        title=f"{title} x{checkpoint.scale}",
        facts=_facts(run_uri, facts, rows, checkpoint, model),
        notices=(),
        loss_terms=tuple(_curve(rows, name) for name in ("loss", *terms)),
        validation_psnr=(_curve(rows, "validation_psnr", label=title),),
        validation_ssim=(_curve(rows, "validation_ssim", label=title),),
        bicubic_psnr=look.bicubic.mean_psnr if look else None,
        bicubic_ssim=look.bicubic.mean_ssim if look else None,
        best_step=None if best_step is None else int(best_step),
        learning_rate=_curve(rows, "learning_rate", label="learning rate"),
        images_per_s=_curve(rows, "images_per_s", label="images/s"),
        crops=look.crops if look else (),
        validation_table=look.table if look else (),
        convention=look.convention if look else "The dataset has no validation tiles.",
        config=config,
        conditions=look.conditions if look else (),
    )


def _facts(
    run_uri: str,
    facts: dict[str, Any],
    rows: Sequence[Row],
    checkpoint: Checkpoint,
    model: nn.Module,
) -> dict[str, str]:
    config = facts["config"]
    patches = config["patches"]
    last = rows[-1] if rows else {}
    images = last.get("step", 0) * patches["batch_size"]
    seconds = last.get("seconds", 0.0)
    return {
        "Run": run_uri,
        "Dataset": str(facts["dataset"]["uri"]),
        "Checkpoint": f"update {checkpoint.step:,}, sha256 {checkpoint.weights_sha256[:16]}",
        "Parameters": f"{count_parameters(model):,}",
        "Updates": f"{int(last.get('step', 0)):,} of {config['steps']:,}",
        "Batch": f"{patches['batch_size']} patches of {patches['patch_px']} px HR",
        "Time in updates": _hours(seconds),
        "Throughput": f"{images / seconds:.1f} images/s" if seconds else "–",
        "Code": str(facts["code_version"]),
    }


def _hours(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour} h {minute:02d} min {second:02d} s"


def _curve(rows: Sequence[Row], name: str, *, label: str | None = None) -> Curve:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return Curve(
        label=label or name,
        steps=np.array([int(step) for step, _ in points], dtype=np.int64),
        values=np.array([value for _, value in points], dtype=np.float64),
    )


# ------------------------------------------------------------------------------------ the tiles


class _Look:
    """The checkpoint on the validation tiles, beside bicubic."""

    def __init__(self, validator: Validator, model: nn.Module, *, scale: int) -> None:
        device = torch.device("cpu")
        bicubic = Bicubic(BicubicConfig(), scale=scale)
        self.convention = validator.convention
        self.bicubic = validator.score(bicubic, device)
        scores = validator.score(model, device)
        self.table = _table(validator.tile_ids, self.bicubic, scores)
        theirs = validator.by_condition(self.bicubic)
        self.conditions = tuple(
            (name, theirs[name].mean_psnr, ours.mean_psnr, theirs[name].mean_ssim, ours.mean_ssim)
            for name, ours in validator.by_condition(scores).items()
        )
        gains = scores.psnr - self.bicubic.psnr
        chosen = _spread(gains)
        self.crops = tuple(
            _crop_row(validator, index, bicubic, model, scale=scale, gain=float(gains[index]))
            for index in chosen
        )


def _look(facts: dict[str, Any], model: nn.Module) -> _Look | None:
    dataset = open_dataset(facts["dataset"]["uri"])
    if not dataset.num_tiles("validation"):
        return None
    scale = int(facts["config"]["network"]["scale"])
    config = with_values(TrainConfig(), facts["config"])
    maker = validation_maker(config)
    store = load_tiles(dataset, split="validation", scale=scale, maker=maker)
    validator = Validator(store, config.validation, group=WorkerGroup())
    return _Look(validator, model, scale=scale)


def _table(
    tile_ids: Sequence[str], bicubic: Scores, sr: Scores
) -> tuple[tuple[str, float, float, float, float], ...]:
    numbers = zip(bicubic.psnr, sr.psnr, bicubic.ssim, sr.ssim, strict=True)
    return tuple(
        (tile_id, *map(float, row))  # type: ignore[misc]
        for tile_id, row in zip(tile_ids, numbers, strict=True)
    )


def _spread(gains: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """Tiles from the least gain to the largest, evenly: a report of the best ones would flatter."""
    order = np.argsort(gains, kind="stable")
    places = np.linspace(0, len(order) - 1, min(NUM_CROPS, len(order))).round().astype(int)
    return [int(order[place]) for place in places]


def _crop_row(
    validator: Validator,
    index: int,
    bicubic: nn.Module,
    model: nn.Module,
    *,
    scale: int,
    gain: float,
) -> CropRow:
    device = torch.device("cpu")
    lr, hr = validator.crop(index)
    pictures = {
        "LR": lr,
        "bicubic": validator.upscale(bicubic, index, device),
        "SR": validator.upscale(model.eval(), index, device),
        "HR": hr,
    }
    side = min(CROP_PX, *hr.shape[:2]) // scale * scale
    top, left = _busiest(hr, side=side, scale=scale)
    cut = {}
    target = hr[top : top + side, left : left + side]
    for name, pixels in pictures.items():
        zoom = scale if name == "LR" else 1
        rows = slice(top // zoom, (top + side) // zoom)
        part = pixels[rows, left // zoom : (left + side) // zoom]
        has_score = name in ("bicubic", "SR")
        score = f" {float(psnr(_tensor(part), _tensor(target))):.2f} dB" if has_score else ""
        cut[name + score] = _png(part)
    return CropRow(
        title=validator.tile_ids[index],
        detail=f"{gain:+.2f} dB over bicubic on the tile; {side} px of it at ({left}, {top})",
        images=tuple(cut.items()),
    )


def _busiest(hr: Rgb, *, side: int, scale: int) -> tuple[int, int]:
    """Top-left corner of the part with the most contrast, on the grid of LR px."""
    height, width = hr.shape[:2]
    grey = hr.astype(np.float32).mean(axis=2)
    step = max(scale, side // 2 // scale * scale)
    corners = [
        (top, left)
        for top in range(0, max(1, height - side + 1), step)
        for left in range(0, max(1, width - side + 1), step)
    ]
    return max(corners, key=lambda at: grey[at[0] : at[0] + side, at[1] : at[1] + side].std())


def _tensor(pixels: Rgb) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]


def _png(pixels: Rgb) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _summary(report: TrainReport, checkpoint: Checkpoint, uri: str) -> str:
    lines = [f"{report.title} after {checkpoint.step:,} updates: {checkpoint.uri}"]
    psnr, ssim = (checkpoint.metrics.get(name) for name in ("best_psnr", "best_ssim"))
    if psnr is not None and ssim is not None and report.bicubic_psnr is not None:
        gain = psnr - report.bicubic_psnr
        lines.append(
            f"  validation PSNR {psnr:.2f} dB ({gain:+.2f} dB over bicubic), SSIM {ssim:.4f} "
            f"(bicubic {report.bicubic_ssim:.4f})"
        )
        lines.append(f"  {report.convention}")
    lines.append(f"  report {uri}")
    return "\n".join(lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    try:
        sys.stdout.write(tyro.cli(write_report, config=(tyro.conf.Positional,)) + "\n")
    except CarnError as error:
        sys.exit(f"train_summary: {error}")
