"""Which cells are near tissue, and the windows that cover them."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carn.errors import CarnError, DamagedTileError
from carn.upscaling.lr_view import InputConfig, LrView, open_view
from carn.upscaling.windows import (
    CELL_PX,
    TISSUE_MARGIN_PX,
    CellGrid,
    TissueCells,
    cells_near,
    cover,
    flat_colour,
    runs,
)
from tests.upscaling.lab import DrawnSlide, view_of

PINK = (200, 90, 160)


def slide_with(*spots: tuple[int, int, int, int], width: int, height: int) -> np.ndarray:
    """White, with pink boxes (x, y, width, height)."""
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    for x, y, across, down in spots:
        pixels[y : y + down, x : x + across] = PINK
    return pixels


@settings(max_examples=60)
@given(
    extent=st.tuples(st.integers(1, 1500), st.integers(1, 1500)),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    margin=st.integers(0, 300),
    seed=st.integers(0, 9),
)
def test_cells_near_tissue_are_those_within_the_margin(
    extent: tuple[int, int], shape: tuple[int, int], margin: int, seed: int
) -> None:
    mask = np.random.default_rng(seed).random(shape) < 0.03
    cells = cells_near(mask, extent=extent, margin_px=margin)
    width, height = extent
    assert cells.shape == (math.ceil(height / CELL_PX), math.ceil(width / CELL_PX))
    unit_x, unit_y = width / shape[1], height / shape[0]
    for row, column in np.ndindex(cells.shape):
        x0, x1 = column * CELL_PX - margin, min((column + 1) * CELL_PX, width) + margin
        y0, y1 = row * CELL_PX - margin, min((row + 1) * CELL_PX, height) + margin
        near = any(
            x * unit_x < x1 - 1e-6
            and (x + 1) * unit_x > x0 + 1e-6
            and y * unit_y < y1 - 1e-6
            and (y + 1) * unit_y > y0 + 1e-6
            for y, x in np.argwhere(mask)
        )
        assert cells[row, column] == near


def test_tissue_is_found_in_the_frame_of_the_view() -> None:
    pixels = slide_with((1100, 600, 300, 200), width=4096, height=2048)
    slide = DrawnSlide(pixels, pixels[::2, ::2])
    tissue = TissueCells.of(LrView(slide, InputConfig()), halo_px=0)
    near = {(row, column) for row, column in np.argwhere(tissue.cells).tolist()}
    # From 1100 - 64 to 1400 + 64, and from 600 - 64 to 800 + 64.
    assert TISSUE_MARGIN_PX == 64
    assert near == set(itertools.product((2, 3), (4, 5)))
    coarse = TissueCells.of(LrView(slide, InputConfig(level=1)), halo_px=32)
    assert coarse.extent == (2048, 1024)
    near = {(row, column) for row, column in np.argwhere(coarse.cells).tolist()}
    assert near == set(itertools.product((0, 1), (1, 2, 3)))
    inside = coarse.is_tissue(np.array([549, 552, 698, 702, 5000, -1]), np.array([350]))
    assert inside.tolist() == [[False, True, True, False, False, False]]


def test_more_context_makes_more_cells_tissue() -> None:
    view = LrView(
        DrawnSlide(slide_with((1100, 600, 300, 200), width=4096, height=2048)), InputConfig()
    )
    near, far = (TissueCells.of(view, halo_px=halo).cells for halo in (0, 400))
    assert far[near].all()
    assert far.sum() > near.sum()


def test_all_of_an_image_and_of_a_slide_without_tissue_is_inferred(
    caplog: pytest.LogCaptureFixture,
) -> None:
    blank = slide_with(width=600, height=300)
    image = TissueCells.of(view_of(blank))
    assert image.cells.shape == (2, 3)
    assert image.cells.all()
    assert not caplog.records
    slide = TissueCells.of(LrView(DrawnSlide(blank), InputConfig()))
    assert slide.cells.all()
    assert "no tissue" in caplog.text
    inside = slide.is_tissue(np.array([0, 599, 600]), np.array([-1, 0, 299, 300]))
    assert inside.sum() == 4


def test_damage_of_the_overview_fails_the_slide_or_lets_all_be_inferred() -> None:
    slide = DrawnSlide(slide_with((0, 0, 9, 9), width=600, height=300), bad=((5, 5, 9, 9),))
    with pytest.raises(DamagedTileError):
        TissueCells.of(LrView(slide, InputConfig()))
    cells = TissueCells.of(LrView(slide, InputConfig(on_damaged_tile="upsample")))
    assert cells.cells.all()


@pytest.mark.parametrize("has_mask", [True, False])
def test_cells_go_through_bytes(has_mask: bool) -> None:
    rng = np.random.default_rng(0)
    cells = TissueCells(
        cells=rng.random((5, 13)) < 0.5,
        extent=(3300, 1200),
        mask=rng.random((77, 211)) < 0.5 if has_mask else None,
    )
    found = TissueCells.from_bytes(cells.to_bytes())
    np.testing.assert_array_equal(found.cells, cells.cells)
    assert found.extent == cells.extent
    if cells.mask is None:
        assert found.mask is None
    else:
        np.testing.assert_array_equal(found.mask, cells.mask)
    with pytest.raises(CarnError, match="find them again"):
        TissueCells.from_bytes(cells.to_bytes()[:-40])
    with pytest.raises(CarnError, match="find them again"):
        TissueCells.from_bytes(b"")


# ------------------------------------------------------------------------------------- windows

boxes = st.tuples(
    st.integers(0, 900).map(lambda n: 4 * n),
    st.integers(0, 900).map(lambda n: 4 * n),
    st.integers(1, 2300),
    st.integers(1, 2300),
)


def cost(windows: list[tuple[int, int, int, int]], halo: int) -> int:
    return sum((width + 2 * halo) * (height + 2 * halo) for _, _, width, height in windows)


@settings(max_examples=80)
@given(
    box=boxes,
    halo=st.sampled_from([4, 36, 64, 256]),
    most=st.sampled_from([100, 256, 700, 1024, 4096]),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 5),
)
def test_windows_cover_what_is_wanted_once(
    box: tuple[int, int, int, int], halo: int, most: int, share: float, seed: int
) -> None:
    grid = CellGrid.under(box)
    wanted = np.random.default_rng(seed).random((grid.num_rows, grid.num_columns)) < share
    windows = cover(wanted, grid, halo_px=halo, max_window_px=most)
    x0, y0, width, height = box
    painted = np.zeros((height, width), dtype=np.uint8)
    for x, y, across, down in windows:
        assert x0 <= x < x + across <= x0 + width
        assert y0 <= y < y + down <= y0 + height
        assert max(across, down) <= max(most, CELL_PX)
        assert x % 4 == y % 4 == 0
        painted[y - y0 : y - y0 + down, x - x0 : x - x0 + across] += 1
    assert painted.max(initial=0) <= 1
    singles = [grid.box_of(row, column) for row, column in np.argwhere(wanted).tolist()]
    for x, y, across, down in singles:
        assert (painted[y - y0 : y - y0 + down, x - x0 : x - x0 + across] == 1).all()
    assert cost(windows, halo) <= cost(singles, halo)


def test_the_grid_parts_a_box_at_multiples_of_the_cell() -> None:
    grid = CellGrid.under((500, 0, 30, 600))
    assert (grid.num_rows, grid.num_columns) == (3, 2)
    assert grid.box_of(0, 0) == (500, 0, 12, 256)
    assert grid.box_of(2, 1) == (512, 512, 18, 88)


def test_full_tissue_takes_the_largest_windows_and_a_speck_the_smallest() -> None:
    grid = CellGrid.under((0, 0, 2048, 2048))
    wanted = np.ones((8, 8), dtype=bool)
    windows = cover(wanted, grid, halo_px=36, max_window_px=1024)
    assert sorted(windows) == [
        (0, 0, 1024, 1024),
        (0, 1024, 1024, 1024),
        (1024, 0, 1024, 1024),
        (1024, 1024, 1024, 1024),
    ]
    wanted[:] = False
    wanted[3, 5] = True
    assert cover(wanted, grid, halo_px=36, max_window_px=1024) == [(1280, 768, 256, 256)]


def test_the_cheaper_of_one_window_and_its_parts_is_taken() -> None:
    grid = CellGrid.under((0, 0, 512, 512))
    three = np.array([[True, True], [True, False]])
    # 584^2 = 341,056 for all four, 3 x 328^2 = 322,752 for the three.
    assert len(cover(three, grid, halo_px=36, max_window_px=512)) == 3
    # 640^2 = 409,600, 3 x 384^2 = 442,368.
    assert len(cover(three, grid, halo_px=64, max_window_px=512)) == 1


@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 20))
def test_runs_hold_every_wanted_cell_once(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = rng.random(shape) < 0.6
    wanted[rng.random(shape[0]) < 0.4] = True
    found = np.zeros(shape, dtype=int)
    for row, column, down, across in runs(wanted):
        found[row : row + down, column : column + across] += 1
    np.testing.assert_array_equal(found, wanted)
    assert list(runs(np.ones(shape, dtype=bool))) == [(0, 0, *shape)]


def test_only_what_is_all_of_one_colour_is_flat() -> None:
    pixels = np.full((20, 30, 3), PINK, dtype=np.uint8)
    assert flat_colour(pixels) == PINK
    for place in ((0, 29, 1), (19, 0, 2), (10, 10, 0)):
        pixels[place] += 1
        assert flat_colour(pixels) is None
        pixels[place] -= 1


def test_tissue_of_a_real_slide(shared_data: Path, find_slide: Callable[[str], Path]) -> None:
    view = open_view(find_slide("*.svs"), InputConfig())
    tissue = TissueCells.of(view, halo_px=36)
    assert 0 < tissue.cells.mean() <= 1
    assert tissue.mask is not None
    stored = tissue.to_bytes()
    assert len(stored) < 200_000


@pytest.fixture
def find_slide(shared_data: Path) -> Callable[[str], Path]:
    def find(pattern: str) -> Path:
        found = sorted(shared_data.rglob(pattern))
        if not found:
            pytest.skip(f"no {pattern} among the real samples")
        return found[0]

    return find
