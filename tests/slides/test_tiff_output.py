"""Slides written block by block: the bytes and the pixels of a slide that was written at once."""

import io
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import pyvips
import simplejpeg
import skimage.data
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageCms

from carn import storage, uploads
from carn.errors import (
    ExtraPartError,
    StalePartError,
    StorageError,
    UnfinishedError,
    UploadGoneError,
)
from carn.slides import open_slide
from carn.slides.pyramid import pyramid_levels
from carn.slides.slide import Rgb
from carn.slides.slide_output import (
    Finished,
    OutputSpec,
    SlideFormat,
    SlideOutput,
    block_box,
    level_extents,
    open_output,
)
from carn.slides.tiff_output import lay_out

LOSSLESS = SlideFormat(compression="lossless", tile_px=64)
JPEG = SlideFormat(tile_px=64)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def tissue() -> Rgb:
    """1536 x 1536 px, no two 512-px squares of it alike in every px."""
    square = skimage.data.immunohistochemistry()
    rows = [np.concatenate([np.rot90(square, k + j) for k in range(3)], axis=1) for j in range(3)]
    return np.ascontiguousarray(np.concatenate(rows))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few hundred px are parts of their own, unless a test says otherwise."""
    monkeypatch.setattr(uploads, "MIN_PART_BYTES", 20_000)


def spec_of(
    folder: Path | str, pixels: Rgb, form: SlideFormat = JPEG, **options: Any
) -> OutputSpec:
    return OutputSpec(
        **{
            "uri": storage.join(str(folder), "slide.tif"),
            "work_uri": storage.join(str(folder), "work"),
            "extent": (pixels.shape[1], pixels.shape[0]),
            "block_px": 256,
            "mpp": (0.25, 0.25),
            "provenance": {"slide": "sha256:12", "scale": 2},
            "format": form,
            **options,
        }
    )


def cut(spec: OutputSpec, pixels: Rgb, index: int) -> Rgb:
    x0, y0, x1, y1 = block_box(spec, index)
    return pixels[y0:y1, x0:x1]


def write(output: SlideOutput, pixels: Rgb, indexes: Any = None) -> None:
    output.begin()
    for index in range(output.num_blocks) if indexes is None else indexes:
        facts = {"index": index, "mean": np.float32(1.5), "name": f"b{index}", "grid": np.eye(2)}
        output.write_block(index, cut(output.spec, pixels, index), facts=facts)


def written(spec: OutputSpec, pixels: Rgb, indexes: Any = None) -> Finished:
    output = open_output(spec)
    write(output, pixels, indexes)
    return output.finish(icc_profile=ICC)


def psnr(found: Rgb, expected: Rgb) -> float:
    error = np.mean((found.astype(float) - expected) ** 2)
    return 10 * math.log10(255**2 / max(error, 1e-9))


def assert_is_near(found: Rgb, expected: Rgb, *, subsampling: str = "420") -> None:
    """As near as JPEG of this quality comes when it is given the level whole."""
    stream = simplejpeg.encode_jpeg(expected, quality=90, colorsubsampling=subsampling)
    assert found.shape == expected.shape
    assert psnr(found, expected) > psnr(simplejpeg.decode_jpeg(stream), expected) - 0.15


def levels_by_tifffile(content: bytes) -> list[Rgb]:
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        return [page.asarray() for page in tiff.pages]


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
        assert slide.reader == "tiled-jpeg"
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


def test_an_object_store_holds_the_same_bytes(
    tissue: Rgb, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts as large as S3 wants them: blocks above and below the limit."""
    monkeypatch.setattr(uploads, "MIN_PART_BYTES", 5 * 2**20)
    rng = np.random.default_rng(0)
    pixels = np.tile(tissue, (3, 2, 1))[:4500, :2300]
    pixels[:2048, :2048] = rng.integers(0, 256, (2048, 2048, 3), np.uint8)  # 12 MB, a part
    form = SlideFormat(compression="lossless", tile_px=512)
    for folder in (str(tmp_path), s3.uri("out")):
        finished = written(spec_of(folder, pixels, form, block_px=1024), pixels)
    local = (tmp_path / "slide.tif").read_bytes()
    assert s3.get("out/slide.tif") == local
    assert s3.list_keys() == ["out/slide.tif"]
    assert finished.num_parts > 3
    assert finished.etag.endswith(f"-{finished.num_parts}")
    assert not uploads.list_uploads(s3.uri("out"))
    assert all(map(np.array_equal, levels_by_tifffile(local), pyramid_levels(pixels)))


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


# ------------------------------------------------------------------- interruption and damage


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return request.getfixturevalue("s3").uri("out")


@pytest.fixture
def unlimited_parts(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store that joins parts of any size, as the tests' small slides want it."""
    if storage.is_s3(folder):
        if "CARN_TEST_S3_ENDPOINT" in os.environ:
            pytest.skip("a real object store joins no parts as small as this slide's")
        monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)


@pytest.fixture(scope="module")
def whole(tissue: Rgb, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The slide of `pixels` written without a break."""
    folder = tmp_path_factory.mktemp("whole")
    pixels = pixels_of(tissue)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "MIN_PART_BYTES", 20_000)
        return Path(written(spec_of(folder, pixels), pixels).uri).read_bytes()


NUM_BLOCKS = 10
LARGE, BLANK = {0, 4, 6}, 2


def pixels_of(tissue: Rgb) -> Rgb:
    """Two levels, 2 x 5 blocks: LARGE are parts of their own, BLANK is white, others are small."""
    pixels = tissue[:1100, :330].copy()
    pixels[256:512, :256] = 255
    return pixels


@pytest.mark.usefixtures("unlimited_parts")
def test_a_slide_is_resumed_by_another_process(tissue: Rgb, folder: str, whole: bytes) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    assert open_output(spec).done_blocks() == set()
    first = open_output(spec)
    write(first, pixels, [0, 1, 2, 5, 7])
    second = open_output(OutputSpec.from_json(spec.to_json()))
    second.begin()
    assert second.done_blocks() == {0, 1, 2, 5, 7}
    with pytest.raises(UnfinishedError) as caught:
        second.finish(icc_profile=ICC)
    assert caught.value.blocks == (3, 4, 6, 8, 9)
    assert not storage.is_file(spec.uri)
    assert len(uploads.list_uploads(folder)) == 1
    write(second, pixels, [3, 4, 6, 8, 9])
    facts = dict(second.block_facts())
    assert list(facts) == list(range(NUM_BLOCKS))
    assert facts[4]["index"] == 4
    assert facts[4]["mean"] == 1.5
    assert facts[4]["name"] == "b4"
    assert np.array_equal(facts[4]["grid"], np.eye(2))
    second.finish(icc_profile=ICC)
    assert storage.read_bytes(spec.uri) == whole


@pytest.mark.usefixtures("unlimited_parts")
def test_what_storage_no_longer_has_is_done_again(tissue: Rgb, folder: str, whole: bytes) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    output = open_output(spec)
    write(output, pixels)
    [upload] = uploads.list_uploads(folder)
    uploads.put_part(spec.uri, upload.upload_id, 2 + 4, bytes(30_000))  # somebody else's part
    payloads = storage.list_objects(storage.join(spec.work_uri, "payloads"))
    [small] = [item.uri for item in payloads if "/000003." in item.uri]
    storage.delete([small])
    storage.write_bytes(storage.join(spec.work_uri, "blocks", "000007.npz"), b"no record")
    others = set(range(NUM_BLOCKS)) - {3, 4, 7}
    assert output.done_blocks() == others
    with pytest.raises(UnfinishedError, match="blocks 3, 4, 7"):
        output.finish(icc_profile=ICC)
    assert {index for index, _ in output.block_facts()} == others
    write(output, pixels, [3, 4, 7])
    output.finish(icc_profile=ICC)
    assert storage.read_bytes(spec.uri) == whole


def test_a_small_block_that_was_altered_is_done_again(
    tissue: Rgb, tmp_path: Path, whole: bytes
) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    output = open_output(spec)
    write(output, pixels)
    for item in storage.list_objects(storage.join(spec.work_uri, "payloads")):
        if "/000003." in item.uri:
            storage.write_bytes(item.uri, bytes(item.size))  # as long as before
    with pytest.raises(UnfinishedError) as caught:
        output.finish(icc_profile=ICC)
    assert caught.value.blocks == (3,)
    write(output, pixels, [3])
    output.finish(icc_profile=ICC)
    assert Path(spec.uri).read_bytes() == whole


@pytest.mark.usefixtures("unlimited_parts")
def test_an_upload_that_was_aborted_begins_anew(tissue: Rgb, folder: str, whole: bytes) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    output = open_output(spec)
    write(output, pixels)
    [upload] = uploads.list_uploads(folder)
    uploads.abort(spec.uri, upload.upload_id)
    with pytest.raises(UploadGoneError):
        output.write_block(0, cut(spec, pixels, 0), facts={})
    small = set(range(NUM_BLOCKS)) - LARGE
    assert output.done_blocks() == small
    output.begin()
    assert output.done_blocks() == small
    write(output, pixels, LARGE)
    output.finish(icc_profile=ICC)
    assert storage.read_bytes(spec.uri) == whole
    assert not uploads.list_uploads(folder)


def test_racing_workers_agree_on_one_upload(tissue: Rgb, tmp_path: Path) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: open_output(spec).begin(), range(12)))
    assert len(uploads.list_uploads(str(tmp_path))) == 1


def test_records_of_another_spec_are_not_taken(tissue: Rgb, tmp_path: Path) -> None:
    pixels = pixels_of(tissue)
    write(open_output(spec_of(tmp_path, pixels)), pixels, [0, 5])
    other = open_output(spec_of(tmp_path, pixels, replace(JPEG, quality=50)))
    other.begin()
    assert other.done_blocks() == set()


class Killed(BaseException):
    """What a test kills a process with."""


def _calls_to_kill(patch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Make storage die after so many writes and deletions; before and after each."""
    count = itertools.count()
    limit = [10**9]

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(count) >= limit[0]:
                raise Killed
            result = function(*arguments, **options)
            if next(count) >= limit[0]:
                raise Killed
            return result

        return call

    for module, name in (
        (uploads, "put_part"),
        (uploads, "complete"),
        (storage, "write_bytes"),
        (storage, "delete"),
        (storage, "delete_below"),
    ):
        patch.setattr(module, name, dying(getattr(module, name)))

    def arm(number: int | None) -> int:
        nonlocal count
        done, count = next(count), itertools.count()
        limit[0] = 10**9 if number is None else number
        return done

    yield arm


def test_a_finish_that_was_killed_anywhere_is_finished_by_the_next(
    tissue: Rgb, tmp_path: Path, whole: bytes
) -> None:
    pixels = pixels_of(tissue)
    number, is_over = 0, False
    write(open_output(spec_of(tmp_path / "written", pixels)), pixels)
    while not is_over:
        # Nothing in the folder of a slide knows where it lies.
        shutil.copytree(tmp_path / "written", tmp_path / f"{number}")
        spec = spec_of(tmp_path / f"{number}", pixels)
        with pytest.MonkeyPatch.context() as patch:
            [arm] = _calls_to_kill(patch)
            arm(number)
            try:
                finished = open_output(spec).finish(icc_profile=ICC)
                is_over = True
            except Killed:
                # What it left is whole or nothing, and a worker that looks breaks nothing.
                arm(None)
                if any(path.is_file() for path in Path(spec.work_uri).rglob("*")):
                    output = open_output(spec)
                    output.begin()
                    assert output.done_blocks() == set(range(NUM_BLOCKS))
                    finished = output.finish(icc_profile=ICC)
                    assert max(finished.thumbnail.shape) == 550
        assert Path(spec.uri).read_bytes() == whole
        assert not list(tmp_path.glob(f"{number}/*/blocks/*"))
        number += 1
    assert number > 20


def test_finish_before_begin_and_after_the_end_says_so(tissue: Rgb, tmp_path: Path) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    with pytest.raises(UnfinishedError):
        open_output(spec).finish(icc_profile=None)
    with pytest.raises(UploadGoneError, match="begin"):
        open_output(spec).write_block(0, cut(spec, pixels, 0), facts={})
    assert list(tmp_path.iterdir()) == []


def test_a_part_replaced_at_the_last_moment_is_named(
    tissue: Rgb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    output = open_output(spec)
    write(output, pixels)

    def complete(uri: str, upload_id: str, parts: Any) -> Any:
        raise StalePartError(uri, (2 + 4, 2 + 0))

    monkeypatch.setattr(uploads, "complete", complete)
    with pytest.raises(UnfinishedError) as caught:
        output.finish(icc_profile=ICC)
    assert caught.value.blocks == (0, 4)
    assert output.done_blocks() == set(range(NUM_BLOCKS)) - {0, 4}


def test_a_store_that_joins_parts_too_many_or_none_is_begun_with_anew(
    tissue: Rgb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(tmp_path, pixels)
    output = open_output(spec)
    write(output, pixels)

    def complete(uri: str, upload_id: str, parts: Any) -> Any:
        raise ExtraPartError(uri, (2 + 4,))

    with monkeypatch.context() as patch:
        patch.setattr(uploads, "complete", complete)
        with pytest.raises(UnfinishedError) as caught:
            output.finish(icc_profile=ICC)
    assert caught.value.blocks == tuple(range(NUM_BLOCKS))
    assert uploads.list_uploads(str(tmp_path)) == []
    output.begin()
    assert output.done_blocks() == set()
    write(output, pixels)
    output.finish(icc_profile=ICC)


@pytest.mark.usefixtures("unlimited_parts")
def test_records_can_be_kept_beyond_the_commit(tissue: Rgb, folder: str, whole: bytes) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    output = open_output(spec)
    write(output, pixels)
    first = output.finish(icc_profile=ICC, keep_work=True)
    assert len(dict(output.block_facts())) == NUM_BLOCKS
    again = open_output(spec).finish(icc_profile=ICC, keep_work=True)
    assert (again.size, again.etag, again.num_parts) == (first.size, first.etag, first.num_parts)
    output.discard()
    assert storage.read_bytes(spec.uri) == whole
    assert [item.uri for item in storage.list_objects(folder)] == [spec.uri]


@pytest.mark.usefixtures("unlimited_parts")
def test_discard_leaves_nothing(tissue: Rgb, folder: str) -> None:
    pixels = pixels_of(tissue)
    spec = spec_of(folder, pixels)
    output = open_output(spec)
    write(output, pixels, [0, 3])
    output.discard()
    assert not storage.list_objects(folder)
    assert not uploads.list_uploads(folder)
    output.discard()
    with pytest.raises(StorageError):
        output.write_block(0, cut(spec, pixels, 0), facts={})


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
