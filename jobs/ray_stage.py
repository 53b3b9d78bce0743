"""Run one stage of a job over many small work units with Ray Data.

A unit is a dict of plain values (a slide, some positions); a stage turns it into an Arrow table of
small rows. Units are independent tasks of one CPU: they start on one core and spread over any
cluster, need no actor that could starve the tasks feeding it, and a worker process keeps its open
slides from one unit to the next.

A unit that kills its process (a decoder that segfaults, memory that runs out) would be retried by
Ray for ever. A ledger, an actor outside the worker processes, counts the attempts: after
MAX_ATTEMPTS the unit is not begun again but turned into its failure.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from carn.errors import CarnError
from carn.s3 import REQUEST_PAYER
from jobs.ledger import Ledger
from jobs.metrics import meters, watch_s3

logger = logging.getLogger(__name__)

# Times a unit may take its worker process down before it is given up. Three, because a preempted
# node or an overcommitted one also kills processes, through no fault of the unit.
MAX_ATTEMPTS = 3

# What Ray reads the port of a cluster that it starts from.
GCS_PORT_VARIABLE = "RAY_GCS_SERVER_PORT"

Unit = dict[str, Any]
Attempt = Callable[[str], AbstractContextManager[None]]
StageFunction = Callable[[Unit, Attempt], pa.Table]


class ClusterError(CarnError):
    """Ray is not there."""


class ProcessDiedError(CarnError):
    """Reading something took the reading process down, every time."""


def progress(num_done: int, num_units: int, *, seconds: float, seconds_to_first: float) -> str:
    """How far a stage is, in words; says what is left once there is something to tell it by.

    Args:
        num_done, num_units: tasks.
        seconds: since the stage began.
        seconds_to_first: until its first task was done, which processes' starts made slow.
    """
    text = f"{num_done:,} of {num_units:,} tasks ({num_done / num_units:.0%})"
    text += f" in {duration(seconds)}"
    if 1 < num_done < num_units:
        left = (seconds - seconds_to_first) / (num_done - 1) * (num_units - num_done)
        text += f", about {duration(left)} left"
    return text


def duration(seconds: float) -> str:
    """Seconds in words: `2 h 5 min`, `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def start_ray(*, has_dashboard: bool = False) -> None:
    """Connect to the cluster of RAY_ADDRESS (`ray job submit` sets it), or start Ray here.

    Args:
        has_dashboard: start Ray here with its dashboard, on the loopback address.

    Raises:
        ClusterError: the cluster cannot be reached, or Ray cannot be started.
    """
    if ray.is_initialized():
        return
    root = str(Path(__file__).resolve().parents[1])
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if "RAY_ADDRESS" not in os.environ:
        variables = {
            "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        }
        if has_dashboard:
            # Processes of Ray Train ask the dashboard by the cluster's address, and find several
            # where another job has started a Ray of its own on this machine.
            os.environ[GCS_PORT_VARIABLE] = str(_free_port())
            host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            variables["RAY_ADDRESS"] = f"{host}:{os.environ[GCS_PORT_VARIABLE]}"
        options |= {
            "address": "local",
            "include_dashboard": has_dashboard,
            # Whoever reaches the dashboard runs programs here: it knows no passwords.
            "dashboard_host": "127.0.0.1",
            "runtime_env": {"env_vars": variables},
        }
    if payer := os.environ.get(REQUEST_PAYER):
        told = options.setdefault("runtime_env", {}).setdefault("env_vars", {})
        told[REQUEST_PAYER] = payer
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        # Ray puts one of its own in its place, with which a job that is stopped would just exit.
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    except (
        Exception
    ) as error:  # Ray raises whatever went wrong, from ConnectionError to RuntimeError
        address = os.environ.get("RAY_ADDRESS")
        where = f"the cluster at RAY_ADDRESS={address}" if address else "Ray on this machine"
        raise ClusterError(f"{where} could not be reached or started: {error}") from error
    finally:
        os.environ.pop(GCS_PORT_VARIABLE, None)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Whatever is lost for good costs its own unit only; the caller finds it missing and says so.
    context.max_errored_blocks = -1
    for name in (
        "ray.data",
        "ray.data._internal.execution.streaming_executor",
        "ray.data._internal.progress",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class StageRunner:
    """Runs the stages of one job on the cluster that `start_ray` connected to."""

    def __init__(self, *, num_workers: int | None = None, progress_s: float = 10.0) -> None:
        """Start the ledger.

        Args:
            num_workers: most units at a time; None for what the cluster's CPUs hold.
            progress_s: seconds between two lines of progress in the log.
        """
        self._num_workers = num_workers
        self._progress_s = progress_s
        # One for all stages: starting a process takes half a second.
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self._ledger = remote(Ledger).remote()

    def run(self, name: str, function: StageFunction, units: Sequence[Unit]) -> Iterator[pa.Table]:
        """Run a function over units; yields its tables as they are done, in any order.

        Args:
            name: of the stage, in logs.
            function: `(unit, attempt) -> table`. It enters `attempt(key)` round whatever may take
                the process down; entering raises ProcessDiedError when it did so MAX_ATTEMPTS
                times. It raises nothing else: what fails becomes rows.
            units: JSON-like dicts.
        """
        if not units:
            return
        started = reported = time.monotonic()
        logger.info("%s: %s tasks", name, f"{len(units):,}")
        rows = [{"unit": json.dumps(unit)} for unit in units]
        call: Any = _call  # Ray's annotation of what it calls leaves keyword arguments out
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            call,
            fn_kwargs={"function": function, "run_id": uuid.uuid4().hex, "ledger": self._ledger},
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=self._num_workers),
            num_cpus=1,
        )
        num_done, to_first = 0, 0.0
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            results: Any = table["result"]
            for content in results.to_pylist():
                yield pa.ipc.open_stream(content).read_all()
                num_done += 1
                meters().add("carn_stage_units_total", stage=name)
                meters().set("carn_stage_units_left", len(units) - num_done, stage=name)
            now = time.monotonic()
            to_first = to_first or now - started
            if now - reported >= self._progress_s or num_done == len(units):
                reported = now
                text = progress(
                    num_done, len(units), seconds=now - started, seconds_to_first=to_first
                )
                logger.info("%s: %s", name, text)


def _call(batch: pa.Table, *, function: StageFunction, run_id: str, ledger: Any) -> pa.Table:
    @contextmanager
    def attempt(key: str) -> Iterator[None]:
        key = f"{run_id}|{key}"
        if ray.get(ledger.begin.remote(key)) > MAX_ATTEMPTS:
            raise ProcessDiedError(
                f"reading it took the process down {MAX_ATTEMPTS} times (a crash in a decoder, or "
                "memory that ran out); see the worker's log"
            )
        try:
            yield
        finally:
            ledger.end.remote(key)

    units = batch["unit"].to_pylist()
    watch_s3(*units)
    tables = [function(json.loads(unit), attempt) for unit in units]
    # Tables of one stage may differ in their all-null columns' types once they pass through Ray's
    # block builders; serialized, they arrive as they were made.
    return pa.table({"result": [_serialize(table) for table in tables]})


def _serialize(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content
