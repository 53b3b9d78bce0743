"""How slides are stored, by the headers of their files."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from carn import storage
from carn.degradation.jpeg import encode_jpeg, quantisation_tables
from carn.slides import compression as module
from carn.slides import dicom
from carn.slides.compression import Compression, match_tables, read_compression
from carn.slides.opening import open_image, open_slide
from carn.slides.openslide_reader import OpenSlideSlide
from carn.slides.slide import Level
from tests.conftest import Bucket, draw, halved

KINDS = [
    (30, "4:4:4", "ijg"),
    (75, "4:2:0", "ijg"),
    (80, "4:2:2", "ijg"),
    (95, "4:2:0", "ijg"),
    (70, "4:2:0", "flat"),
    (85, "4:4:4", "robidoux"),
]


def compression_of(path: Path | str, *, level: int = 0) -> Compression:
    with open_slide(path) as slide:
        return read_compression(slide, level=level)


def write_tiff(
    path: Path,
    qualities: tuple[int, ...],
    *,
    subsampling: str = "4:2:0",
    tables: str = "ijg",
    is_shared: bool = False,
    description: str | None = None,
) -> Path:
    """A pyramid of JPEG tiles of 128 px, a level for each quality; tables in a tag if shared."""
    pixels = draw(400, 300)
    factors = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}[subsampling]
    with tifffile.TiffWriter(path) as writer:
        for number, quality in enumerate(qualities):
            height, width = pixels.shape[:2]
            down, across = -(-height // 128), -(-width // 128)
            padding = ((0, down * 128 - height), (0, across * 128 - width), (0, 0))
            padded = np.pad(pixels, padding, mode="edge")
            streams = [
                encode_jpeg(
                    np.ascontiguousarray(padded[y : y + 128, x : x + 128]),
                    quality=quality,
                    subsampling=subsampling,
                    tables=tables,
                )
                for y in range(0, down * 128, 128)
                for x in range(0, across * 128, 128)
            ]
            shared = b""
            if is_shared:
                shared, streams = abbreviated(streams)
            writer.write(
                iter(streams),
                shape=pixels.shape,
                dtype=np.uint8,
                tile=(128, 128),
                photometric="ycbcr",
                compression="jpeg",
                subsampling=factors,
                jpegtables=shared or None,
                subfiletype=int(number > 0),
                description=description if number == 0 else None,
                metadata=None,
                software=False,
            )
            pixels = halved(pixels)
    return path


def abbreviated(streams: list[bytes]) -> tuple[bytes, list[bytes]]:
    """The tables of streams, which have the same, and the streams without them."""
    tables, rest = b"", []
    for stream in streams:
        at, kept, found = 2, b"", b""
        while stream[at + 1] != 0xDA:
            end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
            if stream[at + 1] in (0xDB, 0xC4):
                found += stream[at:end]
            else:
                kept += stream[at:end]
            at = end
        tables = found
        rest.append(b"\xff\xd8" + kept + stream[at:])
    return b"\xff\xd8" + tables + b"\xff\xd9", rest


# ---------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("tables", ["ijg", "flat", "robidoux"])
@pytest.mark.parametrize("quality", [1, 20, 49, 50, 75, 90, 96])
def test_tables_are_known_exactly(quality: int, tables: str) -> None:
    wanted = quantisation_tables(quality, tables=tables)

    found = match_tables(*wanted)

    assert found.is_exact
    assert found.luma_distance == found.chroma_distance == 0
    # At the ends of the scale, and of the flat table often, several qualities have the same.
    assert quantisation_tables(found.quality, tables=found.tables) == wanted
    if tables == "ijg":
        assert (found.tables, found.quality) == ("ijg", quality)


def test_tables_of_nobody_are_near_some_and_not_exact() -> None:
    luma, chroma = (list(table) for table in quantisation_tables(80))
    luma[0] += 1

    found = match_tables(tuple(luma), tuple(chroma))

    assert (found.tables, found.quality, found.is_exact) == ("ijg", 80, False)
    assert 0 < found.luma_distance < 0.01
    assert found.chroma_distance == 0


def test_luma_decides_where_chroma_has_its_table() -> None:
    luma, _ = quantisation_tables(80)

    found = match_tables(luma, luma)

    assert (found.tables, found.quality, found.is_exact) == ("ijg", 80, False)
    assert found.luma_distance == 0
    assert found.chroma_distance > 0.5


def test_a_step_of_zero_is_no_error() -> None:
    assert not match_tables((0,) * 64, None).is_exact


# ------------------------------------------------------------------------------------------ TIFF


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(("quality", "subsampling", "tables"), KINDS)
def test_tiff_tells_quality_and_subsampling(
    tmp_path: Path, quality: int, subsampling: str, tables: str, is_shared: bool
) -> None:
    path = write_tiff(
        tmp_path / "a.tif",
        (quality,),
        subsampling=subsampling,
        tables=tables,
        is_shared=is_shared,
    )

    found = compression_of(path)

    luma, chroma = quantisation_tables(quality, tables=tables)
    assert (found.luma_table, found.chroma_table) == (luma, chroma)
    assert found.quality is not None
    assert (found.quality.tables, found.quality.quality) == (tables, quality)
    assert found.quality.is_exact
    assert (found.codec, found.subsampling, found.is_rgb) == ("jpeg", subsampling, False)
    assert found.claimed_quality is None
    assert not found.is_lossless


def test_each_level_tells_its_own(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", (90, 70, 50))

    found = [compression_of(path, level=level).quality for level in range(3)]

    assert [quality and quality.quality for quality in found] == [90, 70, 50]


def test_levels_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", (90,))
    with pytest.raises(ValueError, match=r"levels 0\.\.0, not 1"):
        compression_of(path, level=1)


def test_a_level_that_no_image_holds_is_unknown(tmp_path: Path) -> None:
    with open_slide(write_tiff(tmp_path / "a.tif", (90,))) as slide:
        made = Level(width_px=100, height_px=75, downsample=4.0)
        slide.levels = (*slide.levels, made)
        found = read_compression(slide, level=1)
    assert found.codec == "unknown"
    assert "100 x 75" in (found.unknown or "")


def test_what_a_description_claims_is_no_more_than_a_claim(tmp_path: Path) -> None:
    path = write_tiff(
        tmp_path / "a.svs",
        (60,),
        description="Aperio Image Library v12\n400x300 (128x128) JPEG/RGB Q=70|AppMag = 20",
    )

    found = compression_of(path)

    assert found.quality is not None
    assert (found.quality.quality, found.claimed_quality) == (60, 70)
    assert "Q=70" in str(found)


def test_rgb_jpeg_has_the_table_of_luma_throughout(write_slide: Callable[..., Path]) -> None:
    found = compression_of(write_slide(is_rgb=True))
    assert found.is_rgb
    assert found.subsampling == "4:4:4"
    assert found.quality is not None
    assert (found.quality.quality, found.quality.is_exact) == (90, True)


@pytest.mark.parametrize("method", ["deflate", "lzw", "none"])
def test_lossless_tiff(write_slide: Callable[..., Path], method: str) -> None:
    found = compression_of(write_slide(compression=method))
    assert (found.codec, found.is_lossless, found.quality) == ("lossless", True, None)
    assert found.luma_table is None


def test_tiles_that_are_left_out_say_nothing(write_slide: Callable[..., Path]) -> None:
    # All of level 0, a slide of glass.
    path = write_slide(extent=(256, 128), num_levels=1, absent=((0, 0), (0, 1)))
    found = compression_of(path)
    assert found.codec == "jpeg"
    assert found.quality is None
    assert found.unknown == "no tile of it is stored"


def test_one_damaged_tile_is_passed_over(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", (65,))
    with tifffile.TiffFile(path) as tiff:
        offsets = tiff.pages[0].dataoffsets
    content = bytearray(path.read_bytes())
    middle = offsets[len(offsets) // 2]
    content[middle + 2 : middle + 400] = bytes(398)
    path.write_bytes(content)

    found = compression_of(path)

    assert found.quality is not None
    assert found.quality.quality == 65


def test_damage_all_over_is_unknown_and_no_error(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", (65,))
    with tifffile.TiffFile(path) as tiff:
        places = list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts, strict=True))
    content = bytearray(path.read_bytes())
    for offset, length in places:
        content[offset + 2 : offset + length] = bytes(length - 2)
    path.write_bytes(content)

    found = compression_of(path)

    assert (found.codec, found.quality) == ("jpeg", None)
    assert "damaged" in (found.unknown or "")


def test_a_directory_that_is_damaged_meanwhile_is_unknown(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", (65,))
    with open_slide(path) as slide:
        path.write_bytes(path.read_bytes()[:4] + b"\xff" * 12)
        found = read_compression(slide)
    assert found.codec == "unknown"
    assert found.unknown


# ----------------------------------------------------------------------------------- plain images


@pytest.mark.parametrize(("quality", "subsampling", "tables"), KINDS)
def test_jpeg_files(tmp_path: Path, quality: int, subsampling: str, tables: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(
        encode_jpeg(draw(120, 90), quality=quality, subsampling=subsampling, tables=tables)
    )
    with open_image(path) as image:
        found = read_compression(image)
    assert found.quality is not None
    assert (found.quality.tables, found.quality.quality) == (tables, quality)
    assert (found.quality.is_exact, found.subsampling) == (True, subsampling)


def test_grey_and_progressive_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    grey = Image.fromarray(draw(120, 90)).convert("L")
    grey.save(path, quality=77, progressive=True)
    with open_image(path) as image:
        found = read_compression(image)
    assert found.quality is not None
    assert (found.quality.quality, found.quality.is_exact) == (77, True)
    assert (found.chroma_table, found.subsampling) == (None, None)


@pytest.mark.parametrize(
    ("name", "options", "codec", "quality"),
    [
        ("a.png", {}, "lossless", None),
        ("a.bmp", {}, "lossless", None),
        ("a.webp", {"lossless": True}, "lossless", None),
        ("a.webp", {"quality": 80}, "other", None),
        ("a.tif", {"compression": "tiff_lzw"}, "lossless", None),
        ("a.tif", {"compression": "jpeg", "quality": 83}, "jpeg", 83),
    ],
)
def test_images(
    tmp_path: Path, name: str, options: dict[str, Any], codec: str, quality: int | None
) -> None:
    path = tmp_path / name
    Image.fromarray(draw(120, 90)).save(path, **options)
    with open_image(path) as image:
        found = read_compression(image)
    assert found.codec == codec
    assert (found.quality and found.quality.quality) == quality


# ---------------------------------------------------------------------------------- object storage


def test_remote_slides_stay_where_they_are(
    s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiff(tmp_path / "a.tif", (75, 75), is_shared=True)
    # Pixels without end, so that headers are a small part.
    content = path.read_bytes()
    uri = s3.put("slides/a.tif", content + bytes(4_000_000))
    fetched: list[int] = []
    read_ranges = storage._S3Source.read_ranges

    def counted(source: storage._S3Source, ranges: list[tuple[int, int]]) -> list[bytes]:
        parts = read_ranges(source, ranges)
        fetched.extend(map(len, parts))
        return parts

    monkeypatch.setattr(storage._S3Source, "read_ranges", counted)

    found = compression_of(uri)

    assert found.quality is not None
    assert (found.quality.quality, found.subsampling) == (75, "4:2:0")
    assert 0 < sum(fetched) < len(content) + 500_000


# ------------------------------------------------------------------------------------- real slides


@pytest.mark.parametrize(
    ("name", "expected", "subsampling"),
    [
        ("CMU-1-Small-Region.svs", ("ijg", 30, True), "4:4:4"),
        # Philips: luma's table serves chroma.
        ("camelyon16_tumor_001_level5.tif", ("ijg", 80, False), "4:2:0"),
        ("dicom_camelyon_jpeg/level.dcm", ("ijg", 80, True), "4:2:0"),
        ("odd/padded_dicom/l1.dcm", ("ijg", 95, True), "4:2:2"),
        ("edge/dicom_boxes/boxes_1.dcm", ("ijg", 30, True), "4:4:4"),
        ("formats/packed_example_0.987mpp.tif", ("ijg", 80, False), "4:2:0"),
        ("odd/xml_only.ome.tif", ("ijg", 95, True), "4:2:0"),
    ],
)
def test_real_jpeg_slides(
    shared_data: Path, name: str, expected: tuple[str, int, bool], subsampling: str
) -> None:
    path = real(shared_data, name)
    found = compression_of(path)
    assert found.quality is not None
    assert (found.quality.tables, found.quality.quality, found.quality.is_exact) == expected
    assert found.subsampling == subsampling


@pytest.mark.parametrize(
    ("name", "codec", "claim"),
    [
        ("uir-test-image-j2k.svs", "jpeg2000", 70),
        ("monuseg_breast2_lossless_pyr.tif", "lossless", None),
        ("formats/gcp_wsi2dicom_jpeg2000.dcm", "lossless", None),
        ("formats/gcp_wsi2dicom_raw.dcm", "lossless", None),
        ("edge/unreadable.svs", "jpeg", 30),
    ],
)
def test_other_real_slides(shared_data: Path, name: str, codec: str, claim: int | None) -> None:
    found = compression_of(real(shared_data, name))
    assert (found.codec, found.claimed_quality, found.quality) == (codec, claim, None)


def test_real_ndpi(shared_data: Path) -> None:
    path = real(shared_data, "formats/hamamatsu_test3_DAPI.ndpi")
    with OpenSlideSlide(str(path), path) as slide:
        found = read_compression(slide)
        made = read_compression(slide, level=len(slide.levels) - 1)
    assert found.quality is not None
    assert (found.quality.quality, found.quality.is_exact, found.subsampling) == (90, True, "4:4:4")
    # OpenSlide makes the coarsest itself.
    assert made.codec == "unknown"


def test_a_dicom_series_without_its_level_is_unknown(shared_data: Path, tmp_path: Path) -> None:
    content = real(shared_data, "odd/padded_dicom/l1.dcm").read_bytes()
    path = tmp_path / "l1.dcm"
    path.write_bytes(content)
    with open_slide(path) as slide:
        assert read_compression(slide).quality is not None
        slide.levels = (Level(width_px=8192, height_px=6144, downsample=1.0),)
        found = read_compression(slide)
    assert found.codec == "unknown"
    assert "8192 x 6144" in (found.unknown or "")


def test_dicom_frames_that_are_no_jpeg_are_unknown(shared_data: Path, tmp_path: Path) -> None:
    content = real(shared_data, "dicom_camelyon_jpeg/level.dcm").read_bytes()
    path = tmp_path / "level.dcm"
    path.write_bytes(content)
    with open_slide(path) as slide:
        path.write_bytes(content.replace(b"\xff\xd8\xff", b"\x00\x00\x00"))
        found = read_compression(slide)
        assert (found.codec, found.quality) == ("jpeg", None)
        path.write_bytes(content[: content.index(dicom._PIXELS)])
        found = read_compression(slide)
    assert "first DICOM frame is not found" in (found.unknown or "")


def real(shared_data: Path, name: str) -> Path:
    path = shared_data / "slides" / name
    if not path.is_file():
        pytest.skip(f"{name} is not among the real samples")
    return path


def test_headers_beyond_what_is_read_are_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = io.BytesIO()
    Image.fromarray(draw(120, 90)).save(encoded, format="JPEG", icc_profile=bytes(200_000))
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded.getvalue())
    with open_image(path) as image:
        assert read_compression(image).quality is not None
        monkeypatch.setattr(module, "MAX_JPEG_HEAD_BYTES", 100_000)
        assert read_compression(image).codec == "unknown"
