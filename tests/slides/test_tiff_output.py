"""Slides written block by block: the bytes and the pixels of a slide that was written at once."""

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import pyvips
import simplejpeg
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from carn import uploads
from carn.slides import open_slide
from carn.slides.pyramid import pyramid_levels
from carn.slides.slide import Rgb
from carn.slides.slide_output import OutputSpec, SlideFormat, level_extents, open_output
from carn.slides.tiff_output import lay_out
from tests.slides.tiff_lab import (
    ICC,
    JPEG,
    LOSSLESS,
    MIN_PART_BYTES,
    cut,
    levels_by_tifffile,
    spec_of,
    turned_tissue,
    write,
    written,
)


@pytest.fixture(scope="module")
def tissue() -> Rgb:
    return turned_tissue()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MIN_PART_BYTES", MIN_PART_BYTES)


def psnr(found: Rgb, expected: Rgb) -> float:
    error = np.mean((found.astype(float) - expected) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-9))


def assert_is_near(found: Rgb, expected: Rgb, *, subsampling: str = "420") -> None:
    """As near as JPEG of this quality comes when it is given the level whole."""
    stream = simplejpeg.encode_jpeg(expected, quality=90, colorsubsampling=subsampling)
    assert found.shape == expected.shape
    assert psnr(found, expected) > psnr(simplejpeg.decode_jpeg(stream), expected) - 0.15


# -------------------------------------------------------------------------------- the pixels


@pytest.mark.parametrize(
    ("extent", "tile_px", "block_px"),
    [
        ((256, 256), 64, 256),  # one block
        ((257, 257), 64, 256),  # and one px
        ((1, 300), 16, 64),  # 1 px wide
        ((1, 1), 16, 16),
        ((1283, 1111), 64, 256),  # odd, two levels of the blocks' own and none beyond
        ((1537, 70), 16, 64),
        ((1026, 2049), 64, 128),  # levels 1 and 2 end in 1 px: 513, 257; 1025, 513
        ((1100, 40), 16, 16),  # blocks of one tile
        ((1100, 900), 64, 1024),  # blocks could make more levels than there are
    ],
)
def test_lossless_levels_are_exactly_those_of_the_whole_image(
    tissue: Rgb, tmp_path: Path, extent: tuple[int, int], tile_px: int, block_px: int
) -> None:
    pixels = np.tile(tissue, (2, 2, 1))[: extent[1], : extent[0]]
    form = replace(LOSSLESS, tile_px=tile_px)
    spec = spec_of(tmp_path, pixels, form, block_px=block_px)
    finished = written(spec, pixels)
    expected = list(pyramid_levels(pixels))
    assert level_extents(extent) == [(level.shape[1], level.shape[0]) for level in expected]
    found = levels_by_tifffile(Path(spec.uri).read_bytes())
    assert len(found) == len(expected)
    assert all(map(np.array_equal, found, expected))
    assert np.array_equal(finished.thumbnail, expected[-1])
    assert finished.size == Path(spec.uri).stat().st_size
    assert not Path(spec.work_uri).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["slide.tif"]


@settings(max_examples=30)
@given(
    width=st.integers(1, 2200),
    height=st.integers(1, 40),
    exponent=st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_any_extent_holds_every_px_once(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, exponent: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    pixels[:, 30:1500] = 240  # tiles of one colour among others, on all levels
    form = replace(LOSSLESS, tile_px=32)
    folder = tmp_path_factory.mktemp("any")
    spec = spec_of(folder, pixels, form, block_px=32 << exponent)
    written(spec, pixels)
    found = levels_by_tifffile(Path(spec.uri).read_bytes())
    assert all(map(np.array_equal, found, pyramid_levels(pixels)))


@pytest.mark.parametrize("subsampling", ["420", "422", "444"])
def test_every_reader_opens_it(tissue: Rgb, tmp_path: Path, subsampling: str) -> None:
    pixels = np.tile(tissue, (2, 1, 1))[:2301, :1301]
    form = replace(JPEG, subsampling=subsampling)
    spec = spec_of(tmp_path, pixels, form, mpp=(0.25, 0.26))
    written(spec, pixels)
    levels = [np.ascontiguousarray(level) for level in pyramid_levels(pixels)]
    # Level 0 is grainy tissue; the coarser ones are sharper, and cost JPEG more.
    extents = tuple((level.shape[1], level.shape[0]) for level in levels)
    assert len(extents) == 3

    with open_slide(spec.uri) as slide:
        assert slide.reader == "tiled-tiff"
        assert tuple((level.width_px, level.height_px) for level in slide.levels) == extents
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        assert (slide.properties.mpp_x, slide.properties.mpp_y) == pytest.approx((0.25, 0.26))
        assert slide.properties.icc_profile == ICC
        assert psnr(slide.read_region(0, 0, *extents[0]), pixels) > (
            38 if subsampling == "420" else 39
        )
        for number, expected in enumerate(levels):
            found = slide.read_region(0, 0, *extents[number], level=number)
            assert_is_near(found, expected, subsampling=subsampling)
    with openslide.OpenSlide(spec.uri) as slide:
        assert slide.level_dimensions == extents
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.26)
        assert slide.color_profile is not None
        assert not slide.associated_images
        for number, expected in enumerate(levels):
            found = slide.read_region((0, 0), number, extents[number])
            assert_is_near(np.asarray(found)[..., :3], expected, subsampling=subsampling)
            assert np.asarray(found)[..., 3].min() == 255
    with tifffile.TiffFile(spec.uri) as tiff:
        for number, page in enumerate(tiff.pages):
            assert_is_near(page.asarray(), levels[number], subsampling=subsampling)
            num, den = page.tags["XResolution"].value
            assert 10_000 * den / num == pytest.approx(0.25 * 2**number)
            assert page.tags[34675].value == ICC
        assert json.loads(tiff.pages[0].description)["provenance"] == spec.provenance
    for number, expected in enumerate(levels):
        image = pyvips.Image.tiffload(spec.uri, page=number)
        assert (image.width, image.height) == extents[number]
        assert 1000 / image.xres == pytest.approx(0.25 * 2**number)
        assert_is_near(image.numpy(), expected, subsampling=subsampling)


@pytest.mark.parametrize("extent", [(1, 1), (40, 20), (100, 100), (101, 101), (130, 9), (300, 90)])
@pytest.mark.parametrize("tile_px", [256, 512, 1024])
def test_libvips_opens_what_is_tiny(
    extent: tuple[int, int], tile_px: int, tissue: Rgb, tmp_path: Path
) -> None:
    pixels = tissue[: extent[1], : extent[0]]
    form = replace(LOSSLESS, tile_px=tile_px).fitting(extent)
    spec = spec_of(tmp_path, pixels, form, block_px=1024)
    written(spec, pixels)
    assert np.array_equal(pyvips.Image.tiffload(spec.uri).numpy(), pixels)
    with openslide.OpenSlide(spec.uri) as slide:
        found = slide.read_region((0, 0), 0, extent)
    assert np.array_equal(np.asarray(found)[..., :3], pixels)


def test_openslide_and_vips_open_what_is_lossless(tissue: Rgb, tmp_path: Path) -> None:
    pixels = tissue[:1100, :1201]
    spec = spec_of(tmp_path, pixels, LOSSLESS)
    written(spec, pixels)
    with openslide.OpenSlide(spec.uri) as slide:
        for number, expected in enumerate(pyramid_levels(pixels)):
            found = slide.read_region((0, 0), number, slide.level_dimensions[number])
            assert np.array_equal(np.asarray(found)[..., :3], expected)
    assert np.array_equal(pyvips.Image.tiffload(spec.uri, page=1).numpy(), expected)


def test_without_mpp_and_profile_none_is_invented(tissue: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tissue[:300, :300], mpp=None)
    output = open_output(spec)
    write(output, tissue[:300, :300])
    output.finish(icc_profile=None)
    with open_slide(spec.uri) as slide:
        assert slide.mpp is None
        assert slide.properties.icc_profile is None


def test_a_real_slide_comes_out_as_it_went_in(shared_data: Path, tmp_path: Path) -> None:
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        width, height = slide.extent
        pixels = slide.read_region(0, 0, width, height)
    spec = spec_of(tmp_path, pixels, replace(JPEG, tile_px=256), block_px=512)
    written(spec, pixels)
    with open_slide(spec.uri) as slide:
        for number, expected in enumerate(pyramid_levels(pixels)):
            size = expected.shape[1::-1]
            assert_is_near(slide.read_region(0, 0, *size, level=number), expected)


def test_blank_blocks_cost_nothing(tissue: Rgb, tmp_path: Path) -> None:
    pixels = np.full((4096, 4096, 3), 243, np.uint8)
    pixels[:256, :256] = tissue[:256, :256]
    spec = spec_of(tmp_path, pixels)
    output = open_output(spec)
    output.begin()
    sizes = [
        output.write_block(index, cut(spec, pixels, index), facts={})
        for index in range(output.num_blocks)
    ]
    assert sizes[0] > 0
    assert not any(sizes[1:])
    finished = output.finish(icc_profile=None)
    # Beyond the one block with tissue: 16 bytes a tile of table, and one tile.
    assert finished.size - sizes[0] < 64**2 * 1.4 * 12 + 20_000
    with openslide.OpenSlide(spec.uri) as slide:
        found = np.asarray(slide.read_region((2000, 3000), 0, (200, 200)))
        assert np.all(np.abs(found[..., :3].astype(int) - 243) <= 1)


def test_a_slide_of_one_colour_is_a_slide(tmp_path: Path) -> None:
    pixels = np.full((1100, 1300, 3), 255, np.uint8)
    finished = written(spec_of(tmp_path, pixels), pixels)
    assert finished.num_parts == 1
    assert np.all(finished.thumbnail == 255)
    with open_slide(finished.uri) as slide:
        assert np.all(slide.read_region(0, 0, 1300, 1100) == 255)


# --------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize("least", [1, 4_000, 20_000, 90_000, 10_000_000])
def test_bytes_depend_on_no_order(
    tissue: Rgb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """Whatever is a part of its own, joined to the head or joined at the end."""
    monkeypatch.setattr(uploads, "MIN_PART_BYTES", least)
    pixels = tissue[:1300, :1100].copy()
    pixels[256:600] = 255
    pixels[256 + 5, 7] = 0  # a block of few bytes among blank ones
    contents = []
    num_blocks = 5 * 6
    backwards = range(num_blocks - 1, -1, -1)
    for name, order in (("a", range(num_blocks)), ("b", [*backwards, 3, 4])):
        spec = spec_of(tmp_path / name, pixels, LOSSLESS)
        with ThreadPoolExecutor(3) as pool:
            output = open_output(spec, pool=pool)
            write(output, pixels, order)
            output.finish(icc_profile=ICC)
        contents.append(Path(spec.uri).read_bytes())
    assert contents[0] == contents[1]
    assert all(map(np.array_equal, levels_by_tifffile(contents[0]), pyramid_levels(pixels)))


@given(sizes=st.lists(st.integers(0, 60), max_size=30), start=st.integers(1, 60))
def test_the_layout_covers_the_file_without_gap_or_overlap(sizes: list[int], start: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "MIN_PART_BYTES", 25)
        layout = lay_out(sizes, start=start)
    first = start + sum(sizes[index] for index in layout.with_head) + layout.padding
    parts = [
        first,
        *(sizes[index] for index in layout.large),
        *(sum(sizes[index] for index in group) for group in layout.groups),
    ]
    assert all(size >= 25 for size in parts[:-1])
    order = [*layout.with_head, *layout.large, *itertools.chain(*layout.groups)]
    assert sorted(order) == [index for index, size in enumerate(sizes) if size]
    position = start
    for index in order:
        if index not in layout.with_head and position < first:
            position += layout.padding
        assert layout.block_offsets[index] == position
        position += sizes[index]


# ------------------------------------------------------------------------------ what is refused


def test_blocks_of_another_shape_or_type_are_refused(tissue: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tissue[:300, :300])
    output = open_output(spec)
    output.begin()
    for index, pixels in (
        (0, tissue[:255, :256]),
        (3, tissue[:256, :256]),
        (0, tissue[:256, :256].astype(np.int16)),
        (4, tissue[:44, :44]),
        (-1, tissue[:44, :44]),
    ):
        with pytest.raises(ValueError, match=r"slide\.tif"):
            output.write_block(index, pixels, facts={})
    with pytest.raises(ValueError, match="words is no number"):
        output.write_block(0, tissue[:256, :256], facts={"words": object()})


def test_too_many_blocks_name_a_block_size_that_works(tmp_path: Path) -> None:
    pixels = np.broadcast_to(np.uint8(0), (40_000, 40_000, 3))
    with pytest.raises(ValueError, match="raise block_px from 256 to 1024"):
        open_output(spec_of(tmp_path, pixels))
    assert open_output(spec_of(tmp_path, pixels, block_px=1024)).num_blocks == 1600


@pytest.mark.parametrize(
    "options",
    [
        {"block_px": 192},
        {"block_px": 32},
        {"extent": (0, 5)},
        {"mpp": (0.0, 0.25)},
        {"mpp": (math.nan, 0.25)},
        {"uri": "a/slide.ome.zarr"},
        {"format": SlideFormat(container="ome-zarr", tile_px=64)},
    ],
)
def test_impossible_specs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).replace("uri", "ome")):
        spec_of("a", np.zeros((300, 300, 3), np.uint8), **options)


@pytest.mark.parametrize("options", [{"tile_px": 100}, {"tile_px": 0}, {"quality": 0}])
def test_impossible_formats_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SlideFormat(**options)


def test_a_spec_travels_as_text() -> None:
    spec = spec_of("a", np.zeros((300, 200, 3), np.uint8), provenance={"b": [1, {"c": "ü"}]})
    assert OutputSpec.from_json(spec.to_json()) == spec
    assert OutputSpec.from_json(replace(spec, mpp=None).to_json()).mpp is None
