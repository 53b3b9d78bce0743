"""The exported folder: the published names and numbers, the same HR pixels, LR by `degrade`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from carn.bcsr.codec import encode
from carn.bcsr.export import (
    EXPORT_MARKER,
    begin_export,
    export_shard,
    export_state,
    finish_export,
    first_numbers,
)
from carn.bcsr.schema import TILES
from carn.bcsr.shards import shard_bytes, shard_uri
from carn.degradation.bicubic import degrade
from carn.errors import DatasetError, MissingObjectError

SIZES = {"train-0": [(32, 48), (33, 50)], "train-1": [(40, 40)], "validation-0": [(24, 24)]}
SIZES |= {"test-0": [(64, 32), (16, 16)]}


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[str, list[dict[str, Any]], list[np.ndarray]]:
    """(uri, the manifest's shards, the tiles in order)."""
    rng = np.random.default_rng(0)
    uri, shards, tiles = str(tmp_path / "bcsr"), [], []
    for name, sizes in SIZES.items():
        pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        known = {"encoding": "jxl", "tile_id": name}
        rows = [
            dict.fromkeys(TILES.names) | known | {"height_px": height, "width_px": width}
            for height, width in sizes
        ]
        content = shard_bytes(rows, [encode(tile, "jxl") for tile in pixels])
        path = Path(shard_uri(uri, f"{name}.parquet"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        shards.append({"name": f"{name}.parquet", "num_tiles": len(pixels)})
        tiles += pixels
    return uri, shards, tiles


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.asarray(image)


def test_numbers_go_on_over_shards_in_the_manifests_order(dataset) -> None:
    _, shards, _ = dataset
    assert first_numbers(shards) == {
        "train-0.parquet": 1,
        "train-1.parquet": 3,
        "validation-0.parquet": 4,
        "test-0.parquet": 5,
    }
    assert first_numbers([]) == {}


def test_every_tile_becomes_one_hr_and_an_lr_of_each_scale(dataset, tmp_path: Path) -> None:
    uri, shards, tiles = dataset
    target = tmp_path / "edsr"
    numbers = first_numbers(shards)
    for name, first in reversed(numbers.items()):  # shards are exported in any order
        count = export_shard(
            uri, str(target), name, first_number=first, num_digits=4, scales=(2, 3)
        )
        assert count == len(SIZES[name.removesuffix(".parquet")])
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*.png"))
    assert found == sorted(
        name
        for number in range(1, 7)
        for name in (
            f"HR/{number:04d}.png",
            f"LR_bicubic/X2/{number:04d}x2.png",
            f"LR_bicubic/X3/{number:04d}x3.png",
        )
    )
    for number, hr in enumerate(tiles, start=1):
        np.testing.assert_array_equal(read(target / f"HR/{number:04d}.png"), hr)
        for scale in (2, 3):
            lr = read(target / f"LR_bicubic/X{scale}/{number:04d}x{scale}.png")
            assert lr.shape == (hr.shape[0] // scale, hr.shape[1] // scale, 3)
            np.testing.assert_array_equal(lr, degrade(hr, scale=scale))
    # The shards alone do not make an export: its marker is written when all are there.
    assert not (target / EXPORT_MARKER).exists()


def test_an_export_again_is_the_same_bytes(dataset, tmp_path: Path) -> None:
    uri, shards, _ = dataset
    contents = []
    for folder in ("one", "two"):
        target = tmp_path / folder
        for name, first in first_numbers(shards).items():
            export_shard(uri, str(target), name, first_number=first, num_digits=4, scales=(4,))
        contents.append(
            {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
        )
    assert len(contents[0]) == 12
    assert contents[0] == contents[1]


def test_numbers_have_as_many_digits_as_the_largest(dataset, tmp_path: Path) -> None:
    uri, _, _ = dataset
    wish: dict[str, Any] = {"num_digits": 5, "scales": (2,)}
    export_shard(uri, str(tmp_path / "e"), "train-1.parquet", first_number=12345, **wish)
    export_shard(uri, str(tmp_path / "e"), "train-0.parquet", first_number=1, **wish)
    assert (tmp_path / "e" / "HR" / "12345.png").is_file()
    # All as long: sorted names pair HR with LR.
    assert (tmp_path / "e" / "HR" / "00001.png").is_file()
    assert (tmp_path / "e" / "LR_bicubic" / "X2" / "00001x2.png").is_file()


def test_the_marker_says_what_the_export_holds(tmp_path: Path) -> None:
    target = tmp_path / "edsr"
    assert export_state(str(target)) == (None, False)
    state = {"scales": [2, 4], "shards": [["train-0.parquet", 2]]}
    begin_export(str(target), state)
    assert export_state(str(target)) == (state, False)
    finish_export(str(target), state)
    assert export_state(str(target)) == (state, True)
    assert [path.name for path in target.iterdir()] == [EXPORT_MARKER]
    assert json.loads((target / EXPORT_MARKER).read_bytes()) == state


def test_a_shard_that_is_not_there_or_damaged_is_named(dataset, tmp_path: Path) -> None:
    uri, _, _ = dataset
    wish: dict[str, Any] = {"first_number": 1, "num_digits": 4, "scales": (2,)}
    with pytest.raises(MissingObjectError, match=r"gone\.parquet"):
        export_shard(uri, str(tmp_path / "e"), "gone.parquet", **wish)
    Path(shard_uri(uri, "test-0.parquet")).write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"test-0\.parquet is damaged"):
        export_shard(uri, str(tmp_path / "e"), "test-0.parquet", **wish)
    assert not (tmp_path / "e").exists()
