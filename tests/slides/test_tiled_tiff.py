"""The direct reader: the same pixels as OpenSlide, and errors that stay where the damage is."""

import itertools
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from carn.errors import DamagedTileError, SlideError
from carn.slides import Slide, open_slide
from carn.slides.slide import level_downsamples
from tests.conftest import draw

REAL_SLIDES = [
    "CMU-1-Small-Region.svs",
    "cam17_c012_mosaic_pyr.tif",
    "camelyon16_tumor_001_level5.tif",
]
WriteSlide = Callable[..., Path]


def by_openslide(
    handle: openslide.OpenSlide, x: int, y: int, width: int, height: int, *, level: int = 0
) -> np.ndarray:
    """A region as OpenSlide gives it, its transparent places white."""
    region = handle.read_region((x, y), level, (width, height))
    rgba = np.asarray(region)
    alpha = rgba[..., 3:]
    assert set(np.unique(alpha)) <= {0, 255}
    return np.where(alpha == 255, rgba[..., :3], np.uint8(255))


def assert_same_as_openslide(path: Path, *, num_regions: int = 12) -> None:
    rng = np.random.default_rng(7)
    with open_slide(path) as slide, openslide.OpenSlide(str(path)) as peer:
        assert slide.reader == "tiled-tiff"
        assert slide.extent == peer.dimensions
        width, height = slide.extent
        corners = [(-30, -20), (width - 50, height - 40), (-30, height - 40)]
        corners += [tuple(map(int, rng.integers(slide.extent))) for _ in range(num_regions)]
        for x, y in corners:
            w, h = (int(side) for side in rng.integers(1, 400, 2))
            mine = slide.read_region(x, y, w, h)
            np.testing.assert_array_equal(mine, by_openslide(peer, x, y, w, h), f"{x, y, w, h}")
        for number, level in enumerate(slide.levels):
            size = (min(level.width_px, 600), min(level.height_px, 600))
            mine = slide.read_region(0, 0, *size, level=number)
            np.testing.assert_array_equal(mine, by_openslide(peer, 0, 0, *size, level=number))
            # A tile's corner is a whole number of level-0 px away where the downsample is whole.
            if level.downsample.is_integer() and level.downsample == peer.level_downsamples[number]:
                at = round(128 * level.downsample)
                mine = slide.read_region(at, at, 200, 100, level=number)
                other = by_openslide(peer, at, at, 200, 100, level=number)
                np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("name", REAL_SLIDES)
def test_real_slides_read_as_openslide_reads_them(shared_data: Path, name: str) -> None:
    assert_same_as_openslide(shared_data / "slides" / name)


@pytest.mark.parametrize(
    "form",
    [
        {"tile_px": 512, "extent": (1100, 700)},
        {"tile_px": 240, "extent": (701, 497)},
        {"tile_px": 240, "extent": (701, 497), "subsampling": "444"},
        {"is_rgb": True},
        {"is_rgb": True, "has_jfif": True, "tile_px": 240},
        {"has_jfif": True, "is_bigtiff": True},
        {"is_bigtiff": True, "extent": (131, 1), "num_levels": 1},
        {"is_bigtiff": True, "is_padded": True, "extent": (1024, 768), "num_levels": 3},
        {"absent": ((0, 0), (0, 7))},
    ],
    ids=lambda form: ",".join(f"{key}={value}" for key, value in form.items()),
)
def test_drawn_slides_read_as_openslide_reads_them(
    write_slide: WriteSlide, form: dict[str, Any]
) -> None:
    assert_same_as_openslide(write_slide(**form))


def test_pixels_are_those_that_were_drawn(write_slide: WriteSlide) -> None:
    # Against the source and not a peer: both readers swapping red and blue would agree.
    pixels = np.full((300, 400, 3), 240, np.uint8)
    pixels[100:200, 50:150] = (200, 40, 90)
    pixels[10:60, 300:390] = (60, 20, 160)
    for is_rgb in (False, True):
        with open_slide(write_slide(f"{is_rgb}.tif", pixels=pixels, is_rgb=is_rgb)) as slide:
            found = slide.read_region(0, 0, 400, 300)
            assert np.abs(found[120:180, 70:130].astype(int) - (200, 40, 90)).max() <= 4
            assert np.abs(found[20:50, 310:380].astype(int) - (60, 20, 160)).max() <= 4


def test_a_jfif_marker_does_not_overrule_rgb_photometric(write_slide: WriteSlide) -> None:
    plain = write_slide("plain.svs", is_rgb=True)
    marked = write_slide("marked.svs", is_rgb=True, has_jfif=True)
    assert plain.stat().st_size < marked.stat().st_size
    with open_slide(plain) as one, open_slide(marked) as other:
        size = one.extent
        np.testing.assert_array_equal(one.read_region(0, 0, *size), other.read_region(0, 0, *size))


def test_absent_tiles_are_white(write_slide: WriteSlide) -> None:
    with open_slide(write_slide(absent=((0, 7),))) as slide:  # 6 across: column 1, row 1
        assert (slide.read_region(128, 128, 128, 128) == 255).all()
        assert (slide.read_region(120, 120, 144, 144)[8:136, 8:136] == 255).all()
        assert slide.read_region(0, 128, 128, 128).max(axis=2).min() < 255


def test_absent_tiles_of_a_reduced_level_come_of_the_finer_one(write_slide: WriteSlide) -> None:
    whole = write_slide("whole.tif")
    for number, absent in enumerate((((1, 1),), ((2, 0), (1, 0)))):
        with (
            open_slide(whole) as slide,
            open_slide(write_slide(f"sparse{number}.tif", absent=absent)) as sparse,
        ):
            for level in range(3):
                size = slide.levels[level].width_px, slide.levels[level].height_px
                expected, found = (
                    one.read_region(0, 0, *size, level=level).astype(int) for one in (slide, sparse)
                )
                assert np.abs(found - expected).mean() < 4, (absent, level)
    # Bare glass, which the scanner left out on all levels.
    bare = write_slide("bare.tif", absent=((0, 0), (0, 1), (0, 6), (0, 7), (1, 0)))
    with open_slide(bare) as slide:
        assert (slide.read_region(0, 0, 128, 128, level=1) == 255).all()


@pytest.mark.parametrize("stream", ["ycbcr", "rgb"])
def test_colours_are_those_of_the_streams_where_the_tag_contradicts(
    stream: str, write_slide: WriteSlide
) -> None:
    right = write_slide("right.tif", is_rgb=stream == "rgb", num_levels=2)
    wrong = write_slide("wrong.tif", is_rgb=stream == "rgb", num_levels=2)
    with tifffile.TiffFile(wrong, mode="r+b") as tiff:
        for page in tiff.pages:
            page.tags["PhotometricInterpretation"].overwrite(6 if stream == "rgb" else 2)
    with open_slide(right) as slide, open_slide(wrong) as odd:
        assert not slide.notes
        for level in range(2):
            one, other = (s.read_region(0, 0, 300, 200, level=level) for s in (slide, odd))
            np.testing.assert_array_equal(one, other)
        name = "RGB" if stream == "rgb" else "YCbCr"
        assert odd.notes == (f"colours by its JPEG streams, {name}, not by the TIFF tag",)


@pytest.mark.parametrize(("number", "is_whole"), [(2, True), (40, False)])
def test_a_few_stray_bytes_behind_the_pixels_are_no_damage(
    number: int, is_whole: bool, write_slide: WriteSlide
) -> None:
    path = write_slide(extent=(128, 128), num_levels=1)
    with open_slide(path) as slide:
        expected = slide.read_region(0, 0, 128, 128)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        start, length = page.dataoffsets[0], page.databytecounts[0]
        offsets, counts = page.tags["TileOffsets"], page.tags["TileByteCounts"]
    stray = b"\x00\x12" * (number // 2)
    stream = content[start : start + length - 2] + stray + b"\xff\xd9"
    struct.pack_into("<I", content, offsets.valueoffset, len(content))
    struct.pack_into("<I", content, counts.valueoffset, len(stream))
    path.write_bytes(content + stream)
    with open_slide(path) as slide:
        if is_whole:
            np.testing.assert_array_equal(slide.read_region(0, 0, 128, 128), expected)
        else:
            with pytest.raises(DamagedTileError, match="extraneous bytes"):
                slide.read_region(0, 0, 128, 128)


def test_a_slide_of_absent_tiles_only_is_white(write_slide: WriteSlide) -> None:
    path = write_slide(extent=(200, 100), num_levels=1, absent=((0, 0), (0, 1)))
    with open_slide(path) as slide:
        assert (slide.read_region(0, 0, 200, 100) == 255).all()


def test_levels_padded_to_tiles_keep_their_scale_and_end_with_the_slide(
    write_slide: WriteSlide,
) -> None:
    pixels = np.full((512, 768, 3), 120, np.uint8)
    pixels[256:320, 384:448] = (200, 60, 60)
    path = write_slide(pixels=pixels, num_levels=4, tile_px=128, is_padded=True)
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.levels] == [1.0, 2.0, 4.0, 8.0]
        assert (slide.levels[3].width_px, slide.levels[3].height_px) == (96, 64)
        for number, level in enumerate(slide.levels):
            side = round(64 / level.downsample)
            found = slide.read_region(384, 256, side, side, level=number)
            inner = found[side // 4 : -side // 4, side // 4 : -side // 4]
            assert np.abs(inner.astype(int) - (200, 60, 60)).max() < 25, number


# ------------------------------------------------------------------------- region of the whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Slide, list[np.ndarray]]]:
    """A slide with odd extents, and each of its levels whole, decoded by another library."""
    from carn.slides.pyramid import write_pyramid

    rng = np.random.default_rng(3)
    pixels = np.repeat(np.repeat(rng.integers(0, 255, (41, 53, 3), np.uint8), 9, 0), 9, 1)
    path = tmp_path_factory.mktemp("whole") / "slide.tif"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("carn.slides.pyramid.SMALLEST_LEVEL_PX", 100)
        write_pyramid(path, pixels[:-2, :-4], mpp_um=0.5, tile_px=96)
    levels = [page.asarray() for page in tifffile.TiffFile(path).pages]
    with open_slide(path) as slide:
        yield slide, levels


@given(
    x=st.integers(-700, 700),
    y=st.integers(-700, 700),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    level=st.integers(0, 3),
)
@example(x=0, y=0, width=473, height=367, level=0)
@example(x=96, y=96, width=96, height=96, level=0)
@example(x=472, y=366, width=1, height=1, level=0)
@settings(max_examples=150)
def test_any_region_is_that_crop_of_the_whole(
    whole: tuple[Slide, list[np.ndarray]], x: int, y: int, width: int, height: int, level: int
) -> None:
    slide, levels = whole
    pad = 1200
    padded = np.pad(levels[level], ((pad, pad), (pad, pad), (0, 0)), constant_values=255)
    downsample = slide.levels[level].downsample
    left, top = (int(np.floor(at / downsample + 0.5)) + pad for at in (x, y))
    expected = padded[top : top + height, left : left + width]
    found = slide.read_region(x, y, width, height, level=level)
    assert found.dtype == np.uint8
    # tifffile's decoder upsamples chroma as libjpeg does; so do we.
    np.testing.assert_array_equal(found, expected)
    inside = slide.inside(x, y, width, height, level=level)
    on_slide = np.zeros(padded.shape[:2], bool)
    on_slide[pad : pad + levels[level].shape[0], pad : pad + levels[level].shape[1]] = True
    expected_mask = on_slide[top : top + height, left : left + width]
    mask = np.zeros((height, width), bool)
    if not inside.is_empty:
        mask[inside.y0 : inside.y1, inside.x0 : inside.x1] = True
    np.testing.assert_array_equal(mask, expected_mask)


def test_regions_do_not_share_memory(whole: tuple[Slide, list[np.ndarray]]) -> None:
    slide, levels = whole
    first = slide.read_region(10, 10, 50, 50)
    first[:] = 0  # a caller may write on what it got, cached tiles or not
    np.testing.assert_array_equal(slide.read_region(10, 10, 50, 50), levels[0][10:60, 10:60])


# ------------------------------------------------------------------------------------- damage


def tile_span(path: Path, number: int, *, level: int = 0) -> tuple[int, int]:
    """(offset, length) of a tile's stream."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        return page.dataoffsets[number], page.databytecounts[number]


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def garbage(path: Path, start: int, length: int) -> None:
    overwrite(path, start, np.random.default_rng(1).bytes(length))


def zeros(path: Path, start: int, length: int) -> None:
    overwrite(path, start, bytes(length))


def cut_in_the_middle(path: Path, start: int, length: int) -> None:
    # The stream ends half way: what follows reads as fill.
    overwrite(path, start + length // 2, b"\xff\xd9" + bytes(length - length // 2 - 2))


def garbled_scan(path: Path, start: int, length: int) -> None:
    overwrite(path, start + length // 2, np.random.default_rng(2).bytes(length // 4))


def huge_claim(path: Path, start: int, length: int) -> None:
    stream = path.read_bytes()[start : start + length]
    at = stream.index(b"\xff\xc0")
    # SOF0: marker, length, precision, then height and width.
    overwrite(path, start + at + 5, struct.pack(">HH", 65500, 65500))


def small_claim(path: Path, start: int, length: int) -> None:
    stream = path.read_bytes()[start : start + length]
    overwrite(path, start + stream.index(b"\xff\xc0") + 5, struct.pack(">HH", 64, 64))


def small_tile(path: Path, start: int, length: int) -> None:
    # A sound JPEG of a quarter of the tile; what follows its end is not looked at.
    stream = imagecodecs.jpeg8_encode(np.zeros((64, 64, 3), np.uint8))
    assert len(stream) <= length
    overwrite(path, start, stream)


def lone_marker(path: Path, start: int, length: int) -> None:
    del length
    overwrite(path, start, b"\xff\xd8" + b"\xff\xe0\xff\xff")


@pytest.mark.parametrize(
    "harm",
    [
        garbage,
        zeros,
        cut_in_the_middle,
        garbled_scan,
        huge_claim,
        small_claim,
        small_tile,
        lone_marker,
    ],
)
def test_a_damaged_tile_is_an_error_of_that_tile_alone(
    write_slide: WriteSlide, harm: Callable[[Path, int, int], None]
) -> None:
    path = write_slide(has_jfif=True)
    whole_copy = path.with_name("whole.tif")
    shutil.copy(path, whole_copy)
    harm(path, *tile_span(path, 8))  # 6 across: column 2, row 1
    with open_slide(path) as slide, open_slide(whole_copy) as sound:
        for region in ((256, 128, 128, 128), (300, 200, 10, 10), (200, 100, 300, 300)):
            with pytest.raises(DamagedTileError) as caught:
                slide.read_region(*region)
            error = caught.value
            assert (error.level, error.x_l0, error.y_l0) == (0, 256, 128)
            assert error.uri == str(path)
            for word in (str(path), "level 0", "(256, 128)"):
                assert word in str(error)
        for column, row in itertools.product(range(6), range(4)):
            if (column, row) == (2, 1):
                continue
            region = (column * 128, row * 128, 128, 128)
            np.testing.assert_array_equal(slide.read_region(*region), sound.read_region(*region))
        for level in (1, 2):
            region = (0, 0, 175, 125)
            np.testing.assert_array_equal(
                slide.read_region(*region, level=level), sound.read_region(*region, level=level)
            )


def test_a_damaged_tile_of_a_coarse_level_is_named_in_level_0_px(write_slide: WriteSlide) -> None:
    path = write_slide()
    garbage(path, *tile_span(path, 4, level=1))  # 3 across: column 1, row 1
    with open_slide(path) as slide:
        with pytest.raises(DamagedTileError) as caught:
            slide.read_region(0, 0, 350, 250, level=1)
        assert (caught.value.level, caught.value.x_l0, caught.value.y_l0) == (1, 256, 256)
        slide.read_region(0, 0, 700, 500)


def test_a_damaged_tile_error_travels() -> None:
    error = DamagedTileError("s3://b/a.tif", "why", 2, 1024, 512)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is DamagedTileError
    assert str(copy) == str(error)
    assert (copy.uri, copy.reason, copy.level, copy.x_l0, copy.y_l0) == (
        "s3://b/a.tif",
        "damaged tile on level 2 at level-0 px (1024, 512): why",
        2,
        1024,
        512,
    )


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 20])
def test_a_tile_of_a_few_bytes_is_damaged(write_slide: WriteSlide, length: int) -> None:
    path = write_slide(num_levels=1)
    start, _ = tile_span(path, 0)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileByteCounts"]
        tag.overwrite((length, *tag.value[1:]))
    overwrite(path, start, (b"\xff\xd8\xff\xe0\x00\x04\x00\x00" + b"\xff" * 12)[:length])
    with open_slide(path) as slide:
        with pytest.raises(DamagedTileError):
            slide.read_region(0, 0, 10, 10)
        slide.read_region(128, 0, 10, 10)


@given(place=st.floats(0, 1), flips=st.binary(min_size=1, max_size=6))
@settings(max_examples=80)
def test_any_damage_to_a_stream_gives_pixels_or_a_damaged_tile(
    tmp_path: Path, place: float, flips: bytes
) -> None:
    path = tmp_path / "fuzzed.tif"
    if not path.exists():
        tile = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        tifffile.imwrite(path, tile, tile=(64, 64), photometric="rgb", compression="jpeg")
    start, length = tile_span(path, 0)
    sound = path.read_bytes()
    try:
        overwrite(path, start + int(place * (length - len(flips))), flips)
        with open_slide(path) as slide:
            try:
                assert slide.read_region(0, 0, 64, 64).shape == (64, 64, 3)
            except DamagedTileError as error:
                event(error.reason[:40])
    finally:
        path.write_bytes(sound)


def test_a_truncated_slide_is_refused(write_slide: WriteSlide) -> None:
    path = write_slide(num_levels=1)
    start, length = tile_span(path, 8)
    path.write_bytes(path.read_bytes()[: start + length // 2])
    with pytest.raises(SlideError, match=r"slide\.tif: is truncated: 16 of its 24 tiles"):
        open_slide(path)


def test_a_slide_that_shrinks_while_it_is_open_reads_up_to_its_end(write_slide: WriteSlide) -> None:
    path = write_slide(num_levels=1)
    start, length = tile_span(path, 8)
    with open_slide(path) as slide:
        os.truncate(path, start + length // 2)
        for _ in range(2):
            for region in ((256, 128, 128, 128), (600, 450, 10, 10)):
                with pytest.raises(DamagedTileError):
                    slide.read_region(*region)
            assert slide.read_region(0, 0, 700, 128).std() > 10


def test_a_tile_placed_beyond_all_files_is_damaged(write_slide: WriteSlide) -> None:
    path = write_slide(num_levels=1, is_bigtiff=True)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileOffsets"]
        # Its end wraps round 64 bits.
        tag.overwrite((*tag.value[:8], 2**64 - 4, *tag.value[9:]))
    with open_slide(path) as slide:
        with pytest.raises(DamagedTileError, match=r"\(256, 128\).*beyond the end"):
            slide.read_region(256, 128, 128, 128)
        slide.read_region(0, 0, 256, 500)


def test_absent_tiles_may_be_placed_anywhere(write_slide: WriteSlide) -> None:
    path = write_slide(num_levels=1, absent=((0, 7),))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[0].tags["TileOffsets"]
        tag.overwrite((*tag.value[:7], 2**31, *tag.value[8:]))
    with open_slide(path) as slide:
        assert (slide.read_region(128, 128, 128, 128) == 255).all()


@pytest.mark.parametrize("length", [1, 2, 4, 8, 9, 100, 150, 300])
def test_a_slide_cut_within_its_header_is_a_slide_error(
    write_slide: WriteSlide, length: int
) -> None:
    path = write_slide(num_levels=1)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    assert caught.value.uri == str(path)


# ------------------------------------------------------------------------------ hostile headers


def set_tags(path: Path, **values: int) -> None:
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, value in values.items():
            tag = tiff.pages[0].tags[name]
            tag.overwrite(value, dtype="I")


@pytest.mark.parametrize(
    "values",
    [
        {"ImageWidth": 4_000_000_000, "ImageLength": 4_000_000_000},
        {"ImageWidth": 3_000_000, "ImageLength": 3_000_000},
        {"ImageWidth": 3_000_000},
        {"ImageWidth": 0},
        {"ImageLength": 0},
        {"ImageWidth": 0, "ImageLength": 0},
        {"TileWidth": 0},
        {"TileLength": 0},
        {"TileWidth": 4_000_000_000, "TileLength": 4_000_000_000},
        {"TileWidth": 17},
    ],
    ids=str,
)
def test_an_impossible_header_is_one_error(write_slide: WriteSlide, values: dict[str, int]) -> None:
    path = write_slide(num_levels=1)
    set_tags(path, **values)
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    assert caught.value.uri == str(path)
    assert len(str(caught.value)) < 600


def test_an_extent_beyond_any_scanner_is_refused(write_slide: WriteSlide) -> None:
    # One row of tiles long enough to be consistent, so that only the bound can refuse it.
    path = write_slide(extent=(64, 64), num_levels=1, tile_px=64)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            (b"" for _ in range(300)),
            shape=(64, 300 * 8192, 3),
            dtype=np.uint8,
            tile=(64, 8192),
            photometric="rgb",
            compression="jpeg",
            metadata=None,
        )
    with pytest.raises(SlideError, match="more than any scanner"):
        open_slide(path)


LOSSLESS: dict[str, dict[str, Any]] = {
    "none": {"compression": None},
    "deflate": {"compression": "deflate"},
    "deflate with differences": {"compression": "deflate", "predictor": True},
    "lzw": {"compression": "lzw"},
    "lzw with differences": {"compression": "lzw", "predictor": True},
    "zstd": {"compression": "zstd"},
    "zstd with differences": {"compression": "zstd", "predictor": True},
    "webp": {"compression": "webp", "compressionargs": {"lossless": True}},
    "jpeg xl": {"compression": "jpegxl", "compressionargs": {"lossless": True}},
    "jpeg 2000": {"compression": "jpeg2000", "compressionargs": {"level": 0}},
}


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_tiles_are_read_to_the_bit(form: str, tmp_path: Path) -> None:
    pixels = draw(150, 100)
    path = tmp_path / "lossless.tif"
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", **LOSSLESS[form])
    with open_slide(path) as slide:
        assert slide.reader == "tiled-tiff"
        np.testing.assert_array_equal(slide.read_region(0, 0, 150, 100), pixels)
        np.testing.assert_array_equal(slide.read_region(30, 20, 70, 60), pixels[20:80, 30:100])


@pytest.mark.parametrize("form", [form for form in LOSSLESS if form != "none"])
def test_a_damaged_lossless_tile_is_its_own_error(form: str, tmp_path: Path) -> None:
    path = tmp_path / "lossless.tif"
    pixels = draw(150, 100)
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", **LOSSLESS[form])
    with tifffile.TiffFile(path) as tiff:
        start, length = tiff.pages[0].dataoffsets[1], tiff.pages[0].databytecounts[1]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(np.random.default_rng(0).bytes(length))
    with open_slide(path) as slide:
        with pytest.raises(DamagedTileError):
            slide.read_region(64, 0, 10, 10)
        np.testing.assert_array_equal(slide.read_region(0, 0, 64, 64), pixels[:64, :64])


def test_a_tile_that_claims_more_than_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "liar.tif"
    for form, larger in (
        ("jpeg 2000", imagecodecs.jpeg2k_encode(draw(640, 640), level=0)),
        ("webp", imagecodecs.webp_encode(draw(640, 640), lossless=True)),
        ("jpeg xl", imagecodecs.jpegxl_encode(draw(640, 640), lossless=True)),
        ("deflate", imagecodecs.zlib_encode(bytes(64 * 64 * 3 * 100))),
    ):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        tifffile.imwrite(path, noise, tile=(64, 64), photometric="rgb", **LOSSLESS[form])
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            entry = page.tags["TileByteCounts"]
        content = bytearray(path.read_bytes())
        start = len(content)
        content += larger
        struct.pack_into("<I", content, page.tags["TileOffsets"].valueoffset, start)
        struct.pack_into("<I", content, entry.valueoffset, min(len(larger), 2 * 64 * 64 * 3))
        path.write_bytes(content)
        with open_slide(path) as slide, pytest.raises(DamagedTileError):
            slide.read_region(0, 0, 64, 64)


def test_a_codec_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lerc.tif"
    tifffile.imwrite(path, draw(64, 64), tile=(64, 64), photometric="rgb", compression="lerc")
    with pytest.raises(SlideError, match="tiles of LERC in RGB are not read by it; store it anew"):
        open_slide(path)


@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8)), max_size=4),
    end=st.floats(0.0, 1.0),
)
@settings(max_examples=120)
def test_any_damage_to_a_header_opens_or_is_a_slide_error(
    tmp_path: Path, edits: list[tuple[float, bytes]], end: float
) -> None:
    path = tmp_path / "sound.tif"
    if not path.exists():
        tile = np.full((64, 80, 3), 100, np.uint8)
        tifffile.imwrite(
            path, tile, tile=(32, 32), photometric="rgb", compression="jpeg", metadata=None
        )
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        header = min(tiff.pages[0].dataoffsets)
    for place, patch in edits:
        at = int(place * (header - len(patch)))
        content[at : at + len(patch)] = patch
    hurt = tmp_path / "hurt.tif"
    hurt.write_bytes(bytes(content[: max(1, int(len(content) * end))]))
    try:
        with open_slide(hurt) as slide:
            width, height = slide.extent
            slide.read_region(0, 0, min(width, 100), min(height, 100))
    except SlideError as error:
        event(error.reason[:20])


# ----------------------------------------------------------------------------------- properties


def test_ome_levels_in_subifds_are_levels(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    pixels = np.full((256, 320, 3), (180, 60, 120), np.uint8)
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "jpeg"}
    with tifffile.TiffWriter(path, bigtiff=True, ome=True) as writer:
        writer.write(pixels, subifds=2, **options)
        writer.write(pixels[::2, ::2], subfiletype=1, **options)
        writer.write(pixels[::4, ::4], subfiletype=1, **options)
    with open_slide(path) as slide:
        assert slide.reader == "tiled-tiff"
        assert [level.downsample for level in slide.levels] == [1.0, 2.0, 4.0]


def test_macro_image_and_mask_are_no_levels(write_slide: WriteSlide) -> None:
    path = write_slide(extent=(640, 512), num_levels=2)
    with tifffile.TiffWriter(path, append=True) as writer:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "jpeg", "metadata": None}
        writer.write(np.zeros((32, 300, 3), np.uint8), subfiletype=1, **options)  # a macro image
        writer.write(np.zeros((128, 160, 3), np.uint8), subfiletype=1, **options)  # to be a mask
        writer.write(np.zeros((256, 320, 3), np.uint8), subfiletype=1, **options)  # a focal plane
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[3].tags["NewSubfileType"].overwrite(5)
    with open_slide(path) as slide:
        assert [(level.width_px, level.height_px) for level in slide.levels] == [
            (640, 512),
            (320, 256),
        ]


@pytest.mark.parametrize(
    ("extents", "tile", "expected"),
    [
        ([(1000, 800), (500, 400), (250, 200)], None, [1, 2, 4]),
        ([(1001, 801), (500, 400), (250, 200)], None, [1, 2, 4]),
        ([(1001, 801), (501, 401), (251, 201)], None, [1, 2, 4]),
        # Tumor_001 of CAMELYON16: 97792 x 221184, its last level padded to whole tiles.
        ([(97792, 221184), (1024, 2048)], (512, 512), [1, 128]),
        # Without knowing of tiles, OpenSlide's mean of both ratios.
        ([(97792, 221184), (1024, 2048)], None, [1, (97792 / 1024 + 108) / 2]),
        # Ratio 3 is no power of two.
        ([(900, 600), (300, 200)], None, [1, 3]),
    ],
)
def test_downsamples(
    extents: list[tuple[int, int]], tile: tuple[int, int] | None, expected: list[float]
) -> None:
    assert level_downsamples(extents, tile=tile) == pytest.approx(expected, rel=1e-12)


def test_tiles_cut_by_a_region_are_decoded_once(
    write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = simplejpeg.decode_jpeg

    def counted(*args: Any, **options: Any) -> Any:
        decoded.append(1)
        return decode(*args, **options)

    monkeypatch.setattr("carn.slides.tiled_tiff.simplejpeg.decode_jpeg", counted)
    with open_slide(write_slide()) as slide:
        slide.read_region(64, 64, 128, 128)
        slide.read_region(192, 64, 128, 128)
    assert len(decoded) == 6  # 3 x 2 tiles, the middle column shared
