"""What the actors of a run have to know of each other, and who works; without Ray's processes."""

from typing import Any

import pytest

from carn.upscaling.engine import EngineConfig
from jobs import sr_pipeline
from jobs.ray_stage import MAX_ATTEMPTS, ClusterError
from jobs.sr_config import ClusterConfig
from jobs.sr_pipeline import Board, crew_for
from jobs.sr_stages import in_thread


def test_a_block_that_never_survives_is_given_up() -> None:
    board = Board()
    for _ in range(MAX_ATTEMPTS):
        assert board.begin(0, 7) == "go"
    assert board.begin(0, 7) == "deadly"
    # Others are no worse for it, and one that survived counts from the start.
    assert board.begin(0, 8) == "go"
    board.end(0, 8)
    assert [board.begin(0, 8) for _ in range(MAX_ATTEMPTS)] == ["go"] * MAX_ATTEMPTS


def test_failed_slides_and_stopped_runs_begin_nothing() -> None:
    board = Board()
    board.cancel(1)
    assert board.begin(1, 0) == "cancelled"
    assert board.begin(0, 0) == "go"
    board.stop()
    assert board.begin(0, 1) == "stopped"


def test_one_actor_calibrates_a_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    assert board.take_turn(0, "a") == "yours"
    assert board.take_turn(0, "b") == "another's"
    assert board.take_turn(1, "b") == "yours"
    board.end_turn(0)
    assert board.take_turn(0, "b") == "yours"
    # Restarted in the middle of it, or dead for good: nobody waits for ever.
    assert board.take_turn(0, "b") == "yours"
    monkeypatch.setattr(sr_pipeline, "CALIBRATION_TURN_S", 0.0)
    assert board.take_turn(0, "a") == "yours"
    board.cancel(0)
    assert board.take_turn(0, "a") == "cancelled"
    board.stop()
    assert board.take_turn(1, "a") == "stopped"


def nodes(*resources: dict[str, float]) -> Any:
    return lambda: [{"Alive": True, "Resources": each} for each in resources]


def test_cpu_crews_fill_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", nodes({"CPU": 5.0}, {"CPU": 2.0}, {"memory": 1.0}))
    crew = crew_for(ClusterConfig(), EngineConfig())
    assert (crew.device, crew.is_split, crew.num_cpus, crew.max_actors) == ("cpu", False, 2.0, 3)
    crew = crew_for(ClusterConfig(pipeline="split"), EngineConfig())
    # A CPU of each node is left to readers.
    assert (crew.is_split, crew.num_cpus, crew.max_actors) == (True, 2.0, 2)


def test_one_cpu_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", nodes({"CPU": 1.0}))
    crew = crew_for(ClusterConfig(), EngineConfig())
    assert (crew.num_cpus, crew.max_actors) == (1.0, 1)


def test_gpus_are_shared_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", nodes({"CPU": 16.0, "GPU": 2.0}, {"CPU": 8.0}))
    crew = crew_for(ClusterConfig(gpus_per_actor=0.5), EngineConfig())
    assert (crew.device, crew.is_split, crew.num_gpus, crew.max_actors) == ("cuda", True, 0.5, 4)
    assert crew.num_readers == 8
    crew = crew_for(ClusterConfig(), EngineConfig(device="cpu"))
    assert (crew.device, crew.num_gpus) == ("cpu", 0.0)


def test_what_no_node_holds_is_an_error_unless_the_cluster_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.nodes", nodes({"CPU": 2.0}))
    with pytest.raises(ClusterError, match="--cpus-per-actor"):
        crew_for(ClusterConfig(cpus_per_actor=4.0), EngineConfig())
    with pytest.raises(ClusterError, match="--gpus-per-actor"):
        crew_for(ClusterConfig(), EngineConfig(device="cuda"))
    crew = crew_for(ClusterConfig(cpus_per_actor=4.0, max_actors=5), EngineConfig())
    assert crew.max_actors == 5
    # GPUs that are asked for are waited for, not done without.
    crew = crew_for(ClusterConfig(gpus_per_actor=0.5, max_actors=8), EngineConfig())
    assert (crew.device, crew.num_gpus) == ("cuda", 0.5)
    monkeypatch.setattr("ray.nodes", nodes({"CPU": 2.0, "GPU": 1.0}))
    with pytest.raises(ClusterError, match="--cpus-per-actor"):
        crew_for(ClusterConfig(cpus_per_actor=8.0), EngineConfig())


def test_items_come_out_of_a_thread_in_order_with_its_error() -> None:
    def items() -> Any:
        yield from (1, 2)
        raise RuntimeError("broken")

    found = in_thread(items(), tick_s=5)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(RuntimeError, match="broken"):
        next(found)
