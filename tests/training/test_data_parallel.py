"""Several workers learn what one does from the same batches, however these divide.

The workers are processes that talk over gloo, as on a cluster of CPU machines. They are started
once for two and once for three of them, and bring back what the tests look at.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carn.errors import RunError
from carn.models.checkpoint import load_model
from carn.models.table import build_model
from carn.training.config import TrainConfig, resolve
from carn.training.group import WorkerGroup
from carn.training.loop import TrainResult
from carn.training.players import autocast_for, make_players
from carn.training.recording import read_metrics
from tests.training.lab import (
    Killed,
    last_hashes,
    listening,
    run,
    run_workers,
    tiny_config,
    tiny_engine,
)

# One group of processes for all tests of this file, however many pytest itself has.
pytestmark = pytest.mark.xdist_group("data-parallel")

CPU = torch.device("cpu")
MEAN = (0.6, 0.5, 0.55)
# Five samples never divide evenly over two or three workers.
BATCH = 5
RUNS: dict[str, TrainConfig] = {
    "one-step": tiny_config(steps=1),
    "even": tiny_config(steps=3, patches={"batch_size": 6}),
    "uneven": tiny_config(steps=3, patches={"batch_size": BATCH}),
    "clip": tiny_config(
        steps=3,
        patches={"batch_size": BATCH},
        optimizer={"gradient_clip": 0.01, "ema_decay": 0.5},
    ),
    "windowed": tiny_config(steps=3, patches={"batch_size": BATCH, "order": "windowed"}),
    "swdnet": tiny_config(
        "swdnet",
        steps=2,
        swdnet_stage_steps=1,
        patches={"batch_size": BATCH},
        validation={"max_validation_tiles": 2},
    ),
}

# Which of them how many workers carry out together.
RUNS_OF = {2: list(RUNS), 3: ["uneven", "clip"]}
CASES = [(count, name) for count, names in RUNS_OF.items() for name in names]


def gradients(group: WorkerGroup) -> dict[str, Tensor]:
    """What one update of five samples leaves in a network's parameters, on one of the workers."""
    config = resolve(tiny_config("carn", patches={"batch_size": BATCH}))
    torch.manual_seed(1)
    model = build_model("carn", scale=2, config=config.network.model_config(MEAN))
    lr, hr = torch.rand(BATCH, 3, 8, 8), torch.rand(BATCH, 3, 16, 16)
    (player,) = make_players(model, config, device=CPU, group=group)
    own = slice(group.rank, None, group.world_size)
    player.update(
        lr[own],
        hr[own],
        learning_rate=1e-3,
        weight=group.gradient_weight(BATCH),
        gradient_clip=None,
        autocast=autocast_for("fp32", CPU)(),
    )
    return {name: item.grad.clone() for name, item in model.named_parameters()}  # type: ignore[union-attr]


def work(dataset_uri: str, folder: str) -> dict[str, Any]:
    """All that a worker does; what it returns is compared with one worker's."""
    group = WorkerGroup.current()
    found: dict[str, Any] = {"group": group, "gradients": gradients(group), "results": {}}
    found["broadcast"] = group.broadcast(10 + group.rank)
    found["sum"] = group.sum(torch.tensor([1.0, group.rank]))
    for name in RUNS_OF[group.world_size]:
        config = RUNS[name]
        events, listener = listening()
        path = "stream" if name == "windowed" else "memory"
        found["results"][name] = run(
            config,
            dataset_uri,
            f"{folder}/{name}",
            on_event=listener,
            engine=tiny_engine(data=path),
        )
        found[f"events-{name}"] = events
    # Killed at the same update on all workers, and taken up.
    resumed = RUNS["uneven"]
    try:
        run(resumed, dataset_uri, f"{folder}/resumed", on_event=kill_everybody_at(3))
    except Killed:
        found["killed"] = True
    run(resumed, dataset_uri, f"{folder}/resumed")
    return found


def kill_everybody_at(step: int) -> Any:
    """Rank 0 alone hears events; the others fall with it, as when Ray ends an attempt."""
    from carn.training import loop

    original = loop._Run.look

    def look(self: Any, done: int) -> None:
        if done == step:
            loop._Run.look = original  # type: ignore[method-assign]
            raise Killed
        original(self, done)

    loop._Run.look = look  # type: ignore[method-assign]
    return lambda event: None


def work_too_many(dataset_uri: str, folder: str) -> str:
    """More workers than samples: each of them says so before anything is written."""
    try:
        run(tiny_config(patches={"batch_size": 2}), dataset_uri, f"{folder}/refused")
    except RunError as error:
        return str(error)
    return ""


def work_three(dataset_uri: str, folder: str) -> dict[str, Any]:
    """As `work`, and what three workers cannot do."""
    return work(dataset_uri, folder) | {"refusal": work_too_many(dataset_uri, folder)}


@pytest.fixture(scope="module")
def alone(
    dataset_uri: str, session_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, TrainResult]]:
    """The folder and the results of one worker's runs."""
    torch.set_num_threads(1)
    folder = str(tmp_path_factory.mktemp("alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARN_CACHE_DIR", str(session_cache))
        results = {
            name: run(config, dataset_uri, f"{folder}/{name}") for name, config in RUNS.items()
        }
    return folder, results


@pytest.fixture(scope="module")
def workers(
    dataset_uri: str, session_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], tuple[str, list[dict[str, Any]]]]:
    """The folder of so many workers' runs and what each of them found; each group starts once."""

    @functools.cache
    def start(num_workers: int) -> tuple[str, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("together")
        task = work if num_workers == 2 else work_three
        arguments = (dataset_uri, str(folder))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CARN_CACHE_DIR", str(session_cache))
            found = run_workers(
                task, *arguments, num_workers=num_workers, folder=folder / "workers"
            )
        return str(folder), found

    return start


@pytest.fixture
def together(num_workers: int, workers: Callable[[int], Any]) -> Any:
    """The runs of the test's number of workers."""
    return workers(num_workers)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference, relative to the norm."""
    names = list(one)
    assert names == list(other)
    flat = [torch.cat([part[name].double().flatten() for name in names]) for part in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize("num_workers", RUNS_OF)
def test_the_group(together: tuple[str, list[dict[str, Any]]]) -> None:
    _, found = together
    count = len(found)
    assert [part["group"] for part in found] == [
        WorkerGroup(rank=rank, world_size=count) for rank in range(count)
    ]
    assert [part["broadcast"] for part in found] == [10] * count
    for part in found:
        assert part["sum"].tolist() == [count, sum(range(count))]


@pytest.mark.parametrize("num_workers", RUNS_OF)
def test_gradients_are_those_of_the_whole_batch(
    together: tuple[str, list[dict[str, Any]]],
) -> None:
    wanted = gradients(WorkerGroup())
    for part in together[1]:
        assert distance(part["gradients"], wanted) < 1e-6


@pytest.mark.parametrize(("num_workers", "name"), CASES)
def test_weights_are_those_of_one_worker(
    alone: tuple[str, Any], together: tuple[str, Any], name: str
) -> None:
    states = [load_model(f"{run[0]}/{name}/last.json").state_dict() for run in (together, alone)]
    assert distance(*states) < 1e-6


@pytest.mark.parametrize(("num_workers", "name"), CASES)
def test_metrics_are_those_of_one_worker(
    alone: tuple[str, Any], together: tuple[str, Any], name: str
) -> None:
    rows, wanted = (read_metrics(f"{run[0]}/{name}") for run in (together, alone))
    assert len(rows) == RUNS[name].steps
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for term in row.keys() - {"seconds", "images_per_s", "validation_psnr", "validation_ssim"}:
            assert row[term] == pytest.approx(other[term], rel=1e-5), term
        for term in row.keys() & {"validation_psnr", "validation_ssim"}:
            # A grey level of a few px may round the other way.
            assert row[term] == pytest.approx(other[term], rel=1e-4), term


@pytest.mark.parametrize(("num_workers", "name"), CASES)
def test_every_worker_knows_the_scores(
    alone: tuple[str, Any], together: tuple[str, Any], name: str
) -> None:
    wanted = alone[1][name]
    results = [part["results"][name] for part in together[1]]
    assert all(result == results[0] for result in results)
    assert results[0].psnr == pytest.approx(wanted.psnr, rel=1e-4)
    # Bicubic has no weights: its scores are the same to the bit.
    assert results[0].bicubic_psnr == wanted.bicubic_psnr
    assert results[0].bicubic_ssim == wanted.bicubic_ssim
    assert results[0].step == wanted.step


@pytest.mark.parametrize("num_workers", RUNS_OF)
def test_rank_0_alone_tells(together: tuple[str, Any]) -> None:
    first, *others = (part["events-uneven"] for part in together[1])
    assert first[0]["num_workers"] == len(together[1])
    assert all(events == [] for events in others)


@pytest.mark.parametrize("num_workers", RUNS_OF)
def test_a_killed_group_ends_where_an_unbroken_one_does(together: tuple[str, Any]) -> None:
    folder, found = together
    assert all(part["killed"] for part in found)
    outputs = [f"{folder}/{name}" for name in ("resumed", "uneven")]
    if len(found) == 2:
        assert last_hashes(outputs[0]) == last_hashes(outputs[1])
    # The order in which more than two are summed up is torch's, and another in its first update.
    one, other = (load_model(f"{output}/last.json").state_dict() for output in outputs)
    assert distance(one, other) < 1e-6
    assert [row["step"] for row in read_metrics(f"{folder}/resumed")] == [1, 2, 3]


@pytest.mark.parametrize("num_workers", [3])
def test_more_workers_than_samples(together: tuple[str, Any]) -> None:
    folder, found = together
    for part in found:
        assert "3 workers cannot share a batch of 2" in part["refusal"]
    assert not Path(folder, "refused").exists()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_weights_of_workers_make_the_mean_over_the_batch(
    batch_size: int, world_size: int
) -> None:
    groups = [WorkerGroup(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sum(group.num_samples(batch_size) for group in groups) == batch_size
    values = torch.rand(batch_size, dtype=torch.float64)
    parts = [
        values[group.rank :: world_size].mean() * group.gradient_weight(batch_size)
        for group in groups
        if group.num_samples(batch_size)
    ]
    assert float(sum(parts)) / world_size == pytest.approx(float(values.mean()), rel=1e-12)


def test_one_worker_needs_no_group() -> None:
    group = WorkerGroup.current()
    assert group == WorkerGroup(rank=0, world_size=1)
    values = torch.rand(3)
    assert group.sum(values) is values
    assert group.broadcast(7) == 7
    group.barrier()
