"""A sweep on storage: its trials, each a training run of its own, and what they came to.

    sweep.json                  space, settings, dataset
    trials/<name>/trial.json    the point and the seed, written before the trial begins
    trials/<name>/...           the training run, as `train.py` keeps it
    trials/<name>/stopped.json  a scheduler has ended it early
    trials/<name>/failure.json  it cannot be trained, and why
    trials.parquet, results.csv, best.yaml (best-x2.yaml, ... where scale is searched),
    summary.json, report.html

Names of trials follow from what they are, so the same sweep begun again finds those that it has.
"""

import hashlib
import io
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from carn import storage
from carn.errors import CheckpointError, MissingObjectError, RunError
from carn.models.checkpoint import read_checkpoint
from carn.models.cost import count_flops, count_parameters
from carn.models.table import build_model
from carn.training.config import TrainConfig
from carn.training.recording import Row, read_metrics
from carn.tuning.space import Point, Space, label_of
from carn.version import code_version

logger = logging.getLogger(__name__)

SWEEP, TRIALS, TRIAL = "sweep.json", "trials", "trial.json"
STOPPED, FAILURE = "stopped.json", "failure.json"
TABLE, RESULTS, BEST = "trials.parquet", "results.csv", "best.yaml"
# Requests of one process at a time, where many small files are read.
NUM_THREADS = 16

State = Literal["new", "begun", "done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of a sweep.

    Attributes:
        name: of its folder: a hash of the point, and the seed.
        point: settings by name.
        seed: of the run.
        suggestion: what an adaptive search called the point in its own numbers; None otherwise.
    """

    name: str
    point: Point
    seed: int
    suggestion: Mapping[str, float | int | str | bool] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial has come to so far.

    Attributes:
        trial: which.
        state: new (nothing of it is kept), begun, done, stopped (early, by a scheduler), failed.
        step: updates done.
        psnr_db, ssim: the best validation's; None before the first.
        seconds: of training.
        reason: why it failed.
        is_lasting: it would fail again.
        rows: of its metrics.
    """

    trial: Trial
    state: State
    step: int = 0
    psnr_db: float | None = None
    ssim: float | None = None
    seconds: float = 0.0
    reason: str | None = None
    is_lasting: bool = False
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """A point over its seeds.

    Attributes:
        point: settings by name.
        state: done when every seed is; stopped, failed or begun when one of them is.
        seeds: that count: done, or where none is, stopped ones.
        psnr_db, ssim: means over these seeds; None where there is none.
        psnr_std, ssim_std: standard deviations (n - 1); None for one seed.
        seconds: mean over these seeds.
        num_params, flops: of the network; FLOPs for one 64 x 64 px LR image, as the paper's.
    """

    point: Point
    state: State
    seeds: tuple[int, ...]
    psnr_db: float | None
    psnr_std: float | None
    ssim: float | None
    ssim_std: float | None
    seconds: float
    num_params: int
    flops: int


def make_trial(point: Point, *, seed: int, suggestion: Mapping[str, Any] | None = None) -> Trial:
    """The trial of a point and a seed."""
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:10]
    return Trial(name=f"{digest}-seed{seed}", point=point, seed=seed, suggestion=suggestion)


@dataclass(frozen=True, kw_only=True)
class SweepFolder:
    """Where a sweep is kept."""

    uri: str

    def begin(self, space: Space, *, base: TrainConfig, dataset: Mapping[str, Any]) -> None:
        """Say what is swept here, or check that it is what has been all along.

        More seeds, points or values may be asked for than before; what all trials share may not
        change.

        Raises:
            RunError: the folder holds a sweep of other settings or on another dataset.
        """
        settings = base.to_dict()
        settings.pop("seed")
        for name in space.columns:  # what points say anyway
            for part in (settings, *(v for v in settings.values() if isinstance(v, dict))):
                part.pop(name, None)
        facts = {"settings": settings, "dataset_digest": dataset["digest"]}
        known = self.facts()
        if known is not None:
            changed = [name for name, value in facts.items() if known.get(name) != value]
            if changed:
                raise RunError(
                    f"{self.uri} holds a sweep with other {', '.join(sorted(changed))}; choose "
                    "another --output"
                )
            return
        content = {"code_version": code_version(), "space": space.name, "dataset": dict(dataset)}
        text = json.dumps(content | facts, indent=1, sort_keys=True) + "\n"
        storage.write_bytes(storage.join(self.uri, SWEEP), text.encode())

    def facts(self) -> dict[str, Any] | None:
        """What sweep.json says; None where no sweep has begun.

        Raises:
            RunError: it is something else's.
        """
        uri = storage.join(self.uri, SWEEP)
        try:
            content = json.loads(storage.read_bytes(uri))
        except MissingObjectError:
            return None
        except ValueError as error:
            raise RunError(f"{uri} is not of a sweep; choose another --output") from error
        if not isinstance(content, dict):
            raise RunError(f"{uri} is not of a sweep; choose another --output")
        return content

    def trial_uri(self, trial: Trial) -> str:
        """The folder of a trial's run."""
        return storage.join(self.uri, TRIALS, trial.name)

    def note_trial(self, trial: Trial) -> None:
        """Write down what a trial is, before it begins."""
        content = {"point": trial.point, "seed": trial.seed, "suggestion": trial.suggestion}
        self._write(trial, TRIAL, content)

    def note_stopped(self, trial: Trial, *, step: int) -> None:
        """A scheduler has ended a trial."""
        self._write(trial, STOPPED, {"step": step})

    def note_failure(self, trial: Trial, reason: str, *, is_lasting: bool) -> None:
        """A trial cannot be trained; what is not lasting is tried again by the next run."""
        self._write(trial, FAILURE, {"reason": reason, "is_lasting": is_lasting})

    def reopen(self, trial: Trial) -> None:
        """Let a trial that failed, or was ended early, go on."""
        storage.delete([storage.join(self.trial_uri(trial), name) for name in (FAILURE, STOPPED)])

    def _write(self, trial: Trial, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=1) + "\n"
        storage.write_bytes(storage.join(self.trial_uri(trial), name), text.encode())

    def trials(self) -> list[Trial]:
        """The trials that have been begun here, by name."""
        uris = [
            item.uri
            for item in storage.list_objects(storage.join(self.uri, TRIALS))
            if storage.name_of(item.uri) == TRIAL
        ]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            contents = list(pool.map(storage.read_bytes, uris))
        trials = []
        for content in map(json.loads, contents):
            trials.append(
                make_trial(content["point"], seed=content["seed"], suggestion=content["suggestion"])
            )
        return sorted(trials, key=lambda trial: trial.name)

    def outcome(self, trial: Trial, *, steps: int) -> Outcome:
        """What a trial has come to.

        Args:
            trial: which.
            steps: updates of a whole run.
        """
        uri = self.trial_uri(trial)
        names = {
            storage.name_of(item.uri)
            for item in storage.list_objects(uri)
            if item.uri.removeprefix(uri + "/").count("/") == 0
        }
        rows = tuple(read_metrics(uri))
        step, psnr_db, ssim = 0, None, None
        if "best.json" in names:
            try:
                last = read_checkpoint(storage.join(uri, "last.json"))
                step = last.step or 0
                psnr_db, ssim = last.metrics.get("best_psnr"), last.metrics.get("best_ssim")
            except (CheckpointError, MissingObjectError) as error:
                logger.warning("%s: %s", trial.name, error)
        known: dict[str, Any] = {"step": step, "psnr_db": psnr_db, "ssim": ssim, "rows": rows}
        known["seconds"] = rows[-1]["seconds"] if rows else 0.0
        if step >= steps:
            return Outcome(trial=trial, state="done", **known)
        if FAILURE in names:
            failure = json.loads(storage.read_bytes(storage.join(uri, FAILURE)))
            known |= {"reason": failure["reason"], "is_lasting": failure["is_lasting"]}
            return Outcome(trial=trial, state="failed", **known)
        if STOPPED in names:
            return Outcome(trial=trial, state="stopped", **known)
        return Outcome(trial=trial, state="begun" if TRIAL in names else "new", **known)

    def outcomes(self, trials: Sequence[Trial], *, base: TrainConfig) -> list[Outcome]:
        """What trials have come to, in their order."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return list(
                pool.map(lambda trial: self.outcome(trial, steps=steps_of(trial, base)), trials)
            )


def steps_of(trial: Trial, base: TrainConfig) -> int:
    """Updates of a trial's whole run: what all train for, unless just that is searched."""
    return int(trial.point.get("steps", base.steps))


def join_seeds(
    space: Space, outcomes: Sequence[Outcome], *, base: TrainConfig
) -> list[PointResult]:
    """Points over their seeds, in the order in which they first appear."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(label_of(outcome.trial.point), []).append(outcome)
    return [_joined(space, group, base=base) for group in groups.values()]


def _joined(space: Space, group: Sequence[Outcome], *, base: TrainConfig) -> PointResult:
    states = {outcome.state for outcome in group}
    order: tuple[State, ...] = ("failed", "begun", "new", "stopped", "done")
    state = next(item for item in order if item in states)
    counted = [outcome for outcome in group if outcome.state == "done"]
    counted = counted or [outcome for outcome in group if outcome.state == "stopped"]
    psnrs = [outcome.psnr_db for outcome in counted if outcome.psnr_db is not None]
    ssims = [outcome.ssim for outcome in counted if outcome.ssim is not None]
    num_params, flops = network_cost(space.config(group[0].trial.point, base=base, seed=0))
    return PointResult(
        point=group[0].trial.point,
        state=state,
        seeds=tuple(outcome.trial.seed for outcome in counted),
        psnr_db=statistics.fmean(psnrs) if psnrs else None,
        psnr_std=_deviation(psnrs),
        ssim=statistics.fmean(ssims) if ssims else None,
        ssim_std=_deviation(ssims),
        seconds=statistics.fmean(o.seconds for o in counted) if counted else 0.0,
        num_params=num_params,
        flops=flops,
    )


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)


def network_cost(config: TrainConfig) -> tuple[int, int]:
    """Trainable parameters, and FLOPs for one 64 x 64 px LR image, of a run's network."""
    network = config.network
    model = build_model(
        network.model, scale=network.scale, config=network.model_config((0.5, 0.5, 0.5))
    )
    return count_parameters(model), count_flops(model)


def best_by_scale(results: Sequence[PointResult]) -> dict[int | None, PointResult]:
    """The best point of each scale, in order; under None where scale is not searched.

    An x2 network always has a higher PSNR than an x4 one, which says nothing of their settings.
    """
    scales = {result.point.get("scale") for result in results}
    best = {
        None if scale is None else int(scale): best_of(
            [result for result in results if result.point.get("scale") == scale]
        )
        for scale in sorted(scales, key=lambda scale: scale or 0)
    }
    return {scale: result for scale, result in best.items() if result is not None}


def best_name(scale: int | None) -> str:
    """The file of the best settings, or of those of a scale."""
    return BEST if scale is None else f"best-x{scale}.yaml"


def best_of(results: Sequence[PointResult]) -> PointResult | None:
    """The point of the highest mean PSNR: among those with every seed done, else among all."""
    known = [result for result in results if result.psnr_db is not None]
    whole = [result for result in known if result.state == "done"]
    return max(whole or known, key=lambda result: result.psnr_db or 0.0, default=None)


def trials_table(outcomes: Sequence[Outcome], columns: Sequence[str]) -> pa.Table:
    """A row for each trial: name, seed, the searched settings, state, numbers, reason."""
    rows = []
    for outcome in outcomes:
        trial = outcome.trial
        rows.append(
            {"trial": trial.name, "seed": trial.seed}
            | {name: trial.point.get(name) for name in columns}
            | {"state": outcome.state, "step": outcome.step, "psnr_db": outcome.psnr_db}
            | {"ssim": outcome.ssim, "seconds": outcome.seconds, "reason": outcome.reason}
        )
    return pa.Table.from_pylist(rows)


def results_table(results: Sequence[PointResult], columns: Sequence[str]) -> pa.Table:
    """A row for each point, the best first."""
    ranked = sorted(results, key=lambda r: -math.inf if r.psnr_db is None else -r.psnr_db)
    ranked.sort(key=lambda result: result.psnr_db is None)
    return pa.Table.from_pylist(
        [
            {name: result.point.get(name) for name in columns}
            | {"state": result.state, "num_seeds": len(result.seeds)}
            | {"psnr_db": result.psnr_db, "psnr_std": result.psnr_std}
            | {"ssim": result.ssim, "ssim_std": result.ssim_std, "seconds": result.seconds}
            | {"num_params": result.num_params, "flops": result.flops}
            for result in ranked
        ]
    )


def best_yaml(space: Space, best: PointResult, *, base: TrainConfig) -> str:
    """The best point as the settings of a training run, for `train.py --config`."""
    config = space.config(best.point, base=base, seed=0).to_dict()
    config.pop("seed")
    head = f"# The best of the sweep {space.name}: {label_of(best.point)}\n"
    return f"{head}{yaml.safe_dump(config, sort_keys=False)}"


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def csv_bytes(table: pa.Table) -> bytes:
    """A table as a CSV file."""
    from pyarrow import csv

    sink = io.BytesIO()
    csv.write_csv(table, sink)
    return sink.getvalue()
