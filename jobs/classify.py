"""Is tissue in super-resolved pictures still recognised? The paper's Table 5, on bcSR and PCam.

A ResNet is trained on GT crops and tested on GT, LR, bicubic and the SR of each model (or, with
--train-on each, trained anew for each kind of picture). One command on a workstation, the same
under `ray job submit` on a cluster. A run that was stopped or killed goes on when the same command
is given again; models may be added to a finished one.

Examples:
  python jobs/classify.py --dataset bcsr/ --models runs/carn-x2 runs/edsr-x2 --output classify/
  python jobs/classify.py --pcam /data/pcam --models runs/carn-x2 --output classify/
  python jobs/classify.py --dataset bcsr/ --depth 18 --epochs 3 --max-crops 2000 --output quick/
"""

import dataclasses
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# `python jobs/classify.py` puts jobs/ on the path, not the folder that holds carn/ and jobs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import ray.train
import tyro
from ray.train import LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from carn import storage
from carn.classification.config import ClassifierConfig, CropConfig, StudyConfig, TrainOn
from carn.classification.loop import ClassifierDivergedError, check_batch
from carn.classification.study import Plan, begin, is_finished, make_plan, run_study
from carn.classification.summary import write_summary
from carn.errors import (
    AccessDeniedError,
    CacheError,
    CarnError,
    MissingObjectError,
    StorageError,
)
from carn.log_lines import start_logging
from carn.models.checkpoint import checkpoint_uri
from carn.processor import KEEPING_ENVIRONMENT
from jobs.monitor import Monitor
from jobs.ray_stage import ClusterError, start_ray
from jobs.stopping import stopped_by_sigterm
from jobs.train_worker import NodeAddressTorchConfig, failure_config
from jobs.trainer import LostWorkersError, cause_of, fit_showing

logger = logging.getLogger("classify")

# A worker may wait so long for another that decodes a dataset, or makes the pages' pictures.
COLLECTIVE_TIMEOUT_S = 6 * 3600


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Who computes, and where."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` (a GPU where there is one), `cpu` or `cuda`."""
    num_workers: int | None = None
    """Workers that share each batch and the test's tiles; None for one per GPU of the cluster, or
    one on CPUs. On CPUs several workers learn slightly else than one (batch normalisation)."""
    cpus_per_worker: int | None = None
    """CPUs of a worker; None for an even share of a node's."""
    max_failures: int = 8
    """Times that lost workers are replaced before the run gives up."""
    overwrite: bool = False
    """Remove the study at the output and begin anew."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.max_failures < -1:
            raise ValueError(f"max_failures={self.max_failures} must be -1 (no limit) or more")


@dataclass(frozen=True, kw_only=True)
class ClassifyJob:
    """What `classify.py` is asked to do."""

    output: str
    """Folder or s3:// prefix of the study, which all nodes must share."""
    dataset: str | None = None
    """Folder or s3:// prefix of a finished bcSR dataset; its tiles are labelled tumor or normal."""
    pcam: str | None = None
    """Folder or s3:// prefix of PCam's HDF5 files, unpacked
    (https://zenodo.org/records/2546921)."""
    models: tuple[str, ...] = ()
    """Checkpoints, training runs or networks that come with the project (carn-x2) whose SR is
    tested."""
    train_on: TrainOn = "gt"
    """`gt`: one classifier, trained on GT and tested on all. `each`: one for each kind of
    picture."""
    crops: CropConfig = field(default_factory=CropConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def __post_init__(self) -> None:
        if self.dataset is None and self.pcam is None:
            raise ValueError("say what is classified: --dataset, --pcam, or both")
        output = _place(self.output)
        for read in (self.dataset, self.pcam, *self.models):
            if read is not None and output.startswith(_place(read)):
                raise ValueError(
                    f"--output {self.output} lies in {read}, which is read; choose another"
                )

    def study(self) -> StudyConfig:
        """The study, without how it is carried out; workers start in another folder."""
        weights = self.classifier.weights
        return StudyConfig(
            dataset=self.dataset and storage.normalize(self.dataset),
            pcam=self.pcam and storage.normalize(self.pcam),
            models=tuple(map(checkpoint_uri, self.models)),
            output=storage.normalize(self.output),
            train_on=self.train_on,
            crops=self.crops,
            classifier=dataclasses.replace(
                self.classifier, weights=weights and storage.normalize(weights)
            ),
            device=self.workers.device,
        )


def main(job: ClassifyJob) -> int:
    """Train, test and sum up; returns the process's exit status."""
    start_logging()
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it would say where keys come from
    begun = time.monotonic()
    plan = make_plan(job.study(), num_workers=job.workers.num_workers or 1)
    begin(plan, overwrite=job.workers.overwrite)
    num_workers = None
    if is_finished(plan):
        logger.info("%s is finished already; nothing to train or test", job.output)
    else:
        num_workers = run_on_ray(job, plan)
    seconds = time.monotonic() - begun
    print(write_summary(plan, seconds=seconds, num_workers=num_workers), flush=True)
    return 0


def run_on_ray(job: ClassifyJob, plan: Plan) -> int:
    """Run the workers to the end, showing what they say; returns how many there were.

    Raises:
        CarnError, ValueError: the study cannot go on; the error is that of the worker.
        ClusterError: Ray or its resources are not there.
    """
    logger.info("starting Ray, or connecting to it")
    # Each line of a worker would otherwise come twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if "RAY_ADDRESS" not in os.environ:
        # Nobody takes this machine away at short notice.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray Train finds out through the dashboard's API whether its controller lives.
    start_ray(has_dashboard=True)
    scaling = scaling_config(job)
    num_workers = scaling.num_workers
    assert isinstance(num_workers, int)
    for corpus in plan.corpora:
        num_crops = len(corpus.crops["train"])
        check_batch(job.classifier, num_workers=num_workers, num_crops=num_crops)
    node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    monitor: Any = (
        ray.remote(Monitor).options(num_cpus=0, max_restarts=3, scheduling_strategy=node).remote()
    )
    own_files = tempfile.mkdtemp(prefix="carn-ray-train-")
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"study": job.study(), "monitor": monitor},
        scaling_config=scaling,
        torch_config=NodeAddressTorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            # What is finished is kept by the study itself. Ray's own files are read here alone.
            storage_path=own_files,
            failure_config=failure_config(job.workers.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
            # Ray Train runs the loop in a thread that is not the process's first.
            worker_runtime_env={"env_vars": dict(KEEPING_ENVIRONMENT)},
        ),
    )
    try:
        fit_showing(trainer, monitor, lambda event: logger.info("%s", describe(event)))
    except Exception as error:  # Ray wraps what a worker raised in errors of its own
        raise cause_of(monitor, error) from error
    finally:
        shutil.rmtree(own_files, ignore_errors=True)
    fatal: Exception | None = ray.get(monitor.fatal.remote())
    if fatal is not None:
        raise fatal
    return num_workers


def scaling_config(job: ClassifyJob) -> ScalingConfig:
    """Workers and their resources, by what the cluster has.

    Raises:
        ClusterError: a GPU, or more than there is, was asked for.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    wanted = job.workers
    if wanted.device == "cuda" and not num_gpus:
        raise ClusterError(
            "a GPU was asked for (--device cuda), but the cluster has none; use --device cpu"
        )
    use_gpu = num_gpus > 0 and wanted.device != "cpu"
    num_workers = wanted.num_workers or (num_gpus if use_gpu else 1)
    if use_gpu and num_workers > num_gpus:
        raise ClusterError(
            f"{num_workers} workers need a GPU each, and the cluster has {num_gpus}; take fewer "
            "--num-workers"
        )
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    num_fitting = 0
    cpus = wanted.cpus_per_worker or largest
    while cpus >= 1:
        num_fitting = sum(
            min(int(node.get("CPU", 0)) // cpus, int(node.get("GPU", 0)) if use_gpu else 1 << 30)
            for node in nodes
        )
        if num_fitting >= num_workers or wanted.cpus_per_worker:
            break
        cpus -= 1
    if num_fitting < num_workers:
        sizes = ", ".join(f"{node.get('CPU', 0):g}" for node in nodes)
        raise ClusterError(
            f"{num_workers} workers of {max(cpus, 1)} CPUs do not fit the cluster, whose nodes "
            f"have {sizes} CPUs; take fewer --num-workers or --cpus-per-worker"
        )
    return ScalingConfig(
        num_workers=num_workers,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
    )


# ---------------------------------------------------------------------------------------- worker


def run_worker(settings: dict[str, Any]) -> None:
    """Do the study as one of the workers of a Ray Train run.

    Errors that another attempt would only meet again are told to the monitor, so that the attempts
    that Ray makes after them end at once; lost workers, nodes and requests are not among them, and
    another attempt goes on from what is on storage.
    """
    for name in list(logging.root.manager.loggerDict):
        # Ray's own lines about each report would bury ours. Some loggers are named after files.
        if name.startswith("ray.") or "/ray/train/" in Path(name).as_posix():
            logging.getLogger(name).setLevel(logging.WARNING)
    monitor = settings["monitor"]
    if ray.get(monitor.fatal.remote()) is not None:
        return
    study: StudyConfig = settings["study"]
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # Ray sets it to the CPUs
    if threads.isdigit() and study.num_threads is None:
        study = dataclasses.replace(study, num_threads=int(threads))
    try:
        run_study(study, on_event=lambda event: monitor.tell.remote(dict(event)))
    except (CarnError, ValueError) as error:
        lasting = (AccessDeniedError, CacheError, MissingObjectError)
        if isinstance(error, StorageError) and not isinstance(error, lasting):
            raise  # storage and its servers recover
        ray.get(monitor.give_up.remote(error))
        is_alone = ray.train.get_context().get_world_size() == 1
        if is_alone or isinstance(error, ClassifierDivergedError):
            return  # on every worker alike: nobody is left waiting, and Ray need not try again
        raise


# ----------------------------------------------------------------------------------------- driver


def describe(event: dict[str, Any]) -> str:
    """An event of the study as a line of the log."""
    if event["kind"] == "tested":
        return f"{event['corpus']}: {event['pictures']} tested"
    accuracy = event["validation_accuracy"]
    return (
        f"{event['corpus']}: classifier of {event['trained_on']}, epoch {event['epoch']} of "
        f"{event['epochs']}, loss {event['loss']:.4f}"
        + ("" if accuracy is None else f", validation accuracy {100 * accuracy:.2f} %")
        + f", {event['seconds']:.1f} s"
    )


def _place(uri: str) -> str:
    """A location as it starts the names of all below it."""
    uri = storage.normalize(uri)
    return (uri if storage.is_s3(uri) else os.path.realpath(uri)).rstrip("/") + "/"


# ----------------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str] | None = None) -> ClassifyJob:
    """The job that a command line asks for.

    Raises:
        ValueError: a setting is impossible.
    """
    return tyro.cli(
        ClassifyJob, args=arguments, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )


def cli() -> int:
    """Parse the command line, run, and turn expected errors into one line each."""
    try:
        with stopped_by_sigterm():
            return main(parse())
    except (ClassifierDivergedError, LostWorkersError) as error:
        print(f"classify: {error}", file=sys.stderr)
        return 1
    except (CarnError, ValueError) as error:
        print(f"classify: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("classify: stopped; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(cli())
