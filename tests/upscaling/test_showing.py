"""Which place of a slide is shown: where the stain is, not a speck on the glass."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from carn.upscaling.blocks import block_region, num_blocks, read_block
from carn.upscaling.finish import _pictures
from carn.upscaling.showing import choose_show, shown_facts
from carn.upscaling.windows import CELL_PX, TissueCells
from tests.conftest import draw
from tests.upscaling.lab import view_of

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


# ------------------------------------------------------------------------- what is kept of blocks


def kept_of(
    extent_lr: tuple[int, int], *, scale: int, block_px: int, show: int, cell: tuple[int, int]
) -> dict[str, Any]:
    """What the shown block of a drawn slide and its neighbour keep; each LR px becomes its SR."""
    view = view_of(draw(*extent_lr))
    extent = (extent_lr[0] * scale, extent_lr[1] * scale)
    plan: Any = SimpleNamespace(
        task=SimpleNamespace(scale=scale),
        spec=SimpleNamespace(extent=extent, block_px=block_px),
        lr_extent=extent_lr,
        show=show,
        show_cell=cell,
    )
    kept: dict[str, Any] = {}
    columns, rows = num_blocks(extent, block_px=block_px)
    for index in range(show, min(show + 2, columns * rows)):
        region = block_region(extent, block_px=block_px, index=index, scale=scale, halo_px=8)
        read = read_block(view, region)
        sr = read.pixels.repeat(scale, axis=0).repeat(scale, axis=1)
        left, top = region.x0 - region.x * scale, region.y0 - region.y * scale
        sr = sr[top : top + region.y1 - region.y0, left : left + region.x1 - region.x0]
        kept |= shown_facts(plan, index, read, sr)
    return kept


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("stained", ["left", "middle", "right"])
@pytest.mark.parametrize("extent_lr", [(1500, 1300), (1367, 300), (700, 90), (7, 1)])
def test_crops_are_of_one_place_at_any_scale(
    extent_lr: tuple[int, int], stained: str, scale: int
) -> None:
    thumbnail = np.full((26, 30, 3), 240, dtype=np.uint8)
    place = {"left": 0, "middle": 14, "right": 27}[stained]
    thumbnail[:, place : place + 3] = (220, 100, 180)
    for block_px in (4096, 1024):
        show, cell = choose_show(
            None, extent_lr=extent_lr, block_px=block_px, scale=scale, thumbnail=thumbnail
        )
        kept = kept_of(extent_lr, scale=scale, block_px=block_px, show=show, cell=cell)
        lr, sr = kept["crop_lr"], kept["crop_sr"]
        assert lr.size > 0
        np.testing.assert_array_equal(sr, lr.repeat(scale, axis=0).repeat(scale, axis=1))
        has_neighbour = "seam_left" in kept
        assert set(_pictures(kept, scale)) == ({"crop", "seam"} if has_neighbour else {"crop"})


def test_a_block_without_a_whole_px_of_lr_has_no_crop() -> None:
    # At x3 the second block begins within the last px of LR but one, and ends with the last.
    extent_lr, block_px = (683, 683), 2048
    kept = kept_of(extent_lr, scale=3, block_px=block_px, show=1, cell=(683, 0))
    assert "crop_lr" not in kept
    assert "crop_sr" not in kept
    assert "rim_right" in kept


def test_a_picture_that_cannot_be_drawn_is_left_out_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shown = {
        "crop_lr": draw(10, 10),
        "crop_sr": draw(30, 29),
        "seam_left": draw(8, 40),
        "seam_right": draw(8, 40),
    }
    with caplog.at_level(logging.ERROR):
        assert set(_pictures(shown, 3)) == {"seam"}
    assert "picture 'crop' cannot be drawn" in caplog.text
    shown["seam_left"] = draw(8, 30)
    assert _pictures(shown, 3) == {}
