"""The coarse levels of a pyramid, made from top to bottom in strips: no level is held whole."""

from collections.abc import Iterable, Iterator

import numpy as np

from carn.slides.encoding import halved
from carn.slides.slide import Rgb


def level_strips(
    bands: Iterable[Rgb], *, num_levels: int, strip_px: int
) -> Iterator[tuple[int, Rgb]]:
    """Every level as strips of `strip_px` rows, each as soon as the bands reach that far.

    Memory: about `strip_px` rows of each level, and a band.

    Args:
        bands: the first level, cut into bands from top to bottom; (rows, width, 3) uint8 RGB.
        num_levels: levels to make; each halves the one before (`carn.slides.encoding.halved`).
        strip_px: rows of a strip, even; the last of a level may have fewer.

    Yields:
        (level, strip): the levels count from 0, a level's strips come in order.
    """
    waiting: list[list[Rgb]] = [[] for _ in range(num_levels)]

    def feed(level: int, band: Rgb | None) -> Iterator[tuple[int, Rgb]]:
        if level == num_levels:
            return
        if band is not None:
            waiting[level].append(band)
        num_rows = sum(map(len, waiting[level]))
        if num_rows >= strip_px or (band is None and num_rows):
            rows = np.concatenate(waiting[level])
            # Whole strips only, but for the last: an odd row has its partner yet to come.
            end = num_rows if band is None else num_rows // strip_px * strip_px
            waiting[level] = [rows[end:]]
            for top in range(0, end, strip_px):
                strip = rows[top : min(top + strip_px, end)]
                yield level, strip
                if level + 1 < num_levels:
                    yield from feed(level + 1, halved(strip))
        if band is None:
            yield from feed(level + 1, None)

    for band in bands:
        yield from feed(0, band)
    yield from feed(0, None)
