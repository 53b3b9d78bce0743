"""Which place of a slide is shown: where the stain is, not a speck on the glass."""

import numpy as np

from carn.upscaling.showing import choose_show
from carn.upscaling.windows import CELL_PX, TissueCells

EXTENT = (8 * CELL_PX, 4 * CELL_PX)


def test_the_most_stained_cell_of_the_most_stained_block_is_shown() -> None:
    thumbnail = np.full((64, 128, 3), 240, dtype=np.uint8)
    # Pink at the cell in column 2, row 1, and a grey speck elsewhere.
    thumbnail[16:32, 32:48] = (220, 100, 180)
    thumbnail[50:54, 100:104] = 20
    index, place = choose_show(
        None, extent_lr=EXTENT, block_px=8 * CELL_PX, scale=2, thumbnail=thumbnail
    )
    assert index == 0  # blocks of 4 x 4 cells, two of them
    assert place == (2 * CELL_PX, CELL_PX)


def test_a_block_with_a_neighbour_to_the_right_is_preferred_among_equals() -> None:
    thumbnail = np.full((64, 128, 3), (220, 100, 180), dtype=np.uint8)
    index, _ = choose_show(
        None, extent_lr=EXTENT, block_px=8 * CELL_PX, scale=2, thumbnail=thumbnail
    )
    assert index == 0


def test_without_a_thumbnail_the_tissue_mask_decides() -> None:
    mask = np.zeros((4, 8), dtype=bool)
    mask[2, 6] = True
    cells = TissueCells(cells=np.ones((4, 8), dtype=bool), extent=EXTENT, mask=mask)
    index, place = choose_show(cells, extent_lr=EXTENT, block_px=8 * CELL_PX, scale=2)
    assert (index, place) == (1, (6 * CELL_PX, 2 * CELL_PX))


def test_a_slide_smaller_than_a_cell_is_shown_from_its_corner() -> None:
    index, place = choose_show(None, extent_lr=(7, 1), block_px=1024, scale=2)
    assert (index, place) == (0, (0, 0))
    thumbnail = np.full((1, 7, 3), 9, dtype=np.uint8)
    assert choose_show(None, extent_lr=(7, 1), block_px=1024, scale=2, thumbnail=thumbnail) == (
        0,
        (0, 0),
    )
