"""What a model card shows of a network that comes with the project: scores by source, and crops.

Scores are those of `jobs/evaluate.py`; images those of `python -m carn.models.shipped images`,
whose names say which source they are of.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from carn.degradation.conditions import DEFAULT
from carn.degradation.scanner import Degradation
from carn.errors import DatasetError
from carn.evaluation.crops import CROP_PX
from carn.evaluation.scoring import pair, super_resolve
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.models.checkpoint import load_model, read_checkpoint
from carn.models.shipped.recipe import read_rgb

BASELINE = "bicubic"
(DEFAULT_NAME,) = DEFAULT
# `<order>_<split>_<source>_<image>`, as `prepare_images` calls them; the split and the source.
_NAMED = re.compile(r"\d_(validation|test)_([a-z0-9-]+)_")

ZOOM = 3
_GAP_PX = 8
_TITLE_PX = 22
# An image's border, where networks see less than all around a pixel, is not what is shown.
_BORDER_PX = 16


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a network did on one image under one condition.

    Attributes:
        source: split and source of the image, such as `test camelyon16`.
        image: its name.
        tile: that of the tile that it is in the evaluation's dataset.
        network: the name of a network that comes with the project, or else the model's.
        psnr_db, ssim: in RGB.
        gain_db: PSNR over that of bicubic interpolation of the same LR.
        condition: the name of the way that LR was made in.
    """

    source: str
    image: str
    tile: str
    network: str
    psnr_db: float
    ssim: float
    gain_db: float
    condition: str


def read_scores(rows: Sequence[Mapping[str, Any]], name: str) -> list[Score]:
    """Sort scores by image: of bicubic interpolation first, then the network's, then others'.

    Args:
        rows: those of an evaluation's `scores.parquet`; of one that knew no conditions, they are of
            bicubic LR.
        name: the network whose card it is; the evaluation must have it.

    Raises:
        CheckpointError: there is no such network.
        DatasetError: the evaluation lacks it or bicubic interpolation, is of another scale, has two
            networks that would have one name, or an image that is not called as a recipe's are.
    """
    checkpoint = read_checkpoint(name)
    if scales := sorted({row["scale"] for row in rows} - {checkpoint.scale}):
        raise DatasetError(f"the evaluation is of x{scales[0]}; {name} is x{checkpoint.scale}")
    names: dict[str, str] = {}
    for row in rows:
        is_ours = row["checkpoint"] == checkpoint.uri
        called = name if is_ours else row["key"]
        if names.setdefault(called, row["checkpoint"]) != row["checkpoint"]:
            raise DatasetError(
                f"the evaluation has two networks called {called}: {names[called]} and "
                f"{row['checkpoint']}; evaluate without one of them"
            )
    if missing := {BASELINE, name} - names.keys():
        raise DatasetError(f"the evaluation has no scores of {' and '.join(sorted(missing))}")
    order = [BASELINE, name, *sorted(names.keys() - {BASELINE, name})]
    called_by = {checkpoint: called for called, checkpoint in names.items()}
    baseline = {
        (_condition_of(row), row["tile_id"]): row["psnr_db"]
        for row in rows
        if row["key"] == BASELINE
    }
    conditions = list(dict.fromkeys(_condition_of(row) for row in rows))
    if missing := {_condition_of(row) for row in rows} - {condition for condition, _ in baseline}:
        raise DatasetError(
            f"the evaluation has no scores of {BASELINE} under {', '.join(sorted(missing))}"
        )
    scores = [
        Score(
            source=_source_of(row["slide"]),
            image=row["slide"],
            tile=row["tile_id"],
            network=called_by[row["checkpoint"]],
            psnr_db=row["psnr_db"],
            ssim=row["ssim"],
            gain_db=row["psnr_db"] - baseline[_condition_of(row), row["tile_id"]],
            condition=_condition_of(row),
        )
        for row in rows
    ]
    return sorted(
        scores,
        key=lambda row: (
            row.source,
            order.index(row.network),
            conditions.index(row.condition),
            row.image,
        ),
    )


def _condition_of(row: Mapping[str, Any]) -> str:
    return str(row.get("condition", DEFAULT_NAME))


def _source_of(image: str) -> str:
    found = _NAMED.match(image)
    if found is None:
        raise DatasetError(
            f"{image} is not the name of an image that `python -m carn.models.shipped images` made "
            "for testing or validation; evaluate those"
        )
    return " ".join(found.groups())


def scores_table(scores: Iterable[Score]) -> str:
    """Write scores as a table in Markdown: a row for each source and network.

    Of an evaluation under several conditions, a column for each: the mean PSNR of bicubic
    interpolation and the mean gains of networks over it, dB.

    Args:
        scores: as `read_scores` gives them.
    """
    scores = list(scores)
    conditions = list(dict.fromkeys(row.condition for row in scores))
    if len(conditions) > 1:
        return _conditions_table(scores, conditions)
    lines = [
        "| source | images | network | PSNR, dB | SSIM | gain, dB | least to most | deviation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (source, network), group in groupby(scores, key=lambda row: (row.source, row.network)):
        rows = list(group)
        psnr_db, ssim, gain_db = (
            np.array([getattr(row, field) for row in rows])
            for field in ("psnr_db", "ssim", "gain_db")
        )
        line = [source, str(len(rows)), network, f"{psnr_db.mean():.2f}", f"{ssim.mean():.4f}"]
        if network == BASELINE:
            line += ["", "", ""]
        else:
            spread = f"{gain_db.std(ddof=1):.2f}" if len(rows) > 1 else ""
            line += [
                f"{gain_db.mean():+.2f}",
                f"{gain_db.min():+.2f} to {gain_db.max():+.2f}",
                spread,
            ]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _conditions_table(scores: Sequence[Score], conditions: Sequence[str]) -> str:
    lines = [
        "| " + " | ".join(["source", "images", "network", *conditions]) + " |",
        "|---" * (3 + len(conditions)) + "|",
    ]
    for (source, network), group in groupby(scores, key=lambda row: (row.source, row.network)):
        rows = list(group)
        is_baseline = network == BASELINE
        count = len({row.image for row in rows})
        line = [source, str(count), f"{network}, {'PSNR' if is_baseline else 'gain'} in dB"]
        for condition in conditions:
            found = [
                row.psnr_db if is_baseline else row.gain_db
                for row in rows
                if row.condition == condition
            ]
            # An evaluation may lack a part that failed.
            text = f"{np.mean(found):{'.2f' if is_baseline else '+.2f'}}" if found else ""
            line.append(text)
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def typical_images(
    scores: Iterable[Score], name: str, *, condition: str = DEFAULT_NAME
) -> dict[str, str]:
    """Find the image of each source on which a network gains the median (the lower of two).

    Args:
        scores: as `read_scores` gives them.
        name: the network's.
        condition: that of the gains.
    """
    ours = [row for row in scores if row.network == name and row.condition == condition]
    typical = {}
    for source, group in groupby(ours, key=lambda row: row.source):
        rows = sorted(group, key=lambda row: (row.gain_db, row.image))
        typical[source] = rows[(len(rows) - 1) // 2].image
    return typical


def crops_figure(
    name: str,
    images: Path,
    scores: Iterable[Score],
    *,
    condition: str = DEFAULT_NAME,
    way: Degradation = DEFAULT[DEFAULT_NAME],
) -> Image.Image:
    """Draw crops side by side: LR enlarged by interpolation, SR, HR.

    Of each test source the image of the median gain, at its place of most detail: nothing is
    chosen for how well it came out.

    Args:
        name: of the network.
        images: what `python -m carn.models.shipped images` made.
        scores: as `read_scores` gives them.
        condition: the name of the way to make LR, which the evaluation must have.
        way: that way.

    Raises:
        DatasetError: an image is missing or too small, no source is of the test split, or there are
            no scores under the condition.
    """
    scores = list(scores)
    known = dict.fromkeys(row.condition for row in scores if row.network == name)
    if condition not in known:
        raise DatasetError(
            f"the evaluation has no scores of {name} under {condition}; name one of "
            f"{', '.join(known)}, or evaluate under it"
        )
    tiles = {row.image: row.tile for row in scores}
    checkpoint = read_checkpoint(name)
    scale = checkpoint.scale
    models = (Bicubic(BicubicConfig(), scale=scale), load_model(checkpoint))
    rows: dict[str, list[UInt8[np.ndarray, "h w 3"]]] = {}
    for source, image in typical_images(scores, name, condition=condition).items():
        split, folder = source.split()
        if split != "test":
            continue
        lr, hr = pair(
            _read(images / split / folder / f"{image}.png"),
            scale=scale,
            protocol="aligned",
            way=way,
            tile=tiles[image],
        )
        sr = [
            super_resolve(model, lr, scale=scale, name=image)[0].permute(1, 2, 0).numpy()
            for model in models
        ]
        y, x = most_detailed(hr)
        rows[folder] = [pixels[y : y + CROP_PX, x : x + CROP_PX] for pixels in (*sr, hr)]
    if not rows:
        raise DatasetError("the evaluation has no test images")
    title = "LR, enlarged by interpolation"
    if condition != DEFAULT_NAME:
        title = f"LR of {condition}, interpolated"
    return _side_by_side(rows, [title, name, "HR"])


def _read(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing; name the folder of the recipe's images")
    pixels = read_rgb(path)
    if min(pixels.shape[:2]) < CROP_PX + 2 * _BORDER_PX:
        raise DatasetError(f"{path} is too small for a crop of {CROP_PX} px")
    return pixels


def most_detailed(pixels: UInt8[np.ndarray, "h w 3"]) -> tuple[int, int]:
    """Top-left corner (y, x) of the crop whose neighbouring pixels differ most."""
    steps = np.abs(np.diff(pixels.astype(float).mean(axis=2), axis=1))
    ends = [side - CROP_PX - _BORDER_PX + 1 for side in pixels.shape[:2]]
    corners = [
        (y, x)
        for y in range(_BORDER_PX, max(ends[0], _BORDER_PX + 1), _BORDER_PX)
        for x in range(_BORDER_PX, max(ends[1], _BORDER_PX + 1), _BORDER_PX)
    ]
    return max(
        corners,
        key=lambda at: steps[at[0] : at[0] + CROP_PX, at[1] : at[1] + CROP_PX - 1].mean(),
    )


def _side_by_side(
    rows: Mapping[str, list[UInt8[np.ndarray, "h w 3"]]], titles: Sequence[str]
) -> Image.Image:
    """Rows of crops, each below its title, with the titles of the columns on top."""
    side = CROP_PX * ZOOM
    height = _TITLE_PX + side + _GAP_PX
    size = (len(titles) * (side + _GAP_PX) + _GAP_PX, _TITLE_PX + len(rows) * height)
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)
    font = ImageFont.load_default(15)
    for column, title in enumerate(titles):
        left = _GAP_PX + column * (side + _GAP_PX)
        draw.text((left, 3), title, fill="black", font=font)
        for number, (row, crops) in enumerate(rows.items()):
            top = _TITLE_PX + number * height
            if column == 0:
                draw.text((left, top + 3), row, fill="#666666", font=font)
            crop = Image.fromarray(crops[column]).resize((side, side), Image.Resampling.NEAREST)
            figure.paste(crop, (left, top + _TITLE_PX))
    return figure
