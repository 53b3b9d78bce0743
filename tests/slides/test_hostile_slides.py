"""What a slide may cost is bounded: each limit refuses what is beyond it, and nothing real."""

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from carn.errors import DamagedTileError, SlideError, StorageError
from carn.slides import image as image_module
from carn.slides import open_image, open_slide, tiled_tiff
from carn.slides import slide as slide_module
from carn.slides.listing import list_slides
from carn.slides.openslide_reader import OpenSlideSlide
from carn.slides.provenance import read_provenance
from carn.slides.slide import Level, Rgb, Slide, SlideProperties
from tests.fuzzing import only_own_errors

WriteSlide = Callable[..., Path]


def refused(path: Path, words: str) -> None:
    """Opening is an error of the slide that says why, within bounds."""
    with pytest.raises(SlideError, match=words) as caught:
        open_slide(path)
    assert str(path) in str(caught.value)
    with only_own_errors():
        open_slide(path)


# ---------------------------------------------------------------------------------- directories


def write_directories(path: Path, tags: list[tuple[int, int, int, int]], nexts: list[int]) -> None:
    """Classic TIFF: one directory for each of `nexts`, which say which follows (-1: none)."""
    size = 2 + 12 * len(tags) + 4
    content = b"II*\0" + struct.pack("<I", 8)
    for following in nexts:
        content += struct.pack("<H", len(tags))
        content += b"".join(struct.pack("<HHII", *tag) for tag in tags)
        content += struct.pack("<I", 0 if following < 0 else 8 + following * size)
    path.write_bytes(content)


def test_directories_that_lead_in_a_long_circle_are_refused(tmp_path: Path) -> None:
    # tifffile looks for circles of up to 100; this one it follows for ever.
    write_directories(tmp_path / "a.tif", [(256, 4, 1, 10)], [*range(1, 150), 0])
    refused(tmp_path / "a.tif", "lead in a circle")


def test_more_directories_than_any_slide_has_are_refused(tmp_path: Path) -> None:
    count = tiled_tiff.MAX_DIRECTORIES + 2
    write_directories(tmp_path / "a.tif", [(256, 4, 1, 10)], [*range(1, count), -1])
    refused(tmp_path / "a.tif", f"more than {tiled_tiff.MAX_DIRECTORIES} images")


def test_tags_that_all_point_to_the_same_megabytes_are_refused(tmp_path: Path) -> None:
    # A description of 4 MB, 4000 times: 16 GB are read, and held, of a file of 4 MB.
    path, num_bytes = tmp_path / "a.tif", 4_000_000
    write_directories(path, [(270, 7, num_bytes, 60_000)] * 4000, [-1])
    with path.open("ab") as file:
        file.truncate(60_000 + num_bytes)
    refused(path, "header of more than")
    assert read_provenance(str(path)) is None


def test_an_entry_of_more_than_any_slide_needs_is_refused(tmp_path: Path) -> None:
    path, num_bytes = tmp_path / "a.tif", tiled_tiff.MAX_HEADER_READ_BYTES + 1
    write_directories(path, [(270, 2, num_bytes, 100)], [-1])
    with path.open("ab") as file:
        file.truncate(100 + num_bytes)
    refused(path, "directory entry of")


def test_a_header_without_an_end_is_refused(
    write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide()
    monkeypatch.setattr(tiled_tiff, "MAX_HEADER_READS", 20)
    refused(path, "without an end")


def test_the_tables_of_a_slide_of_200_000_px_are_within_the_limits() -> None:
    num_tiles = sum((200_000 // 256 // 2**level + 1) ** 2 for level in range(10))
    # Offsets of 8 bytes, lengths of 4: and in tiles of half the side still.
    assert 12 * num_tiles < tiled_tiff.MAX_HEADER_BYTES / 4
    assert 4 * 12 * num_tiles < tiled_tiff.MAX_HEADER_BYTES
    assert slide_module.MAX_SLIDE_PX > 200_000**2
    assert slide_module.MAX_REDUCED_PX > 200_000**2


# ---------------------------------------------------------------------------------------- tiles


def overwrite(path: Path, page: int = 0, **values: Any) -> None:
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, value in values.items():
            tiff.pages[page].tags[name].overwrite(value)


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
@pytest.mark.parametrize("side", [8, 65_520])
def test_tiles_of_no_scanners_size_go_to_no_reader(
    write_slide: WriteSlide, compression: str, side: int
) -> None:
    path = write_slide(compression=compression, num_levels=1)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in ("TileWidth", "TileLength"):
            tiff.pages[0].tags[name].overwrite(side, dtype="I")
    refused(path, f"tiles of {side} x {side} px; sides of 16 to 8192")


@pytest.mark.parametrize("page", [0, 1])
@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_tiles_larger_than_the_file_go_to_no_reader(
    write_slide: WriteSlide, compression: str, page: int
) -> None:
    # OpenSlide asks for the memory first, and ends the process when there is none.
    path = write_slide(compression=compression, is_bigtiff=True)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[page].tags["TileByteCounts"]
        tag.overwrite([2**43] * tag.count, dtype="Q")
    refused(path, f"lists {2**43} bytes for a tile")


def claim(stream: bytes, *, width: int, height: int) -> bytes:
    """The JPEG, its frame header saying another extent."""
    place = next(i for i in range(len(stream)) if stream[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return stream[: place + 5] + struct.pack(">HH", height, width) + stream[place + 9 :]


def replace_tile(path: Path, stream: bytes) -> None:
    """Makes a stream, put at the end of the file, the first tile of level 0."""
    content = path.read_bytes()
    path.write_bytes(content + stream)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tags = tiff.pages[0].tags
        offsets, lengths = list(tags["TileOffsets"].value), list(tags["TileByteCounts"].value)
        offsets[0], lengths[0] = len(content), len(stream)
        tags["TileOffsets"].overwrite(offsets)
        tags["TileByteCounts"].overwrite(lengths)


def jpeg(side: int = 128, **options: Any) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("is_progressive", [False, True])
def test_a_tile_that_claims_65535_px_is_damaged(
    write_slide: WriteSlide, is_progressive: bool
) -> None:
    path = write_slide()
    stream = claim(jpeg(progressive=is_progressive), width=65_535, height=65_535)
    replace_tile(path, stream)
    with open_slide(path) as slide:
        with pytest.raises(DamagedTileError):
            slide.read_region(0, 0, 20, 20)
        with only_own_errors():
            slide.read_region(0, 0, 20, 20)
        slide.read_region(300, 300, 20, 20)


def test_a_tile_of_ever_more_scans_is_damaged(write_slide: WriteSlide) -> None:
    stream = jpeg(progressive=True)
    last = stream.rindex(b"\xff\xda")
    path = write_slide()
    replace_tile(path, stream[:-2] + stream[last:-2] * 200 + stream[-2:])
    with (
        open_slide(path) as slide,
        pytest.raises(DamagedTileError, match="scans, more than 100"),
    ):
        slide.read_region(0, 0, 20, 20)


def test_a_tile_of_more_bytes_than_its_px_can_take_is_not_read(
    write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide()
    replace_tile(path, jpeg() + bytes(2_000_000))
    with open_slide(path) as slide:
        monkeypatch.setattr(
            slide._source,  # type: ignore[attr-defined]
            "read_ranges",
            lambda _: pytest.fail("it was read"),
        )
        with pytest.raises(DamagedTileError, match="more than a tile of 128 x 128 px can take"):
            slide.read_region(0, 0, 20, 20)


def test_noise_at_the_best_quality_is_within_the_limit() -> None:
    assert len(jpeg(512, quality=100, subsampling=0)) < tiled_tiff.MAX_BYTES_PER_PX * 512**2 / 2


def test_shared_tables_of_no_jpegs_size_are_refused(
    write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tables go before each tile: 10 MB of them would be copied for each.
    path = write_slide(extent=(200, 150), num_levels=1, tile_px=64)
    content = path.read_bytes()
    path.write_bytes(content + bytes(100_000))
    with tifffile.TiffFile(path) as tiff:
        if "JPEGTables" in tiff.pages[0].tags:
            place = tiff.pages[0].tags["JPEGTables"].offset
        else:
            place = tiff.pages[0].tags["NewSubfileType"].offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<HHII", 347, 7, 100_000, len(content)))
    refused(path, "JPEG tables of 100000 bytes")


# --------------------------------------------------------------------------------------- extents


class Blank(Slide):
    """A slide that is all white, of any extent."""

    reader = "blank"

    def _read_level(self, x: int, y: int, width: int, height: int, *, level: int) -> Rgb:
        return np.full((height, width, 3), 255, np.uint8)

    def close(self) -> None: ...


def blank(width: int, height: int) -> Slide:
    level = Level(width_px=width, height_px=height, downsample=1.0)
    return Blank("blank", levels=(level,), properties=SlideProperties(vendor="test"))


def test_more_px_than_a_glass_slide_has_are_refused() -> None:
    blank(750_000, 250_000)
    with pytest.raises(SlideError, match=r"1900000 x 1900000 px, more than .* whole glass slide"):
        blank(1_900_000, 1_900_000)


def test_a_picture_of_a_slide_without_a_pyramid_is_not_made_for_days() -> None:
    with pytest.raises(SlideError, match="store it anew with a pyramid"):
        blank(700_000, 300_000).thumbnail(2048)


# -------------------------------------------------------------------------- OpenSlide's own words


def test_what_openslide_says_of_a_level_is_looked_at(
    write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openslide

    path = write_slide(compression="deflate")
    monkeypatch.setattr(openslide.OpenSlide, "level_dimensions", ((700, 500), (0, 250), (175, 125)))
    with pytest.raises(SlideError, match="level without pixels"):
        OpenSlideSlide(str(path), path)


def test_what_openslide_says_need_not_be_text(
    write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openslide

    def fail(*_: object) -> Any:
        return b"\xff".decode()

    path = write_slide(compression="deflate")
    monkeypatch.setattr(openslide.OpenSlide, "level_dimensions", property(fail))
    with pytest.raises(SlideError, match="cannot be opened"):
        OpenSlideSlide(str(path), path)


@pytest.mark.parametrize("said", ["9" * 400, "-20", "0"])
def test_a_magnification_is_a_number_or_not_known(write_slide: WriteSlide, said: str) -> None:
    path = write_slide(description=f"Aperio Image Library v1\r\n|AppMag = {said}|MPP = 0.5|")
    with open_slide(path) as slide:
        assert slide.properties.objective_power is None
        assert slide.mpp == 0.5


def test_a_description_that_declares_entities_says_no_mpp(write_slide: WriteSlide) -> None:
    bomb = '<!DOCTYPE x [<!ENTITY s "0.0005 0.0005">]>'
    spacing = '<Attribute Name="DICOM_PIXEL_SPACING">&s;</Attribute>'
    text = f'<?xml version="1.0"?>{bomb}<DataObject>{spacing}</DataObject>'
    with open_slide(write_slide(description=text, software="Philips DP v1.0")) as slide:
        assert slide.properties.vendor == "philips"
        assert slide.mpp is None


# ------------------------------------------------------------------------------ what is no file


@pytest.mark.parametrize("opener", [open_slide, open_image])
def test_a_pipe_is_refused_and_waited_for_by_nobody(
    tmp_path: Path, opener: Callable[[Path], Slide]
) -> None:
    os.mkfifo(tmp_path / "a.tif")
    with pytest.raises(StorageError, match="pipe, socket or device"):
        opener(tmp_path / "a.tif")
    with pytest.raises(StorageError, match="no file here"):
        list_slides([str(tmp_path)])


def test_a_link_to_a_device_is_no_slide(tmp_path: Path) -> None:
    (tmp_path / "a.tif").symlink_to("/dev/zero")
    with pytest.raises(StorageError, match="pipe, socket or device"):
        open_slide(tmp_path / "a.tif")


# --------------------------------------------------------------------------------- plain images


def test_formats_that_start_other_programs_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it ran"))
    path = tmp_path / "a.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(SlideError, match="is not an image in any format that is read"):
        open_image(path)


def test_an_image_of_ever_more_scans_is_refused(tmp_path: Path) -> None:
    stream = jpeg(progressive=True)
    last = stream.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(stream[:-2] + stream[last:-2] * 200 + stream[-2:])
    with pytest.raises(SlideError, match="more than 100 scans"):
        open_image(tmp_path / "a.jpg")


def test_an_image_of_too_many_bytes_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "MAX_IMAGE_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    with pytest.raises(StorageError, match="has 1001 bytes; at most 1000"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_mutated_images_open_or_are_one_error(tmp_path: Path, form: str) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 30), "red").save(file, format=form, exif=exif)
    whole, rng = file.getvalue(), np.random.default_rng(1)
    path = tmp_path / f"a.{form.lower()}"
    for _ in range(60):
        content = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(0, min(len(content), 400), 3)
        content[places] = rng.choice([0, 1, 127, 128, 255], 3)
        path.write_bytes(content.tobytes()[: len(content) - rng.integers(0, 3) * 20])
        with only_own_errors(), open_image(path) as slide:
            slide.read_region(0, 0, 20, 20)
