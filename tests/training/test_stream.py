"""A streamed run sees what a run in memory sees, to the bit."""

import dataclasses
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from carn.bcsr import dataset as dataset_module
from carn.bcsr.dataset import BcsrDataset, open_dataset
from carn.errors import DatasetError
from carn.training.data import open_training_data
from carn.training.group import WorkerGroup
from carn.training.patches import Batch
from carn.training.samples import Sampler
from carn.training.stream import READ_AHEAD, WindowReader, map_in_threads, windows_in_order
from tests.training.lab import last_hashes, run, tiny_config, tiny_engine

CPU = torch.device("cpu")


def map_plainly(function: Callable[..., Any], units: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """Another way to map: no threads, and everything goes through pickle, as between processes."""
    function = pickle.loads(pickle.dumps(function))
    for unit in units:
        yield pickle.loads(pickle.dumps(function(unit)))


def batches(
    uri: str,
    path: Any,
    *,
    group: WorkerGroup | None = None,
    first_step: int = 0,
    map_units: Any = map_in_threads,
    **changes: Any,
) -> list[Batch]:
    config = tiny_config(patches={"order": "windowed", "samples_per_tile": 3} | changes, steps=60)
    found = open_training_data(open_dataset(uri), config, path=path).batches(
        config,
        group=group or WorkerGroup(),
        device=CPU,
        first_step=first_step,
        map_units=map_units,
    )
    return list(found)


def is_same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        torch.equal(a.lr, b.lr)
        and torch.equal(a.hr, b.hr)
        and (a.numbers is b.numbers is None or torch.equal(a.numbers, b.numbers))
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def in_memory(dataset_uri: str, session_cache: Path) -> list[Batch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARN_CACHE_DIR", str(session_cache))
        return batches(dataset_uri, "memory")


@pytest.mark.parametrize("map_units", [map_in_threads, map_plainly])
def test_streamed_batches_are_those_from_memory(
    dataset_uri: str, in_memory: list[Batch], map_units: Any
) -> None:
    streamed = batches(dataset_uri, "stream", map_units=map_units)
    assert len(streamed) == 60
    assert is_same(streamed, in_memory)
    for batch in streamed:
        lr, hr = batch.lr, batch.hr
        assert lr.shape == (4, 3, 8, 8)
        assert hr.shape == (4, 3, 16, 16)
        assert lr.dtype == hr.dtype == torch.float32
        assert lr.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("first_step", [1, 5, 41, 59])
def test_a_stream_is_taken_up_in_the_middle_of_windows(
    dataset_uri: str, in_memory: list[Batch], first_step: int
) -> None:
    streamed = batches(dataset_uri, "stream", first_step=first_step)
    assert is_same(streamed, in_memory[first_step:])


@pytest.mark.parametrize("path", ["memory", "stream"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_workers_shares_make_the_batch(
    dataset_uri: str, in_memory: list[Batch], path: str, world_size: int
) -> None:
    shares = [
        batches(dataset_uri, path, group=WorkerGroup(rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(in_memory):
        lr, hr = batch.lr, batch.hr
        for rank in range(world_size):
            assert torch.equal(shares[rank][step].lr, lr[rank::world_size])
            assert torch.equal(shares[rank][step].hr, hr[rank::world_size])


def test_a_streamed_run_equals_one_in_memory(dataset_uri: str, tmp_path: Path) -> None:
    config = tiny_config(patches={"order": "windowed"}, steps=9)
    outputs = [str(tmp_path / name) for name in ("memory", "stream")]
    for output, path in zip(outputs, ("memory", "stream"), strict=True):
        run(config, dataset_uri, output, engine=tiny_engine(data=path))
    assert last_hashes(outputs[0]) == last_hashes(outputs[1])


@pytest.mark.parametrize(("first_step", "last_step"), [(0, 1), (0, 40), (5, 40), (7, 9), (3, 3)])
@pytest.mark.parametrize("slots", [[0, 1, 2], [0, 2], [1]])
def test_windows_come_in_the_order_they_are_needed(
    first_step: int, last_step: int, slots: list[int]
) -> None:
    sampler = Sampler(
        [(32, 32)] * 7,
        scale=2,
        patch_px=16,
        batch_size=3,
        seed=1,
        order="windowed",
        groups=[(0, 4), (4, 2), (6, 1)],
        samples_per_tile=2,
    )
    needed = [sampler.window(slot, step) for step in range(first_step, last_step) for slot in slots]
    found = windows_in_order(sampler, slots, first_step=first_step, last_step=last_step)
    # Each once, where it is needed first.
    assert list(found) == list(dict.fromkeys(needed))


def test_a_window_reads_its_own_part_of_a_shard_alone(
    dataset_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(patches={"order": "windowed"})
    dataset = open_dataset(dataset_uri)
    sampler = open_training_data(dataset, config, path="memory").sampler
    reader = WindowReader(groups=dataset.groups("train"), sampler=sampler, scale=2, patch_px=16)
    decoded: list[str] = []
    original = dataset_module.decode

    def decode(content: bytes, encoding: str, *, extent: tuple[int, int]) -> Any:
        decoded.append(encoding)
        return original(content, encoding, extent=extent)

    monkeypatch.setattr(dataset_module, "decode", decode)
    window = sampler.window(0, 0)
    found = reader(dataclasses.asdict(window))
    assert len(decoded) == dataset.groups("train")[window.group].count
    assert found["lr"].shape == (window.num_steps, 8, 8, 3)
    assert found["hr"].shape == (window.num_steps, 16, 16, 3)
    assert found["lr"].dtype == found["hr"].dtype == "uint8"


def test_a_damaged_part_is_named(dataset_uri: str, tmp_path: Path) -> None:
    shutil.copytree(dataset_uri, tmp_path / "own")
    dataset: BcsrDataset = open_dataset(str(tmp_path / "own"))
    for path in Path(dataset.uri, "tiles").glob("train-*"):
        content = bytearray(path.read_bytes())
        content[content.index(b"IDAT") + 60] ^= 1
        path.write_bytes(bytes(content))
    with pytest.raises(DatasetError, match=r"train-0000\d-.*parquet is damaged"):
        batches(dataset.uri, "stream")


def swapped(function: Callable[..., Any], units: Iterable[dict[str, Any]]) -> Iterator[Any]:
    first, second, *others = map_plainly(function, units)
    yield from [second, first, *others]


def without_one(function: Callable[..., Any], units: Iterable[dict[str, Any]]) -> Iterator[Any]:
    yield from list(map_plainly(function, units))[:-1]


@pytest.mark.parametrize("map_units", [swapped, without_one])
def test_windows_that_are_missing_or_out_of_order_are_not_trained_on(
    dataset_uri: str, map_units: Any
) -> None:
    with pytest.raises(DatasetError, match=r"the patches of Window\(slot=\d.*were not read"):
        batches(dataset_uri, "stream", map_units=map_units)


def test_threads_keep_order_and_read_ahead_no_further_than_told() -> None:
    asked: list[int] = []

    def units() -> Iterator[dict[str, Any]]:
        for number in range(30):
            asked.append(number)
            yield {"number": number}

    results = map_in_threads(lambda unit: {"twice": 2 * unit["number"]}, units())
    assert next(results) == {"twice": 0}
    assert len(asked) == READ_AHEAD + 1
    assert [result["twice"] for result in results] == list(range(2, 60, 2))


def test_a_failing_read_reaches_whoever_waits_for_it() -> None:
    def read(unit: dict[str, Any]) -> dict[str, Any]:
        if unit["number"] == 3:
            raise DatasetError("window 3")
        return unit

    results = map_in_threads(read, ({"number": number} for number in range(9)))
    assert [next(results)["number"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DatasetError, match="window 3"):
        next(results)
