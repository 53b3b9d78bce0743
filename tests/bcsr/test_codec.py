"""Tile encodings lose nothing, repeat themselves, and refuse what is not theirs."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from carn.bcsr.codec import Encoding, decode, encode

ENCODINGS = get_args(Encoding)
tiles = st.tuples(st.integers(1, 24), st.integers(1, 24), st.just(3)).flatmap(
    lambda shape: arrays(np.uint8, shape)
)


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(tile=tiles)
@example(tile=np.array([[[255, 0, 1]]], dtype=np.uint8))
@example(tile=np.random.default_rng(1).integers(0, 256, (61, 33, 3), dtype=np.uint8))
def test_nothing_is_lost_and_bytes_repeat(tile: np.ndarray, encoding: Encoding) -> None:
    content = encode(tile, encoding)
    assert content == encode(tile.copy(), encoding)
    decoded = decode(content, encoding, extent=tile.shape[1::-1])
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, tile)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_view_is_encoded_as_its_copy(encoding: Encoding) -> None:
    whole = np.random.default_rng(2).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for view in (whole[3:30, 7:41], whole[::2, ::3]):
        np.testing.assert_array_equal(
            decode(encode(view, encoding), encoding, extent=view.shape[1::-1]), view
        )


def test_png_is_what_others_read(tmp_path) -> None:
    tile = np.random.default_rng(3).integers(0, 256, (9, 17, 3), dtype=np.uint8)
    path = tmp_path / "tile.png"
    path.write_bytes(encode(tile, "png"))
    with Image.open(path) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), tile)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:10], id="header only"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: content[:-20], id="cut"),
        pytest.param(lambda content: bytes(8) + content[8:], id="no magic"),
        pytest.param(lambda content: b"no image at all", id="text"),
    ],
)
def test_damaged_bytes_are_a_value_error(encoding: Encoding, damage) -> None:
    tile = np.random.default_rng(4).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"(?i)jxl|jpeg xl|png"):
        decode(damage(encode(tile, encoding)), encoding, extent=(48, 48))


def test_an_encoding_does_not_read_the_other() -> None:
    tile = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="PNG"):
        decode(encode(tile, "jxl"), "png", extent=(4, 4))
    with pytest.raises(ValueError, match="JPEG XL"):
        decode(encode(tile, "png"), "jxl", extent=(4, 4))


def test_an_unknown_encoding_is_named_with_the_known_ones() -> None:
    tile = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"'webp'.*'jxl', 'png'"):
        encode(tile, "webp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'webp'.*'jxl', 'png'"):
        decode(b"", "webp", extent=(4, 4))
