"""Tell whether a picture made of a coarser level is the slide at all.

A TIFF may hold a second section, a thumbnail of another scan or an older version of a level beside
its pyramid, in the shape that a level would have. What is tissue is decided on such a picture, so
it is held against level 0 first.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from carn.errors import DamagedTileError

Rgb = NDArray[np.uint8]

# Places that are looked at: those of most contrast in a grid of cells, and others at random, for
# what the picture lacks.
NUM_PLACES = 12
_GRID = 4
# Sides of a place, px of the picture, and px of level 0 that are read of it at most.
_PLACE_PX = 8
_MAX_READ_PX = 1024
# A place agrees when its means over 2 x 2 px differ by less than this in the mean (grey levels), or
# rise and fall together: levels may be sharpened, or of another JPEG quality.
_MAX_DIFFERENCE = 10.0
_MIN_CORRELATION = 0.6
# Of the places. Where a level is a px off, some fine detail disagrees.
_MIN_AGREEING = 0.7

ReadBase = Callable[[int, int, int, int], Rgb]


def is_of_slide(
    picture: Rgb,
    read: ReadBase,
    *,
    extent: tuple[int, int],
    other: ReadBase | None = None,
    seed: int = 0,
) -> bool:
    """Whether a picture of the whole slide, made of a coarser level, shows what level 0 shows.

    Args:
        picture: (h, w, 3) uint8.
        read: gives (height, width, 3) uint8 of level 0 for x, y, width, height.
        extent: (width, height) of level 0.
        other: gives the same place out of another level, which is held against level 0 in the
            picture's stead; the picture then says where to look.
        seed: of the places that are drawn.
    """
    step_x, step_y = extent[0] / picture.shape[1], extent[1] / picture.shape[0]
    side = min(_PLACE_PX, int(_MAX_READ_PX / max(step_x, step_y)), *picture.shape[:2])
    if side < 2:
        return True  # a px of the picture is more than is read: nothing can be told
    verdicts = []
    for x, y in _places(picture, side, np.random.default_rng(seed)):
        x0, y0 = round(x * step_x), round(y * step_y)
        width = min(max(2, round(side * step_x)), extent[0] - x0)
        height = min(max(2, round(side * step_y)), extent[1] - y0)
        try:
            base = read(x0, y0, width, height)
            mine = picture[y : y + side, x : x + side]
            if other is not None:
                mine = other(x0, y0, width, height)
        except DamagedTileError:
            continue
        verdicts.append(_agree(mine, base, side=side))
    return not verdicts or float(np.mean(verdicts)) >= _MIN_AGREEING


def _places(picture: Rgb, side: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Top-left corners: of most contrast in each cell of a grid, and some at random."""
    height, width = (length // side for length in picture.shape[:2])
    luma = picture[: height * side, : width * side].mean(axis=2, dtype=np.float32)
    blocks = luma.reshape(height, side, width, side).std(axis=(1, 3))
    found: dict[tuple[int, int], float] = {}
    for rows in np.array_split(np.arange(height), min(_GRID, height)):
        for columns in np.array_split(np.arange(width), min(_GRID, width)):
            part = blocks[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            row, column = np.unravel_index(int(part.argmax()), part.shape)
            place = int(columns[0] + column) * side, int(rows[0] + row) * side
            found[place] = float(part.max())
    yield from sorted(found, key=lambda place: -found[place])[:NUM_PLACES]
    for _ in range(NUM_PLACES // 2):
        yield int(rng.integers(width)) * side, int(rng.integers(height)) * side


def _agree(picture: Rgb, base: Rgb, *, side: int) -> bool:
    from PIL import Image

    size = (side // 2, side // 2)
    one, other = (
        np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX), dtype=np.float32)
        for pixels in (picture, base)
    )
    if float(np.abs(one - other).mean()) <= _MAX_DIFFERENCE:
        return True
    return _correlation(one.mean(axis=2), other.mean(axis=2)) >= _MIN_CORRELATION


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    a, b = one.ravel() - one.mean(), other.ravel() - other.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0
