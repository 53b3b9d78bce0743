"""SR made small against LR: the degradation's numbers, per cell, joined over blocks."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from carn.degradation.bicubic import SCALES, degrade
from carn.slides.slide import Rgb
from carn.upscaling.consistency import (
    BEST_DB,
    CONSISTENCY_CELL_PX,
    cells_under,
    consistency,
    heat_map_png,
    join,
    low_cells,
    measured_box,
    resized,
    to_db,
)
from carn.upscaling.lr_view import Box
from tests.conftest import draw

CELL = CONSISTENCY_CELL_PX


def whole_map(sr: Rgb, lr: Rgb, *, scale: int) -> np.ndarray:
    extent = (sr.shape[1], sr.shape[0])
    return consistency(
        sr, lr, sr_box=(0, 0, *extent), lr_corner=(0, 0), extent_sr=extent, scale=scale
    )


@pytest.mark.parametrize("scale", SCALES)
def test_making_small_is_the_degradation_to_a_grey_level(scale: int) -> None:
    hr = draw(40 * scale, 30 * scale)
    small = resized(hr, width=40, height=30).astype(int)
    assert np.abs(small - degrade(hr, scale=scale)).max() <= 1


def test_images_of_one_column_are_no_exception() -> None:
    # torch's float kernels go wrong there.
    hr = draw(2, 24)
    turned = np.ascontiguousarray(hr.transpose(1, 0, 2))
    column = resized(hr, width=1, height=12)
    row = resized(turned, width=12, height=1)
    assert np.abs(column[:, 0].astype(int) - row[0]).max() <= 1


def test_read_only_and_cut_out_pixels_are_taken() -> None:
    hr = draw(40, 30)
    hr.setflags(write=False)
    np.testing.assert_array_equal(
        resized(hr[2:22, 4:24], width=10, height=10),
        resized(hr[2:22, 4:24].copy(), width=10, height=10),
    )


@pytest.mark.parametrize("scale", SCALES)
def test_the_map_is_the_mean_squared_error_of_each_cell(scale: int) -> None:
    sr = draw(100 * scale, 70 * scale)
    lr = draw(100, 70, seed=4)
    found = whole_map(sr, lr, scale=scale)
    assert found.shape == (2, 2)
    assert found.dtype == np.float32
    errors = (degrade(sr, scale=scale).astype(float) - lr) ** 2
    for row, column in np.ndindex(2, 2):
        cell = errors[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        assert found[row, column] == pytest.approx(cell.mean(), rel=0.01)


def test_sr_that_agrees_is_told_from_sr_that_does_not() -> None:
    sr = draw(256, 256)
    lr = degrade(sr, scale=2)
    assert to_db(whole_map(sr, lr, scale=2)).min() > 50
    # A structure of 16 SR px that LR does not have, in one cell.
    sr[150:166, 20:36] = 0
    decibels = to_db(whole_map(sr, lr, scale=2))
    assert decibels[1, 0] < 35
    assert np.delete(decibels.ravel(), 2).min() > 50
    # Another colour of everything, as a wrong channel order would be.
    assert to_db(whole_map(np.ascontiguousarray(sr[..., ::-1]), lr, scale=2)).max() < 20


@settings(max_examples=40)
@given(
    extent=st.tuples(st.integers(1, 300), st.integers(1, 200)),
    scale=st.sampled_from(SCALES),
    block_px=st.integers(100, 900),
)
def test_blocks_join_to_the_map_of_the_whole(
    extent: tuple[int, int], scale: int, block_px: int
) -> None:
    width, height = extent
    lr = draw(width, height)
    # The same error at every px: then it does not matter which px of a cell are left out.
    sr = lr.clip(0, 240).repeat(scale, axis=0).repeat(scale, axis=1)
    lr = np.minimum(resized(sr, width=width, height=height), 252) + np.uint8(3)
    extent_sr = (width * scale, height * scale)
    parts: list[tuple[Box, np.ndarray]] = []
    measured = np.zeros((height, width), dtype=int)
    for y in range(0, extent_sr[1], block_px):
        for x in range(0, extent_sr[0], block_px):
            box = (x, y, min(block_px, extent_sr[0] - x), min(block_px, extent_sr[1] - y))
            corner = (x // scale, y // scale)
            found = consistency(
                sr[y : y + box[3], x : x + box[2]],
                lr[corner[1] :, corner[0] :],
                sr_box=box,
                lr_corner=corner,
                extent_sr=extent_sr,
                scale=scale,
            )
            parts.append((box, found))
            left, top, across, down = measured_box(box, extent_sr=extent_sr, scale=scale)
            measured[top : top + down, left : left + across] += 1
    assert measured.max() <= 1
    joined = join(parts, extent_sr=extent_sr, scale=scale)
    assert joined.shape == (math.ceil(height / CELL), math.ceil(width / CELL))
    for row, column in np.ndindex(joined.shape):
        place = np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        assert np.isnan(joined[row, column]) == (not measured[place].any())
    known = joined[~np.isnan(joined)]
    np.testing.assert_allclose(known, 9, rtol=0.05)
    if block_px >= max(extent_sr):
        assert measured.all()


def test_a_blocks_rim_is_left_out_but_not_the_slides() -> None:
    extent = (800, 400)
    assert measured_box((0, 0, 400, 400), extent_sr=extent, scale=2) == (0, 0, 196, 200)
    assert measured_box((400, 0, 400, 400), extent_sr=extent, scale=2) == (204, 0, 196, 200)
    # At x3 a block of 400 SR px ends within an LR px.
    assert measured_box((400, 0, 400, 399), extent_sr=(1200, 399), scale=3) == (138, 0, 124, 133)
    assert measured_box((400, 0, 10, 399), extent_sr=(1200, 399), scale=3)[2] == 0
    assert cells_under((400, 0, 400, 399), scale=3) == (2, 0, 3, 3)


def test_cells_of_two_blocks_weigh_by_their_px() -> None:
    # 200 LR px in blocks of 100: cell 1 has 64..96 from the left and 104..128 from the right.
    left = np.full((1, 2), 10, dtype=np.float32)
    right = np.full((1, 3), 40, dtype=np.float32)
    boxes: list[Box] = [(0, 0, 200, 100), (200, 0, 200, 100)]
    joined = join(zip(boxes, (left, right), strict=True), extent_sr=(400, 100), scale=2)
    assert joined.shape == (1, 4)
    assert joined[0].tolist() == pytest.approx([10, (32 * 10 + 24 * 40) / 56, 40, 40])
    with pytest.raises(ValueError, match="cells"):
        join([(boxes[0], right)], extent_sr=(400, 100), scale=2)


def test_decibels_are_capped_and_unknown_stays_unknown() -> None:
    found = to_db(np.array([[0.0, 1.0, 65025.0, np.nan]], dtype=np.float32))[0]
    assert found[:3].tolist() == pytest.approx([BEST_DB, 48.1308, 0.0], abs=1e-3)
    assert np.isnan(found[3])


def test_low_cells_are_listed_worst_first_where_they_are() -> None:
    errors = np.array([[1, 500, np.nan], [20, 2000, 1]], dtype=np.float32)
    found = low_cells(errors, threshold_db=30, extent_l0=(1000, 900), downsample=(4.0, 5.0))
    places = [(cell.x_l0, cell.y_l0, cell.width, cell.height) for cell in found]
    assert places == [(256, 320, 256, 320), (256, 0, 256, 320)]
    assert [cell.consistency_db for cell in found] == [15.12, 21.14]
    edge = low_cells(
        np.full((1, 1), 9999, dtype=np.float32),
        threshold_db=30,
        extent_l0=(50, 60),
        downsample=(1.0, 1.0),
    )
    assert (edge[0].width, edge[0].height) == (50, 60)
    assert (
        len(low_cells(errors, threshold_db=99, extent_l0=(9, 9), downsample=(1, 1), limit=2)) == 2
    )
    assert type(found[0].x_l0) is int


def test_the_heat_map_brightens_with_consistency_and_keeps_the_worst() -> None:
    errors = np.full((40, 90), 1.0, dtype=np.float32)
    errors[0, 0] = np.nan
    errors[39, 89] = 5000
    errors[10, 10] = 0

    def pixels(**options: int) -> np.ndarray:
        with Image.open(io.BytesIO(heat_map_png(errors, **options))) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB")).astype(int)

    full = pixels()
    assert full.shape == (40, 90, 3)
    assert full[0, 0].tolist() == [160, 160, 160]
    brightness = full.sum(axis=2)
    assert brightness[39, 89] < brightness[20, 20] < brightness[10, 10]
    small = pixels(max_side_px=30)
    assert small.shape == (14, 30, 3)
    np.testing.assert_array_equal(small[13, 29], full[39, 89])
    np.testing.assert_array_equal(small[0, 0], full[0, 1])
    np.testing.assert_array_equal(small[3, 3], full[20, 20])
