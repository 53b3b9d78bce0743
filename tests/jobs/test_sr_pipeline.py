"""What the actors of a run have to know of each other, and who works; without Ray's processes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray

from carn.upscaling.engine import EngineConfig
from jobs import sr_pipeline, sr_stages
from jobs.ray_stage import MAX_ATTEMPTS, ClusterError
from jobs.sr_board import Board
from jobs.sr_config import ClusterConfig
from jobs.sr_pipeline import crew_for
from jobs.sr_stages import ProgressLines, in_thread


def test_a_block_that_never_survives_is_given_up() -> None:
    board = Board(3)
    for _ in range(MAX_ATTEMPTS):
        assert board.begin(0, 7) == "go"
    assert board.begin(0, 7) == "deadly"
    # Others are no worse for it, and one that survived counts from the start.
    assert board.begin(0, 8) == "go"
    board.end(0, 8)
    assert [board.begin(0, 8) for _ in range(MAX_ATTEMPTS)] == ["go"] * MAX_ATTEMPTS


def test_failed_slides_and_stopped_runs_begin_nothing() -> None:
    board = Board(3)
    board.cancel(1)
    assert board.begin(1, 0) == "cancelled"
    assert board.begin(0, 0) == "go"
    board.stop()
    assert board.begin(0, 1) == "stopped"


def test_one_actor_calibrates_a_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(3)
    assert board.take_turn(0, "a") == "yours"
    assert board.take_turn(0, "b") == "another's"
    assert board.take_turn(1, "b") == "yours"
    board.end_turn(0)
    assert board.take_turn(0, "b") == "yours"
    # Restarted in the middle of it, or dead for good: nobody waits for ever.
    assert board.take_turn(0, "b") == "yours"
    monkeypatch.setattr("jobs.sr_board.CALIBRATION_TURN_S", 0.0)
    assert board.take_turn(0, "a") == "yours"
    board.cancel(0)
    assert board.take_turn(0, "a") == "cancelled"
    board.stop()
    assert board.take_turn(1, "a") == "stopped"


def test_whoever_calibrates_says_so_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(3)
    told = threading.Semaphore(0)

    def take_turn(slide: int, actor: str) -> None:
        board.take_turn(slide, actor)
        told.release()

    monkeypatch.setattr(sr_pipeline, "CALIBRATION_TELL_S", 0.001)
    handle = SimpleNamespace(take_turn=SimpleNamespace(remote=take_turn))
    upscaler: Any = SimpleNamespace(_board=handle, _actor="a")
    with sr_pipeline.Upscaler._turn_kept(upscaler, 0):
        for _ in range(3):
            assert told.acquire(timeout=10)
        assert board.take_turn(0, "b") == "another's"
    while told.acquire(blocking=False):
        pass
    assert not told.acquire(timeout=0.05)


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


def test_readers_have_a_cpu_beside_gpu_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", nodes({"CPU": 2.0, "GPU": 1.0}))
    crew = crew_for(ClusterConfig(), EngineConfig())
    assert (crew.num_cpus, crew.max_actors) == (1.0, 1)
    with pytest.raises(ClusterError, match="beside one to read with"):
        crew_for(ClusterConfig(cpus_per_actor=2.0), EngineConfig())
    # Where another node can read, nothing is left free.
    monkeypatch.setattr("ray.nodes", nodes({"CPU": 2.0, "GPU": 1.0}, {"CPU": 4.0}))
    crew = crew_for(ClusterConfig(), EngineConfig())
    assert (crew.num_cpus, crew.max_actors) == (2.0, 1)


def test_progress_is_told_of_all_slides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="super_resolve")
    now = [100.0]
    monkeypatch.setattr("jobs.sr_stages.time.monotonic", lambda: now[0])
    show = ProgressLines({"a": 400, "b": 800, "bad": 9000}, every_s=5)
    show.begin("a", num_blocks=4, num_left=3)  # one was made by an earlier run
    show.end("bad")  # failed: not waited for
    for left in (2, 1, 0):
        now[0] += 10
        show.block("a", num_left=left, num_blocks=4, num_lr_px=1_000_000)
    show.end("a")
    show.begin("b", num_blocks=8, num_left=8)
    now[0] += 10
    show.block("b", num_left=7, num_blocks=8, num_lr_px=1_000_000)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == (
        "a: 2 of 4 blocks; 1 of 3 slides ended, 0.10 LR megapixels a second"  # nothing to tell by
    )
    # After the first block 100 bytes took 10 s; 100 of a and 800 of b are left.
    assert lines[1].endswith("about 1 min 30 s left")
    # 300 bytes took 30 s, 700 are left.
    assert lines[3].startswith("b: 1 of 8 blocks; 2 of 3 slides ended")
    assert lines[3].endswith("about 1 min 10 s left")


def test_a_block_does_not_wait_beside_another_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor of `Upscaler`, its blocks written by a thread that takes its time."""
    said: list[tuple[str, int, int]] = []

    class Handle:
        def __getattr__(self, name: str) -> Any:
            def remote(slide: int, block: int) -> str:
                said.append((name, slide, block))
                return "go"

            return type("Method", (), {"remote": staticmethod(remote)})

    class Maker:
        def __init__(self, *_: Any, **__: Any) -> None:
            self._pool = ThreadPoolExecutor(1)

        def has_calibration(self, _plan: Any) -> bool:
            return True

        def begin_block(self, _plan: Any, block: int, _read: Any) -> Any:
            facts = {"num_lr_px": 1}
            return self._pool.submit(lambda: time.sleep(0.2) or {"num_bytes": block}), facts

    monkeypatch.setattr("ray.get", lambda found: found)
    monkeypatch.setattr(sr_pipeline, "BlockMaker", Maker)
    monkeypatch.setattr("ray.get_runtime_context", type("C", (), {"get_actor_id": lambda _: "a"}))
    upscaler = sr_pipeline.Upscaler([], Handle(), EngineConfig(device="cpu"))
    upscaler._plans = [None, None]  # type: ignore[list-item]
    batch = pa.Table.from_pylist([{"slide": 0, "block": 5}, {"slide": 1, "block": 0}])
    made = upscaler(batch).to_pylist()
    assert [(row["slide"], row["block"]) for row in made] == [(0, 5), (1, 0)]
    # The board knows that the first slide's block was survived before the second's begins.
    assert said.index(("end", 0, 5)) < said.index(("begin", 1, 0))
    # Blocks of one slide overlap: the second begins while the first is written.
    said.clear()
    upscaler(pa.Table.from_pylist([{"slide": 0, "block": 6}, {"slide": 0, "block": 7}]))
    assert said.index(("begin", 0, 7)) < said.index(("end", 0, 6))


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


class Processes:
    """Stands in for Ray: processes that finish slides, each call ending in the next of `ends`."""

    exceptions = ray.exceptions

    def __init__(self, ends: list[Any]) -> None:
        self.ends = ends
        self.num_made = 0
        self.killed: list[Any] = []
        self.finish = self

    def remote(self, *arguments: Any) -> Any:
        if isinstance(arguments[0] if arguments else None, type):
            return self
        return object()

    def options(self, **_: Any) -> Any:
        def make() -> Any:
            self.num_made += 1
            return self

        return type("Made", (), {"remote": staticmethod(make)})

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references, []

    def get(self, _reference: Any) -> Any:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    def kill(self, process: Any) -> None:
        self.killed.append(process)


DIED = ray.exceptions.ActorDiedError()
OUT_OF_REACH = ray.exceptions.ActorUnavailableError("gone", b"x" * 16)


@pytest.mark.parametrize(
    ("ends", "comes_to"),
    [
        ([DIED, DIED, {"summary": "x"}], {"summary": "x"}),
        ([OUT_OF_REACH] * 5 + [DIED, {"summary": "x"}], {"summary": "x"}),
        ([DIED] * MAX_ATTEMPTS, "the process that finished it died"),
    ],
)
def test_a_slide_whose_process_is_lost_is_finished_by_another(
    monkeypatch: pytest.MonkeyPatch, ends: list[Any], comes_to: Any
) -> None:
    processes = Processes(list(ends))
    monkeypatch.setattr(sr_stages, "ray", processes)
    monkeypatch.setattr(sr_stages, "UNAVAILABLE_POLL_S", 0.0)
    finishing = sr_stages.Finishing()
    plan: Any = type("Plan", (), {"to_json": lambda self: "{}"})()
    finishing.begin(7, plan, threshold_db=30.0, has_pictures=False)
    found: list[Any] = []
    while not finishing.is_idle:
        found += finishing.collect()
    ((slide, outcome),) = found
    assert slide == 7
    assert outcome == comes_to or outcome["reason"].startswith(comes_to)
    num_lost = sum(isinstance(end, Exception) for end in ends)
    assert len(processes.killed) == num_lost
    # One is made beforehand, and one for each that was lost and has to be replaced.
    assert processes.num_made == len(ends)


def test_processes_that_stay_out_of_reach_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes([OUT_OF_REACH])
    monkeypatch.setattr(sr_stages, "ray", processes)
    monkeypatch.setattr(sr_stages, "UNAVAILABLE_S", 0.0)
    finishing = sr_stages.Finishing()
    plan: Any = type("Plan", (), {"to_json": lambda self: "{}"})()
    finishing.begin(7, plan, threshold_db=30.0, has_pictures=False)
    ((slide, outcome),) = finishing.collect()
    assert (slide, "died" in outcome["reason"]) == (7, True)
