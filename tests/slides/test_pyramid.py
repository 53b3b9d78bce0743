"""Written pyramids: every reader opens them, and they hold what was given."""

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, ImageCms

from carn.slides import open_slide
from carn.slides.pyramid import SMALLEST_LEVEL_PX, pyramid_levels, write_pyramid


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """2301 x 1507 px of smooth colour: odd sides, three levels."""
    y, x = np.mgrid[0:1507, 0:2301]
    colour = (160 + 60 * np.sin(x / 90), 110 + 60 * np.sin(y / 70), 150 + 50 * np.sin((x - y) / 80))
    return np.stack(colour, axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def path(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pyramid") / "slide.tif"
    write_pyramid(path, pixels, mpp_um=0.25, tile_px=256, icc_profile=icc(), description="drawn")
    return path


def icc() -> bytes:
    # Without its date of creation, so that two calls agree.
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)
    return bytes(profile)


def test_levels_halve_by_the_mean_until_a_screen_shows_them(pixels: np.ndarray) -> None:
    levels = list(pyramid_levels(pixels))
    assert [level.shape for level in levels] == [(1507, 2301, 3), (754, 1151, 3), (377, 576, 3)]
    assert max(levels[-1].shape) <= SMALLEST_LEVEL_PX < max(levels[-2].shape)
    mean = pixels[:1506, :2300].reshape(753, 2, 1150, 2, 3).mean(axis=(1, 3))
    assert np.abs(levels[1][:753, :1150] - mean).max() <= 1
    assert len(list(pyramid_levels(pixels[:10, :20]))) == 1


def test_our_reader_opens_it(path: Path, pixels: np.ndarray) -> None:
    levels = list(pyramid_levels(pixels))
    with open_slide(path) as slide:
        assert slide.reader == "tiled-tiff"
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        assert slide.mpp == pytest.approx(0.25, rel=1e-4)
        assert slide.properties.icc_profile == icc()
        for number, expected in enumerate(levels):
            height, width = expected.shape[:2]
            found = slide.read_region(0, 0, width, height, level=number)
            assert np.abs(found.astype(int) - expected).mean() < 3


def test_openslide_opens_it(path: Path, pixels: np.ndarray) -> None:
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.level_dimensions == ((2301, 1507), (1151, 754), (576, 377))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25, rel=1e-4)
        found = slide.read_region((0, 0), 0, (2301, 1507))
        assert np.abs(np.asarray(found)[..., :3].astype(int) - pixels).mean() < 3
        assert found.info["icc_profile"] == icc()


def test_tifffile_opens_it_with_the_mpp_of_each_level(path: Path, pixels: np.ndarray) -> None:
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        assert tiff.pages[0].description == "drawn"
        assert [page.subfiletype for page in tiff.pages] == [0, 1, 1]
        for page, expected in zip(tiff.pages, pyramid_levels(pixels), strict=True):
            assert page.shape == expected.shape
            assert (page.tilewidth, page.tilelength) == (256, 256)
            assert np.abs(page.asarray().astype(int) - expected).mean() < 3
            num, den = page.tags["XResolution"].value
            assert page.tags["ResolutionUnit"].value == 3  # centimetres
            mpp = 10_000 * den / num
            assert mpp == pytest.approx(0.25 * pixels.shape[1] / expected.shape[1], rel=1e-4)


def test_pillow_opens_it(path: Path) -> None:
    with Image.open(path) as image:
        assert image.size == (2301, 1507)


def test_without_mpp_and_profile_none_is_invented(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    write_pyramid(path, np.full((100, 150, 3), 200, np.uint8), mpp_um=None)
    with open_slide(path) as slide:
        assert slide.mpp is None
        assert slide.properties.icc_profile is None
        assert slide.extent == (150, 100)


def test_quality_is_obeyed(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    sizes = []
    for quality in (30, 90):
        write_pyramid(tmp_path / "slide.tif", noise, mpp_um=1.0, quality=quality)
        sizes.append((tmp_path / "slide.tif").stat().st_size)
    assert sizes[1] > 1.5 * sizes[0]
