"""Opening: which reader serves what, what is known of a slide, what is refused, and sharing."""

import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import psutil
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from carn.errors import (
    AccessDeniedError,
    CarnError,
    DamagedTileError,
    MissingObjectError,
    SlideError,
    StorageError,
)
from carn.slides import Slide, cached_slide, open_slide
from carn.slides import slide as slide_module
from carn.slides.opening import MAX_OPEN_SLIDES, _cached
from carn.slides.slide import MAX_REGION_PX

WriteSlide = Callable[..., Path]
READERS = {"tiled-tiff": "jpeg", "openslide": "packbits"}

APERIO = (
    "Aperio Image Library v11.2.1\r\n700x500 [0,0 700x500] (128x128) JPEG/RGB Q=70"
    "|AppMag = 20|MPP = 0.4990|Filename = x"
)
SPACING = (
    '<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">'
    "&quot;{}&quot; &quot;{}&quot;</Attribute>"
)
PHILIPS = (
    '<?xml version="1.0" encoding="UTF-8" ?>\n<DataObject ObjectType="DPUfsImport">'
    '<Attribute Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" '
    'PMSVR="IDataObjectArray"><Array><DataObject ObjectType="DPScannedImage">'
    '<Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" PMSVR="IString">WSI'
    "</Attribute>" + SPACING.format(0.000227273, 0.000226891) + "<Attribute "
    'Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE" Group="0x1001" Element="0x8B01" '
    'PMSVR="IDataObjectArray"><Array>'
    + "".join(
        '<DataObject ObjectType="PixelDataRepresentation">'
        + SPACING.format(0.000227273 * 2**level, 0.000226891 * 2**level)
        + "</DataObject>"
        for level in range(3)
    )
    + "</Array></Attribute></DataObject></Array></Attribute></DataObject>"
)


@pytest.fixture(params=READERS)
def slide(request: pytest.FixtureRequest, write_slide: WriteSlide) -> Iterator[Slide]:
    """The same drawn slide, once for each reader: levels of 700 x 500, 350 x 250, 175 x 125."""
    with open_slide(write_slide(compression=READERS[request.param])) as opened:
        assert opened.reader == request.param
        yield opened


# ------------------------------------------------------------------------------------- regions


def test_extent_and_levels(slide: Slide) -> None:
    assert slide.extent == (700, 500)
    assert [(lv.width_px, lv.height_px, lv.downsample) for lv in slide.levels] == [
        (700, 500, 1.0),
        (350, 250, 2.0),
        (175, 125, 4.0),
    ]


def test_locations_are_in_level_0_px_at_every_level(slide: Slide) -> None:
    for level, downsample in enumerate((1, 2, 4)):
        found = slide.read_region(200, 120, 50, 40, level=level)
        w, h = slide.levels[level].width_px, slide.levels[level].height_px
        whole = slide.read_region(0, 0, w, h, level=level)
        x, y = 200 // downsample, 120 // downsample
        np.testing.assert_array_equal(found, whole[y : y + 40, x : x + 50])
        assert found.dtype == np.uint8
        assert found.shape == (40, 50, 3)


def test_regions_over_the_border_are_white_outside(slide: Slide) -> None:
    for level, downsample in enumerate((1, 2, 4)):
        w, h = slide.levels[level].width_px, slide.levels[level].height_px
        whole = slide.read_region(0, 0, w, h, level=level)
        left, top = -16, -8
        found = slide.read_region(left * downsample, top * downsample, w + 40, h + 30, level=level)
        expected = np.full((h + 30, w + 40, 3), 255, np.uint8)
        expected[8 : 8 + h, 16 : 16 + w] = whole
        np.testing.assert_array_equal(found, expected)
        inside = slide.inside(left * downsample, top * downsample, w + 40, h + 30, level=level)
        assert (inside.x0, inside.y0, inside.x1, inside.y1) == (16, 8, 16 + w, 8 + h)


@pytest.mark.parametrize(
    ("x", "y"), [(-200, 0), (0, -200), (700, 0), (0, 500), (10**9, 10**9), (-(10**9), 5)]
)
def test_a_region_off_the_slide_is_white(slide: Slide, x: int, y: int) -> None:
    for level in range(3):
        assert (slide.read_region(x, y, 20, 20, level=level) == 255).all()
        assert slide.inside(x, y, 20, 20, level=level).is_empty
    assert slide.inside(699, 499, 20, 20).x1 == 1


@pytest.mark.parametrize(
    ("size", "level", "words"),
    [
        ((0, 5), 0, "0 x 5"),
        ((5, -1), 0, "5 x -1"),
        ((MAX_REGION_PX, 2), 0, "in parts"),
        ((5, 5), 3, r"levels 0\.\.2, not 3"),
        ((5, 5), -1, r"levels 0\.\.2, not -1"),
    ],
)
def test_a_wrong_wish_is_a_value_error(
    slide: Slide, size: tuple[int, int], level: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        slide.read_region(0, 0, *size, level=level)


def test_level_for_downsample(slide: Slide) -> None:
    chosen = [slide.level_for_downsample(d) for d in (0.5, 1, 1.9, 1.99, 2, 3, 4, 100)]
    assert chosen == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("side", [1, 64, 100, 175, 176, 350, 700, 5000])
def test_thumbnail(slide: Slide, side: int) -> None:
    found = slide.thumbnail(side)
    longer = min(side, 700)
    assert found.shape == (max(1, round(500 * longer / 700)), longer, 3)
    whole = slide.read_region(0, 0, 700, 500)
    box = Image.fromarray(whole).resize(found.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(found.astype(int) - np.asarray(box)).mean() < 12


@given(
    extent=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    x=st.integers(-400, 400),
    y=st.integers(-400, 400),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
)
def test_inside_is_where_the_slide_is(
    extent: tuple[int, int], x: int, y: int, width: int, height: int
) -> None:
    from carn.slides.slide import Level, SlideProperties

    class Plain(Slide):
        def _read_level(self, x: int, y: int, width: int, height: int, *, level: int) -> Any:
            assert 0 <= x <= x + width <= extent[0]
            assert 0 <= y <= y + height <= extent[1]
            return np.zeros((height, width, 3), np.uint8)

        def close(self) -> None: ...

    level = Level(width_px=extent[0], height_px=extent[1], downsample=1.0)
    plain = Plain("plain", levels=(level,), properties=SlideProperties(vendor="test"))
    region = plain.read_region(x, y, width, height)
    inside = plain.inside(x, y, width, height)
    across = np.arange(x, x + width)
    down = np.arange(y, y + height)
    is_on = ((down >= 0) & (down < extent[1]))[:, None] & ((across >= 0) & (across < extent[0]))
    np.testing.assert_array_equal(region[..., 0] == 0, is_on)
    assert inside.is_empty == (not is_on.any())
    if is_on.any():
        assert is_on[inside.y0 : inside.y1, inside.x0 : inside.x1].all()
        assert (inside.x1 - inside.x0) * (inside.y1 - inside.y0) == is_on.sum()


# ---------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("compression", READERS.values())
@pytest.mark.parametrize(
    ("form", "mpp"),
    [
        ({"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (101_600, 101_600), "resolutionunit": "INCH"}, 0.25),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (96, 96), "resolutionunit": "INCH"}, None),
        ({"resolution": (20_000, 20_000), "resolutionunit": "NONE"}, None),
        ({"resolution": (0, 0), "resolutionunit": "CENTIMETER"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_mpp_by_resolution_tags(
    write_slide: WriteSlide, compression: str, form: dict[str, Any], mpp: float | None
) -> None:
    with open_slide(write_slide(compression=compression, **form)) as slide:
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-6))
        assert slide.properties.vendor == "generic-tiff"
        assert slide.properties.objective_power is None


@pytest.mark.parametrize("compression", READERS.values())
def test_mpp_of_both_axes(write_slide: WriteSlide, compression: str) -> None:
    path = write_slide(
        compression=compression, resolution=(20_000, 40_000), resolutionunit="CENTIMETER"
    )
    with open_slide(path) as slide:
        assert slide.properties.mpp_x == pytest.approx(0.5)
        assert slide.properties.mpp_y == pytest.approx(0.25)
        assert slide.mpp == pytest.approx(0.375)


@pytest.mark.parametrize("compression", READERS.values())
@pytest.mark.parametrize(
    ("description", "mpp", "power"),
    [
        (APERIO, 0.499, 20.0),
        (APERIO.replace("MPP = 0.4990", "MPP = 0"), None, 20.0),
        (APERIO.replace("MPP = 0.4990", "MPP = 1.2.3"), None, 20.0),
        (APERIO.replace("|MPP = 0.4990", ""), None, 20.0),
        (APERIO.replace("|AppMag = 20", ""), 0.499, None),
    ],
)
def test_aperio_says_mpp_and_power_in_its_description(
    write_slide: WriteSlide, compression: str, description: str, mpp: float, power: float
) -> None:
    # The resolution tags of an Aperio file say nothing, whatever they say.
    path = write_slide(
        "a.svs",
        compression=compression,
        description=description,
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
    )
    with open_slide(path) as slide:
        assert slide.properties.vendor == "aperio"
        assert slide.mpp == mpp
        assert slide.properties.objective_power == power


def test_philips_says_mpp_in_its_xml(write_slide: WriteSlide) -> None:
    path = write_slide(description=PHILIPS, software="Philips DP v1.0")
    with open_slide(path) as slide, openslide.OpenSlide(str(path)) as peer:
        assert slide.reader == "tiled-tiff"
        assert slide.properties.vendor == "philips" == peer.properties["openslide.vendor"]
        # Row spacing stands first: it is that of y.
        assert slide.properties.mpp_x == pytest.approx(0.226891)
        assert slide.properties.mpp_y == pytest.approx(0.227273)
        assert slide.properties.mpp_x == pytest.approx(float(peer.properties["openslide.mpp-x"]))
        assert slide.properties.mpp_y == pytest.approx(float(peer.properties["openslide.mpp-y"]))


def test_philips_with_broken_xml_has_no_mpp(write_slide: WriteSlide) -> None:
    broken = PHILIPS.replace("</Array>", "", 1)
    with open_slide(write_slide(description=broken, software="Philips DP v1.0")) as slide:
        assert slide.properties.vendor == "philips"
        assert slide.mpp is None


@pytest.mark.parametrize("compression", READERS.values())
def test_the_icc_profile_comes_byte_for_byte(write_slide: WriteSlide, compression: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with open_slide(write_slide(compression=compression, iccprofile=profile)) as slide:
        assert slide.properties.icc_profile == profile
    with open_slide(write_slide("without.tif", compression=compression)) as slide:
        assert slide.properties.icc_profile is None


# ------------------------------------------------------------------------------- what is refused


def refused(error_type: type[CarnError], uri: str | Path, words: str) -> None:
    """Opening is one error of exactly that type that names the slide and what is wrong."""
    with pytest.raises(CarnError, match=words) as caught:
        open_slide(uri)
    assert type(caught.value) is error_type
    assert str(uri) in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(MissingObjectError, tmp_path / "no.svs", "no such file")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    refused(SlideError, tmp_path, "is a directory")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.svs").touch()
    refused(SlideError, tmp_path / "a.svs", "is an empty file")


@pytest.mark.parametrize(
    "content",
    [b"just text, no slide", b"II*\0", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", os.urandom(5000)],
    ids=["text", "4 bytes", "no directory", "big endian", "noise"],
)
def test_what_is_no_slide_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(content)
    refused(SlideError, path, "is not a slide in any format|cannot be opened")


def test_a_plain_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (50, 50)).save(path)
    refused(SlideError, path, "is not a slide in any format")


def test_a_directory_that_loops_is_refused(tmp_path: Path) -> None:
    # One directory whose "next" is itself.
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0" + struct.pack("<IHI", 8, 0, 8))
    refused(SlideError, path, "lead in a circle")


@pytest.mark.parametrize("compression", READERS.values())
def test_truncated_slides_open_or_are_refused(write_slide: WriteSlide, compression: str) -> None:
    path = write_slide(compression=compression)
    content = path.read_bytes()
    refusals = []
    for share in np.linspace(0.001, 0.999, 60):
        path.write_bytes(content[: int(len(content) * share)])
        try:
            with open_slide(path) as slide:
                slide.read_region(0, 0, *slide.extent)
        except SlideError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert all(str(path) in refusal for refusal in refusals)


@pytest.mark.parametrize("compression", READERS.values())
@pytest.mark.parametrize("extent", [(4_000_000_000, 4_000_000_000), (3_000_000, 3_000_000), (0, 0)])
def test_absurd_extents_are_refused(
    write_slide: WriteSlide, compression: str, extent: tuple[int, int]
) -> None:
    path = write_slide(compression=compression, num_levels=1)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for tag, value in zip((256, 257), extent, strict=True):
            tiff.pages[0].tags[tag].overwrite(value, dtype="I")
    refused(SlideError, path, r"slide\.tif: ")


@pytest.mark.parametrize("name", ["broken.svs", "small_dicom_no_flavor.dcm"])
def test_real_files_that_are_no_slides_are_refused(shared_data: Path, name: str) -> None:
    refused(SlideError, shared_data / "slides" / "edge" / name, "not a slide|cannot be opened")


def test_a_real_slide_that_opens_but_does_not_read(shared_data: Path) -> None:
    path = shared_data / "slides" / "edge" / "unreadable.svs"
    with open_slide(path) as slide, pytest.raises(SlideError, match=r"unreadable\.svs"):
        slide.read_region(0, 0, 16, 16)


@pytest.mark.parametrize("name", ["boxes.tiff", "dicom_boxes/boxes_0.dcm"])
def test_small_real_slides_read(shared_data: Path, name: str) -> None:
    path = shared_data / "slides" / "edge" / name
    with open_slide(path) as slide, openslide.OpenSlide(str(path)) as peer:
        rgba = np.asarray(peer.read_region((0, 0), 0, slide.extent))
        is_opaque = rgba[..., 3] == 255
        found = slide.read_region(0, 0, *slide.extent)
        np.testing.assert_array_equal(found[is_opaque], rgba[is_opaque][:, :3])
        assert is_opaque.any()


def test_missing_objects_and_buckets_are_refused(s3: Any) -> None:
    refused(MissingObjectError, s3.uri("no/such.svs"), "no such object")
    refused(MissingObjectError, "s3://carn-no-such-bucket/a.svs", "no such")
    refused(MissingObjectError, s3.uri(), "names a bucket")
    refused(SlideError, s3.put("empty.svs", b""), "is an empty file")


def test_refused_credentials_are_one_error(stub_s3: Any) -> None:
    stub_s3.refuse_all = True
    refused(AccessDeniedError, "s3://b/a.svs", "access denied.*AWS_ACCESS_KEY_ID")


@pytest.mark.usefixtures("stub_s3", "no_waiting")
def test_an_unreachable_store_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    refused(StorageError, "s3://b/a.svs", "cannot be reached.*AWS_ENDPOINT_URL")


def test_an_unknown_scheme_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="'gs' is not supported"):
        open_slide("gs://bucket/a.svs")


def test_a_refused_slide_leaves_no_handle(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(b"no slide")
    before = open_files()
    for _ in range(20):
        with pytest.raises(SlideError):
            open_slide(path)
    assert open_files() == before


# ------------------------------------------------------------------------- remote and local alike


@pytest.mark.parametrize("compression", READERS.values())
def test_a_remote_slide_reads_as_the_local_one(
    s3: Any,
    write_slide: WriteSlide,
    compression: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CARN_CACHE_DIR", str(tmp_path / "cache"))
    path = write_slide(compression=compression)
    with open_slide(s3.put("a b/slide é.tif", path)) as remote, open_slide(path) as local:
        assert remote.reader == local.reader
        assert remote.levels == local.levels
        assert remote.properties == local.properties
        for region in ((0, 0, 700, 500), (-20, 130, 300, 40)):
            np.testing.assert_array_equal(remote.read_region(*region), local.read_region(*region))
    # By range: what the direct reader reads leaves nothing on the disk.
    assert (tmp_path / "cache").exists() == (local.reader == "openslide")


def test_names_do_not_decide(write_slide: WriteSlide) -> None:
    with open_slide(write_slide("slide.png")) as slide:
        assert slide.reader == "tiled-tiff"


def test_open_slides_do_not_travel(slide: Slide) -> None:
    with pytest.raises(TypeError, match=re.escape(slide.uri)):
        pickle.dumps(slide)


# ------------------------------------------------------------------------------- sharing slides


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def forget_slides() -> Any:
    _cached.cache_clear()
    yield
    _cached.cache_clear()


def links(path: Path, count: int) -> list[str]:
    """Many names of one file: to the cache, many slides."""
    folder = path.parent / "many"
    folder.mkdir()
    names = [folder / f"{number:04d}.tif" for number in range(count)]
    for name in names:
        name.hardlink_to(path)
    return [str(name) for name in names]


def test_a_cached_slide_is_opened_once(write_slide: WriteSlide) -> None:
    path = str(write_slide())
    assert cached_slide(path) is cached_slide(path)


@pytest.mark.parametrize(("compression", "num_slides"), [("jpeg", 1000), ("deflate", 500)])
def test_few_slides_stay_open_and_memory_stays_flat(
    write_slide: WriteSlide, compression: str, num_slides: int
) -> None:
    path = write_slide(extent=(200, 160), num_levels=2, tile_px=64, compression=compression)
    process = psutil.Process()
    before = open_files()
    warm = 0
    for number, uri in enumerate(links(path, num_slides)):
        cached_slide(uri).read_region(30, 30, 100, 100)
        if number == 200:
            warm = process.memory_info().rss
        if number % 100 == 99:
            assert open_files() - before <= MAX_OPEN_SLIDES * 2
    assert process.memory_info().rss - warm < 30e6
    _cached.cache_clear()
    assert open_files() == before


@pytest.mark.parametrize("compression", READERS.values())
def test_a_slide_that_somebody_holds_outlives_its_place_in_the_cache(
    write_slide: WriteSlide, compression: str
) -> None:
    uris = links(write_slide(compression=compression), MAX_OPEN_SLIDES + 5)
    held = cached_slide(uris[0])
    expected = held.read_region(0, 0, 300, 300)
    for uri in uris[1:]:
        cached_slide(uri)
    assert cached_slide(uris[0]) is not held
    np.testing.assert_array_equal(held.read_region(0, 0, 300, 300), expected)


@pytest.mark.parametrize("compression", READERS.values())
def test_threads_share_a_slide(write_slide: WriteSlide, compression: str) -> None:
    path = str(write_slide(compression=compression))
    whole = cached_slide(path).read_region(0, 0, 700, 500)

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            x, y = int(rng.integers(600)), int(rng.integers(400))
            found = cached_slide(path).read_region(x, y, 100, 100)
            if not np.array_equal(found, whole[y : y + 100, x : x + 100]):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_a_thumbnail_of_a_slide_without_pyramid_is_made_in_strips(
    write_slide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide("flat.tif", extent=(900, 700), num_levels=1)
    with open_slide(path) as slide:
        at_once = slide.thumbnail(100).astype(int)
        pixels = slide.read_region(0, 0, 900, 700).astype(float)
    largest = 0
    with open_slide(path) as slide:
        inner = slide._read_level

        def counting(x: int, y: int, width: int, height: int, *, level: int) -> Any:
            nonlocal largest
            largest = max(largest, width * height)
            return inner(x, y, width, height, level=level)

        monkeypatch.setattr(slide_module, "STRIP_PX", 900 * 50)
        monkeypatch.setattr(slide, "_read_level", counting)
        strips = slide.thumbnail(100).astype(int)
    assert largest <= 900 * 50
    assert strips.shape == (78, 100, 3)
    assert np.abs(strips - at_once).max() <= 1
    # Area means: the middle of a pixel's square is near its mean.
    np.testing.assert_allclose(strips.mean(axis=(0, 1)), pixels.mean(axis=(0, 1)), atol=1.0)


def test_a_thumbnail_of_a_slide_with_a_damaged_coarse_level_is_made_from_a_finer_one(
    write_slide: Any,
) -> None:
    path = write_slide("coarse.tif", extent=(1024, 768), num_levels=3, tile_px=128)
    with open_slide(path) as slide:
        expected = slide.thumbnail(200).astype(int)
        level = slide._tiled_levels[2]  # type: ignore[attr-defined]
        start = int(level.offsets[0])
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(40))
    with open_slide(path) as slide:
        with pytest.raises(DamagedTileError, match="level 2"):
            slide.read_region(0, 0, 64, 64, level=2)
        found = slide.thumbnail(200).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 4
