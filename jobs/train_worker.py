"""What a worker of `jobs/train.py` runs, and how it is heard of; the loop is carn.training's."""

import dataclasses
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.data
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend

from carn.errors import (
    AccessDeniedError,
    CacheError,
    CarnError,
    DivergedError,
    MissingObjectError,
    StorageError,
)
from carn.processor import KEEPING_ENVIRONMENT
from carn.training.config import TrainConfig
from carn.training.engine import EngineConfig
from carn.training.loop import train
from jobs.metrics import TrainingMeters

# Windows of patches that one task of a stream reads: some tens of MB come back.
WINDOWS_PER_TASK = 4
# Failed starts of workers that are borne for each of their failures at work.
STARTS_PER_FAILURE = 10
# Seconds without a window read after which a stream gives up, and its run begins another attempt.
NO_PROGRESS_S = 300


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What every worker is told.

    Attributes:
        config, engine, dataset_uri, output: of `carn.training.loop.train`.
        monitor: handle of the run's Monitor.
    """

    config: TrainConfig
    engine: EngineConfig
    dataset_uri: str
    output: str
    monitor: Any


def failure_config(max_failures: int) -> FailureConfig:
    """That lost workers are replaced so often, and those that never begin some times as often.

    Left to itself, Ray Train starts workers for ever that die while they start. With them it counts
    those that found no place within a minute, and nodes that are to be started take minutes. (That
    minute must not grow: it is after it that a run goes on with fewer workers.)
    """
    num_starts = -1 if max_failures < 0 else STARTS_PER_FAILURE * max(1, max_failures)
    return FailureConfig(
        max_failures=max_failures,
        controller_failure_limit=num_starts,  # type: ignore[call-arg]
    )


def make_trainer(
    task: WorkerTask,
    *,
    scaling: ScalingConfig,
    max_failures: int,
    own_files: str,
    callbacks: Sequence[Any] = (),
) -> TorchTrainer:
    """What runs the workers; its `fit` returns when they have ended.

    Args:
        task: what every worker is told.
        scaling: how many workers, and what each has.
        max_failures: times that lost workers are replaced.
        own_files: folder of this machine for Ray's own files.
        callbacks: told of the workers' reports.
    """
    return TorchTrainer(
        run_worker,
        train_loop_config={"task": task},
        scaling_config=scaling,
        torch_config=NodeAddressTorchConfig(),
        run_config=RunConfig(
            # Checkpoints and resuming are the loop's. Ray's own files are read on this node alone.
            storage_path=own_files,
            failure_config=failure_config(max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            # Ray Train runs the loop in a thread that is not the process's first.
            worker_runtime_env={"env_vars": dict(KEEPING_ENVIRONMENT)},
            callbacks=list(callbacks),
        ),
    )


def run_worker(settings: dict[str, Any]) -> None:
    """Train as one of the workers of a Ray Train run.

    Errors of the run itself (a split without tiles, a diverged loss) are told to the monitor, so
    that the attempts that Ray makes after them end at once; lost workers, nodes and requests are
    not among them, and another attempt goes on from the last checkpoint.
    """
    _quiet_ray()
    task: WorkerTask = settings["task"]
    monitor = task.monitor
    if ray.get(monitor.fatal.remote()) is not None:
        return
    engine = task.engine
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # Ray sets it to the CPUs
    if threads.isdigit() and engine.num_threads is None:
        engine = dataclasses.replace(engine, num_threads=int(threads))
    network = task.config.network
    count = TrainingMeters(
        model=network.model, scale=network.scale, batch_size=task.config.patches.batch_size
    )

    def tell(event: Mapping[str, Any]) -> None:
        count(event)
        monitor.tell.remote(dict(event))

    try:
        result = train(
            task.config,
            dataset_uri=task.dataset_uri,
            output=task.output,
            engine=engine,
            map_units=map_with_ray_data,
            on_event=tell,
            on_checkpoint=_report,
        )
    except (CarnError, ValueError) as error:
        if _may_pass(error):
            raise
        ray.get(monitor.give_up.remote(error))
        is_alone = ray.train.get_context().get_world_size() == 1
        if is_alone or isinstance(error, DivergedError):
            return  # on every worker alike: nobody is left waiting, and Ray need not try again
        raise
    if ray.train.get_context().get_world_rank() == 0:
        ray.get(monitor.tell.remote({"kind": "end", **dataclasses.asdict(result)}))


def _quiet_ray() -> None:
    """Ray's own lines about each report and each dataset would bury ours in the job's log."""
    for name in list(logging.root.manager.loggerDict):
        # Some of Ray's loggers are named after their files.
        if name.startswith("ray.") or "/ray/train/" in Path(name).as_posix():
            logging.getLogger(name).setLevel(logging.WARNING)


def _report(metrics: Mapping[str, float]) -> None:
    # Ray (and a sweep around the run) sees the numbers; checkpoints are the loop's own.
    ray.train.report(dict(metrics))


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may go well: storage and its servers recover."""
    lasting = (AccessDeniedError, CacheError, MissingObjectError)
    return isinstance(error, StorageError) and not isinstance(error, lasting)


def map_with_ray_data(
    function: Callable[[dict[str, Any]], dict[str, Any]], units: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Map over units with Ray Data, ahead of need, results in the order of the units.

    Raises:
        CarnError: what the function raised.
    """
    _quiet_ray()
    listed = list(units)
    if not listed:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # A window that is left out would put all later ones in the wrong place.
    context.max_errored_blocks = 0
    # Without a free CPU nobody reads, and the workers would wait for ever.
    context.execution_no_progress_timeout_s = NO_PROGRESS_S

    def read(row: dict[str, Any]) -> dict[str, Any]:
        try:
            found: Any = function({name: int(value) for name, value in row.items()})
        except CarnError as error:
            found = error  # Ray hands on what a task raises as text only
        return {"found": pickle.dumps(found)}

    num_tasks = -(-len(listed) // WINDOWS_PER_TASK)
    dataset = ray.data.from_items(listed, override_num_blocks=num_tasks).map(read)
    for row in dataset.iter_rows():
        found = pickle.loads(row["found"])
        if isinstance(found, CarnError):
            raise found
        yield found


# ------------------------------------------------------------------------------------------ network


class NodeAddressTorchConfig(TorchConfig):
    """Torch's process group over the network interface that Ray knows each node by.

    Gloo binds to what the host's name resolves to, which on many machines is the loopback address:
    workers of other nodes then cannot connect.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Chooses the interface before torch looks for one."""
        return _NodeAddressBackend


class _NodeAddressBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Let gloo use the interface that has the node's address, unless somebody chose one."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    for name, addresses in psutil.net_if_addrs().items():
        families = (socket.AF_INET, socket.AF_INET6)
        if any(item.family in families and item.address == address for item in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
