"""Plain images as slides of one level."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from carn.errors import MissingObjectError, SlideError
from carn.slides import open_image
from carn.slides.image import MAX_IMAGE_PX


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp"])
def test_lossless_images_are_their_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels()).save(path, **({"lossless": True} if suffix == "webp" else {}))
    with open_image(path) as slide:
        assert (slide.reader, slide.properties.vendor) == ("image", "image")
        assert slide.extent == (60, 40)
        assert len(slide.levels) == 1
        assert slide.mpp is None
        np.testing.assert_array_equal(slide.read_region(0, 0, 60, 40), pixels())
        found = slide.read_region(50, -5, 20, 20)
        expected = np.full((20, 20, 3), 255, np.uint8)
        expected[5:, :10] = pixels()[:15, 50:]
        np.testing.assert_array_equal(found, expected)


def test_a_jpeg_keeps_its_profile(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (30, 20), (200, 100, 150)).save(tmp_path / "a.jpg", icc_profile=profile)
    with open_image(tmp_path / "a.jpg") as slide:
        assert slide.properties.icc_profile == profile
        assert np.abs(slide.read_region(0, 0, 30, 20).astype(int) - (200, 100, 150)).max() < 5


def test_an_image_on_an_object_store(s3: Any, tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    with open_image(s3.put("x/a.png", tmp_path / "a.png")) as slide:
        assert slide.uri == s3.uri("x/a.png")
        np.testing.assert_array_equal(slide.read_region(0, 0, 60, 40), pixels())


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = (0, 255, 127)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png") as slide:
        assert slide.read_region(0, 0, 3, 1)[0, :, 0].tolist() == [255, 0, 128]


def test_grey_and_palette_images_become_rgb(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(pixels()).quantize(16).save(tmp_path / "palette.png")
    with open_image(tmp_path / "grey.png") as slide:
        np.testing.assert_array_equal(slide.read_region(0, 0, 16, 16), grey[..., None].repeat(3, 2))
    with open_image(tmp_path / "palette.png") as slide:
        assert slide.read_region(0, 0, 60, 40).shape == (40, 60, 3)


def test_regions_do_not_share_memory(tmp_path: Path) -> None:
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png") as slide:
        slide.read_region(0, 0, 60, 40)[:] = 0
        np.testing.assert_array_equal(slide.read_region(0, 0, 60, 40), pixels())


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    start_of_pixels = struct.pack(">I", 1000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunk + start_of_pixels


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is an empty file"),
        (b"text, no image", "is not an image"),
        (png_claiming(20_000, 20_000), "claims"),
        (png_claiming(2**31 - 1, 2**31 - 1), "claims"),
        (png_claiming(0, 5), "not an image|damaged|no pixels"),
        (png_claiming(50, 50), "damaged or truncated"),
    ],
    ids=["empty", "text", "400 Mpx", "absurd", "no width", "header alone"],
)
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(SlideError, match=rf"a\.png: .*({words})"):
        open_image(path)


def test_the_bound_is_on_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_IMAGE_PX == 2**28
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    monkeypatch.setattr("carn.slides.image.MAX_IMAGE_PX", 60 * 40)
    open_image(tmp_path / "a.png").close()
    monkeypatch.setattr("carn.slides.image.MAX_IMAGE_PX", 60 * 40 - 1)
    with pytest.raises(SlideError, match="claims 60 x 40 px"):
        open_image(tmp_path / "a.png")


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError, match=r"no\.png"):
        open_image(tmp_path / "no.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
@given(
    end=st.floats(0.05, 1),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=3),
)
@settings(max_examples=60)
def test_any_damage_opens_or_is_a_slide_error(
    tmp_path: Path, suffix: str, end: float, edits: list[tuple[float, bytes]]
) -> None:
    sound = tmp_path / f"sound.{suffix}"
    if not sound.exists():
        Image.fromarray(pixels()).save(sound)
    content = bytearray(sound.read_bytes())
    for place, patch in edits:
        at = int(place**2 * (len(content) - len(patch)))  # headers first
        content[at : at + len(patch)] = patch
    hurt = tmp_path / f"hurt.{suffix}"
    hurt.write_bytes(bytes(content[: int(len(content) * end)]))
    try:
        with open_image(hurt) as slide:
            slide.read_region(0, 0, 10, 10)
    except SlideError as error:
        event(error.reason[:20])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pixels_of_more_than_8_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "deep.tif"
    Image.fromarray(np.zeros((8, 8), dtype=dtype)).save(path)
    with pytest.raises(SlideError, match="more than 8 bits"):
        open_image(path)


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with open_image(tmp_path / "turned.png") as image:
        np.testing.assert_array_equal(image.read_region(0, 0, 6, 4), pixels[::-1, ::-1])


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [((20_000, 20_000), "CENTIMETER", 0.5), ((300, 300), "INCH", None), ((72, 72), "INCH", None)],
)
def test_a_tiff_in_strips_keeps_its_px_size_where_a_scanner_wrote_it(
    resolution: tuple[int, int], unit: str, mpp: float | None, tmp_path: Path
) -> None:
    path = tmp_path / "strips.tif"
    tifffile.imwrite(path, pixels(), photometric="rgb", resolution=resolution, resolutionunit=unit)
    with open_image(path) as image:
        assert image.mpp == pytest.approx(mpp)
