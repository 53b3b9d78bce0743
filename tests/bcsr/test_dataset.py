"""A dataset opens when it is whole and carn's, and says what is wrong when it is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from carn import storage
from carn.bcsr.build import select_tiles
from carn.bcsr.codec import encode
from carn.bcsr.config import FilterConfig, SelectConfig
from carn.bcsr.dataset import (
    MANIFEST,
    BcsrDataset,
    TileGroup,
    group_tiles,
    open_dataset,
    read_manifest,
    shard_tiles,
    write_manifest,
)
from carn.bcsr.schema import SPLITS, TILES
from carn.bcsr.shards import plan_shards, shard_bytes, shard_uri, write_shard
from carn.errors import DatasetError, MissingObjectError
from carn.slides import open_slide


@pytest.fixture
def dataset(tmp_path: Path, write_slide, measured, attempt) -> BcsrDataset:
    """Ten tiles of two slides in shards of three, committed."""
    rows = [
        {"slide": name, "uri": str(write_slide(f"{name}.tif", seed=seed))}
        | {"x_l0": 70 * number, "y_l0": 100, "width_px": 64, "height_px": 64}
        | {"mean_r": float(7 * number + seed)}
        for seed, name in enumerate("ab")
        for number in range(5)
    ]
    selected = select_tiles(
        measured(rows),
        white=FilterConfig(tile_px=64),
        select=SelectConfig(keep=10, num_test=2, num_validation=1, split="paper"),
        seed=1,
    )
    plans = plan_shards(selected, encoding="jxl", tiles_per_shard=3)
    uri = str(tmp_path / "bcsr")
    for plan in plans:
        write_shard(uri, plan, attempt=attempt)
    manifest = {
        "channel_means": [0.5, 0.25, 0.125],
        "splits": {"train": 7, "validation": 1, "test": 2},
        "shards": [
            {"name": plan.name, "split": plan.split, "num_tiles": len(plan.rows)} for plan in plans
        ],
    }
    write_manifest(uri, manifest)
    return open_dataset(uri)


def test_the_tiles_of_each_split(dataset: BcsrDataset) -> None:
    assert dataset.channel_means == (0.5, 0.25, 0.125)
    seen = set()
    for split in SPLITS:
        table = dataset.table(split)
        assert table.column_names == [name for name in TILES.names if name != "image"]
        found = list(dataset.tiles(split))
        assert [row for row, _ in found] == table.to_pylist()
        assert len(found) == dataset.num_tiles(split) == len(table)
        for row, pixels in found:
            assert row["split"] == split
            with open_slide(row["uri"]) as slide:
                expected = slide.read_region(row["x_l0"], row["y_l0"], 64, 64)
            np.testing.assert_array_equal(pixels, expected)
            seen.add(row["tile_id"])
    assert len(seen) == 10


def test_a_split_without_tiles_is_an_empty_table(dataset: BcsrDataset) -> None:
    shards = [shard for shard in dataset.manifest["shards"] if shard["split"] != "test"]
    without = BcsrDataset(uri=dataset.uri, manifest=dataset.manifest | {"shards": shards})
    assert len(without.table("test")) == 0
    assert without.table("test").column_names == without.table("train").column_names
    assert list(without.tiles("test")) == []


@pytest.mark.parametrize("name", ["table", "tiles", "num_tiles", "groups"])
def test_an_unknown_split_is_named(dataset: BcsrDataset, name: str) -> None:
    with pytest.raises(ValueError, match="'valid' is no split; there are train, validation, test"):
        list(getattr(dataset, name)("valid"))


# --------------------------------------------------------------------------------------- groups


@pytest.fixture
def two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two tiles: shards of three then have one of two and one of one."""
    for module in ("dataset", "shards"):
        monkeypatch.setattr(f"carn.bcsr.{module}.ROWS_PER_GROUP", 2)


def test_groups_are_the_tiles_of_a_split_in_their_order(
    two_rows: None, dataset: BcsrDataset
) -> None:
    for split in SPLITS:
        groups = dataset.groups(split)
        tiles = [pixels for _, pixels in dataset.tiles(split)]
        first = 0
        for group in groups:
            assert group.first == first
            found = group_tiles(group)
            assert len(found) == group.count
            for pixels, wanted in zip(found, tiles[first : first + group.count], strict=True):
                np.testing.assert_array_equal(pixels, wanted)
            first += group.count
        assert first == dataset.num_tiles(split)
    # Seven training tiles in shards of three.
    assert [(group.index, group.count) for group in dataset.groups("train")] == [
        *((0, 2), (1, 1), (0, 2), (1, 1), (0, 1)),
    ]


def test_groups_are_planned_without_reading(dataset: BcsrDataset) -> None:
    elsewhere = BcsrDataset(uri="/nowhere", manifest=dataset.manifest)
    assert [group.count for group in elsewhere.groups("train")] == [3, 3, 1]


def test_a_split_without_tiles_has_no_groups(dataset: BcsrDataset) -> None:
    without = BcsrDataset(uri=dataset.uri, manifest=dataset.manifest | {"shards": []})
    assert without.groups("train") == []


def test_a_group_of_other_tiles_than_planned_is_named(dataset: BcsrDataset) -> None:
    group = dataset.groups("train")[0]
    wrong = TileGroup(uri=group.uri, index=0, first=0, count=group.count + 1)
    with pytest.raises(DatasetError, match=r"part 0 holds 3 tiles, not 4; build .*--overwrite"):
        group_tiles(wrong)


def test_damage_is_that_of_its_group_alone(two_rows: None, dataset: BcsrDataset) -> None:
    path = first_shard(dataset)
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\x0a") + 60] ^= 1  # the first tile's codestream
    path.write_bytes(bytes(content))
    first, second, *_ = dataset.groups("train")
    with pytest.raises(DatasetError, match=f"{path.name} is damaged"):
        group_tiles(first)
    assert len(group_tiles(second)) == 1


@pytest.mark.parametrize("content", [b"", b"no parquet at all"])
def test_a_group_of_a_damaged_shard_is_named(dataset: BcsrDataset, content: bytes) -> None:
    path = first_shard(dataset)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"{path.name} is damaged"):
        group_tiles(dataset.groups("train")[0])


def test_a_group_of_a_missing_shard_is_named(dataset: BcsrDataset) -> None:
    first_shard(dataset).unlink()
    with pytest.raises(MissingObjectError, match=first_shard(dataset).name):
        group_tiles(dataset.groups("train")[0])


def test_tables_and_groups_of_an_object_store_read_their_part_alone(
    dataset: BcsrDataset, stub_s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carn.bcsr.shards.ROWS_PER_GROUP", 1)
    monkeypatch.setattr("carn.bcsr.dataset.ROWS_PER_GROUP", 1)
    noise = np.random.default_rng(1).integers(0, 256, (3, 1000, 1000, 3), dtype=np.uint8)
    images = [encode(pixels, "png") for pixels in noise]
    said = {"encoding": "png", "width_px": 1000, "height_px": 1000}
    rows = [row | said for row in dataset.table("train").to_pylist()[:3]]
    content = shard_bytes(rows, images)
    assert len(content) > 9_000_000
    stub_s3.objects["b/set/tiles/shard.parquet"] = content
    shard = {"name": "shard.parquet", "split": "train", "num_tiles": 3}
    remote = BcsrDataset(uri="s3://b/set", manifest={"shards": [shard]})
    assert remote.table("train").drop_columns(["encoding"]).to_pylist() == [
        {name: value for name, value in row.items() if name != "encoding"} for row in rows
    ]
    for_table = stub_s3.body_bytes
    assert for_table < 300_000
    (tile,) = group_tiles(remote.groups("train")[1])
    np.testing.assert_array_equal(tile, noise[1])
    assert len(images[1]) <= stub_s3.body_bytes - for_table < 1.2 * len(images[1])


# --------------------------------------------------------------------------------------- damage


def first_shard(dataset: BcsrDataset) -> Path:
    (name, *_) = (s["name"] for s in dataset.manifest["shards"] if s["split"] == "train")
    return Path(shard_uri(dataset.uri, name))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"no parquet at all", id="text"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: content[:-1], id="cut"),
        pytest.param(lambda content: content[:-1500] + bytes(1492) + content[-8:], id="footer"),
    ],
)
def test_a_damaged_shard_is_named(dataset: BcsrDataset, damage) -> None:
    path = first_shard(dataset)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=f"{path.name} is damaged"):
        list(dataset.tiles("train"))
    with pytest.raises(DatasetError, match=f"{path.name} is damaged"):
        dataset.table("train")
    assert len(list(dataset.tiles("test"))) == 2


def test_a_flipped_bit_of_a_tile_is_found(dataset: BcsrDataset) -> None:
    # JPEG XL itself would decode many of these to other pixels without a word.
    path = first_shard(dataset)
    whole = path.read_bytes()
    start = whole.index(b"\xff\x0a")  # the first tile's codestream
    for offset in range(start + 40, start + 2000, 97):
        content = bytearray(whole)
        content[offset] ^= 1
        with pytest.raises(DatasetError, match="damaged"):
            list(shard_tiles(bytes(content), uri="u"))


def test_a_damaged_tile_in_a_sound_shard_is_named(dataset: BcsrDataset) -> None:
    path = first_shard(dataset)
    rows = dataset.table("train").to_pylist()[:2]
    content = shard_bytes(rows, [b"no image", b"none either"])
    found = shard_tiles(content, uri=str(path))
    with pytest.raises(DatasetError, match=f"{path.name}: tile {rows[0]['tile_id']}: .*JPEG XL"):
        next(found)


def test_a_missing_shard_is_named(dataset: BcsrDataset) -> None:
    path = first_shard(dataset)
    path.unlink()
    with pytest.raises(MissingObjectError, match=path.name):
        list(dataset.tiles("train"))


# -------------------------------------------------------------------------------------- manifest


def test_a_folder_without_a_manifest_is_no_dataset_yet(tmp_path: Path) -> None:
    assert read_manifest(str(tmp_path)) is None
    with pytest.raises(
        DatasetError, match=r"no finished bcSR dataset \(manifest.json is missing\)"
    ):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null", b"{}", b'{"format": "bcsr"}'],
)
def test_foreign_json_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DatasetError, match="is not the manifest of a bcSR dataset"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "version", "match"),
    [("bcsr", 2, "bcsr of format version 2; .* reads bcsr of version 1"), ("coco", 1, "coco")],
)
def test_another_format_or_version_is_named(
    tmp_path: Path, kind: str, version: int, match: str
) -> None:
    manifest: dict[str, Any] = {"format": kind, "format_version": version}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=match):
        read_manifest(str(tmp_path))


def test_a_manifest_is_the_same_bytes_for_the_same_content(tmp_path: Path) -> None:
    manifest = {"b": [1, None], "a": {"slide": "Größe"}}
    write_manifest(str(tmp_path), manifest)
    content = (tmp_path / MANIFEST).read_bytes()
    assert "Größe".encode() in content
    write_manifest(str(tmp_path), dict(reversed(manifest.items())))
    assert (tmp_path / MANIFEST).read_bytes() == content
    found = read_manifest(str(tmp_path))
    assert found == {"format": "bcsr", "format_version": 1, **manifest}


def test_a_dataset_on_an_object_store(dataset: BcsrDataset, s3: Any) -> None:
    for item in storage.list_objects(dataset.uri):
        s3.put("sets/bcsr" + item.uri.removeprefix(dataset.uri), Path(item.uri))
    remote = open_dataset(s3.uri("sets/bcsr"))
    assert remote.manifest == dataset.manifest
    for (row, pixels), (other, others) in zip(
        remote.tiles("train"), dataset.tiles("train"), strict=True
    ):
        assert row == other
        np.testing.assert_array_equal(pixels, others)
