"""The exported folder: the published names and numbers, the same HR pixels, LR by `degrade`.

Under another condition LR has a folder by its name.
"""

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
    describe_export,
    export_shard,
    export_state,
    finish_export,
    first_numbers,
)
from carn.bcsr.schema import TILES
from carn.bcsr.shards import shard_bytes, shard_uri
from carn.degradation.bicubic import BICUBIC, crop_to_multiple, degrade
from carn.degradation.conditions import CONDITIONS, DEFAULT, apply_condition, read_conditions
from carn.degradation.scanner import Degradation
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
            uri,
            str(target),
            name,
            first_number=first,
            num_digits=4,
            scales=(2, 3),
            conditions=DEFAULT,
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


def test_lr_of_conditions_lies_beside_each_other(dataset, tmp_path: Path) -> None:
    uri, shards, tiles = dataset
    conditions = read_conditions(["scanned-jpeg80", "bicubic"])
    target = tmp_path / "edsr"
    for name, first in first_numbers(shards).items():
        wish: dict[str, Any] = {"num_digits": 4, "scales": (2, 3), "conditions": conditions}
        export_shard(uri, str(target), name, first_number=first, **wish)
    folders = sorted(path.name for path in target.iterdir())
    assert folders == ["HR", "LR_bicubic", "LR_scanned-jpeg80"]
    tile_ids = [name for name, sizes in SIZES.items() for _ in sizes]
    for number, (tile, hr) in enumerate(zip(tile_ids, tiles, strict=True), start=1):
        for scale in (2, 3):
            end = f"X{scale}/{number:04d}x{scale}.png"
            plain = read(target / "LR_bicubic" / end)
            np.testing.assert_array_equal(plain, degrade(hr, scale=scale))
            way, cropped = conditions["scanned-jpeg80"], crop_to_multiple(hr, scale)
            lr = read(target / "LR_scanned-jpeg80" / end)
            wanted = apply_condition(cropped, way, scale=scale, tile=tile)
            np.testing.assert_array_equal(lr, wanted)
            assert (lr != plain).any()


def test_what_an_export_is_of_says_its_conditions() -> None:
    shards = [{"name": "train-0.parquet", "num_tiles": 2, "sha256": "0"}]
    manifest: dict[str, Any] = {"shards": shards, "splits": {"train": 2}, "counts": {}}

    def described(conditions: Any) -> dict[str, Any]:
        return describe_export(manifest, scales=(4, 2), conditions=conditions)

    plain = described(DEFAULT)
    # As it was before there were others: finished exports stay what they are.
    assert plain == {
        "shards": [["train-0.parquet", 2]],
        "splits": {"train": 2},
        "scales": [2, 4],
        "degradation": BICUBIC,
    }
    states = [plain, *(described({name: way}) for name, way in CONDITIONS.items())]
    states.append(described({"mine": CONDITIONS["jpeg80-420"]}))
    states.append(described({"mine": Degradation(jpeg_quality=81)}))
    states.append(described(read_conditions(["bicubic", "mean"])))
    texts = {json.dumps(state, sort_keys=True) for state in states}
    assert len(texts) == len(CONDITIONS) + 3  # of the first two, both are bicubic
    assert all(json.loads(json.dumps(state)) == state for state in states)
    assert described(read_conditions(["mean", "bicubic"])) == states[-1]


def test_an_export_again_is_the_same_bytes(dataset, tmp_path: Path) -> None:
    uri, shards, _ = dataset
    contents = []
    for folder in ("one", "two"):
        target = tmp_path / folder
        for name, first in first_numbers(shards).items():
            wish: dict[str, Any] = {"num_digits": 4, "scales": (4,), "conditions": DEFAULT}
            export_shard(uri, str(target), name, first_number=first, **wish)
        contents.append(
            {p.relative_to(target): p.read_bytes() for p in target.rglob("*") if p.is_file()}
        )
    assert len(contents[0]) == 12
    assert contents[0] == contents[1]


def test_numbers_have_as_many_digits_as_the_largest(dataset, tmp_path: Path) -> None:
    uri, _, _ = dataset
    wish: dict[str, Any] = {"num_digits": 5, "scales": (2,), "conditions": DEFAULT}
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
    wish |= {"conditions": DEFAULT}
    with pytest.raises(MissingObjectError, match=r"gone\.parquet"):
        export_shard(uri, str(tmp_path / "e"), "gone.parquet", **wish)
    Path(shard_uri(uri, "test-0.parquet")).write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"test-0\.parquet is damaged"):
        export_shard(uri, str(tmp_path / "e"), "test-0.parquet", **wish)
    assert not (tmp_path / "e").exists()
