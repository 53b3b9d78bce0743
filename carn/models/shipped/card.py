"""What a model card shows of a network that comes with the project: scores by source, and crops.

Scores are those of `jobs/evaluate.py`; images those of `python -m carn.models.shipped images`,
whose names say which source they are of.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from carn.bcsr.degradation import degrade
from carn.errors import DatasetError
from carn.metrics import to_uint8
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.models.checkpoint import load_model

BASELINE = "bicubic"
# `<order>_<split>_<source>_<image>`, as `prepare_images` calls them; the split and the source.
_NAMED = re.compile(r"\d_((?:validation|test)_[a-z0-9-]+)_")

CROP_PX = 96
ZOOM = 3
_GAP_PX = 8
_TITLE_PX = 22
# An image's border, where networks see less than all around a pixel, is not what is shown.
_BORDER_PX = 16


def gains_by_source(scores: pd.DataFrame) -> pd.DataFrame:
    """Every score with its split and source, and its gain over bicubic interpolation of that image.

    Args:
        scores: rows of an evaluation's `scores.parquet`, of one scale.

    Returns:
        The rows with the columns `source` (such as `test camelyon16`) and `gain_db`.

    Raises:
        DatasetError: an image is not called as a recipe's are, or bicubic was not scored.
    """
    names = scores["slide"].str.extract(_NAMED, expand=False)
    if names.isna().any():
        raise DatasetError(
            f"{scores['slide'][names.isna()].iloc[0]} is not the name of an image of a recipe; "
            "evaluate what `python -m carn.models.shipped images` made"
        )
    if scores["scale"].nunique() != 1:
        raise DatasetError("the evaluation is of more than one scale; evaluate one at a time")
    baseline = scores[scores["key"] == BASELINE].set_index("tile_id")["psnr_db"]
    if not set(scores["tile_id"]) <= set(baseline.index):
        raise DatasetError("the evaluation has no scores of bicubic interpolation for some images")
    gains = scores["psnr_db"] - scores["tile_id"].map(baseline)
    return scores.assign(source=names.str.replace("_", " ", n=1), gain_db=gains)


def scores_table(scores: pd.DataFrame) -> str:
    """Scores as a table in Markdown: a row for each source and network.

    Args:
        scores: rows of an evaluation's `scores.parquet`, of one scale.

    Raises:
        DatasetError: as `gains_by_source`.
    """
    lines = [
        "| source | images | network | PSNR, dB | SSIM | gain, dB | least to most | deviation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    gains = gains_by_source(scores)
    for source, of_source in gains.groupby("source", sort=True):
        for key, rows in of_source.groupby("key", sort=False):
            line = [source, len(rows), key, f"{rows.psnr_db.mean():.2f}", f"{rows.ssim.mean():.4f}"]
            if key == BASELINE:
                line += ["", "", ""]
            else:
                least, most = rows.gain_db.min(), rows.gain_db.max()
                spread = f"{rows.gain_db.std():.2f}" if len(rows) > 1 else ""
                line += [f"{rows.gain_db.mean():+.2f}", f"{least:+.2f} to {most:+.2f}", spread]
            lines.append("| " + " | ".join(map(str, line)) + " |")
    return "\n".join(lines)


def typical_images(scores: pd.DataFrame, key: str) -> dict[str, str]:
    """The image of each source on which a network gains the median, by source.

    Args:
        scores: rows of an evaluation's `scores.parquet`, of one scale.
        key: the network's key in them.

    Raises:
        DatasetError: as `gains_by_source`, or the network was not evaluated.
    """
    gains = gains_by_source(scores)
    rows = gains[gains["key"] == key].sort_values(["gain_db", "slide"])
    if rows.empty:
        raise DatasetError(f"the evaluation has no scores of {key}")
    return {
        source: of_source["slide"].iloc[(len(of_source) - 1) // 2]
        for source, of_source in rows.groupby("source", sort=True)
    }


def crops_figure(name: str, images: Path, scores: pd.DataFrame) -> Image.Image:
    """Crops side by side: LR enlarged by interpolation, SR, HR.

    Of each test source the image of the median gain, at its place of most detail: nothing is
    chosen for how well it came out.

    Args:
        name: of the network.
        images: what `python -m carn.models.shipped images` made.
        scores: rows of an evaluation's `scores.parquet`, of the network's scale.

    Raises:
        CheckpointError: there is no such network.
        DatasetError: as `typical_images`, or an image is missing.
    """
    network = load_model(name)
    scale = int(network.scale)
    bicubic = Bicubic(BicubicConfig(), scale=scale)
    rows = []
    for source, image in typical_images(scores, name.partition("-")[0]).items():
        split, _, folder = source.partition(" ")
        if split != "test":
            continue
        path = images / split / folder / f"{image}.png"
        if not path.is_file():
            raise DatasetError(f"{path} is missing; name the folder of the recipe's images")
        with Image.open(path) as opened:
            hr = np.asarray(opened.convert("RGB"))
        hr = hr[: hr.shape[0] // scale * scale, : hr.shape[1] // scale * scale]
        lr = torch.from_numpy(degrade(hr, scale=scale)).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            sr = [to_uint8(model(lr))[0].permute(1, 2, 0).numpy() for model in (bicubic, network)]
        y, x = most_detailed(hr)
        rows.append([pixels[y : y + CROP_PX, x : x + CROP_PX] for pixels in (*sr, hr)])
    return _side_by_side(rows, [f"{40 // scale}x, enlarged by interpolation", name, "40x"])


def most_detailed(pixels: UInt8[np.ndarray, "h w 3"]) -> tuple[int, int]:
    """Top-left corner (y, x) of the crop whose neighbouring pixels differ most."""
    steps = np.abs(np.diff(pixels.astype(float).mean(axis=2), axis=1))

    def corners() -> Iterator[tuple[float, int, int]]:
        for y in range(_BORDER_PX, pixels.shape[0] - CROP_PX - _BORDER_PX + 1, _BORDER_PX):
            for x in range(_BORDER_PX, pixels.shape[1] - CROP_PX - _BORDER_PX + 1, _BORDER_PX):
                yield float(steps[y : y + CROP_PX, x : x + CROP_PX - 1].mean()), -y, -x

    _, y, x = max(corners())
    return -y, -x


def _side_by_side(rows: list[list[UInt8[np.ndarray, "h w 3"]]], titles: list[str]) -> Image.Image:
    step = CROP_PX * ZOOM + _GAP_PX
    size = (len(titles) * step + _GAP_PX, len(rows) * step + _GAP_PX + _TITLE_PX)
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)
    font = ImageFont.load_default(15)
    for column, title in enumerate(titles):
        draw.text((_GAP_PX + column * step, 3), title, fill="black", font=font)
        for row, crops in enumerate(rows):
            crop = Image.fromarray(crops[column])
            crop = crop.resize((CROP_PX * ZOOM,) * 2, Image.Resampling.NEAREST)
            figure.paste(crop, (_GAP_PX + column * step, _TITLE_PX + _GAP_PX + row * step))
    return figure
