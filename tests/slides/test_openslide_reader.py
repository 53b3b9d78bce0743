"""The OpenSlide reader: right pixels on every level, and damage that stays where it is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile

from carn import storage
from carn.errors import DamagedTileError, SlideError
from carn.slides import Slide
from carn.slides.openslide_reader import OpenSlideSlide, _on_white
from carn.slides.tiled_tiff import TiledTiffSlide

WriteSlide = Callable[..., Path]


def open_slide(path: Path) -> Slide:
    """By OpenSlide, whatever else could read it."""
    return OpenSlideSlide(str(path), path)


APERIO = "Aperio Image Library v11.2.1\r\n700x500 (128x128) J2K/KDU Q=70|AppMag = 20|MPP = 0.499"
# 33005: Aperio's JPEG 2000, RGB.
FORMS: dict[str, dict[str, Any]] = {
    "deflate": {"compression": "deflate"},
    "jpeg2000": {"compression": 33005, "description": APERIO, "name": "slide.svs"},
}


@pytest.fixture(params=FORMS)
def path(request: pytest.FixtureRequest, write_slide: WriteSlide) -> Path:
    """A slide that OpenSlide reads: 6 x 4 tiles of 128 px."""
    return write_slide(num_levels=1, **FORMS[request.param])


def overwrite_tile(path: Path, number: int) -> None:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        start, length = page.dataoffsets[number], page.databytecounts[number]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(np.random.default_rng(0).bytes(length))


def test_reads_of_sound_places_follow_failed_ones(path: Path) -> None:
    sound_path = path.with_name("sound" + path.suffix)
    shutil.copy(path, sound_path)
    overwrite_tile(path, 8)  # column 2, row 1
    with open_slide(path) as slide, open_slide(sound_path) as sound:
        assert slide.reader == "openslide"
        for _ in range(3):
            with pytest.raises(DamagedTileError) as caught:
                slide.read_region(260, 130, 50, 50)
            error = caught.value
            assert (error.uri, error.level) == (str(path), 0)
            assert (error.x_l0, error.y_l0) == (260, 130)
            assert "OpenSlide says" in str(error)
            for region in ((0, 0, 256, 128), (384, 128, 128, 128), (-10, 256, 200, 400)):
                found = slide.read_region(*region)
                np.testing.assert_array_equal(found, sound.read_region(*region))


def test_a_peer_without_care_fails_ever_after(path: Path) -> None:
    # The reason for opening anew: should OpenSlide mend this, the detour can go.
    overwrite_tile(path, 8)
    with openslide.OpenSlide(str(path)) as peer:
        with pytest.raises(openslide.OpenSlideError):
            peer.read_region((260, 130), 0, (50, 50))
        with pytest.raises(openslide.OpenSlideError):
            peer.read_region((0, 0), 0, (50, 50))


def test_damaged_dicom_stays_readable(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "level.dcm"
    path.write_bytes((shared_data / "slides" / "dicom_camelyon_jpeg" / "level.dcm").read_bytes())
    content = bytearray(path.read_bytes())
    with open_slide(path) as slide:
        sound = slide.read_region(0, 0, *slide.extent)
    # Frames follow each other as JPEG streams, 5 across: wreck the one in the middle.
    starts = [at for at in range(len(content) - 3) if content[at : at + 3] == b"\xff\xd8\xff"]
    middle = starts[len(starts) // 2]
    content[middle : middle + 600] = bytes(600)
    path.write_bytes(bytes(content))
    num_damaged = 0
    with open_slide(path) as slide:
        width, height = slide.extent
        for y in range(0, height, 256):
            for x in range(0, width, 256):
                w, h = min(256, width - x), min(256, height - y)
                try:
                    found = slide.read_region(x, y, w, h)
                except DamagedTileError:
                    num_damaged += 1
                    continue
                np.testing.assert_array_equal(found, sound[y : y + h, x : x + w])
    assert num_damaged == 1


def test_lossless_pixels_are_the_sources(write_slide: WriteSlide) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (367, 473, 3), np.uint8)
    path = write_slide(pixels=pixels, num_levels=1, tile_px=64, compression="deflate")
    rng = np.random.default_rng(2)
    padded = np.pad(pixels, ((300, 300), (300, 300), (0, 0)), constant_values=255)
    with open_slide(path) as slide:
        for _ in range(40):
            x, y = int(rng.integers(-200, 450)), int(rng.integers(-200, 350))
            w, h = (int(side) for side in rng.integers(1, 200, 2))
            found = slide.read_region(x, y, w, h)
            expected = padded[y + 300 : y + 300 + h, x + 300 : x + 300 + w]
            np.testing.assert_array_equal(found, expected)


def test_levels_of_a_whole_downsample_are_exact(write_slide: WriteSlide) -> None:
    path = write_slide(extent=(512, 384), num_levels=4, tile_px=64, compression="deflate")
    with tifffile.TiffFile(path) as tiff:
        levels = [page.asarray() for page in tiff.pages]
    with open_slide(path) as slide:
        for number, whole in enumerate(levels):
            step = 2**number
            found = slide.read_region(72, 40, 30, 20, level=number)
            x, y = 72 // step, 40 // step
            np.testing.assert_array_equal(found, whole[y : y + 20, x : x + 30])


def test_levels_of_an_odd_downsample_are_within_half_a_level_0_px(write_slide: WriteSlide) -> None:
    # 20 grey values a level-0 px: half a px is 10.
    x = np.arange(473) % 64
    ramp = np.repeat((np.minimum(x, 64 - x) * 7)[None, :, None], 367, 0).repeat(3, 2)
    path = write_slide(
        pixels=ramp.astype(np.uint8), num_levels=3, tile_px=64, compression="deflate"
    )
    with tifffile.TiffFile(path) as tiff:
        levels = [page.asarray().astype(int) for page in tiff.pages]
    with open_slide(path) as slide:
        for number in (1, 2):
            for at in range(0, 120, 8):
                found = slide.read_region(at, 0, 40, 40, level=number)
                left = at // 2**number
                expected = levels[number][:40, left : left + 40]
                # A level px is 2**number level-0 px of 7 grey values; half a px is 3.5.
                assert np.abs(found - expected).max() <= 4


@pytest.fixture(params=FORMS)
def odd_path(request: pytest.FixtureRequest, write_slide: WriteSlide, shared_data: Path) -> Path:
    """Real tissue of odd sides, halved twice: downsamples are no whole numbers."""
    with open_slide(shared_data / "slides" / "uir-test-image-j2k.svs") as slide:
        pixels = slide.read_region(400, 300, 1001, 667)
    return write_slide(pixels=pixels, num_levels=3, **FORMS[request.param])


def assert_parts_are_of_the_whole(slide: Slide, *, level: int) -> None:
    found = slide.levels[level]
    width, height, downsample = found.width_px, found.height_px, found.downsample
    whole = slide.read_region(0, 0, width, height, level=level)
    rng = np.random.default_rng(level)
    corners = [(0, 0), (1, 1), (127, 128), (width - 1, height - 1)]
    corners += [(int(x), int(y)) for x, y in rng.integers(0, (width, height), (40, 2))]
    for x, y in corners:
        w, h = (int(rng.integers(1, side + 1)) for side in (width - x, height - y))
        part = slide.read_region(round(x * downsample), round(y * downsample), w, h, level=level)
        np.testing.assert_array_equal(part, whole[y : y + h, x : x + w])


def test_parts_of_an_odd_level_are_those_of_the_whole(odd_path: Path) -> None:
    with openslide.OpenSlide(str(odd_path)) as peer, open_slide(odd_path) as slide:
        assert slide.reader == "openslide"
        for level, downsample in enumerate(peer.level_downsamples):
            assert level == 0 or not downsample.is_integer()
            assert_parts_are_of_the_whole(slide, level=level)


def test_a_peer_asked_at_another_corner_gives_other_pixels(odd_path: Path) -> None:
    # The reason for the cells: should OpenSlide mend this, they can go.
    with openslide.OpenSlide(str(odd_path)) as peer:
        downsample = peer.level_downsamples[1]
        one, other = (
            np.asarray(peer.read_region((round(x * downsample), 0), 1, (60, 60)).convert("RGB"))
            for x in (100, 130)
        )
    assert np.abs(one[:, 30:].astype(int) - other[:, :30]).max() > 1


def test_parts_of_a_real_slide_are_those_of_the_whole(shared_data: Path) -> None:
    with open_slide(shared_data / "slides" / "uir-test-image-j2k.svs") as slide:
        for level in range(len(slide.levels)):
            assert_parts_are_of_the_whole(slide, level=level)


def test_damage_of_an_odd_level_stays_where_it_is(odd_path: Path) -> None:
    with tifffile.TiffFile(odd_path) as tiff:
        page = tiff.pages[1]  # 500 x 333 px in 4 x 3 tiles of 128
        start, length = page.dataoffsets[5], page.databytecounts[5]
    with open_slide(odd_path) as slide:
        sound = slide.read_region(0, 0, 500, 333, level=1)
    with odd_path.open("r+b") as file:
        file.seek(start)
        file.write(np.random.default_rng(0).bytes(length))
    with open_slide(odd_path) as slide:
        with pytest.raises(DamagedTileError) as caught:
            slide.read_region(0, 0, 1000, 666 // 2, level=1)
        assert (caught.value.level, caught.value.x_l0, caught.value.y_l0) == (1, 256, 256)
        # Interpolation may take one px of the tile beside; cells of the next but one do not.
        found = slide.read_region(512, 0, 244, 333, level=1)
        np.testing.assert_array_equal(found, sound[:, 256:])


def test_jpeg_and_openslide_readers_agree(write_slide: WriteSlide) -> None:
    path = write_slide()
    direct = TiledTiffSlide(storage.open_source(str(path)))
    other = OpenSlideSlide(str(path), path)
    assert (direct.reader, other.reader) == ("tiled-tiff", "openslide")
    assert direct.levels == other.levels
    assert direct.properties == other.properties
    for region in ((0, 0, 700, 500), (-50, 40, 333, 222), (600, 450, 300, 300)):
        np.testing.assert_array_equal(direct.read_region(*region), other.read_region(*region))
    direct.close()
    other.close()


def test_transparency_is_laid_over_white() -> None:
    rgba = np.zeros((1, 4, 4), np.uint8)
    rgba[0, :, 3] = (0, 255, 128, 51)
    rgba[0, :, 0] = (10, 10, 0, 255)
    red = _on_white(rgba)[0, :, 0]
    assert red.tolist() == [255, 10, 127, 255]
    assert _on_white(rgba)[0, 3, 1] == 204


def test_what_openslide_cannot_open_is_a_slide_error(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"x" * 1000)
    with pytest.raises(SlideError, match=r"a\.svs: is not a slide in any format"):
        OpenSlideSlide("a.svs", tmp_path / "a.svs")


def test_closing_twice_and_closing_the_pin(path: Path) -> None:
    pin = path.open("rb")
    slide = OpenSlideSlide(str(path), path, pin=pin)
    slide.read_region(0, 0, 10, 10)
    assert not pin.closed
    slide.close()
    slide.close()
    assert pin.closed
