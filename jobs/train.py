"""Train a super-resolution network on bcSR: a dataset in, a checkpoint that every other job reads.

One command on a workstation, the same under `ray job submit` on a cluster, data-parallel over its
GPUs. The batch is shared by the workers, so their number changes neither the recipe nor (but for
roundings) the result. A run that was stopped or killed goes on from its last checkpoint when the
same command is given again (without --overwrite); a finished one is left as it is.

Examples:
  python jobs/train.py --dataset bcsr/ --scale 2
  python jobs/train.py --dataset bcsr/ --scale 4 --model edsr --output runs/edsr-x4
  ray job submit --working-dir . -- python jobs/train.py --dataset s3://lab/bcsr --scale 2 \
      --output s3://lab/runs/carn-x2
"""

import argparse
import dataclasses
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# `python jobs/train.py` puts jobs/ on the path, not the folder that holds carn/ and jobs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import ray.train
import tyro
import yaml
from ray.train import ScalingConfig

from carn import storage
from carn.bcsr.dataset import BcsrDataset, open_dataset
from carn.errors import CarnError, DatasetError, DivergedError
from carn.log_lines import start_logging
from carn.models.table import MODELS
from carn.report.train_summary import write_report
from carn.training.config import NetworkConfig, TrainConfig, resolve
from carn.training.data import make_sampler
from carn.training.engine import EngineConfig
from carn.training.loop import check_group
from carn.training.players import BATCH_NORM_ON_CPU
from carn.training.progress import ProgressView
from carn.training.recipes import Recipe, flat, recipe, with_values
from carn.training.run_folder import RunFolder
from carn.training.start import starting_point
from carn.training.tiles import dataset_digest
from carn.training.validation import validation_maker
from jobs.monitor import Monitor
from jobs.ray_stage import ClusterError, start_ray
from jobs.stopping import stopped_by_sigterm
from jobs.train_worker import WorkerTask, make_trainer
from jobs.trainer import LostWorkersError, cause_of, fatal_of, fit_showing

logger = logging.getLogger("train")


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Who trains. The number of workers changes the speed, not what is learnt."""

    num_workers: int | None = None
    """Workers that share each batch; None for one per GPU of the cluster, or one on CPUs."""
    min_workers: int | None = None
    """Go on with as few workers when nodes are lost, and take up more when they come back; None
    for 1."""
    cpus_per_worker: float | None = None
    """CPUs of a worker; None for an even share of the cluster's, less one for reading a stream."""
    max_failures: int = 8
    """Times that lost workers are replaced before the run gives up."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "min_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.num_workers and self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than num_workers={self.num_workers}"
            )
        if self.cpus_per_worker is not None and not self.cpus_per_worker > 0:
            raise ValueError(f"cpus_per_worker={self.cpus_per_worker} must be positive")
        if self.max_failures < -1:
            raise ValueError(f"max_failures={self.max_failures} must be -1 (no limit) or more")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What `train.py` is asked to do."""

    dataset: str
    """Folder or s3:// prefix of a finished bcSR dataset."""
    output: str | None = None
    """Folder or s3:// prefix of the run, which all nodes must share; None for
    runs/<model>-x<scale>-seed<seed> in the folder the job is started from."""
    recipe: Recipe = "paper"
    """What all that is not said otherwise is taken from. `paper`: every network as the CARN paper
    trained it. `own`: as the network's own authors did, where that is known to differ."""
    config: str | None = None
    """YAML or JSON file with settings of training by name, such as a sweep's best, another run's
    config.json, or the recipe of a network that comes with the project; options given beside it go
    before it."""
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def __post_init__(self) -> None:
        if self.dataset is tyro.MISSING:
            return  # not a job yet: the defaults of the command line
        storage.normalize(self.dataset)
        if self.output is None and "RAY_ADDRESS" in os.environ:
            raise ValueError(
                "say with --output where the run is to be kept: on a cluster the folder that the "
                "job starts in is thrown away"
            )
        check_group(self.train, self.engine, num_workers=self.workers.num_workers or 1)
        output, dataset = (
            uri if storage.is_s3(uri) else os.path.realpath(uri)
            for uri in (self.output_uri, storage.normalize(self.dataset))
        )
        if (output.rstrip("/") + "/").startswith(dataset.rstrip("/") + "/"):
            raise ValueError(f"--output {self.output} lies in the dataset; choose another")

    @property
    def output_uri(self) -> str:
        """Where the run is kept."""
        network = self.train.network
        name = f"{network.model}-x{network.scale}-seed{self.train.seed}"
        return storage.normalize(self.output or f"runs/{name}")


def main(job: TrainJob) -> int:
    """Train; returns the process's exit status."""
    start_logging()
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it would say where keys come from
    config, output = resolve(job.train), job.output_uri
    dataset = open_dataset(job.dataset)
    folder = RunFolder(uri=output, keep_checkpoints=job.engine.keep_checkpoints)
    check_dataset(dataset, config, is_begun=not job.engine.overwrite and bool(folder.steps()))
    folder.begin(
        config,
        dataset={"uri": dataset.uri, "digest": dataset_digest(dataset)},
        overwrite=job.engine.overwrite,
    )
    newest = None if job.engine.overwrite else folder.newest()
    if newest is not None and (newest[0].step or 0) >= config.steps:
        logger.info("%s is finished already; nothing to train", output)
    else:
        run_on_ray(job, config, output)
    summary = write_report(output)
    print(summary, flush=True)
    return 0


def check_dataset(dataset: BcsrDataset, config: TrainConfig, *, is_begun: bool = False) -> None:
    """Find out before anything is started whether the dataset can be trained on.

    Args:
        dataset: what to train on.
        config: how.
        is_begun: the run has a checkpoint, and needs its starting point no more.

    Raises:
        DatasetError: there is nothing to train on.
        CheckpointError: training cannot start from the weights that it should.
        ValueError: a patch is larger than a tile, or a condition to validate under is not known.
    """
    if not is_begun:
        starting_point(config.network)
    validation_maker(config)
    if not dataset.num_tiles("train"):
        raise DatasetError(f"{dataset.uri} has no training tiles; build it with more tiles")
    if not dataset.num_tiles("validation"):
        logger.warning(
            "%s has no validation tiles: the last checkpoint will stand for the best (build it "
            "with --num-validation to know better)",
            dataset.uri,
        )
    table = dataset.table("train")
    sides = zip(table["width_px"].to_pylist(), table["height_px"].to_pylist(), strict=True)
    make_sampler(dataset, list(sides), tuple(table["tile_id"].to_pylist()), config)


def run_on_ray(job: TrainJob, config: TrainConfig, output: str) -> None:
    """Run the workers to the end, showing what they say.

    Raises:
        CarnError, ValueError: the run cannot go on; the error is that of the worker.
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
    node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    monitor = (
        ray.remote(Monitor).options(num_cpus=0, max_restarts=3, scheduling_strategy=node).remote()
    )
    task = WorkerTask(
        config=config,
        # What was to be overwritten is gone; a second attempt must not begin anew.
        engine=dataclasses.replace(job.engine, overwrite=False),
        dataset_uri=storage.normalize(job.dataset),
        output=output,
        monitor=monitor,
    )
    own_files = tempfile.mkdtemp(prefix="carn-ray-train-")
    trainer = make_trainer(
        task,
        scaling=scaling,
        max_failures=job.workers.max_failures,
        own_files=own_files,
    )
    progress = ProgressView()
    try:
        fit_showing(trainer, monitor, progress)
    except Exception as error:
        raise cause_of(monitor, error) from error
    finally:
        progress.close()
        shutil.rmtree(own_files, ignore_errors=True)
    if (fatal := fatal_of(monitor)) is not None:
        raise fatal


def scaling_config(job: TrainJob) -> ScalingConfig:
    """Workers and their resources, by what the cluster has.

    Raises:
        ClusterError: a GPU, or more of them, was asked for than the cluster has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    wanted = job.workers
    if job.engine.device == "cuda" and not num_gpus:
        raise ClusterError(
            "a GPU was asked for (--device cuda), but the cluster has none; use --device cpu"
        )
    use_gpu = num_gpus > 0 and job.engine.device != "cpu"
    most = min(num_gpus if use_gpu else 1, job.train.patches.batch_size)
    num_workers = wanted.num_workers or most
    if use_gpu and num_workers > num_gpus:
        raise ClusterError(
            f"{num_workers} workers need a GPU each, and the cluster has {num_gpus}; take fewer "
            "--num-workers"
        )
    if job.train.network.model == "srgan" and num_workers > 1 and not use_gpu:
        raise ClusterError(BATCH_NORM_ON_CPU)
    # Those who read a stream need a CPU on every node: with none left they would wait for ever for
    # workers that wait for them.
    spare = 1 if job.engine.data == "stream" else 0
    cpus = wanted.cpus_per_worker or _even_share(nodes, num_workers, use_gpu=use_gpu, spare=spare)
    if _num_fitting(nodes, cpus, use_gpu=use_gpu, spare=spare) < num_workers:
        reading = ", beside one CPU a node that reads their stream," if spare else ""
        sizes = ", ".join(f"{node.get('CPU', 0):g}" for node in nodes)
        raise ClusterError(
            f"{num_workers} workers of {cpus:g} CPUs{reading} do not fit the cluster, whose nodes "
            f"have {sizes} CPUs; take fewer --num-workers or --cpus-per-worker"
            + (", or --data memory" if spare else "")
        )
    least = min(wanted.min_workers or 1, num_workers)
    return ScalingConfig(
        num_workers=num_workers if least == num_workers else (least, num_workers),  # type: ignore[arg-type]
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
    )


def _num_fitting(
    nodes: Sequence[dict[str, float]], cpus: float, *, use_gpu: bool, spare: int
) -> int:
    """How many workers of so many CPUs the nodes hold."""
    by_cpu = [int(max(0.0, node.get("CPU", 0) - spare) / cpus) for node in nodes]
    if not use_gpu:
        return sum(by_cpu)
    return sum(min(n, int(node.get("GPU", 0))) for n, node in zip(by_cpu, nodes, strict=True))


def _even_share(
    nodes: Sequence[dict[str, float]], num_workers: int, *, use_gpu: bool, spare: int
) -> float:
    """The most CPUs that every one of the workers can have."""
    largest = int(max(node.get("CPU", 0) for node in nodes))
    for cpus in range(largest, 1, -1):
        if _num_fitting(nodes, cpus, use_gpu=use_gpu, spare=spare) >= num_workers:
            return cpus
    return 1


def parse(arguments: Sequence[str] | None = None) -> TrainJob:
    """The job that a command line asks for: options before --config before --recipe.

    Raises:
        ValueError: a setting is impossible, or the file of --config has others than training's.
        StorageError: the file cannot be read.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", default="paper")
    early.add_argument("--config", default=None)
    early.add_argument("--model", default=None)
    early.add_argument("--scale", default="")
    known, _ = early.parse_known_args(arguments)
    values = flat(read_settings(known.config)) if known.config else {}
    # What is wrong with the one or the other is better said by the parser proper.
    if known.model in MODELS:
        values["model"] = known.model
    if known.scale.isdigit():
        values["scale"] = int(known.scale)
    network = NetworkConfig()
    start = recipe(
        known.recipe,
        model=values.get("model", network.model),
        scale=values.get("scale", network.scale),
    )
    return tyro.cli(
        TrainJob,
        default=TrainJob(dataset=tyro.MISSING, train=with_values(start, values)),
        args=arguments,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def read_settings(uri: str) -> dict[str, Any]:
    """Settings by name from a YAML file: at its top, or below `config`, beside other things.

    Raises:
        ValueError: it is no YAML, or not of names and values.
        StorageError: it cannot be read.
    """
    try:
        content = yaml.safe_load(storage.read_bytes(storage.normalize(uri)))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {uri} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {uri} must hold settings by name, as `steps: 1000`")
    return content["config"] if isinstance(content.get("config"), dict) else content


def cli() -> int:
    """Parse the command line, run, and turn expected errors into one line each."""
    try:
        job = parse()
    except (CarnError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    try:
        with stopped_by_sigterm():
            return main(job)
    except (DivergedError, LostWorkersError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    except (CarnError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(cli())
