"""Blocks of slides through Ray Data: read, super-resolve, encode, upload; small rows come back.

Without GPUs one kind of actor does all of it. With GPUs, actors on CPUs read (and OpenSlide's
decoders never hold up a GPU), and actors with a share of a GPU do the rest; pixels cross the object
store once, between the two, and Ray Data's backpressure bounds how many.

The board, an actor of its own outside the processes that can die, knows how often a block has taken
its process down, which slides have failed meanwhile, and whose turn it is to calibrate a slide.
"""

import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data

from carn.errors import CarnError, StorageError, UploadGoneError
from carn.processor import KEEPING_ENVIRONMENT
from carn.upscaling.blocks import LrBlock
from carn.upscaling.engine import EngineConfig
from carn.upscaling.task import SlidePlan
from carn.upscaling.work import BlockMaker
from jobs.metrics import meters, watch_s3
from jobs.ray_stage import MAX_ATTEMPTS, ClusterError
from jobs.sr_board import Board, Turn, Verdict
from jobs.sr_config import ClusterConfig

logger = logging.getLogger(__name__)

# Seconds between two words of an actor that it is still calibrating.
CALIBRATION_TELL_S = 5.0
# Seconds between two questions whether another actor has calibrated the slide.
CALIBRATION_POLL_S = 0.5


def make_board() -> Any:
    """A board on the cluster."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board).remote(MAX_ATTEMPTS)


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Who works, as `crew_for` found for a cluster.

    Attributes:
        is_split: reading and super-resolving are done by different actors.
        device: of the actors that super-resolve.
        min_actors, max_actors: of these.
        num_cpus, num_gpus: of each of these.
        num_readers: actors that read, where the work is split.
        blocks_per_task: that go to an actor at a time, at most. One is written while the next is
            inferred.
    """

    is_split: bool
    device: Literal["cpu", "cuda"]
    min_actors: int
    max_actors: int
    num_cpus: float
    num_gpus: float
    num_readers: int
    blocks_per_task: int


def crew_for(cluster: ClusterConfig, engine: EngineConfig) -> Crew:
    """Who works, on the cluster that Ray is connected to.

    Raises:
        ClusterError: no node has what an actor needs.
    """
    list_nodes: Any = ray.nodes
    nodes = [node["Resources"] for node in list_nodes() if node["Alive"]]
    gpus = [node.get("GPU", 0.0) for node in nodes]
    cpus = [node.get("CPU", 0.0) for node in nodes]
    has_gpus = max(gpus, default=0) > 0 or cluster.gpus_per_actor is not None
    is_cuda = engine.device == "cuda" or (engine.device == "auto" and has_gpus)
    is_split = cluster.pipeline == "split" or (cluster.pipeline == "auto" and is_cuda)
    # An actor that nodes still to come are to hold must be said to be wanted.
    grows = cluster.max_actors is not None
    num_gpus = 0.0
    num_cpus = cluster.cpus_per_actor
    if is_cuda:
        num_gpus = cluster.gpus_per_actor or 1.0
        # Those who read need a CPU, too: of a node without GPUs, or of each that has some.
        is_read_elsewhere = any(cpu >= 1 and not gpu for gpu, cpu in zip(gpus, cpus, strict=True))
        spare = 1.0 if is_split and not is_read_elsewhere else 0.0
        most = max((cpu for gpu, cpu in zip(gpus, cpus, strict=True) if gpu), default=3.0) - spare
        num_cpus = (min(2.0, most) if most > 0 else 1.0) if num_cpus is None else num_cpus
        fitting = [
            int(min(gpu / num_gpus, max(0.0, cpu - spare) / max(num_cpus, 0.01)) + 1e-6)
            for gpu, cpu in zip(gpus, cpus, strict=True)
        ]
    else:
        # Reading takes a CPU where it is done apart; without one left for it, nothing would start.
        spare = 1.0 if is_split else 0.0
        most = max(cpus, default=0.0) - spare
        num_cpus = (min(2.0, most) if most > 0 else 1.0) if num_cpus is None else num_cpus
        fitting = [int((node - spare) / max(num_cpus, 0.01) + 1e-6) for node in cpus]
    max_actors = cluster.max_actors or sum(fitting)
    if max(fitting, default=0) < 1 and not grows:
        wanted = f"{num_gpus:g} GPUs and " if is_cuda else ""
        raise ClusterError(
            f"no node of the cluster has the {wanted}{num_cpus:g} CPUs that an actor needs"
            + (", beside one to read with" if is_split else "")
            + f" (CPUs: {cpus}, GPUs: {gpus}); lower --cpus-per-actor or --gpus-per-actor, or say "
            "with --max-actors how many a growing cluster may come to hold"
        )
    per_task = cluster.blocks_per_task or (4 if is_cuda else 2)
    readers = cluster.num_readers or (2 * max_actors if is_cuda else 1)
    return Crew(
        is_split=is_split,
        device="cuda" if is_cuda else "cpu",
        min_actors=min(cluster.min_actors, max_actors),
        max_actors=max_actors,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        num_readers=readers,
        blocks_per_task=per_task,
    )


class Reader:
    """An actor that reads blocks."""

    def __init__(self, plans: Sequence[str], board: Any, engine: EngineConfig) -> None:
        self._plans = [SlidePlan.from_json(plan) for plan in plans]
        self._board = board
        self._maker = BlockMaker(engine)
        self._clock = _Clock("reader")
        _watch_storage(self._plans)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows (slide, block) with the block's LR pixels, or why there are none."""
        self._clock.spent("waiting")
        rows = [self._read(row["slide"], row["block"]) for row in batch.to_pylist()]
        self._clock.spent("working")
        return pa.Table.from_pylist(rows, schema=READ)

    def _read(self, slide: int, block: int) -> dict[str, Any]:
        row: dict[str, Any] = {"slide": slide, "block": block, "pixels": None, "facts": "{}"}
        verdict = ray.get(self._board.begin.remote(slide, block))
        if verdict != "go":
            return row | {"facts": json.dumps(_not_begun(verdict))}
        started = time.perf_counter()
        try:
            read = self._maker.read(self._plans[slide], block)
        except Exception as error:  # whatever it is, it is this slide's alone
            return row | {"facts": json.dumps(_failure(error))}
        finally:
            self._board.end.remote(slide, block)
        seconds = time.perf_counter() - started
        return row | {"pixels": read.to_bytes(), "facts": json.dumps({"read_s": seconds})}


READ = pa.schema(
    [
        ("slide", pa.int32()),
        ("block", pa.int32()),
        ("pixels", pa.large_binary()),
        ("facts", pa.string()),
    ]
)
MADE = pa.schema([("slide", pa.int32()), ("block", pa.int32()), ("facts", pa.string())])


class Upscaler:
    """An actor that super-resolves blocks; it reads them itself where no reader did."""

    def __init__(self, plans: Sequence[str], board: Any, engine: EngineConfig) -> None:
        self._plans = [SlidePlan.from_json(plan) for plan in plans]
        self._board = board
        self._maker = BlockMaker(engine, num_writers=max(2, engine.num_threads or 2))
        self._actor = ray.get_runtime_context().get_actor_id()
        self._idle_since = time.perf_counter()
        self._clock = _Clock("upscaler")
        _watch_storage(self._plans)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows (slide, block, facts) of blocks that are on storage, or why they are not."""
        self._clock.spent("waiting")
        rows: list[tuple[dict[str, Any], Any]] = []
        for row in batch.to_pylist():
            if rows and rows[-1][0]["slide"] != row["slide"]:
                # A block that takes the process down must not count against another slide.
                self._settle(rows)
            rows.append(self._make(row))
        self._clock.spent("working")
        for row, pending in rows:
            self._complete(row, pending)
            _count(row["facts"])
        self._clock.spent("writing")
        self._idle_since = time.perf_counter()
        return pa.Table.from_pylist(
            [
                {"slide": row["slide"], "block": row["block"], "facts": json.dumps(row["facts"])}
                for row, _ in rows
            ],
            schema=MADE,
        )

    def _settle(self, rows: Sequence[tuple[dict[str, Any], Any]]) -> None:
        """Wait until blocks are on storage or have failed, and the board knows."""
        pending = {future: row for row, future in rows if future is not None}
        wait(pending)
        for row in pending.values():
            # Told from this thread, as the next block will be: the board hears of both in order.
            self._board.end.remote(row["slide"], row["block"])

    def _make(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        slide, block = row["slide"], row["block"]
        known = json.loads(row.get("facts") or "{}")
        made: dict[str, Any] = {"slide": slide, "block": block, "facts": known}
        if "reason" in known or "verdict" in known:
            return made, None
        verdict = ray.get(self._board.begin.remote(slide, block))
        if verdict != "go":
            made["facts"] = _not_begun(verdict)
            return made, None
        known["wait_s"] = time.perf_counter() - self._idle_since
        try:
            plan = self._plans[slide]
            turn = self._calibrate(slide, plan)
            if turn != "go":
                self._board.end.remote(slide, block)
                made["facts"] = _not_begun(turn)
                return made, None
            # Rows come back in batches: when they do says little of when a block was made.
            known |= {"began": time.time(), "actor": self._actor}
            pixels = row.get("pixels")
            read = None if pixels is None else LrBlock.from_bytes(pixels)
            pending, facts = self._maker.begin_block(plan, block, read)
            pending.add_done_callback(lambda _: self._board.end.remote(slide, block))
            known |= facts
        except Exception as error:  # whatever it is, it is this slide's alone
            made["facts"] = known | _failure(error)
            pending = None
            self._board.end.remote(slide, block)
        self._idle_since = time.perf_counter()
        return made, pending

    def _complete(self, row: dict[str, Any], pending: Any) -> None:
        """Wait until a block's parts are on storage."""
        if pending is None:
            return
        try:
            row["facts"] |= pending.result()
        except Exception as error:
            row["facts"] |= _failure(error)

    def _calibrate(self, slide: int, plan: SlidePlan) -> Verdict:
        """Have the slide's calibration at hand: from storage, or made here if it is our turn."""
        while not self._maker.has_calibration(plan):
            turn: Turn = ray.get(self._board.take_turn.remote(slide, self._actor))
            if turn == "yours":
                try:
                    with self._turn_kept(slide):
                        self._maker.calibrate(plan)
                finally:
                    self._board.end_turn.remote(slide)
            elif turn == "another's":
                time.sleep(CALIBRATION_POLL_S)
            else:
                return turn
        return "go"

    @contextmanager
    def _turn_kept(self, slide: int) -> Iterator[None]:
        """Let the others know that this actor is still there, while it calibrates."""
        is_over = threading.Event()

        def tell() -> None:
            while not is_over.wait(CALIBRATION_TELL_S):
                self._board.take_turn.remote(slide, self._actor)

        thread = threading.Thread(target=tell, daemon=True, name="calibration")
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


class _Clock:
    """Counts what an actor's own thread spends its time on."""

    def __init__(self, role: Literal["reader", "upscaler"]) -> None:
        self._role = role
        self._since = time.perf_counter()

    def spent(self, state: Literal["working", "waiting", "writing"]) -> None:
        """All of the time since the last call."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        meters().add("carn_sr_actor_seconds_total", seconds, role=self._role, state=state)


def _watch_storage(plans: Sequence[SlidePlan]) -> None:
    watch_s3(*(plan.task.output for plan in plans), *(plan.task.uri for plan in plans))


def _count(facts: Mapping[str, Any]) -> None:
    """Count a block of which this is known."""
    if "verdict" in facts:  # it was not begun
        return
    meters().add("carn_sr_blocks_total", outcome="failed" if "reason" in facts else "stored")
    for name in ("read", "infer", "encode", "upload", "wait"):
        meters().add("carn_sr_stage_seconds_total", facts.get(f"{name}_s", 0.0), stage=name)
    if "reason" not in facts:
        meters().add("carn_sr_lr_pixels_total", facts["num_lr_px"])
        meters().add("carn_sr_written_bytes_total", facts["num_bytes"])


def run_blocks(
    plans: Sequence[SlidePlan],
    blocks: Sequence[tuple[int, int]],
    *,
    board: Any,
    engine: EngineConfig,
    crew: Crew,
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Make blocks; yields (slide, block, facts) as they are done, roughly in order.

    Facts are what `BlockMaker` says of a block, or `reason` (why it failed; with `is_stale` where
    the slide's upload is gone, and whether it `is_storage`'s fault), or `verdict` ("cancelled",
    "stopped": it was not begun). A block that Ray loses for good is not yielded.

    Args:
        plans: the slides.
        blocks: (number of the plan, index of the block), in the order of work.
        board: of `make_board`.
        engine: as it was asked for; device and threads are those of the crew.
        crew: who works.
    """
    if not blocks:
        return
    rows = [{"slide": slide, "block": block} for slide, block in blocks]
    # Where there are few blocks, all actors having some is worth more.
    per_task = max(1, min(crew.blocks_per_task, len(rows) // (2 * crew.max_actors)))
    num_tasks = -(-len(rows) // per_task)
    threads = engine.num_threads or max(1, int(crew.num_cpus))
    engine = replace(engine, device=crew.device, num_threads=threads)
    arguments = ([plan.to_json() for plan in plans], board, engine)
    dataset: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=num_tasks)
    if crew.is_split:
        dataset = dataset.map_batches(
            Reader,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=crew.num_readers),
            num_cpus=1,
        )
    dataset = dataset.map_batches(
        Upscaler,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=crew.min_actors, max_size=crew.max_actors),
        num_cpus=crew.num_cpus,
        num_gpus=crew.num_gpus or None,
        # Ray Data calls actors in a thread that is not their first.
        runtime_env={"env_vars": dict(KEEPING_ENVIRONMENT)},
    )
    # Without looking ahead: a row would be held back until the next one is there.
    tables: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    for table in tables:
        for row in table.to_pylist():
            yield row["slide"], row["block"], json.loads(row["facts"])


def _not_begun(verdict: Verdict) -> dict[str, Any]:
    if verdict != "deadly":
        return {"verdict": verdict}
    return {
        "reason": f"super-resolving a block took the process down {MAX_ATTEMPTS} times (a crash in "
        "a decoder, or memory that ran out); see the worker's log"
    }


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, UploadGoneError):
        return {"reason": str(error), "is_stale": True}
    if isinstance(error, CarnError):
        return {"reason": str(error), "is_storage": isinstance(error, StorageError)}
    logger.error("process %d: %s", os.getpid(), traceback.format_exc())
    return {"reason": f"{type(error).__name__}: {error} (an error of this program)"}
