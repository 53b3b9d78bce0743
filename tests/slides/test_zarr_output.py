"""OME-Zarr written block by block: valid metadata, the exact pixels, nothing before the end."""

import base64
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import zarr
from ome_zarr_models.v05 import Image

from carn import storage
from carn.errors import UnfinishedError
from carn.slides.pyramid import pyramid_levels
from carn.slides.slide import Rgb
from carn.slides.slide_output import NOTICE, OutputSpec, SlideFormat, block_box, open_output

NUM_BLOCKS = 10


@pytest.fixture(scope="module")
def pixels() -> Rgb:
    """1101 x 330 px of tissue: two levels, 2 x 5 blocks, of which the third is white."""
    square = skimage.data.immunohistochemistry()
    pixels = np.concatenate([square, np.rot90(square), square])[:1101, :330].copy()
    pixels[256:512, :256] = 255
    return pixels


def spec_of(folder: Path | str, pixels: Rgb, **options: Any) -> OutputSpec:
    return OutputSpec(
        **{
            "uri": storage.join(str(folder), "slide.ome.zarr"),
            "work_uri": storage.join(str(folder), "work"),
            "extent": (pixels.shape[1], pixels.shape[0]),
            "block_px": 256,
            "mpp": (0.25, 0.26),
            "provenance": {"slide": "sha256:12", "scale": 2},
            "format": SlideFormat(container="ome-zarr", tile_px=64),
            **options,
        }
    )


def write(spec: OutputSpec, pixels: Rgb, indexes: Any) -> Any:
    output = open_output(spec)
    output.begin()
    for index in indexes:
        x0, y0, x1, y1 = block_box(spec, index)
        output.write_block(index, pixels[y0:y1, x0:x1], facts={"index": index})
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_holds(uri: str, pixels: Rgb) -> None:
    group = zarr.open_group(uri, mode="r")
    levels = list(pyramid_levels(pixels))
    assert sorted(group.array_keys()) == [f"{level}" for level in range(len(levels))]
    for level, expected in enumerate(levels):
        array = group[f"{level}"]
        assert array.metadata.dimension_names == ("c", "y", "x")
        assert np.array_equal(array[:].transpose(1, 2, 0), expected)


@pytest.mark.parametrize(
    ("extent", "tile_px", "block_px"),
    [
        ((256, 256), 64, 256),
        ((257, 257), 64, 256),
        ((1, 1100), 64, 128),
        ((1283, 1111), 64, 256),
        ((1026, 130), 64, 64),
        ((1100, 90), 64, 1024),
    ],
)
def test_levels_are_exactly_those_of_the_whole_image(
    tmp_path: Path, extent: tuple[int, int], tile_px: int, block_px: int
) -> None:
    square = skimage.data.immunohistochemistry()
    pixels = np.tile(square, (3, 3, 1))[: extent[1], : extent[0]]
    form = SlideFormat(container="ome-zarr", tile_px=tile_px)
    spec = spec_of(tmp_path, pixels, format=form, block_px=block_px)
    output = write(spec, pixels, range(open_output(spec).num_blocks))
    finished = output.finish(icc_profile=None)
    assert_holds(spec.uri, pixels)
    assert np.array_equal(finished.thumbnail, list(pyramid_levels(pixels))[-1])
    there = contents(Path(spec.uri))
    assert finished.size == sum(map(len, there.values()))
    assert finished.num_parts == len(there)
    assert [path.name for path in tmp_path.iterdir()] == ["slide.ome.zarr"]


def test_the_metadata_is_that_of_ome_zarr(pixels: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, pixels)
    write(spec, pixels, range(NUM_BLOCKS)).finish(icc_profile=b"profile")
    group = zarr.open_group(spec.uri, mode="r")
    image = Image.from_zarr(group)
    [multiscale] = image.ome_attributes.multiscales
    assert [axis.name for axis in multiscale.axes] == ["c", "y", "x"]
    assert [axis.unit for axis in multiscale.axes] == [None, "micrometer", "micrometer"]
    scales = [dataset.coordinateTransformations[0].scale for dataset in multiscale.datasets]
    assert scales == [[1, 0.26, 0.25], [1, 0.52, 0.5]]
    channels = group.attrs["ome"]["omero"]["channels"]
    assert [channel["color"] for channel in channels] == ["FF0000", "00FF00", "0000FF"]
    own = group.attrs["carn"]
    assert own["notice"] == NOTICE
    assert own["provenance"] == spec.provenance
    assert base64.b64decode(own["icc_profile_base64"]) == b"profile"
    array = group["0"]
    assert (array.chunks, array.shards) == ((1, 64, 64), (3, 256, 256))


def test_without_mpp_no_unit_is_claimed(pixels: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, pixels, mpp=None)
    write(spec, pixels, range(NUM_BLOCKS)).finish(icc_profile=None)
    group = zarr.open_group(spec.uri, mode="r")
    [multiscale] = Image.from_zarr(group).ome_attributes.multiscales
    assert {axis.unit for axis in multiscale.axes} == {None}
    assert "icc_profile_base64" not in group.attrs["carn"]


def test_nobody_finds_an_image_before_the_end(pixels: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, pixels)
    output = write(spec, pixels, range(NUM_BLOCKS))
    with pytest.raises(FileNotFoundError):
        zarr.open_group(spec.uri, mode="r")
    output.finish(icc_profile=None)
    zarr.open_group(spec.uri, mode="r")


def test_bytes_depend_on_no_order_and_no_storage(pixels: Rgb, tmp_path: Path, s3: Any) -> None:
    for name, order in (("a", range(NUM_BLOCKS)), ("b", [*reversed(range(NUM_BLOCKS)), 4])):
        write(spec_of(tmp_path / name, pixels), pixels, order).finish(icc_profile=b"p")
    local = contents(tmp_path / "a" / "slide.ome.zarr")
    assert contents(tmp_path / "b" / "slide.ome.zarr") == local
    remote = spec_of(s3.uri("out"), pixels)
    write(remote, pixels, range(NUM_BLOCKS)).finish(icc_profile=b"p")
    assert {key: s3.get(key) for key in s3.list_keys()} == {
        f"out/slide.ome.zarr/{name}": content for name, content in local.items()
    }


def test_white_blocks_take_no_objects_even_where_there_was_one(pixels: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, pixels)
    output = write(spec, np.zeros_like(pixels), [2])
    shard = Path(spec.uri, "0", "c", "0", "1", "0")
    assert shard.is_file()
    write(spec, pixels, range(NUM_BLOCKS))
    assert not shard.exists()
    output.finish(icc_profile=None)
    assert_holds(spec.uri, pixels)


def test_a_slide_is_resumed_and_what_was_lost_is_done_again(pixels: Rgb, root: str) -> None:
    folder = storage.join(root, "out")
    spec = spec_of(folder, pixels)
    with pytest.raises(UnfinishedError):
        open_output(spec).finish(icc_profile=None)
    write(spec, pixels, [0, 1, 2, 3, 9])
    storage.delete([storage.join(spec.uri, "0/c/0/0/1")])
    storage.write_bytes(storage.join(spec.uri, "0/c/0/1/1"), b"of somebody else")
    output = open_output(OutputSpec.from_json(spec.to_json()))
    output.begin()
    assert output.done_blocks() == {0, 2, 9}
    with pytest.raises(UnfinishedError) as caught:
        output.finish(icc_profile=None)
    assert caught.value.blocks == (1, 3, 4, 5, 6, 7, 8)
    write(spec, pixels, caught.value.blocks)
    assert [facts["index"] for _, facts in output.block_facts()] == list(range(NUM_BLOCKS))
    output.finish(icc_profile=None)
    if not storage.is_s3(root):
        assert_holds(spec.uri, pixels)
    assert not storage.list_objects(spec.work_uri)


def test_a_shard_that_was_altered_is_done_again(pixels: Rgb, root: str) -> None:
    folder = storage.join(root, "out")
    spec = spec_of(folder, pixels)
    output = write(spec, pixels, range(NUM_BLOCKS))
    shard = storage.join(spec.uri, "0/c/0/1/1")
    content = bytearray(storage.read_bytes(shard))
    content[100] ^= 1
    storage.write_bytes(shard, bytes(content))
    with pytest.raises(UnfinishedError) as caught:
        output.finish(icc_profile=None)
    assert caught.value.blocks == (3,)
    assert not storage.is_file(storage.join(spec.uri, "zarr.json"))
    write(spec, pixels, caught.value.blocks).finish(icc_profile=None)
    if not storage.is_s3(root):
        assert_holds(spec.uri, pixels)


class Killed(BaseException):
    """What a test kills a process with."""


def test_a_finish_that_was_killed_anywhere_is_finished_by_the_next(
    pixels: Rgb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = SlideFormat(container="ome-zarr", tile_px=128)
    write(spec_of(tmp_path / "written", pixels, format=form), pixels, range(NUM_BLOCKS))
    number, is_over = 0, False
    while not is_over:
        # Nothing in the folder of a slide knows where it lies.
        shutil.copytree(tmp_path / "written", tmp_path / f"{number}")
        spec = spec_of(tmp_path / f"{number}", pixels, format=form)
        left = [number]
        with monkeypatch.context() as patch:
            for name in ("write_bytes", "delete", "delete_below"):
                patch.setattr(storage, name, _dying(getattr(storage, name), left))
            try:
                open_output(spec).finish(icc_profile=None)
                is_over = True
            except Killed:
                pass
        if contents(tmp_path / f"{number}" / "work"):
            again = open_output(spec)
            again.begin()
            assert again.done_blocks() == set(range(NUM_BLOCKS))
            assert max(again.finish(icc_profile=None).thumbnail.shape) == 551
        assert_holds(spec.uri, pixels)
        assert not contents(tmp_path / f"{number}" / "work")
        number += 1
    assert number > 20


def _dying(function: Any, left: list[int]) -> Any:
    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return function(*arguments)

    return call


def test_another_slide_in_its_place_is_replaced_whole(pixels: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, pixels)
    write(spec, pixels, range(NUM_BLOCKS)).finish(icc_profile=None)
    smaller = np.full_like(pixels[:300, :300], 255)
    smaller[5, 5] = 0
    other = spec_of(tmp_path, smaller)
    output = write(other, smaller, range(4))
    assert not Path(spec.uri, "zarr.json").exists()
    output.finish(icc_profile=None)
    assert_holds(spec.uri, smaller)
    assert not Path(spec.uri, "1").exists()
    alone = spec_of(tmp_path / "alone", smaller)
    write(alone, smaller, range(4)).finish(icc_profile=None)
    assert contents(Path(spec.uri)) == contents(Path(alone.uri))


def test_discard_leaves_nothing_but_a_committed_slide(pixels: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, pixels)
    output = write(spec, pixels, range(3))
    output.discard()
    assert contents(tmp_path) == {}
    write(spec, pixels, range(NUM_BLOCKS)).finish(icc_profile=None)
    before = contents(tmp_path)
    output.discard()
    assert contents(tmp_path) == before


def test_records_can_be_kept_beyond_the_commit(pixels: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, pixels)
    output = write(spec, pixels, range(NUM_BLOCKS))
    first = output.finish(icc_profile=None, keep_work=True)
    assert len(dict(output.block_facts())) == NUM_BLOCKS
    assert output.finish(icc_profile=None, keep_work=True).size == first.size
    output.discard()
    assert_holds(spec.uri, pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["slide.ome.zarr"]


def test_workers_write_at_once(pixels: Rgb, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, pixels)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: write(spec, pixels, [index]), range(NUM_BLOCKS)))
    open_output(spec).finish(icc_profile=None)
    assert_holds(spec.uri, pixels)
    assert json.loads(Path(spec.uri, "zarr.json").read_bytes())["node_type"] == "group"
