"""Which parts of a slide are inferred, and in which windows.

Decided on an absolute grid of cells that starts at the slide's top-left corner, so that what is
inferred does not depend on the blocks a slide is cut into. Frame: LR px of the view.
"""

import io
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from carn.errors import CarnError, DamagedTileError
from carn.slides.slide import Rgb
from carn.slides.tissue import find_tissue
from carn.upscaling.lr_view import Box, LrView

logger = logging.getLogger(__name__)

# Side of a cell: 1024-px windows are 4 x 4 of them, and 2048 LR px (a block of 4096 at x2) 8 x 8.
CELL_PX = 256
# Cells closer to tissue than this, beyond the network's context, count as tissue: the mask is
# coarse (some 25 LR px a mask px), loses specks, and fades out with pale edges.
TISSUE_MARGIN_PX = 64
# Context of the deepest network of the paper's comparison, where nobody says which is used.
DEFAULT_HALO_PX = 64


@dataclass(frozen=True, eq=False)
class TissueCells:
    """The cells of a slide that are near tissue.

    Attributes:
        cells: (rows, columns) bool; cell (r, c) starts at LR px (c, r) * CELL_PX.
        extent: (width, height) of the view in LR px.
        mask: (h, w) bool, the tissue itself on a coarse picture of the whole slide; None where all
            cells count, because none was found or the input is a plain image.
    """

    cells: NDArray[np.bool_]
    extent: tuple[int, int]
    mask: NDArray[np.bool_] | None

    @classmethod
    def of(cls, view: LrView, *, halo_px: int = DEFAULT_HALO_PX) -> Self:
        """The cells within `halo_px` + TISSUE_MARGIN_PX of the slide's tissue.

        All cells, where the picture shows no tissue at all (pale tissue must not be lost), or where
        damage keeps it from being made and the view's config lets damage pass; and all of a plain
        image.

        Args:
            view: the slide; its tissue is found on a coarse level.
            halo_px: LR px of context that the network has to each side.

        Raises:
            DamagedTileError: the picture cannot be made, and damage fails the slide.
            StorageError: storage failed.
        """
        if view.slide.reader == "image":
            return cls.everywhere(view.extent)
        try:
            # What is taken for glass is not inferred: isolated cells and pale stains must not be.
            mask = find_tissue(view.slide, is_generous=True).mask
        except DamagedTileError as error:
            if view.config.on_damaged_tile == "fail":
                raise
            logger.warning("%s; all of the slide is inferred", error)
            return cls.everywhere(view.extent)
        if not mask.any():
            logger.warning("%s shows no tissue; all of it is inferred", view.slide.uri)
            return cls.everywhere(view.extent)
        cells = cells_near(mask, extent=view.extent, margin_px=halo_px + TISSUE_MARGIN_PX)
        return cls(cells=cells, extent=view.extent, mask=mask)

    @classmethod
    def everywhere(cls, extent: tuple[int, int]) -> Self:
        """All cells of a view of this extent."""
        width, height = extent
        cells = np.ones((-(-height // CELL_PX), -(-width // CELL_PX)), dtype=bool)
        return cls(cells=cells, extent=extent, mask=None)

    def is_tissue(self, x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(len(y), len(x)) bool, for the columns and rows `x`, `y`: tissue by the mask, or all.

        Beyond the border there is none.
        """
        width, height = self.extent
        on_slide: NDArray[np.bool_] = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
        if self.mask is None:
            return on_slide
        rows = (y.clip(0, height - 1) * self.mask.shape[0]) // height
        columns = (x.clip(0, width - 1) * self.mask.shape[1]) // width
        on_slide &= self.mask[rows[:, None], columns]
        return on_slide

    def to_bytes(self) -> bytes:
        """As a compressed npz; `from_bytes` is the way back."""
        mask = np.zeros((0, 0), dtype=bool) if self.mask is None else self.mask
        file = io.BytesIO()
        np.savez_compressed(
            file,
            cells=np.packbits(self.cells),
            mask=np.packbits(mask),
            shapes=np.asarray([self.cells.shape, mask.shape, self.extent], dtype=np.int64),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """What `to_bytes` wrote.

        Raises:
            CarnError: the bytes are something else.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                cells_shape, mask_shape, extent = (
                    (int(one), int(other)) for one, other in arrays["shapes"]
                )
                cells = _unpacked(arrays["cells"], cells_shape)
                mask = _unpacked(arrays["mask"], mask_shape) if mask_shape[0] else None
                return cls(cells=cells, extent=extent, mask=mask)
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise CarnError(
                f"these {len(content)} bytes are no stored tissue cells ({error}); find them again"
            ) from error


def _unpacked(bits: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.bool_]:
    return np.unpackbits(bits, count=shape[0] * shape[1]).astype(bool).reshape(shape)


def cells_near(
    mask: NDArray[np.bool_], *, extent: tuple[int, int], margin_px: int
) -> NDArray[np.bool_]:
    """(rows, columns) bool: cells that hold, or come within `margin_px` of, something of the mask.

    Args:
        mask: (h, w) bool over the whole view.
        extent: (width, height) of the view in LR px.
        margin_px: LR px along each axis.
    """
    sums = np.pad(mask.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
    top, bottom = _reached(extent[1], mask.shape[0], margin_px)
    left, right = _reached(extent[0], mask.shape[1], margin_px)
    top, bottom = top[:, None], bottom[:, None]
    found = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    near: NDArray[np.bool_] = found > 0
    return near


def _reached(
    side_px: int, mask_side: int, margin_px: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[first, last) mask px within reach of each cell along one axis."""
    start = np.arange(-(-side_px // CELL_PX), dtype=np.int64) * CELL_PX
    stop = np.minimum(start + CELL_PX, side_px)
    first = ((start - margin_px) * mask_side // side_px).clip(0, mask_side)
    last = -((stop + margin_px) * -mask_side // side_px)
    return first, last.clip(0, mask_side)


# ------------------------------------------------------------------------------------- windows


@dataclass(frozen=True, kw_only=True)
class CellGrid:
    """The cells under a box, at whose border they are cut off.

    Attributes:
        box: x, y, width, height in LR px.
        first_row, first_column: of the slide's grid, the cell at the box's top-left corner.
        num_rows, num_columns: cells, whole or in part.
    """

    box: Box
    first_row: int
    first_column: int
    num_rows: int
    num_columns: int

    @classmethod
    def under(cls, box: Box) -> Self:
        """The cells under a box of LR px with its corner on the slide."""
        x, y, width, height = box
        return cls(
            box=box,
            first_row=y // CELL_PX,
            first_column=x // CELL_PX,
            num_rows=-(-(y + height) // CELL_PX) - y // CELL_PX,
            num_columns=-(-(x + width) // CELL_PX) - x // CELL_PX,
        )

    def box_of(self, row: int, column: int, num_rows: int = 1, num_columns: int = 1) -> Box:
        """A rectangle of cells within the box; rows and columns count from the box's first."""
        x, y, width, height = self.box
        left = max(x, (self.first_column + column) * CELL_PX)
        top = max(y, (self.first_row + row) * CELL_PX)
        right = min(x + width, (self.first_column + column + num_columns) * CELL_PX)
        bottom = min(y + height, (self.first_row + row + num_rows) * CELL_PX)
        return left, top, right - left, bottom - top


def cover(
    wanted: NDArray[np.bool_], grid: CellGrid, *, halo_px: int, max_window_px: int
) -> list[Box]:
    """Windows that hold all wanted cells of a box, with the least pixels to infer.

    Windows are squares of 1, 2, 4, ... cells a side on the slide's grid, cut off at the box. A
    large window has less halo for its area, but holds unwanted cells too: dynamic programming over
    the quadtree finds the least sum of (width + 2 halo) (height + 2 halo).

    Args:
        wanted: (rows, columns) bool, for the cells of `grid`.
        grid: the cells under the box.
        halo_px: LR px read to each side of a window.
        max_window_px: longest side of a window, though a cell is never cut for it.

    Returns:
        Disjoint boxes in LR px, row by row of the largest squares.
    """
    side = 1
    while 2 * side * CELL_PX <= max_window_px:
        side *= 2

    def cheapest(row: int, column: int, side: int) -> tuple[int, list[Box]]:
        """Cost and windows of a square of cells; row and column are of the slide's grid."""
        row0, column0 = row - grid.first_row, column - grid.first_column
        part = wanted[max(0, row0) : max(0, row0 + side), max(0, column0) : max(0, column0 + side)]
        if not part.any():
            return 0, []
        box = grid.box_of(row0, column0, side, side)
        whole = ((box[2] + 2 * halo_px) * (box[3] + 2 * halo_px), [box])
        if side == 1:
            return whole
        half = side // 2
        cost, windows = 0, []
        for down in (0, half):
            for across in (0, half):
                part_cost, part_windows = cheapest(row + down, column + across, half)
                cost += part_cost
                windows += part_windows
        return whole if whole[0] <= cost else (cost, windows)

    found: list[Box] = []
    for row in _starts(grid.first_row, grid.num_rows, side):
        for column in _starts(grid.first_column, grid.num_columns, side):
            found += cheapest(row, column, side)[1]
    return found


def _starts(first: int, number: int, step: int) -> range:
    return range(first // step * step, first + number, step)


def runs(wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, 1, length) of each unbroken run of True along a row; whole rows are joined.

    Consecutive rows that are True all along come as one (row, 0, rows, columns).
    """
    is_whole: NDArray[np.bool_] = np.atleast_1d(wanted.all(axis=1))
    row = 0
    while row < wanted.shape[0]:
        if is_whole[row]:
            last = row
            while last < wanted.shape[0] and is_whole[last]:
                last += 1
            yield row, 0, last - row, wanted.shape[1]
            row = last
            continue
        steps = np.diff(wanted[row, :].astype(np.int8), prepend=0, append=0)
        edges = np.flatnonzero(steps)
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            yield row, int(start), 1, int(stop - start)
        row += 1


def flat_colour(pixels: Rgb) -> tuple[int, int, int] | None:
    """The colour that all pixels have, or None where they differ."""
    first = pixels[0, 0]
    # One row tells nearly every place that is not flat.
    if (pixels[0] != first).any() or (pixels != first).any():
        return None
    red, green, blue = first.tolist()
    return red, green, blue
