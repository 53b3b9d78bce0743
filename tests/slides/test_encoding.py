"""Blocks as tiles: every level is what the whole image gives, each tile decodes to it."""

from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import skimage.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from carn.slides.encoding import (
    NOT_FLAT,
    encode_block,
    filled_up,
    flat_colour,
    flat_tile,
    halved,
)
from carn.slides.pyramid import pyramid_levels
from carn.slides.slide_output import SlideFormat
from carn.slides.top_levels import level_strips

LOSSLESS = SlideFormat(compression="lossless", tile_px=16)


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    return np.ascontiguousarray(skimage.data.immunohistochemistry())


def streams_of(block, level: int) -> list[bytes]:
    lengths = np.concatenate([found.ravel() for found in block.lengths])
    ends = np.cumsum(lengths)
    first = sum(found.size for found in block.lengths[:level])
    own = range(first, first + block.lengths[level].size)
    return [block.payload[ends[i] - lengths[i] : ends[i]] for i in own]


def put_together(block, level: int, shape: tuple[int, ...]) -> np.ndarray:
    """A level from lossless tiles."""
    rows, columns = block.lengths[level].shape
    pixels = np.empty((rows * 16, columns * 16, 3), np.uint8)
    for number, stream in enumerate(streams_of(block, level)):
        colour = int(block.flat[level].flat[number])
        values = imagecodecs.zlib_decode(stream or flat_tile(colour, form=LOSSLESS))
        tile = np.frombuffer(values, np.uint8).reshape(16, 16, 3)
        y, x = number // columns * 16, number % columns * 16
        pixels[y : y + 16, x : x + 16] = imagecodecs.delta_decode(tile, axis=-2)
    return pixels[: shape[0], : shape[1]]


@given(
    height=st.integers(1, 150), width=st.integers(1, 150), seed=st.integers(0, 5), two=st.booleans()
)
def test_halving_is_that_of_pil(height: int, width: int, seed: int, two: bool) -> None:
    rng = np.random.default_rng(seed)
    # Neighbours that differ by little meet every rounding.
    pixels = rng.integers(254 if two else 0, 256, (height, width, 3), np.uint8)
    assert np.array_equal(halved(pixels), np.asarray(Image.fromarray(pixels).reduce(2)))


@given(height=st.integers(1, 64), width=st.integers(1, 64), seed=st.integers(0, 3))
def test_lossless_tiles_hold_every_level_exactly(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    block = encode_block(pixels, num_levels=3, has_more_levels=True, form=LOSSLESS)
    for level in range(3):
        assert np.array_equal(put_together(block, level, pixels.shape), pixels)
        pixels = np.asarray(Image.fromarray(pixels).reduce(2))
    assert np.array_equal(block.piece, pixels)


def test_a_slide_without_more_levels_has_no_piece(tissue: np.ndarray) -> None:
    block = encode_block(tissue[:64, :64], num_levels=1, has_more_levels=False, form=LOSSLESS)
    assert block.piece is None
    assert len(block.lengths) == 1


@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
def test_jpeg_tiles_are_those_of_the_bare_encoder(tissue: np.ndarray, subsampling: str) -> None:
    form = SlideFormat(tile_px=128, quality=77, subsampling=subsampling)
    block = encode_block(tissue[:200, :256], num_levels=2, has_more_levels=False, form=form)
    assert [found.shape for found in block.lengths] == [(2, 2), (1, 1)]
    assert all(np.all(found == NOT_FLAT) for found in block.flat)
    border = np.pad(tissue[128:200, :128], ((0, 56), (0, 0), (0, 0)), mode="edge")
    for number, tile in ((1, tissue[:128, 128:256]), (2, border)):
        expected = simplejpeg.encode_jpeg(
            np.ascontiguousarray(tile), quality=77, colorspace="RGB", colorsubsampling=subsampling
        )
        assert streams_of(block, 0)[number] == expected


def test_tiles_of_one_colour_take_no_bytes(tissue: np.ndarray) -> None:
    pixels = tissue[:64, :48].copy()
    pixels[:32, :32] = (250, 128, 3)
    pixels[40, 40] += 1
    block = encode_block(pixels, num_levels=2, has_more_levels=False, form=LOSSLESS)
    assert np.array_equal(block.flat[0][:2, :2], np.full((2, 2), 0xFA8003))
    assert block.flat[1][0, 0] == 0xFA8003
    assert np.array_equal(block.lengths[0] == 0, block.flat[0] != NOT_FLAT)
    assert len(block.payload) == sum(int(found.sum()) for found in block.lengths)


def test_one_px_of_another_colour_is_seen_wherever_it_is() -> None:
    tile = np.full((16, 16, 3), 255, np.uint8)
    assert flat_colour(tile) == 0xFFFFFF
    assert flat_colour(tile * 0) == 0
    for y, x, channel in [(0, 0, 0), (0, 7, 1), (7, 0, 2), (9, 9, 1), (15, 15, 0), (15, 3, 2)]:
        other = tile.copy()
        other[y, x, channel] = 254
        assert flat_colour(other) == NOT_FLAT


def test_border_tiles_repeat_their_edge() -> None:
    tile = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    filled = filled_up(tile, tile_px=16)
    assert filled.shape == (16, 16, 3)
    assert np.array_equal(filled[:, 0], np.tile([0, 1, 2], (16, 1)))
    assert np.array_equal(filled[:, 1:], np.tile([3, 4, 5], (16, 15, 1)))


def test_threads_change_nothing(tissue: np.ndarray) -> None:
    form = SlideFormat(tile_px=64)
    alone = encode_block(tissue, num_levels=4, has_more_levels=True, form=form)
    with ThreadPoolExecutor(4) as pool:
        spread = encode_block(tissue, num_levels=4, has_more_levels=True, form=form, pool=pool)
    assert spread.payload == alone.payload
    assert np.array_equal(spread.piece, alone.piece)


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 40),
    band=st.integers(1, 50).map(lambda half: 2 * half),
    strip=st.sampled_from([16, 32]),
)
def test_strips_are_the_levels_of_the_whole(height: int, width: int, band: int, strip: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    bands = [pixels[top : top + band] for top in range(0, height, band)]
    found: dict[int, list[np.ndarray]] = {level: [] for level in range(4)}
    for level, rows in level_strips(bands, num_levels=4, strip_px=strip):
        found[level].append(rows)
    for level in range(4):
        assert all(len(rows) == strip for rows in found[level][:-1])
        assert np.array_equal(np.concatenate(found[level]), pixels)
        pixels = np.asarray(Image.fromarray(pixels).reduce(2))


def test_the_levels_are_those_of_a_slide_written_at_once(tissue: np.ndarray) -> None:
    pixels = np.tile(tissue, (3, 3, 1))[:1499, :1237]
    levels = list(pyramid_levels(pixels))
    assert len(levels) == 2
    assert np.array_equal(halved(pixels), levels[1])
