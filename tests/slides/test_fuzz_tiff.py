"""Whatever is wrong with a TIFF: it opens, or is one error that names it; nothing hangs."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageCms

from carn.errors import SlideError
from carn.slides import Slide, open_slide
from carn.slides.openslide_reader import OpenSlideSlide
from carn.slides.provenance import read_provenance
from tests.fuzzing import examples, only_own_errors
from tests.slides.test_open_slide import APERIO, PHILIPS
from tests.slides.tiff_mutations import mutated, restated

WriteSlide = Callable[..., Path]
FORMS: dict[str, dict[str, object]] = {
    "plain": {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"},
    "big": {"is_bigtiff": True, "is_rgb": True},
    "deflate": {"compression": "deflate"},
    "aperio": {"description": APERIO},
    "philips": {"description": PHILIPS, "software": "Philips DP v1.0"},
    "lzw": {"compression": "lzw", "is_bigtiff": True},
    "jfif": {"has_jfif": True},
    "jfif under RGB": {"has_jfif": True, "is_rgb": True},
    "RGB, 4:4:4": {"is_rgb": True, "subsampling": "444"},
}


@pytest.fixture
def contents(write_slide: WriteSlide) -> list[bytes]:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return [
        write_slide(
            f"{name}.tif", extent=(200, 150), num_levels=2, tile_px=64, iccprofile=profile, **form
        ).read_bytes()
        for name, form in FORMS.items()
    ]


def read_some(slide: Slide) -> None:
    """A corner of every level, the last px, and a picture of the whole where it is small."""
    for number, level in enumerate(slide.levels[:4]):
        for place in ((0, 0), (slide.extent[0] - 20, slide.extent[1] - 20)):
            # A place that is damaged leaves the others.
            with suppress(SlideError):
                found = slide.read_region(*place, 90, 70, level=number)
                assert found.shape == (70, 90, 3)
        assert level.downsample > 0
    if slide.extent[0] * slide.extent[1] < 4_000_000:
        slide.thumbnail(64)


def test_a_mutated_tiff_opens_or_is_one_error(contents: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "mutated.tif"

    @examples(150)
    @given(mutated(contents))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with only_own_errors(), open_slide(path) as slide:
            read_some(slide)
        with only_own_errors():
            read_provenance(str(path))

    check()


def test_openslide_gets_through_what_the_direct_reader_would_take(
    contents: list[bytes], tmp_path: Path
) -> None:
    path = tmp_path / "mutated.tif"

    @examples(100)
    @given(mutated(contents))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            open_slide(path).close()
        except SlideError:
            return  # what is refused goes to nobody
        with only_own_errors(), OpenSlideSlide(str(path), path) as slide:
            read_some(slide)

    check()


def first_image(path: Path) -> np.ndarray | None:
    """Level 0 where tifffile and OpenSlide both read it, as much the same; None elsewhere."""
    try:
        with warnings.catch_warnings(), tifffile.TiffFile(path) as tiff:
            warnings.simplefilter("ignore")
            mine = tiff.pages[0].asarray()
        with openslide.OpenSlide(str(path)) as slide:
            theirs = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))
    except Exception:  # whatever they come upon in such a file
        return None
    if mine.dtype != np.uint8 or theirs[..., 3].min() < 255:
        return None
    return mine if is_same(mine, theirs[..., :3]) else None


def is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether images differ by no more than decoders of JPEG do."""
    if one.shape != other.shape:
        return False
    return float(np.abs(one.astype(float) - other.astype(float)).mean()) < 4


def test_what_is_not_refused_is_what_two_others_read(contents: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "restated.tif"
    num_compared = 0

    @examples(250)
    @given(restated(contents))
    def check(content: bytes) -> None:
        nonlocal num_compared
        path.write_bytes(content)
        try:
            with open_slide(path) as slide:
                found = slide.read_region(0, 0, *slide.extent)
        except SlideError:
            return
        if (expected := first_image(path)) is not None:
            num_compared += 1
            assert is_same(found, expected)

    check()
    assert num_compared > 20


@given(st.binary(max_size=300), st.sampled_from((b"", b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0")))
@examples(60)
def test_noise_is_one_error(tmp_path: Path, noise: bytes, head: bytes) -> None:
    path = tmp_path / "noise.tif"
    path.write_bytes(head + noise)
    with only_own_errors(), open_slide(path) as slide:
        read_some(slide)


@pytest.mark.slow
def test_many_mutated_tiffs(contents: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "mutated.tif"

    @examples(5000)
    @given(mutated(contents))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with only_own_errors(), open_slide(path) as slide:
            read_some(slide)

    check()
