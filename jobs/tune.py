"""Search settings of training on bcSR: a space of tune_spaces/ in, a table, a best config, a page.

Each trial is a training run of its own below the output, as train.py keeps it. A sweep that was
stopped or killed goes on when the same command is given again: trials that are done are kept,
those that were running go on from their checkpoints.

Examples:
  python jobs/tune.py --space tune_spaces/loss_weights.yaml --dataset bcsr/ --steps 2000
  python jobs/tune.py --space tune_spaces/blocks.yaml --dataset bcsr/ --seeds 1 7 11 18 1011
  python jobs/tune.py --space tune_spaces/loss_weights_search.yaml --dataset bcsr/ \
      --strategy optuna --num-samples 40 --scheduler asha
  ray job submit --working-dir . -- python jobs/tune.py --space tune_spaces/reduction.yaml \
      --dataset s3://lab/bcsr --output s3://lab/sweeps/reduction --gpus-per-worker 0.5
"""

import argparse
import dataclasses
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# `python jobs/tune.py` puts jobs/ on the path, not the folder that holds carn/ and jobs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import tyro
from ray import tune

from carn import storage
from carn.bcsr.dataset import open_dataset
from carn.errors import CarnError, DatasetError
from carn.log_lines import start_logging
from carn.report.page import plural
from carn.report.sweep_summary import write_sweep
from carn.training.config import TrainConfig
from carn.training.engine import EngineConfig
from carn.training.loop import check_group
from carn.training.recipes import Recipe, flat, recipe
from carn.training.tiles import dataset_digest
from carn.tuning.space import Point, Space, label_of, read_space
from carn.tuning.sweep import Outcome, SweepFolder, Trial, make_trial, steps_of
from jobs.ray_stage import ClusterError, start_ray
from jobs.stopping import stopped_by_sigterm
from jobs.train import check_dataset
from jobs.trainer import (
    call_in_thread,
    failure_text,
    keep_credentials_out_of_runtime_environments,
)
from jobs.tune_trials import (
    METRIC,
    Setup,
    Watch,
    finished_suggestions,
    make_search,
    quiet_tune,
    run_trial,
)

logger = logging.getLogger("tune")

# Memory that the process beside each trial's workers is counted with, bytes; it computes nothing.
TRIAL_MEMORY = 500e6


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Which points are tried, and for how long each."""

    strategy: Literal["grid", "random", "optuna"] = "grid"
    """`grid`: every point of the space. `random`: `num_samples` drawn points. `optuna`: as many,
    each suggested by what the ones before came to (TPE)."""
    only: tuple[str, ...] = ()
    """With `grid`: points with these values alone, as `scale=2 model=carn`."""
    num_samples: int = 20
    """Points, where they are drawn or suggested."""
    search_seed: int = 1
    """Of the drawing or the suggestions."""
    seeds: tuple[int, ...] | None = None
    """Seeds that each point is trained with; None for those of the space. The paper's are 1, 7,
    11, 18 and 1011."""
    scheduler: Literal["none", "asha"] = "none"
    """`asha`: end runs early that are worse than most others were at the same step; a sweep that
    is continued compares with the runs of that day only. Without it, runs that were ended early
    are trained to their end."""
    grace_steps: int | None = None
    """With `asha`: no run ends before; None for two validations."""
    reduction_factor: int = 3
    """With `asha`: one in so many goes on from each rung to the next."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "grace_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.reduction_factor < 2:
            raise ValueError(f"reduction_factor={self.reduction_factor} must be at least 2")
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            raise ValueError(f"seeds={self.seeds} must be different numbers")


@dataclass(frozen=True, kw_only=True)
class TrialsConfig:
    """What a trial has of the cluster."""

    max_concurrent: int | None = None
    """Trials at a time; None for as many as fit the cluster now."""
    workers_per_trial: int = 1
    """Workers that share each batch of a trial."""
    cpus_per_worker: float | None = None
    """CPUs of a worker; None for up to 4 of a node's beside each GPU, or on CPUs alone up to 2."""
    gpus_per_worker: float | None = None
    """GPUs of a worker, such as 0.25 for four trials on each; None for one where there are any."""
    max_failures: int = 3
    """Times that lost workers of a trial are replaced, from its last checkpoint; and that a trial
    whose own process is lost is begun again."""

    def __post_init__(self) -> None:
        for name in ("max_concurrent", "workers_per_trial"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.cpus_per_worker is not None and not self.cpus_per_worker > 0:
            raise ValueError(f"cpus_per_worker={self.cpus_per_worker} must be positive")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise ValueError(f"gpus_per_worker={self.gpus_per_worker} must not be negative")


@dataclass(frozen=True, kw_only=True)
class TuneJob:
    """What `tune.py` is asked to do."""

    space: str
    """YAML file of a search space; see tune_spaces/."""
    dataset: str
    """Folder or s3:// prefix of a finished bcSR dataset."""
    output: str | None = None
    """Folder or s3:// prefix of the sweep, which all nodes must share; None for
    sweeps/<name of the space> in the folder the job is started from."""
    recipe: Recipe = "paper"
    """What all that neither the space nor an option says is taken from."""
    search: SearchConfig = field(default_factory=SearchConfig)
    trials: TrialsConfig = field(default_factory=TrialsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if tyro.MISSING in (self.space, self.dataset):
            return  # not a job yet: the defaults of the command line
        storage.normalize(self.dataset)
        if self.output is None and "RAY_ADDRESS" in os.environ:
            raise ValueError(
                "say with --output where the sweep is to be kept: on a cluster the folder that "
                "the job starts in is thrown away"
            )

    @property
    def output_uri(self) -> str:
        """Where the sweep is kept."""
        name = storage.name_of(storage.normalize(self.space)).rsplit(".", 1)[0]
        return storage.normalize(self.output or f"sweeps/{name}")


def main(job: TuneJob) -> int:
    """Search; returns the process's exit status."""
    start_logging()
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it would say where keys come from
    space = read_space(job.space)
    configs = check_job(job, space)
    dataset = open_dataset(job.dataset)
    # Patches may be searched, and are to fit the tiles.
    for config in {(c.patches, c.network.scale): c for c in configs}.values():
        check_dataset(dataset, config)
    if not dataset.num_tiles("validation"):
        raise DatasetError(
            f"{dataset.uri} has no validation tiles to judge trials by; build it with "
            "--num-validation"
        )
    identity = {"uri": dataset.uri, "digest": dataset_digest(dataset)}
    folder = SweepFolder(uri=job.output_uri)
    folder.begin(space, base=job.train, dataset=identity)
    sweep = Sweep(job, space, folder, identity)
    started = time.monotonic()
    is_stopped = False
    try:
        sweep.run()
    except KeyboardInterrupt:
        is_stopped = True
    outcomes = sweep.outcomes()
    seconds = time.monotonic() - started
    said = write_sweep(
        folder.uri, space, outcomes, base=job.train, seconds=seconds, machine=sweep.machine
    )
    print(said, flush=True)
    if is_stopped:
        print("tune: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    is_whole = all(outcome.state in ("done", "stopped") for outcome in outcomes)
    return 0 if is_whole and not sweep.num_lost else 1


def check_job(job: TuneJob, space: Space) -> list[TrainConfig]:
    """Find out before anything is started whether the sweep can be made.

    Returns:
        The settings of the points that will be tried; where these cannot be known, of some like
        them.

    Raises:
        ValueError: a point of the space is impossible, or options do not go together.
    """
    search = job.search
    start = flat(
        space.start(recipe(job.recipe, model=_model(space), scale=_scale(space))).to_dict()
    )
    given = flat(job.train.to_dict())
    for name in space.columns:
        if given.get(name) != start.get(name):
            raise ValueError(f"{name} is what the space {space.name} searches: leave it out")
    if job.recipe == "own" and "model" in space.columns:
        raise ValueError(
            "--recipe own differs from network to network: search one network's settings at a time"
        )
    points: list[Point] | None = None
    if search.strategy == "grid":
        points = grid_of(space, search)
    elif search.only:
        raise ValueError(f"--only is for a grid, not for --strategy {search.strategy}")
    elif search.strategy == "random":
        points = space.draw(search.num_samples, seed=search.search_seed)
    configs = space.check(job.train, points=points)
    for config in configs:
        check_group(config, job.engine, num_workers=job.trials.workers_per_trial)
    seeds = search.seeds or space.seeds
    if search.scheduler == "asha" and len(seeds) > 1:
        raise ValueError(
            f"--scheduler asha compares single runs, and would end some of a point's {len(seeds)} "
            "seeds: take one seed"
        )
    if search.scheduler == "asha" and "scale" in space.columns:
        raise ValueError("--scheduler asha would compare scales with each other: leave it out")
    if search.scheduler == "asha" and "steps" in space.columns:
        raise ValueError("--scheduler asha would compare budgets with each other: leave it out")
    return configs


def grid_of(space: Space, search: SearchConfig) -> list[Point]:
    """The points of a grid that are asked for.

    Raises:
        ValueError: none are, or an `only` names what is not searched.
    """
    wanted: dict[str, set[str]] = {}
    for text in search.only:
        name, _, value = text.partition("=")
        if name not in space.columns:
            raise ValueError(
                f"--only {text}: the space {space.name} searches {', '.join(space.columns)}"
            )
        wanted.setdefault(name, set()).add(value)
    points = [
        point
        for point in space.grid()
        if all(f"{point[name]}" in values for name, values in wanted.items())
    ]
    if not points:
        raise ValueError(f"--only {' '.join(search.only)}: no point of {space.name} is so")
    return points


class Sweep:
    """One run of the job."""

    def __init__(
        self, job: TuneJob, space: Space, folder: SweepFolder, dataset: dict[str, str]
    ) -> None:
        self.job = job
        self.space = space
        self.folder = folder
        self.dataset = dataset
        self.seeds = job.search.seeds or space.seeds
        self.machine = platform.processor() or platform.machine()
        # Suggestions that failed before their trial could be noted.
        self.num_lost = 0

    def outcomes(self) -> list[Outcome]:
        """What every trial that was asked for, or begun, has come to."""
        known = {trial.name: trial for trial in self.folder.trials()}
        listed = {trial.name: trial for trial in self._listed()}
        for trial in known.values():
            # A point that was suggested wants all of its seeds, and may have begun one of them.
            for seed in self.seeds if trial.suggestion is not None else ():
                other = make_trial(trial.point, seed=seed, suggestion=trial.suggestion)
                listed.setdefault(other.name, other)
        # What a trial was suggested as is in its own note.
        return self.folder.outcomes(list((listed | known).values()), base=self.job.train)

    def _listed(self) -> list[Trial]:
        """Trials that are known beforehand."""
        search = self.job.search
        if search.strategy == "optuna":
            return []
        points = (
            grid_of(self.space, search)
            if search.strategy == "grid"
            else self.space.draw(search.num_samples, seed=search.search_seed)
        )
        trials = [make_trial(point, seed=seed) for point in points for seed in self.seeds]
        return list({trial.name: trial for trial in trials}.values())

    def run(self) -> None:
        """Train what is not trained yet."""
        outcomes = self.outcomes()
        again = [outcome for outcome in outcomes if self._is_tried_again(outcome)]
        for outcome in again:
            self.folder.reopen(outcome.trial)
        is_open = [o for o in outcomes if o.state in ("new", "begun")] + again
        done = len(outcomes) - len(is_open)
        left = 0
        if self.job.search.strategy == "optuna":
            points, _ = finished_suggestions(outcomes, num_seeds=len(self.seeds))
            begun = {o.trial.name.split("-")[0] for o in outcomes}
            left = max(0, self.job.search.num_samples - len(begun))
            done = len(points)
        logger.info(
            "%s to do, %d done before", plural(len(is_open) + left * len(self.seeds), "trial"), done
        )
        if not is_open and not left:
            return
        quiet_tune()
        if "RAY_ADDRESS" not in os.environ:
            # Nobody takes this machine away at short notice.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        logger.info("starting Ray, or connecting to it")
        start_ray(has_dashboard=True)
        setup, at_once = self._setup()
        if is_open:
            self._fit(
                setup,
                space={"trial": tune.grid_search([o.trial for o in is_open])},
                count=len(is_open),
                at_once=at_once,
            )
        if left:
            search = make_search(
                self.space,
                known=self.outcomes(),
                seeds=self.seeds,
                search_seed=self.job.search.search_seed,
            )
            self._fit(setup, space={}, count=left, at_once=at_once, search=search)

    def _is_tried_again(self, outcome: Outcome) -> bool:
        if outcome.state == "stopped":  # by a scheduler, which is no longer wanted
            return self.job.search.scheduler == "none"
        return outcome.state == "failed" and not outcome.is_lasting

    def _setup(self) -> tuple[Setup, int]:
        """What trials share, and how many run at a time."""
        trials = self.job.trials
        list_nodes: Any = ray.nodes
        nodes = [node["Resources"] for node in list_nodes() if node["Alive"]]
        most_gpus = max(node.get("GPU", 0.0) for node in nodes)
        most_cpus = max(node.get("CPU", 0.0) for node in nodes)
        is_cuda = self.job.engine.device != "cpu" and most_gpus > 0
        gpus = (1.0 if trials.gpus_per_worker is None else trials.gpus_per_worker) * is_cuda
        if (trials.gpus_per_worker or self.job.engine.device == "cuda") and not gpus:
            raise ClusterError("GPUs were asked for, and the cluster has none; use --device cpu")
        by_gpu = most_cpus / most_gpus * gpus if gpus else 2.0
        if 0 < gpus < 1 < trials.workers_per_trial:
            raise ClusterError(
                "workers of one trial cannot share a GPU: NCCL refuses it; take --gpus-per-worker "
                "1, or --workers-per-trial 1"
            )
        cpus = trials.cpus_per_worker or max(1.0, float(int(min(4.0, by_gpu, most_cpus))))
        fitting = sum(
            int(min(node.get("CPU", 0.0) / cpus, node.get("GPU", 0.0) / gpus if gpus else 1e9))
            for node in nodes
        )
        at_once = fitting // trials.workers_per_trial
        if at_once < 1:
            raise ClusterError(
                f"a trial's {trials.workers_per_trial} workers of {cpus:g} CPUs and {gpus:g} GPUs "
                f"do not fit the cluster, whose largest node has {most_cpus:g} CPUs and "
                f"{most_gpus:g} GPUs; lower --workers-per-trial, --cpus-per-worker or "
                "--gpus-per-worker"
            )
        counts = [sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")]
        self.machine = f"{plural(len(nodes), 'node')}, {counts[0]:g} CPUs, {counts[1]:g} GPUs"
        setup = Setup(
            space=self.space,
            base=self.job.train,
            output=self.folder.uri,
            seeds=self.seeds,
            engine=self.job.engine,
            dataset=self.dataset,
            num_workers=trials.workers_per_trial,
            cpus_per_worker=cpus,
            gpus_per_worker=gpus,
            max_failures=trials.max_failures,
        )
        return setup, min(at_once, trials.max_concurrent or at_once)

    def _scheduler(self) -> Any:
        search, train = self.job.search, self.job.train
        if search.scheduler == "none":
            return None
        from ray.tune.schedulers import ASHAScheduler

        every = train.validation.validate_every
        return ASHAScheduler(
            time_attr="step",
            max_t=train.steps,
            grace_period=min(train.steps, search.grace_steps or 2 * every),
            reduction_factor=search.reduction_factor,
        )

    def _fit(
        self, setup: Setup, *, space: dict[str, Any], count: int, at_once: int, search: Any = None
    ) -> None:
        """Let Tune run trials, and note those that failed for good."""
        own_files = tempfile.mkdtemp(prefix="carn-ray-sweep-")
        trainable = tune.with_resources(
            tune.with_parameters(run_trial, setup=setup), {"CPU": 0, "memory": TRIAL_MEMORY}
        )
        keep_credentials_out_of_runtime_environments()
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=search,
                scheduler=self._scheduler(),
                num_samples=count if search is not None else 1,
                max_concurrent_trials=at_once,
            ),
            run_config=tune.RunConfig(
                storage_path=own_files,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=setup.max_failures),
                callbacks=[Watch(setup, num_trials=count)],
            ),
        )
        try:
            results = call_in_thread(tuner.fit)
        finally:
            shutil.rmtree(own_files, ignore_errors=True)
        for result in results:
            if result.error is None:
                continue
            reason = failure_text(result.error)
            for trial in setup.trials_of(result.config or {}):
                outcome = self.folder.outcome(trial, steps=steps_of(trial, setup.base))
                if outcome.state == "begun" or (outcome.state == "new" and search is None):
                    self.folder.note_failure(trial, reason, is_lasting=False)
                elif outcome.state == "new":
                    self.num_lost += 1
                    logger.error("%s could not be tried: %s", label_of(trial.point), reason)


def _model(space: Space) -> Any:
    return space.settings.get("model", TrainConfig().network.model)


def _scale(space: Space) -> int:
    return int(space.settings.get("scale", TrainConfig().network.scale))


def parse(arguments: Sequence[str] | None = None) -> TuneJob:
    """The job that a command line asks for: options before the space before --recipe.

    Raises:
        ValueError: a setting is impossible.
        StorageError: the space cannot be read.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe", default="paper")
    early.add_argument("--space", default=None)
    known, _ = early.parse_known_args(arguments)
    start = TrainConfig()
    if known.space is not None:
        space = read_space(known.space)
        start = space.start(recipe(known.recipe, model=_model(space), scale=_scale(space)))
    return tyro.cli(
        TuneJob,
        default=dataclasses.replace(TuneJob(space=tyro.MISSING, dataset=tyro.MISSING), train=start),
        args=arguments,
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def cli() -> int:
    """Parse the command line, run, and turn expected errors into one line each."""
    try:
        with stopped_by_sigterm():
            return main(parse())
    except (CarnError, ValueError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tune: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(cli())
