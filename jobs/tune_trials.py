"""What a trial of `jobs/tune.py` runs, and who suggests which; the runs are those of train.py."""

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.train import ScalingConfig, TrainingFailedError
from ray.tune.integration.ray_train import TuneReportCallback

from carn.errors import DivergedError
from carn.report.page import plural
from carn.training.config import TrainConfig
from carn.training.engine import EngineConfig
from carn.training.run_folder import RunFolder
from carn.tuning.space import Choices, Interval, Space, label_of
from carn.tuning.sweep import Outcome, SweepFolder, Trial, make_trial, steps_of
from jobs.monitor import Monitor
from jobs.ray_stage import duration
from jobs.train_worker import WorkerTask, make_trainer
from jobs.trainer import failure_text

logger = logging.getLogger("tune")

METRIC = "validation_psnr"
# What a search that wants a number is told of a trial that could not be trained, dB.
FAILED_PSNR_DB = 0.0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all trials of a sweep share.

    Attributes:
        space, base, output: of the sweep.
        seeds: that a suggested point is trained with.
        engine: how each run is run.
        dataset: URI and digest.
        num_workers, cpus_per_worker, gpus_per_worker: of each trial.
        max_failures: times that lost workers of a trial are replaced.
    """

    space: Space
    base: TrainConfig
    output: str
    seeds: tuple[int, ...]
    engine: EngineConfig
    dataset: Mapping[str, str]
    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    max_failures: int

    @property
    def folder(self) -> SweepFolder:
        """Where the sweep is kept."""
        return SweepFolder(uri=self.output)

    def trials_of(self, settings: Mapping[str, Any]) -> list[Trial]:
        """The trials that Tune means by what it gives: a listed one, or a suggestion."""
        if "trial" in settings:
            listed: Trial = settings["trial"]
            return [listed]
        point = self.space.point_of(settings)
        return [make_trial(point, seed=seed, suggestion=dict(settings)) for seed in self.seeds]


def run_trial(settings: dict[str, Any], *, setup: Setup) -> None:
    """Train what Tune asks for; a suggestion with one seed after another, and report their mean.

    What could not be trained is noted and is no error: Ray Train has tried it again already, and
    Tune would so many times more. Tune's own attempts are for trials whose process is lost.
    """
    trials = setup.trials_of(settings)
    found = []
    for trial in trials:
        psnr_db = train_trial(trial, setup=setup, is_heard=len(trials) == 1)
        found.append(FAILED_PSNR_DB if psnr_db is None else psnr_db)
    tune.report({METRIC: sum(found) / len(found), "step": steps_of(trials[0], setup.base)})


def train_trial(trial: Trial, *, setup: Setup, is_heard: bool) -> float | None:
    """Train one run, taking up what there is of it; its best validation PSNR in dB.

    Args:
        trial: which.
        setup: of the sweep.
        is_heard: tell Tune of its validations, so that a scheduler can end it.

    Returns:
        The PSNR; None where it cannot be trained, which is noted in its folder.
    """
    folder = setup.folder
    config = setup.space.config(trial.point, base=setup.base, seed=trial.seed)
    folder.note_trial(trial)
    uri = folder.trial_uri(trial)
    RunFolder(uri=uri, keep_checkpoints=setup.engine.keep_checkpoints).begin(
        config, dataset=setup.dataset, overwrite=False
    )
    known = folder.outcome(trial, steps=config.steps)
    if known.state == "done":
        return known.psnr_db
    monitor: Any = ray.remote(Monitor).options(num_cpus=0, max_restarts=3).remote()
    task = WorkerTask(
        config=config,
        engine=engine_of_trials(setup.engine, config),
        dataset_uri=setup.dataset["uri"],
        output=uri,
        monitor=monitor,
    )
    own_files = tempfile.mkdtemp(prefix="carn-ray-tune-")
    make_callback: Any = TuneReportCallback
    resources = {"CPU": setup.cpus_per_worker}
    if setup.gpus_per_worker:
        resources["GPU"] = setup.gpus_per_worker
    trainer = make_trainer(
        task,
        scaling=ScalingConfig(
            num_workers=setup.num_workers,
            use_gpu=setup.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        max_failures=setup.max_failures,
        own_files=own_files,
        callbacks=[make_callback()] if is_heard else [],
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        if not _note_fatal(folder, trial, monitor):
            folder.note_failure(trial, failure_text(error), is_lasting=False)
        return None
    finally:
        shutil.rmtree(own_files, ignore_errors=True)
    if _note_fatal(folder, trial, monitor):
        return None
    return folder.outcome(trial, steps=config.steps).psnr_db


def _note_fatal(folder: SweepFolder, trial: Trial, monitor: Any) -> bool:
    """Note what ended a run, as its workers told; whether anything did.

    A run that diverged would do so again. What a machine or its storage lacked (room in the cache,
    a GPU, a right) somebody may have seen to when the sweep is started the next time.
    """
    fatal: Exception | None = ray.get(monitor.fatal.remote())
    if fatal is not None:
        folder.note_failure(trial, str(fatal), is_lasting=isinstance(fatal, DivergedError))
    return fatal is not None


def make_search(
    space: Space, *, known: Sequence[Outcome], seeds: Sequence[int], search_seed: int
) -> Any:
    """Optuna's search (TPE) over a space, told of the points that are finished.

    Args:
        space: what is searched.
        known: finished trials of earlier runs of this sweep.
        seeds: that a point is trained with.
        search_seed: of the search itself.
    """
    from optuna import distributions
    from ray.tune.search.optuna import OptunaSearch

    def distribution(axis: Any) -> Any:
        if isinstance(axis, Choices):
            return distributions.CategoricalDistribution(list(axis.values))
        assert isinstance(axis, Interval)
        if axis.is_whole:
            return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.is_log)
        return distributions.FloatDistribution(axis.low, axis.high, log=axis.is_log)

    points, rewards = finished_suggestions(known, num_seeds=len(seeds))
    return OptunaSearch(
        {name: distribution(axis) for name, axis in space.shares.items()},
        metric=METRIC,
        mode="max",
        # Another seed for each continuation: the same one would suggest the first points again.
        seed=search_seed + len(points),
        points_to_evaluate=points or None,
        evaluated_rewards=rewards or None,
    )


def finished_suggestions(
    known: Sequence[Outcome], *, num_seeds: int
) -> tuple[list[dict[str, Any]], list[float]]:
    """Suggestions whose every seed has ended, and the mean PSNR of each."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in known:
        if outcome.trial.suggestion is not None and outcome.state in ("done", "failed"):
            groups.setdefault(label_of(outcome.trial.point), []).append(outcome)
    points, rewards = [], []
    for group in groups.values():
        if len(group) >= num_seeds:
            points.append(dict(group[0].trial.suggestion or {}))
            values = [o.psnr_db if o.psnr_db is not None else FAILED_PSNR_DB for o in group]
            rewards.append(sum(values) / len(values))
    return points, rewards


class Watch(tune.Callback):
    """Says how a sweep goes on, and notes which trials a scheduler has ended."""

    def __init__(self, setup: Setup, *, num_trials: int) -> None:
        self._setup = setup
        self._num_trials = num_trials
        self._num_ended = 0
        self._best: tuple[float, str] | None = None
        self._said: dict[str, Any] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process begins."""
        logger.info("begins: %s", self._name(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has been validated."""
        # A trial's last word repeats what was said when it was validated.
        if METRIC in result and self._said.get(trial.trial_id) != result.get("step"):
            self._said[trial.trial_id] = result.get("step")
            logger.info(
                "%s: step %s, %.3f dB", self._name(trial), result.get("step"), result[METRIC]
            )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, by itself or by its scheduler."""
        result = trial.last_result or {}
        step, psnr_db = int(result.get("step", 0)), result.get(METRIC)
        parts = self._setup.trials_of(trial.config)
        is_early = step < steps_of(parts[0], self._setup.base)
        if is_early:
            for part in parts:
                self._setup.folder.note_stopped(part, step=step)
        if psnr_db is not None and (self._best is None or psnr_db > self._best[0]):
            self._best = psnr_db, self._name(trial)
        self._ended(trial, f"stopped early at step {step}" if is_early else "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed for good."""
        self._ended(trial, "failed")

    def _ended(self, trial: Any, how: str) -> None:
        self._num_ended += 1
        best = (
            "" if self._best is None else f"; best so far {self._best[0]:.3f} dB: {self._best[1]}"
        )
        seconds = float((trial.last_result or {}).get("time_total_s", 0.0))
        logger.info(
            "ends after %s: %s%s (%d of %s)%s",
            duration(seconds),
            self._name(trial),
            f", {how}" if how else "",
            self._num_ended,
            plural(self._num_trials, "trial"),
            best,
        )

    def _name(self, trial: Any) -> str:
        parts = self._setup.trials_of(trial.config)
        seeds = ", ".join(str(part.seed) for part in parts)
        return f"{label_of(parts[0].point)}, seed {seeds}"


def engine_of_trials(engine: EngineConfig, config: TrainConfig) -> EngineConfig:
    """The engine of a trial's run: a checkpoint at every validation and at no other time.

    A scheduler hears of a run when it has written a checkpoint, and wants a score then.
    """
    return dataclasses.replace(
        engine,
        overwrite=False,
        checkpoint_every=config.validation.validate_every,
        keep_checkpoints=1,
    )


def quiet_tune() -> None:
    """Tune's tables and logs of its own would bury the sweep's in the job's log."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
