"""A block of SR pixels: what to read for it, and how it is made.

Blocks are squares of SR px on a grid that starts at the slide's top-left corner; each is made on
its own, and where the network is purely convolutional (poolings frozen) neighbours fit without a
seam. Frames: `x0, y0, x1, y1` are SR px, `x, y, width, height` are LR px of the view.
"""

import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from carn.errors import CarnError, DamagedTileError
from carn.slides.slide import Rgb
from carn.upscaling.consistency import consistency, resized
from carn.upscaling.engine import Engine
from carn.upscaling.lr_view import Box, LrView, read_mirrored
from carn.upscaling.windows import CELL_PX, CellGrid, TissueCells, cover, flat_colour, runs

# Windows start at multiples of this: networks on half and quarter resolution (Haar, strides) then
# see the same grid as on the whole slide.
ALIGNMENT_PX = 4
# Read round what is enlarged; the bicubic kernel reaches 2 LR px.
ENLARGE_MARGIN_PX = 4
# A damaged place is narrowed down to squares of this side, on a grid from (0, 0).
DAMAGE_PX = 128
# Side of the flat window that tells what the network makes of flat colour.
FLAT_PX = 16

Damaged = Literal["fail", "upsample"]


@dataclass(frozen=True, kw_only=True)
class BlockRegion:
    """Where a block lies.

    Attributes:
        extent_sr: (width, height) of the slide in SR px.
        scale: SR px per LR px.
        x0, y0, x1, y1: the block, [x0, x1) x [y0, y1), in SR px.
        x, y, width, height: LR px to read for it, beyond the border perhaps. The LR px below the
            block, their corner moved up and left to multiples of ALIGNMENT_PX, and the margin.
        margin_px: LR px that are read to each side of them.
    """

    extent_sr: tuple[int, int]
    scale: int
    x0: int
    y0: int
    x1: int
    y1: int
    x: int
    y: int
    width: int
    height: int
    margin_px: int

    @property
    def sr_box(self) -> Box:
        """x, y, width, height in SR px."""
        return self.x0, self.y0, self.x1 - self.x0, self.y1 - self.y0

    @property
    def inner(self) -> Box:
        """The LR px without the margin: x, y, width, height."""
        return (
            self.x + self.margin_px,
            self.y + self.margin_px,
            self.width - 2 * self.margin_px,
            self.height - 2 * self.margin_px,
        )

    @property
    def own(self) -> Box:
        """The LR px whose first SR px is the block's: each belongs to one block of the slide."""
        x, y = -(-self.x0 // self.scale), -(-self.y0 // self.scale)
        return x, y, -(-self.x1 // self.scale) - x, -(-self.y1 // self.scale) - y


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A place of the slide that could not be decoded.

    Attributes:
        x_l0, y_l0: its top-left corner in level-0 px.
        width, height: in level-0 px, at most DAMAGE_PX of the view more than is damaged.
        reason: what the reader said, and what stands there instead.
    """

    x_l0: int
    y_l0: int
    width: int
    height: int
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class LrBlock:
    """What was read for a block.

    Attributes:
        region: where it lies.
        pixels: (height, width, 3) uint8, the LR px of the region.
        damage: of the block's own LR px.
        damaged: all boxes of the region that were filled from elsewhere: x, y, width, height, LR.
    """

    region: BlockRegion
    pixels: Rgb
    damage: tuple[Damage, ...] = ()
    damaged: tuple[Box, ...] = ()

    def to_bytes(self) -> bytes:
        """As bytes for another process; `from_bytes` is the way back."""
        facts = json.dumps(
            {
                "region": asdict(self.region),
                "damage": [asdict(damage) for damage in self.damage],
                "damaged": self.damaged,
            }
        ).encode()
        return b"".join((struct.pack("<I", len(facts)), facts, self.pixels.tobytes()))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """What `to_bytes` wrote.

        Raises:
            CarnError: the bytes are something else.
        """
        try:
            (length,) = struct.unpack_from("<I", content)
            facts = json.loads(content[4 : 4 + length])
            found = facts["region"]
            region = BlockRegion(**found | {"extent_sr": tuple(found["extent_sr"])})
            pixels = np.frombuffer(content, dtype=np.uint8, offset=4 + length)
            return cls(
                region=region,
                # A copy: torch takes no read-only arrays.
                pixels=pixels.reshape(region.height, region.width, 3).copy(),
                damage=tuple(Damage(**damage) for damage in facts["damage"]),
                damaged=tuple((x, y, w, h) for x, y, w, h in facts["damaged"]),
            )
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise CarnError(
                f"these {len(content)} bytes are no block that was read ({error}); read it again"
            ) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockResult:
    """A block that was made.

    Attributes:
        pixels: (y1 - y0, x1 - x0, 3) uint8, the SR block.
        num_inferred_px: own LR px that the network saw.
        num_background_px: own LR px that it did not: background, flat or damaged.
        damage: of the block's own LR px.
    """

    pixels: Rgb
    num_inferred_px: int
    num_background_px: int
    damage: tuple[Damage, ...]


def num_blocks(extent_sr: tuple[int, int], *, block_px: int) -> tuple[int, int]:
    """Blocks of a slide, (columns, rows)."""
    return -(-extent_sr[0] // block_px), -(-extent_sr[1] // block_px)


def block_region(
    extent_sr: tuple[int, int], *, block_px: int, index: int, scale: int, halo_px: int
) -> BlockRegion:
    """Where a block lies, and what to read for it.

    Args:
        extent_sr: (width, height) of the slide in SR px.
        block_px: side of a block in SR px; blocks at the right and the bottom are cut off.
        index: of the block, row by row.
        scale: SR px per LR px.
        halo_px: LR px of context that the network wants to each side.

    Raises:
        ValueError: there is no such block, or the halo is no multiple of ALIGNMENT_PX.
    """
    columns, rows = num_blocks(extent_sr, block_px=block_px)
    if not 0 <= index < columns * rows:
        raise ValueError(f"index={index} must be in 0..{columns * rows - 1}, the slide's blocks")
    if halo_px < 0 or halo_px % ALIGNMENT_PX:
        raise ValueError(f"halo_px={halo_px} must be a multiple of {ALIGNMENT_PX}, at least 0")
    row, column = divmod(index, columns)
    x0, y0 = column * block_px, row * block_px
    x1, y1 = min(x0 + block_px, extent_sr[0]), min(y0 + block_px, extent_sr[1])
    margin = max(halo_px, ENLARGE_MARGIN_PX)
    unit = scale * ALIGNMENT_PX
    x, y = x0 // unit * ALIGNMENT_PX - margin, y0 // unit * ALIGNMENT_PX - margin
    return BlockRegion(
        extent_sr=extent_sr,
        scale=scale,
        x0=x0,
        y0=y0,
        x1=x1,
        y1=y1,
        x=x,
        y=y,
        width=-(-x1 // scale) + margin - x,
        height=-(-y1 // scale) + margin - y,
        margin_px=margin,
    )


# ------------------------------------------------------------------------------------- reading


def read_block(view: LrView, region: BlockRegion, *, on_damage: Damaged = "fail") -> LrBlock:
    """The LR pixels for a block, mirrored beyond the slide's border.

    Args:
        view: the slide, whose extent times the scale is the region's `extent_sr`.
        region: of `block_region`.
        on_damage: `fail` raises; `upsample` fills what cannot be decoded from the next coarser
            level that can, enlarged, or with white where there is none, and lists it.

    Raises:
        ValueError: the region is of a slide of another extent.
        DamagedTileError: pixels cannot be decoded, and `on_damage` is `fail`.
        StorageError: storage failed under the read.
    """
    expected = (view.extent[0] * region.scale, view.extent[1] * region.scale)
    if region.extent_sr != expected:
        raise ValueError(f"a region of {region.extent_sr} SR px; {view.slide.uri} has {expected}")
    box = (region.x, region.y, region.width, region.height)
    try:
        return LrBlock(region=region, pixels=view.read(*box))
    except DamagedTileError:
        if on_damage == "fail":
            raise
    found: list[tuple[Box, str]] = []

    def read_inside(x: int, y: int, width: int, height: int) -> Rgb:
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        for part, content in _readable_parts(view, (x, y, width, height), found):
            pixels[_within(part, (x, y))] = content
        return pixels

    pixels = read_mirrored(read_inside, extent=view.extent, box=box)
    return LrBlock(
        region=region,
        pixels=pixels,
        damage=_listed(found, view, own=region.own),
        damaged=tuple(part for part, _ in found),
    )


def _readable_parts(
    view: LrView, box: Box, found: list[tuple[Box, str]]
) -> Iterator[tuple[Box, Rgb]]:
    """The box in parts with their pixels; what had to be filled is added to `found`."""
    try:
        yield box, view.read_inside(*box)
    except DamagedTileError as error:
        halves = _halves(box)
        if halves:
            for half in halves:
                yield from _readable_parts(view, half, found)
            return
        content = view.read_coarser(*box)
        substitute = "enlarged from a coarser level"
        if content is None:
            content = np.full((box[3], box[2], 3), 255, dtype=np.uint8)
            substitute = "filled with white"
        found.append((box, f"{error.reason}; {substitute}"))
        yield box, content


def _halves(box: Box) -> list[Box]:
    """Two halves along the longer side, cut on the grid of damage; none of a single square."""
    x, y, width, height = box
    columns, rows = (
        -(-(start + length) // DAMAGE_PX) - start // DAMAGE_PX
        for start, length in ((x, width), (y, height))
    )
    if max(columns, rows) == 1:
        return []
    if columns >= rows:
        cut = (x // DAMAGE_PX + columns // 2) * DAMAGE_PX
        return [(x, y, cut - x, height), (cut, y, x + width - cut, height)]
    cut = (y // DAMAGE_PX + rows // 2) * DAMAGE_PX
    return [(x, y, width, cut - y), (x, cut, width, y + height - cut)]


def _listed(found: Sequence[tuple[Box, str]], view: LrView, *, own: Box) -> tuple[Damage, ...]:
    """The damage within a box, one for each reason: a damaged tile names itself in it."""
    bounds: dict[str, tuple[int, int, int, int]] = {}
    for box, reason in found:
        x, y, width, height = _common(box, own)
        if width > 0 and height > 0:
            x0, y0, x1, y1 = bounds.get(reason, (x, y, x, y))
            bounds[reason] = (min(x0, x), min(y0, y), max(x1, x + width), max(y1, y + height))
    listed = []
    for reason, (x0, y0, x1, y1) in bounds.items():
        (x_l0, y_l0), (x_end, y_end) = view.to_l0(x0, y0), view.to_l0(x1, y1)
        listed.append(
            Damage(x_l0=x_l0, y_l0=y_l0, width=x_end - x_l0, height=y_end - y_l0, reason=reason)
        )
    return tuple(listed)


# -------------------------------------------------------------------------------------- making


def upscale_block(
    lr_block: LrBlock, engine: Engine, *, tissue: TissueCells | None = None
) -> BlockResult:
    """Super-resolve a block.

    Cells near tissue are inferred. The others are enlarged bicubically, and so are damaged ones. A
    cell that is of one colour, context included, gets what the network makes of that colour.
    Memory: the SR block, and one window at a time.

    Args:
        lr_block: its LR pixels.
        engine: of the region's scale, its poolings frozen where it has any.
        tissue: the slide's cells; None infers everything.

    Raises:
        ValueError: the engine is of another scale or wants more context than was read, or the
            tissue is of another slide.
    """
    region = lr_block.region
    if engine.scale != region.scale or engine.halo_px > region.margin_px:
        raise ValueError(
            f"the block was read for x{region.scale} with {region.margin_px} LR px of context; "
            f"the engine makes x{engine.scale} and wants {engine.halo_px}"
        )
    grid = CellGrid.under(region.inner)
    wanted = _near_tissue(grid, tissue, region) & ~_touched(grid, lr_block.damaged)
    making = _Making(lr_block, engine, grid)
    flat = making.fill_flat(wanted)
    wanted &= ~flat
    making.infer(wanted)
    making.enlarge(~wanted & ~flat)
    own_px = region.own[2] * region.own[3]
    inferred_px = sum(
        math.prod(_common(grid.box_of(row, column), region.own)[2:])
        for row, column in np.argwhere(wanted).tolist()
    )
    return BlockResult(
        pixels=making.sr,
        num_inferred_px=inferred_px,
        num_background_px=own_px - inferred_px,
        damage=lr_block.damage,
    )


def block_consistency(lr_block: LrBlock, sr: Rgb) -> NDArray[np.float32]:
    """Mean squared error per cell between an SR block, made small again, and its LR pixels.

    See `carn.upscaling.consistency`. It needs a CPU for as long as encoding a tenth of the block
    does, so it is left to whoever encodes it.
    """
    region = lr_block.region
    return consistency(
        sr,
        lr_block.pixels,
        sr_box=region.sr_box,
        lr_corner=(region.x, region.y),
        extent_sr=region.extent_sr,
        scale=region.scale,
    )


class _Making:
    """A block while it is made: its LR pixels, and SR pixels as they come."""

    def __init__(self, lr_block: LrBlock, engine: Engine, grid: CellGrid) -> None:
        self.region = lr_block.region
        self.lr = lr_block.pixels
        self.engine = engine
        self.grid = grid
        _, _, width, height = self.region.sr_box
        self.sr: Rgb = np.empty((height, width, 3), dtype=np.uint8)

    def fill_flat(self, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Fill the wanted cells that are of one colour, and say which they were."""
        flat = np.zeros_like(wanted)
        answers: dict[tuple[int, int, int], Rgb] = {}
        for row, column in np.argwhere(wanted).tolist():
            box = self.grid.box_of(row, column)
            colour = flat_colour(self.around(box, self.engine.halo_px))
            if colour is None:
                continue
            if colour not in answers:
                answers[colour] = self.answer_to(colour)
            # Not the colour itself: no network is exact, and cells beside this one are inferred.
            answer, scale = answers[colour], self.region.scale
            repeats = (-(-box[3] // FLAT_PX), -(-box[2] // FLAT_PX), 1)
            self.paste(box, np.tile(answer, repeats)[: box[3] * scale, : box[2] * scale])
            flat[row, column] = True
        return flat

    def answer_to(self, colour: tuple[int, int, int]) -> Rgb:
        """What the network makes of FLAT_PX squared LR px of one colour amid the same."""
        side = FLAT_PX + 2 * self.engine.halo_px
        return self.engine.upscale(np.full((side, side, 3), colour, dtype=np.uint8))

    def infer(self, wanted: NDArray[np.bool_]) -> None:
        """Super-resolve the wanted cells."""
        halo = self.engine.halo_px
        windows = cover(
            wanted, self.grid, halo_px=halo, max_window_px=max(CELL_PX, self.engine.window_px)
        )
        results = self.engine.upscale_many(self.around(window, halo) for window in windows)
        for window, sr in zip(windows, results, strict=True):
            # A window may hold unwanted cells: whether they are enlarged or inferred must not
            # depend on where blocks end.
            for row, column in np.argwhere(wanted & _touched(self.grid, [window])).tolist():
                box = self.grid.box_of(row, column)
                self.paste(box, _scaled_part(sr, box, corner=window[:2], scale=self.region.scale))

    def enlarge(self, wanted: NDArray[np.bool_]) -> None:
        """Enlarge the wanted cells bicubically."""
        scale, margin = self.region.scale, ENLARGE_MARGIN_PX
        for row, column, num_rows, num_columns in runs(wanted):
            box = self.grid.box_of(row, column, num_rows, num_columns)
            lr = self.around(box, margin)
            colour = flat_colour(lr)
            if colour is not None:
                self.paste(box, np.full((box[3] * scale, box[2] * scale, 3), colour, np.uint8))
                continue
            sr = resized(lr, width=lr.shape[1] * scale, height=lr.shape[0] * scale)
            corner = (box[0] - margin, box[1] - margin)
            self.paste(box, _scaled_part(sr, box, corner=corner, scale=scale))

    def around(self, box: Box, margin: int) -> Rgb:
        """LR pixels of a box with `margin` px to each side."""
        x, y, width, height = box
        padded = (x - margin, y - margin, width + 2 * margin, height + 2 * margin)
        pixels: Rgb = self.lr[_within(padded, (self.region.x, self.region.y))]
        return pixels

    def paste(self, box: Box, sr: Rgb) -> None:
        """Put the SR pixels of an LR box in their place; the block may end within them."""
        scale, region = self.region.scale, self.region
        place = (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)
        common = _common(place, region.sr_box)
        if common[2] > 0 and common[3] > 0:
            self.sr[_within(common, (region.x0, region.y0))] = sr[_within(common, place[:2])]


def _near_tissue(
    grid: CellGrid, tissue: TissueCells | None, region: BlockRegion
) -> NDArray[np.bool_]:
    if tissue is None:
        return np.ones((grid.num_rows, grid.num_columns), dtype=bool)
    extent = (region.extent_sr[0] // region.scale, region.extent_sr[1] // region.scale)
    if tissue.extent != extent:
        raise ValueError(f"tissue cells of {tissue.extent} LR px for a slide of {extent}")
    return tissue.cells[
        grid.first_row : grid.first_row + grid.num_rows,
        grid.first_column : grid.first_column + grid.num_columns,
    ].copy()


def _touched(grid: CellGrid, boxes: Sequence[Box]) -> NDArray[np.bool_]:
    """(rows, columns) bool: cells of which a box holds something."""
    touched = np.zeros((grid.num_rows, grid.num_columns), dtype=bool)
    for box in boxes:
        x, y, width, height = _common(box, grid.box)
        if width > 0 and height > 0:
            under = CellGrid.under((x, y, width, height))
            row, column = under.first_row - grid.first_row, under.first_column - grid.first_column
            touched[row : row + under.num_rows, column : column + under.num_columns] = True
    return touched


def _common(one: Box, other: Box) -> Box:
    """What two boxes share; a side is 0 or negative where they share nothing."""
    x, y = max(one[0], other[0]), max(one[1], other[1])
    right = min(one[0] + one[2], other[0] + other[2])
    bottom = min(one[1] + one[3], other[1] + other[3])
    return x, y, right - x, bottom - y


def _within(box: Box, corner: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a box in an array that begins at `corner`."""
    left, top = box[0] - corner[0], box[1] - corner[1]
    return slice(top, top + box[3]), slice(left, left + box[2])


def _scaled_part(sr: Rgb, box: Box, *, corner: tuple[int, int], scale: int) -> Rgb:
    """The SR pixels of an LR box, in an array that begins at the LR px `corner`."""
    x, y, width, height = (side * scale for side in box)
    part: Rgb = sr[_within((x, y, width, height), (corner[0] * scale, corner[1] * scale))]
    return part
