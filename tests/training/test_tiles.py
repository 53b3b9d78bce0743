"""Tiles are decoded once a node, and patches of them are what slicing would give."""

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carn import storage
from carn.bcsr import dataset as dataset_module
from carn.bcsr.dataset import BcsrDataset, open_dataset
from carn.degradation.bicubic import SCALES, crop_to_multiple, degrade
from carn.degradation.config import DegradationConfig
from carn.degradation.numbers import numbers_of
from carn.degradation.variants import LrMaker
from carn.errors import DatasetError, StorageError
from carn.training import tiles as tiles_module
from carn.training.patches import TileStore, cut_patches
from carn.training.samples import Samples
from carn.training.tiles import dataset_digest, load_tiles
from tests.training.lab import EXTENTS, load_and_count, write_dataset

SCANNED = LrMaker(config=DegradationConfig(degradation="scanner", lr_variants=3))


@pytest.fixture
def dataset(dataset_uri: str) -> BcsrDataset:
    return open_dataset(dataset_uri)


@pytest.fixture
def own_dataset(tmp_path: Path, dataset_uri: str) -> BcsrDataset:
    """A copy that a test may damage."""
    shutil.copytree(dataset_uri, tmp_path / "own")
    return open_dataset(str(tmp_path / "own"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The encodings of the tiles that were decoded, one each."""
    found: list[str] = []
    original = dataset_module.decode

    def decode(content: bytes, encoding: str, *, extent: tuple[int, int]) -> Any:
        found.append(encoding)
        return original(content, encoding, extent=extent)

    monkeypatch.setattr(dataset_module, "decode", decode)
    return found


# ----------------------------------------------------------------------------------- the store


@pytest.mark.parametrize("scale", SCALES)
def test_the_store_holds_the_tiles_and_their_lr(
    dataset: BcsrDataset, pixels: dict[str, np.ndarray], scale: int
) -> None:
    store = load_tiles(dataset, split="train", scale=scale)
    assert store.tile_ids == tuple(f"train_{n}" for n in range(20))
    assert store.extents_px() == [(w // scale * scale, h // scale * scale) for w, h in EXTENTS]
    for index, name in enumerate(store.tile_ids):
        lr, hr = store.pair(index)
        np.testing.assert_array_equal(hr, crop_to_multiple(pixels[name], scale))
        np.testing.assert_array_equal(lr, degrade(pixels[name], scale=scale))


def test_variants_of_a_tile_lie_in_their_order(
    dataset: BcsrDataset, pixels: dict[str, np.ndarray]
) -> None:
    store = load_tiles(dataset, split="train", scale=2, maker=SCANNED)
    for index, name in enumerate(store.tile_ids):
        for variant in range(3):
            lr, hr = store.pair(index, variant=variant)
            np.testing.assert_array_equal(hr, crop_to_multiple(pixels[name], 2))
            wanted = SCANNED.make(pixels[name], scale=2, tile=name, variant=variant)
            np.testing.assert_array_equal(lr, wanted)
            way = SCANNED.way(tile=name, variant=variant)
            np.testing.assert_array_equal(store.numbers[index, variant], numbers_of(way, scale=2))


def test_other_degradations_are_other_tiles(dataset: BcsrDataset) -> None:
    clean = load_tiles(dataset, split="train", scale=2)
    scanned = load_tiles(dataset, split="train", scale=2, maker=SCANNED)
    other_seed = LrMaker(config=dataclasses.replace(SCANNED.config, lr_seed=2))
    seeded = load_tiles(dataset, split="train", scale=2, maker=other_seed)
    assert torch.equal(clean.hr, scanned.hr)
    assert len(scanned.lr) == 3 * len(clean.lr)
    assert not torch.equal(scanned.lr, seeded.lr)


def naive_patch(
    lr: np.ndarray, hr: np.ndarray, row: dict[str, Any], *, patch_px: int, scale: int
) -> list[np.ndarray]:
    patches = []
    for image, zoom in ((lr, 1), (hr, scale)):
        side = patch_px // scale * zoom
        top, left = row["top"] * zoom, row["left"] * zoom
        patch = image[top : top + side, left : left + side]
        if row["flip_x"]:
            patch = patch[:, ::-1]
        if row["flip_y"]:
            patch = patch[::-1]
        if row["transpose"]:
            patch = patch.transpose(1, 0, 2)
        patches.append(patch)
    return patches


@given(data=st.data(), scale=st.sampled_from(SCALES))
def test_patches_are_what_slicing_and_turning_give(
    data: Any, scale: int, dataset: BcsrDataset
) -> None:
    maker = data.draw(st.sampled_from((LrMaker(), SCANNED)))
    store = load_tiles(dataset, split="train", scale=scale, maker=maker)
    patch_px = scale * data.draw(st.integers(1, 64 // scale // 2))
    rows = []
    for tile in data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=4)):
        width, height = store.extents_px()[tile]
        row = {"tile": tile, "variant": data.draw(st.integers(0, maker.num_variants - 1))}
        row["top"] = data.draw(st.integers(0, (height - patch_px) // scale))
        row["left"] = data.draw(st.integers(0, (width - patch_px) // scale))
        row |= {name: data.draw(st.booleans()) for name in ("flip_x", "flip_y", "transpose")}
        rows.append(row)
    samples = Samples(**{name: np.array([row[name] for row in rows]) for name in rows[0]})
    lr, hr = cut_patches(store, samples, patch_px=patch_px)
    assert lr.shape == (len(rows), 3, patch_px // scale, patch_px // scale)
    assert hr.shape == (len(rows), 3, patch_px, patch_px)
    assert lr.dtype == hr.dtype == torch.float32
    for n, row in enumerate(rows):
        pair = store.pair(row["tile"], variant=row["variant"])
        wanted = naive_patch(*pair, row, patch_px=patch_px, scale=scale)
        for found, expected in zip((lr[n], hr[n]), wanted, strict=True):
            as_bytes = found.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(as_bytes, expected)
            assert (found == torch.from_numpy(as_bytes).permute(2, 0, 1).float() / 255).all()


def test_patches_keep_their_channels_together(dataset: BcsrDataset) -> None:
    store = load_tiles(dataset, split="train", scale=2)
    zeros = np.zeros(3, dtype=np.int64)
    turns = zeros.astype(bool)
    samples = Samples(
        tile=zeros,
        variant=zeros,
        top=zeros,
        left=zeros,
        flip_x=turns,
        flip_y=turns,
        transpose=turns,
    )
    for patches in cut_patches(store, samples, patch_px=16):
        assert patches.is_contiguous(memory_format=torch.channels_last)
        assert not patches.is_contiguous()


def test_a_store_on_its_device_is_itself(dataset: BcsrDataset) -> None:
    store = load_tiles(dataset, split="train", scale=2)
    assert store.to(torch.device("cpu")) is store


# ----------------------------------------------------------------------------------- the cache


def test_tiles_are_decoded_once(
    dataset: BcsrDataset, own_cache: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    original = storage.read_bytes

    def read_bytes(uri: str) -> bytes:
        reads.append(uri)
        return original(uri)

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    first = load_tiles(dataset, split="train", scale=2)
    assert len(decoded) == 20
    assert len(reads) == 2  # shards
    again = load_tiles(dataset, split="train", scale=2)
    assert len(decoded) == 20
    assert len(reads) == 2
    assert torch.equal(first.hr, again.hr)
    assert torch.equal(first.lr, again.lr)
    assert len(list(own_cache.glob("tiles*/hr.u8"))) == 1
    # Another scale or split is another entry.
    load_tiles(dataset, split="train", scale=3)
    load_tiles(dataset, split="validation", scale=2)
    assert len(decoded) == 20 + 20 + 4
    assert len(list(own_cache.glob("tiles*/hr.u8"))) == 3


def test_another_dataset_of_that_name_is_decoded_anew(
    own_dataset: BcsrDataset, own_cache: Path
) -> None:
    before = load_tiles(own_dataset, split="train", scale=2)
    write_dataset(own_dataset.uri, seed=1)
    changed = open_dataset(own_dataset.uri)
    assert dataset_digest(changed) != dataset_digest(own_dataset)
    after = load_tiles(changed, split="train", scale=2)
    assert not torch.equal(before.hr, after.hr)


def test_two_processes_at_once_decode_once(dataset_uri: str, own_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=load_and_count, args=(dataset_uri, barrier, queue)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(count for count, _ in found) == [0, 20]
    assert found[0][1] == found[1][1]


def test_a_store_in_use_is_not_evicted(
    dataset: BcsrDataset, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = load_tiles(dataset, split="train", scale=2)
    monkeypatch.setenv("CARN_CACHE_GB", str(1.2 * len(store.hr) * 1.25 / 1e9))
    with pytest.raises(StorageError, match=r"no room in the cache.*CARN_CACHE_GB"):
        load_tiles(dataset, split="train", scale=3)
    assert store.pin is not None
    store.pin.close()
    load_tiles(dataset, split="train", scale=3)


def test_what_does_not_fit_the_cache_says_what_to_do(
    dataset: BcsrDataset, own_cache: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", "0.0001")
    with pytest.raises(StorageError, match=r"bcsr: takes .* GB .*set CARN_CACHE_GB higher"):
        load_tiles(dataset, split="train", scale=2)
    assert decoded == []


# --------------------------------------------------------------------------------------- damage


def shard_of(dataset: BcsrDataset, number: int) -> Path:
    return sorted(Path(dataset.uri, "tiles").glob("train-*"))[number]


def test_a_damaged_shard_is_named_and_nothing_of_it_stays(
    own_dataset: BcsrDataset, pixels: dict[str, np.ndarray], own_cache: Path
) -> None:
    path = shard_of(own_dataset, 0)
    whole = path.read_bytes()
    content = bytearray(whole)
    # In the image of a later tile, so that others have been written by then.
    content[whole.index(b"IDAT", 2 * len(whole) // 3) + 60] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DatasetError, match=f"{path.name} is damaged"):
        load_tiles(own_dataset, split="train", scale=2)
    assert not list(own_cache.glob("tiles*/.complete"))
    path.write_bytes(whole)
    store = load_tiles(own_dataset, split="train", scale=2)
    for index, name in enumerate(store.tile_ids):
        np.testing.assert_array_equal(store.pair(index)[1], crop_to_multiple(pixels[name], 2))


def test_an_end_in_the_middle_of_filling_leaves_nothing_that_is_taken(
    dataset: BcsrDataset, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = tiles_module.make_lr

    def make_some(*arguments: Any, **options: Any) -> list[np.ndarray]:
        nonlocal calls
        calls += 1
        if calls > 15:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(tiles_module, "make_lr", make_some)
    with pytest.raises(KeyboardInterrupt):
        load_tiles(dataset, split="train", scale=2)
    monkeypatch.setattr(tiles_module, "make_lr", original)
    store = load_tiles(dataset, split="train", scale=2)
    assert len(store.hr) == sum((w // 2 * 2) * (h // 2 * 2) * 3 for w, h in EXTENTS)


def test_tiles_of_another_size_than_listed_are_an_error(
    own_dataset: BcsrDataset, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = BcsrDataset.tiles
    monkeypatch.setattr(
        BcsrDataset,
        "tiles",
        lambda self, split: ((row, tile[:-2]) for row, tile in original(self, split)),
    )
    with pytest.raises(DatasetError, match="the train shards do not hold what they list"):
        load_tiles(own_dataset, split="train", scale=2)


def test_a_split_without_tiles_is_named(dataset: BcsrDataset) -> None:
    with pytest.raises(DatasetError, match="bcsr has no test tiles; build it with more of them"):
        load_tiles(dataset, split="test", scale=2)


def test_a_tile_smaller_than_an_lr_pixel_is_named(tmp_path: Path, own_cache: Path) -> None:
    uri = str(tmp_path / "small")
    write_dataset(uri, train=[(64, 64), (6, 64)])
    with pytest.raises(DatasetError, match="tile train_1 is smaller than 8 px"):
        load_tiles(open_dataset(uri), split="train", scale=8)


def test_the_digest_is_that_of_the_content(own_dataset: BcsrDataset, dataset: BcsrDataset) -> None:
    assert dataset_digest(own_dataset) == dataset_digest(dataset)  # a copy elsewhere
    manifest = json.loads(json.dumps(dataset.manifest))
    manifest["shards"][0]["name"] = "train-00000-ffffffffffff.parquet"
    assert dataset_digest(BcsrDataset(uri="u", manifest=manifest)) != dataset_digest(dataset)


def test_stores_share_their_pages(dataset: BcsrDataset) -> None:
    """What is written into one mapping by mistake reaches neither the file nor another."""
    one: TileStore = load_tiles(dataset, split="train", scale=2)
    other = load_tiles(dataset, split="train", scale=2)
    before = int(other.hr[0])
    one.hr[0] = (before + 1) % 256
    assert int(other.hr[0]) == before
