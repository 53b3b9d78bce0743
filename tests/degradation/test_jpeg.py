"""JPEG as scanners write it: libjpeg's own tables and pixels, and none that they do not have."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from carn.degradation.jpeg import (
    SUBSAMPLINGS,
    TABLES,
    encode_jpeg,
    quantisation_tables,
    through_jpeg,
)
from tests.upscaling.networks import tissue


@given(quality=st.integers(1, 100))
def test_ijg_tables_are_those_of_libjpeg(quality: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
    found = Image.open(buffer).quantization
    luma, chroma = quantisation_tables(quality)
    assert (tuple(found[0]), tuple(found[1])) == (luma, chroma)


@pytest.mark.parametrize("quality", [1, 30, 75, 100])
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_a_file_says_how_it_was_made(quality: int, tables: str, subsampling: str) -> None:
    from PIL.JpegImagePlugin import get_sampling

    image = Image.open(
        io.BytesIO(
            encode_jpeg(tissue(48), quality=quality, subsampling=subsampling, tables=tables)  # type: ignore[arg-type]
        )
    )
    wanted = quantisation_tables(quality, tables=tables)  # type: ignore[arg-type]
    assert tuple(tuple(table) for table in image.quantization.values()) == wanted
    assert SUBSAMPLINGS[get_sampling(image)] == subsampling


def test_pixels_are_those_of_pillow() -> None:
    buffer = io.BytesIO()
    Image.fromarray(tissue(65)).save(buffer, "JPEG", quality=80, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer))
    np.testing.assert_array_equal(through_jpeg(tissue(65), quality=80), expected)


def test_lower_qualities_are_farther_from_the_truth() -> None:
    image = tissue(128)
    errors = [
        float(np.square(through_jpeg(image, quality=quality).astype(float) - image).mean())
        for quality in (98, 90, 80, 60, 40)
    ]
    assert errors == sorted(errors)
    assert errors[-1] > 10 * errors[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quality": 0}, "quality 0 is not in 1..100"),
        ({"quality": 101}, "quality 101"),
        ({"quality": 80, "tables": "kodak"}, "'kodak' are not one of ijg, flat, robidoux"),
        ({"quality": 80, "subsampling": "4:1:1"}, "'4:1:1' is not one of 4:4:4, 4:2:2, 4:2:0"),
    ],
)
def test_what_there_is_not_is_named(changes: dict[str, object], said: str) -> None:
    import inspect

    with pytest.raises(ValueError, match=said):
        inspect.unwrap(encode_jpeg)(tissue(16), **changes)  # past the check of types
