"""OME-Zarr as a slide: what this project writes, what others write, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from carn import storage
from carn.errors import DamagedTileError, MissingObjectError, SlideError
from carn.slides import open_slide
from carn.slides.compression import read_compression
from carn.slides.encoding import halved
from carn.slides.listing import list_slides
from carn.slides.pyramid import pyramid_levels
from carn.slides.zarr_slide import FIRST_OF_COLLECTION_NOTE
from tests.conftest import draw
from tests.slides.test_zarr_output import spec_of, write

SIDES = {"c": 3, "y": 333, "x": 420}


def write_zarr(
    folder: Path,
    *,
    version: str = "0.5",
    axes: str = "cyx",
    dtype: str = "uint8",
    channels: int = 3,
    colours: tuple[str, ...] = (),
    unit: str | None = "micrometer",
    depth: int = 1,
    change: Callable[[dict[str, Any]], None] = lambda ome: None,
) -> np.ndarray:
    """Write a pyramid of two levels as other programs do; gives the pixels of level 0."""
    pixels = draw(SIDES["x"], SIDES["y"])
    group = zarr.open_group(folder, mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for level, rgb in enumerate((pixels, halved(pixels))):
        stored = np.dstack([rgb, rgb])[..., :channels].astype(dtype)
        for name in set(axes) - {"c", "y", "x"}:
            del name
            stored = np.repeat(stored[..., None], depth, axis=-1)
        names = [*"yxc", *sorted(set(axes) - {"c", "y", "x"})]
        stored = stored.transpose([names.index(name) for name in axes])
        group.create_array(f"s{level}", data=stored, chunks=tuple(min(64, n) for n in stored.shape))
        scale = [0.25 * 2**level if name in "yx" else 1 for name in axes]
        steps = [{"type": "scale", "scale": scale}]
        datasets.append({"path": f"s{level}", "coordinateTransformations": steps})
    listed = [
        {"name": n, "type": "space", **({"unit": unit} if unit and n in "yx" else {})} for n in axes
    ]
    ome: dict[str, Any] = {"multiscales": [{"axes": listed, "datasets": datasets}]}
    if colours:
        ome["omero"] = {"channels": [{"color": colour} for colour in colours]}
    change(ome)
    group.attrs.update({"ome": {"version": "0.5", **ome}} if version == "0.5" else ome)
    return pixels


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "tczyx", "yxc"])
def test_pixels_of_others_are_exact(version: str, axes: str, tmp_path: Path) -> None:
    pixels = write_zarr(tmp_path / "a.zarr", version=version, axes=axes)
    with open_slide(tmp_path / "a.zarr") as slide:
        assert slide.reader == slide.properties.vendor == "ome-zarr"
        assert slide.extent == (420, 333)
        assert slide.mpp == 0.25
        assert [level.downsample for level in slide.levels] == [1, 2]
        assert np.array_equal(slide.read_region(0, 0, 420, 333), pixels)
        assert np.array_equal(slide.read_region(101, 57, 99, 130), pixels[57:187, 101:200])
        slide.check_level(1)
        assert read_compression(slide).codec == "lossless"


@pytest.mark.parametrize("root", ["disk", "s3"])
def test_what_is_written_can_be_read(root: str, s3: Any, tmp_path: Path) -> None:
    pixels = draw(600, 333)
    folder = str(tmp_path) if root == "disk" else s3.uri("out")
    spec = spec_of(folder, pixels)
    output = write(spec, pixels, range(6))
    assert list_slides([folder]) == []  # not finished: no slide yet
    output.finish(icc_profile=b"profile")
    (uri,) = list_slides([folder])
    assert uri == spec.uri
    assert list_slides([storage.join(folder, "*.zarr")]) == list_slides([uri]) == [uri]
    assert storage.identity(uri) == storage.identity(storage.join(uri, "zarr.json"))
    with open_slide(uri) as slide:
        assert (slide.properties.mpp_x, slide.properties.mpp_y) == (0.25, 0.26)
        assert slide.properties.icc_profile == b"profile"
        assert np.array_equal(slide.read_region(0, 0, 600, 333), pixels)
        for level, expected in enumerate(pyramid_levels(pixels)):
            height, width = expected.shape[:2]
            assert np.array_equal(slide.read_region(0, 0, width, height, level=level), expected)


def test_a_zarr_that_is_replaced_has_another_identity(tmp_path: Path) -> None:
    write_zarr(tmp_path / "a.zarr", version="0.4")
    before = storage.identity(str(tmp_path / "a.zarr"))
    shutil.rmtree(tmp_path / "a.zarr")
    write_zarr(tmp_path / "a.zarr", version="0.4", unit="nanometer")
    assert storage.identity(str(tmp_path / "a.zarr")) != before


@pytest.mark.parametrize(
    ("unit", "mpp"), [("nanometer", 0.00025), ("millimeter", None), (None, None), ("inch", None)]
)
def test_units(unit: str | None, mpp: float | None, tmp_path: Path) -> None:
    write_zarr(tmp_path / "a.zarr", unit=unit)
    with open_slide(tmp_path / "a.zarr") as slide:
        # 250 um/px is no microscope's.
        assert slide.mpp == mpp


def without_axes(ome: dict[str, Any]) -> None:
    del ome["multiscales"][0]["axes"]


def with_levels_turned_round(ome: dict[str, Any]) -> None:
    ome["multiscales"][0]["datasets"].reverse()


def with_a_level_that_is_missing(ome: dict[str, Any]) -> None:
    ome["multiscales"][0]["datasets"][1]["path"] = "s7"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"dtype": "uint16"}, "px of uint16"),
        ({"channels": 4}, "4 channels, no RGB"),
        ({"channels": 1}, "1 channels, no RGB"),
        ({"colours": ("0000FF", "00FF00", "FF0000")}, "as of fluorescence"),
        ({"axes": "czyx", "depth": 5}, "5 images along 'z'"),
        ({"change": without_axes}, "not OME-Zarr's"),
        ({"change": with_levels_turned_round}, "from the finest on"),
        ({"change": with_a_level_that_is_missing}, "'s7' cannot be opened"),
        ({"change": dict.clear}, "name no image"),
    ],
)
def test_what_is_no_slide_is_refused_by_name(
    how: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write_zarr(tmp_path / "a.zarr", **how)
    with pytest.raises(SlideError, match=says):
        open_slide(tmp_path / "a.zarr")


def test_colours_of_rgb_are_no_fluorescence(tmp_path: Path) -> None:
    pixels = write_zarr(tmp_path / "a.zarr", colours=("ff0000", "00FF00", "0000FF"))
    with open_slide(tmp_path / "a.zarr") as slide:
        assert np.array_equal(slide.read_region(0, 0, 420, 333), pixels)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_collection_of_bioformats2raw_is_its_first_image(version: str, tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    layout = {"bioformats2raw.layout": 3}
    group.attrs.update({"ome": layout} if version == "0.5" else layout)
    with pytest.raises(SlideError, match="'0' cannot be opened"):
        open_slide(path)
    pixels = write_zarr(path / "0", version=version)
    write_zarr(path / "1", version=version, channels=1)
    assert list_slides([str(tmp_path)]) == [str(path)]
    with open_slide(path) as slide:
        assert slide.notes == (FIRST_OF_COLLECTION_NOTE,)
        assert [level.downsample for level in slide.levels] == [1, 2]
        assert np.array_equal(slide.read_region(0, 0, 420, 333), pixels)


def test_a_folder_that_is_no_zarr_or_none(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="cannot be opened"):
        open_slide(tmp_path / "a.zarr")
    with pytest.raises(MissingObjectError):
        storage.stat(str(tmp_path / "a.zarr"))
    with pytest.raises(MissingObjectError, match="no Zarr here"):
        list_slides([str(tmp_path / "a.zarr")])
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / "zarr.json").write_text(json.dumps([1]))
    with pytest.raises(SlideError, match="is no OME-Zarr"):
        open_slide(tmp_path / "b.zarr")


def test_a_damaged_chunk_is_an_error_of_its_place(tmp_path: Path) -> None:
    pixels = write_zarr(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "s0" / "c" / "0" / "1" / "2").write_bytes(b"no chunk")
    with open_slide(tmp_path / "a.zarr") as slide:
        with pytest.raises(DamagedTileError) as caught:
            slide.read_region(130, 70, 20, 20)
        assert (caught.value.x_l0, caught.value.y_l0) == (130, 70)
        assert np.array_equal(slide.read_region(0, 0, 64, 64), pixels[:64, :64])


def test_chunks_are_no_slides_of_their_own(tmp_path: Path) -> None:
    write_zarr(tmp_path / "x" / "a.ome.zarr", version="0.4")
    (tmp_path / "x" / "b.svs").write_bytes(b"1")
    assert list_slides([str(tmp_path)]) == [
        str(tmp_path / "x" / "a.ome.zarr"),
        str(tmp_path / "x" / "b.svs"),
    ]
