"""What is kept of a slide to be looked at: a crop of LR and SR, and the border between two blocks.

Taken from the blocks' own pixels, before they are encoded, whatever the output's format.
"""

from typing import Any

import numpy as np
import simplejpeg

from carn.slides.slide import Rgb
from carn.upscaling.blocks import LrBlock
from carn.upscaling.task import SlidePlan
from carn.upscaling.windows import CELL_PX, TissueCells

# Side of the crop: wide enough to see nuclei in their tissue, narrow enough for two on a screen.
CROP_LR_PX, CROP_SR_PX = CELL_PX, 2 * CELL_PX
# JPEG input has steps of its own every 8 LR px, which block borders fall on: a border is looked at
# as far as the next of them.
JPEG_PX = 8
# Half the side of the picture of a border, in SR px.
SEAM_PX = 128
# What records keep under these names.
SHOWN = ("crop_lr", "crop_sr", "rim_left", "rim_right", "seam_left", "seam_right")


def choose_show(
    cells: TissueCells | None,
    *,
    extent_lr: tuple[int, int],
    block_px: int,
    scale: int,
    thumbnail: Rgb | None = None,
) -> tuple[int, tuple[int, int]]:
    """The block to show, with the place in it: most stain, and a neighbour to the right.

    Args:
        cells: of the slide; None where all is inferred.
        extent_lr: of the slide in LR px.
        block_px: side of a block in SR px.
        scale: SR px per LR px.
        thumbnail: (h, w, 3), the whole slide made small; without it cells are all that is known,
            and those lie near whatever might be tissue.

    Returns:
        Index of the block, and the (x, y) LR px of the crop's top-left corner: the first px of a
        cell that lies in the block, or the block's first where it holds no whole cell.
    """
    columns = -(-extent_lr[0] * scale // block_px)
    rows = -(-extent_lr[1] * scale // block_px)
    side = block_px / scale
    chroma = None if thumbnail is None else np.ptp(thumbnail, axis=2)

    def stain(x: float, y: float, side_px: float) -> float:
        """How much stain there is in a square of the slide, in tenths of all there could be."""
        if chroma is None:
            return _tissue_share(cells, x, y, side_px)
        height, width = chroma.shape
        left, right = (int(edge * width / extent_lr[0]) for edge in (x, x + side_px))
        top, bottom = (int(edge * height / extent_lr[1]) for edge in (y, y + side_px))
        part = chroma[top : max(bottom, top + 1), left : max(right, left + 1)]
        # What is alike enough counts alike. Haematoxylin and eosin reach some 130 levels.
        return round(float(part.mean()) / 128, 1) if part.size else 0.0

    best, best_rank = (0, 0), (-1.0, False)
    for row in range(rows):
        for column in range(columns):
            rank = (stain(column * side, row * side, side), column + 1 < columns)
            if rank > best_rank:
                best, best_rank = (row, column), rank
    row, column = best
    x0, x1 = _whole_px(column * block_px, (column + 1) * block_px, scale)
    y0, y1 = _whole_px(row * block_px, (row + 1) * block_px, scale)
    x1, y1 = min(x1, extent_lr[0]), min(y1, extent_lr[1])
    centre = ((x0 + x1) / 2, (y0 + y1) / 2)
    candidates = [
        (x, y)
        for y in range(-(-y0 // CELL_PX) * CELL_PX, y1 - CELL_PX + 1, CELL_PX)
        for x in range(-(-x0 // CELL_PX) * CELL_PX, x1 - CELL_PX + 1, CELL_PX)
        if cells is None or cells.cells[y // CELL_PX, x // CELL_PX]
    ]
    middle = CELL_PX / 2

    def rank_of(place: tuple[int, int]) -> tuple[float, float]:
        away = (place[0] + middle - centre[0]) ** 2 + (place[1] + middle - centre[1]) ** 2
        return -stain(*place, CELL_PX), away

    return row * columns + column, min(candidates or [(x0, y0)], key=rank_of)


def _whole_px(start: int, stop: int, scale: int) -> tuple[int, int]:
    """LR px [first, last) that lie in the SR px [start, stop) with all of theirs."""
    return -(-start // scale), stop // scale


def _tissue_share(cells: TissueCells | None, x: float, y: float, side_px: float) -> float:
    """Share of a square that is tissue by the mask, in tenths."""
    if cells is None:
        return 1.0
    steps = np.arange(0, side_px, max(1.0, side_px / 16))
    xs, ys = (np.floor(start + steps).astype(np.int64) for start in (x, y))
    return round(float(cells.is_tissue(xs, ys).mean()), 1)


def shown_facts(plan: SlidePlan, index: int, read: LrBlock, pixels: Rgb) -> dict[str, Any]:
    """What a block's record keeps to be shown; nothing, but for two blocks of a slide.

    Args:
        plan: the slide.
        index: of the block.
        read: its LR pixels.
        pixels: its SR pixels.
    """
    region, scale = read.region, plan.task.scale
    facts: dict[str, Any] = {}
    columns = -(-plan.spec.extent[0] // plan.spec.block_px)
    if index == plan.show:
        side = min(CROP_LR_PX, CROP_SR_PX // scale)
        first_x, last_x = _whole_px(region.x0, region.x1, scale)
        first_y, last_y = _whole_px(region.y0, region.y1, scale)
        x, y = max(plan.show_cell[0], first_x), max(plan.show_cell[1], first_y)
        width, height = min(side, last_x - x), min(side, last_y - y)
        # The last block of a row may be narrower than one px of LR.
        if min(width, height) > 0:
            left, top = x - region.x, y - region.y
            facts["crop_lr"] = read.pixels[top : top + height, left : left + width]
            left, top = x * scale - region.x0, y * scale - region.y0
            facts["crop_sr"] = pixels[top : top + height * scale, left : left + width * scale]
        facts["rim_right"] = pixels[:, -rim_px(scale) :]
        facts["seam_right"] = _middle(pixels)[:, -SEAM_PX:]
    elif index == plan.show + 1 and index % columns:
        facts["rim_left"] = pixels[:, : rim_px(scale)]
        facts["seam_left"] = _middle(pixels)[:, :SEAM_PX]
    return {name: np.ascontiguousarray(value) for name, value in facts.items()}


def rim_px(scale: int) -> int:
    """SR px on each side of a border between blocks that its steps are measured on."""
    return JPEG_PX * scale + 1


def jpeg(pixels: Rgb) -> bytes:
    """A picture for a page, (H, W, 3) uint8 RGB."""
    content: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=90, colorspace="RGB", colorsubsampling="444"
    )
    return content


def _middle(pixels: Rgb) -> Rgb:
    top = max(0, pixels.shape[0] // 2 - SEAM_PX)
    return pixels[top : top + 2 * SEAM_PX]
