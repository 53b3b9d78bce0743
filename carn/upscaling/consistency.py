"""Whether SR, made small again, is the LR it was made from: what a network invents shows here.

A result that agrees is not thereby right (LR leaves much open), one that does not is wrong. The map
is a mean squared error per cell of CONSISTENCY_CELL_PX LR px on a grid that starts at the slide's
top-left corner.

Source: the LR-PSNR of Lugmayr et al., "SRFlow: learning the super-resolution space with normalizing
flow", section 5, https://arxiv.org/abs/2006.14200.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from carn.slides.slide import Rgb
from carn.upscaling.lr_view import Box

CONSISTENCY_CELL_PX = 64
# LR px at the border between blocks that are left out: there the kernel, which reaches 2 LR px, and
# the block's cut, which need not fall between LR px, would want the neighbour's pixels.
RIM_PX = 4
# Equal images have no finite PSNR; maps show and store this.
BEST_DB = 100.0
# Range of the colours of a heat map in dB: below, structure differs; above, roundings do.
HEAT_RANGE_DB = (20.0, 60.0)
# Nothing was measured there.
UNKNOWN_GREY = 160


def resized(pixels: Rgb, *, width: int, height: int) -> Rgb:
    """Pixels at another size by antialiased bicubic interpolation (a = -0.5), in 8-bit steps.

    The kernel of `carn.degradation` and of `carn.models.bicubic`. It rounds and clips between
    its two passes: on tissue it meets their results within one grey level (making larger, in all
    but 2 px of 10,000), on noise of full contrast it does not. It takes a ninth of their time
    making smaller, and a quarter making larger.
    Source: R. Keys 1981, https://doi.org/10.1109/TASSP.1981.1163711.

    Args:
        pixels: (H, W, 3) uint8.
        width, height: of the result.
    """
    if not pixels.flags.writeable or not pixels.flags.c_contiguous:
        pixels = pixels.copy()  # torch takes no read-only arrays
    # As they lie, channels last: torch's vectorized way.
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    found = functional.interpolate(
        image, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return np.ascontiguousarray(found[0].permute(1, 2, 0).numpy())


def measured_box(sr_box: Box, *, extent_sr: tuple[int, int], scale: int) -> Box:
    """The LR px of a block whose consistency is measured: (x, y, width, height), maybe empty.

    Args:
        sr_box: the block, x, y, width, height in SR px.
        extent_sr: (width, height) of the slide in SR px, multiples of the scale.
        scale: SR px per LR px.
    """
    x0, x1 = _measured(sr_box[0], sr_box[0] + sr_box[2], extent_sr[0], scale)
    y0, y1 = _measured(sr_box[1], sr_box[1] + sr_box[3], extent_sr[1], scale)
    return x0, y0, max(0, x1 - x0), max(0, y1 - y0)


def _measured(start: int, stop: int, side: int, scale: int) -> tuple[int, int]:
    first = 0 if start == 0 else -(-start // scale) + RIM_PX
    last = side // scale if stop == side else stop // scale - RIM_PX
    return first, last


def cells_under(sr_box: Box, *, scale: int) -> Box:
    """The cells that a block has a share in: (first column, first row, columns, rows)."""
    x, y, width, height = sr_box
    side = CONSISTENCY_CELL_PX * scale
    column, row = x // side, y // side
    return column, row, -(-(x + width) // side) - column, -(-(y + height) // side) - row


def consistency(
    sr: Rgb,
    lr: Rgb,
    *,
    sr_box: Box,
    lr_corner: tuple[int, int],
    extent_sr: tuple[int, int],
    scale: int,
) -> NDArray[np.float32]:
    """Mean squared error per cell of a block's SR made small, against its LR.

    Over R, G and B on 0..255. Cells that the block holds in part are measured in part (see
    `measured_box`), and are NaN where it measures nothing of them.

    Args:
        sr: (height, width, 3) the block.
        lr: LR px that hold at least those below the block.
        sr_box: the block, x, y, width, height in SR px.
        lr_corner: (x, y) of the first px of `lr`, in LR px.
        extent_sr: (width, height) of the slide in SR px.
        scale: SR px per LR px.

    Returns:
        (rows, columns) float32, the cells of `cells_under`.
    """
    column, row, num_columns, num_rows = cells_under(sr_box, scale=scale)
    errors = np.full((num_rows, num_columns), np.nan, dtype=np.float32)
    x, y, width, height = measured_box(sr_box, extent_sr=extent_sr, scale=scale)
    if not width or not height:
        return errors
    # From the first LR px that lies below the block whole, to the last.
    x0, y0 = -(-sr_box[0] // scale), -(-sr_box[1] // scale)
    x1, y1 = (sr_box[0] + sr_box[2]) // scale, (sr_box[1] + sr_box[3]) // scale
    left, top = x0 * scale - sr_box[0], y0 * scale - sr_box[1]
    whole = sr[top : top + (y1 - y0) * scale, left : left + (x1 - x0) * scale]
    small = resized(whole, width=x1 - x0, height=y1 - y0)
    small = small[y - y0 : y - y0 + height, x - x0 : x - x0 + width]
    lr = lr[y - lr_corner[1] :, x - lr_corner[0] :][:height, :width]
    # In integers that just hold it: several times faster than floats on 12 million values.
    difference = np.maximum(small, lr)
    difference -= np.minimum(small, lr)
    squares = np.multiply(difference, difference, dtype=np.uint16).reshape(height, -1)
    columns, rows = _cell_starts(x, width), _cell_starts(y, height)
    sums = np.add.reduceat(squares, columns * 3, axis=1, dtype=np.uint32)
    sums = np.add.reduceat(sums, rows, axis=0)
    counts = np.diff(rows, append=height)[:, None] * np.diff(columns, append=width)
    first_row, first_column = y // CONSISTENCY_CELL_PX - row, x // CONSISTENCY_CELL_PX - column
    errors[first_row : first_row + len(rows), first_column : first_column + len(columns)] = sums / (
        3 * counts
    )
    return errors


def _cell_starts(first: int, length: int) -> NDArray[np.int64]:
    """Where cells begin on `length` px from `first` on, counted from there."""
    starts = np.arange(first // CONSISTENCY_CELL_PX * CONSISTENCY_CELL_PX, first + length)
    return (starts[::CONSISTENCY_CELL_PX] - first).clip(0)


def join(
    blocks: Iterable[tuple[Box, NDArray[np.float32]]], *, extent_sr: tuple[int, int], scale: int
) -> NDArray[np.float32]:
    """The map of a whole slide from those of its blocks.

    A cell that several blocks measured is the mean over the px of all; NaN where none did.

    Args:
        blocks: (x, y, width, height in SR px, what `consistency` gave) of each.
        extent_sr: (width, height) of the slide in SR px.
        scale: SR px per LR px.

    Returns:
        (rows, columns) float32, mean squared errors.

    Raises:
        ValueError: a block's map is not of its cells.
    """
    columns, rows = (-(-side // (CONSISTENCY_CELL_PX * scale)) for side in extent_sr)
    total = np.zeros((rows, columns))
    counts = np.zeros((rows, columns))
    for sr_box, errors in blocks:
        column, row, num_columns, num_rows = cells_under(sr_box, scale=scale)
        if errors.shape != (num_rows, num_columns):
            raise ValueError(
                f"the block at SR px {sr_box} has {num_rows} x {num_columns} cells, its map is of "
                f"shape {errors.shape}"
            )
        x, y, width, height = measured_box(sr_box, extent_sr=extent_sr, scale=scale)
        share = np.outer(
            _overlaps(y, height, row, num_rows), _overlaps(x, width, column, num_columns)
        )
        place = np.s_[row : row + num_rows, column : column + num_columns]
        total[place] += np.where(share > 0, errors, 0) * share
        counts[place] += share
    with np.errstate(invalid="ignore"):
        return (total / counts).astype(np.float32)


def _overlaps(start: int, length: int, first: int, number: int) -> NDArray[np.int64]:
    """Px of [start, start + length) in each of `number` cells from cell `first` on."""
    edges = np.arange(first, first + number + 1, dtype=np.int64) * CONSISTENCY_CELL_PX
    return np.diff(edges.clip(start, start + length))


# ------------------------------------------------------------------------------- looking at it


def to_db(errors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean squared errors of 0..255 as PSNR in dB, BEST_DB at most; NaN stays."""
    worst = 255.0**2 / 10 ** (BEST_DB / 10)
    decibels: NDArray[np.float32] = (10 * np.log10(255.0**2 / np.maximum(errors, worst))).astype(
        np.float32
    )
    return decibels


@dataclass(frozen=True, kw_only=True)
class LowCell:
    """A place where SR does not agree with LR.

    Attributes:
        x_l0, y_l0: its top-left corner in level-0 px.
        width, height: in level-0 px.
        consistency_db: PSNR of SR made small, against LR.
    """

    x_l0: int
    y_l0: int
    width: int
    height: int
    consistency_db: float


def low_cells(
    errors: NDArray[np.float32],
    *,
    threshold_db: float,
    extent_l0: tuple[int, int],
    downsample: tuple[float, float],
    limit: int | None = None,
) -> list[LowCell]:
    """The cells of a slide's map below a threshold, the worst first.

    Args:
        errors: the map of `join`.
        threshold_db: PSNR in dB.
        extent_l0: (width, height) of the slide in level-0 px.
        downsample: level-0 px per LR px, (x, y).
        limit: most cells to list.
    """
    decibels = to_db(errors)
    rows, columns = np.nonzero(decibels < threshold_db)  # NaN is not below
    found = []
    worst = np.argsort(decibels[rows, columns], kind="stable")[:limit]
    for row, column in zip(rows[worst].tolist(), columns[worst].tolist(), strict=True):
        x0, x1 = _cell_l0(column, downsample[0], extent_l0[0])
        y0, y1 = _cell_l0(row, downsample[1], extent_l0[1])
        found.append(
            LowCell(
                x_l0=x0,
                y_l0=y0,
                width=x1 - x0,
                height=y1 - y0,
                consistency_db=round(float(decibels[row, column]), 2),
            )
        )
    return found


def _cell_l0(number: int, downsample: float, side_l0: int) -> tuple[int, int]:
    start, stop = (round((number + end) * CONSISTENCY_CELL_PX * downsample) for end in (0, 1))
    return start, min(stop, side_l0)


def heat_map_png(errors: NDArray[np.float32], *, max_side_px: int = 1024) -> bytes:
    """A map as a small PNG, one px a cell: viridis from 20 dB (dark) to 60 dB (bright).

    Larger maps are made smaller by the worst cell of each group, so that no place gets lost. Grey
    where nothing was measured.

    Args:
        errors: the map of `join`.
        max_side_px: longest side of the picture.
    """
    from matplotlib import colormaps
    from PIL import Image

    group = max(1, math.ceil(max(errors.shape) / max_side_px))
    padding = [(0, -side % group) for side in errors.shape]
    padded = np.pad(errors, padding, constant_values=np.nan)
    rows, columns = padded.shape[0] // group, padded.shape[1] // group
    groups = padded.reshape(rows, group, columns, group)
    # Below every error where nothing is known, so that what is known wins.
    worst = np.where(np.isnan(groups), -1, groups).max(axis=(1, 3))
    low, high = HEAT_RANGE_DB
    shares = ((to_db(worst.clip(0)) - low) / (high - low)).clip(0, 1)
    picture = colormaps["viridis"](shares, bytes=True)[..., :3]
    picture[worst < 0] = UNKNOWN_GREY
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, format="PNG")
    return file.getvalue()
