"""What a sweep came to: its tables, its best settings and its page, written beside its trials."""

import json
import math
from collections.abc import Sequence

import numpy as np

from carn import storage
from carn.errors import RunError
from carn.metrics import convention
from carn.report import sweep_report
from carn.report.plots import Curve
from carn.report.sweep_report import Failure, PaperPoint, Point, SweepReport
from carn.report.sweep_report import State as PointState
from carn.training.config import TrainConfig
from carn.tuning.space import Space, label_of
from carn.tuning.sweep import (
    RESULTS,
    TABLE,
    Outcome,
    PointResult,
    SweepFolder,
    best_by_scale,
    best_name,
    best_yaml,
    csv_bytes,
    join_seeds,
    parquet_bytes,
    results_table,
    trials_table,
)
from carn.version import code_version

# More curves than this cannot be told apart.
MAX_CURVES = 8
_STATES: dict[str, PointState] = {"done": "done", "stopped": "done", "failed": "failed"}


def write_sweep(
    uri: str,
    space: Space,
    outcomes: Sequence[Outcome],
    *,
    base: TrainConfig,
    seconds: float,
    machine: str,
) -> str:
    """Write the tables, the best settings and the page of a sweep, and say what it came to.

    Args:
        uri: the sweep's folder or prefix.
        space: what was searched.
        outcomes: of all its trials.
        base: what they share.
        seconds: that this run of the job took.
        machine: it ran on, in words.

    Returns:
        Lines to print.

    Raises:
        StorageError: they cannot be written.
    """
    results = join_seeds(space, outcomes, base=base)
    best = best_by_scale(results)
    names = (TABLE, RESULTS, "summary.json", "report.html")
    table_uri, results_uri, summary_uri, page_uri = (storage.join(uri, name) for name in names)
    storage.write_bytes(table_uri, parquet_bytes(trials_table(outcomes, space.columns)))
    storage.write_bytes(results_uri, csv_bytes(results_table(results, space.columns)))
    for scale, result in best.items():
        text = best_yaml(space, result, base=base)
        storage.write_bytes(storage.join(uri, best_name(scale)), text.encode())
    report = make_report(
        space, outcomes, results, facts=_facts(uri), base=base, seconds=seconds, machine=machine
    )
    storage.write_bytes(page_uri, sweep_report.render(report).encode())
    counts = {
        state: sum(outcome.state == state for outcome in outcomes)
        for state in ("done", "stopped", "failed", "begun", "new")
    }
    summary = {
        "space": space.name,
        "code_version": code_version(),
        "seconds": seconds,
        "machine": machine,
        "trials": counts,
        "best": [
            {"point": result.point, "psnr_db": result.psnr_db, "file": best_name(scale)}
            for scale, result in best.items()
        ],
    }
    storage.write_bytes(summary_uri, (json.dumps(summary, indent=1) + "\n").encode())
    return _said(uri, counts, best, outcomes, page_uri=page_uri)


def _facts(uri: str) -> dict[str, str]:
    facts = SweepFolder(uri=uri).facts()
    if facts is None:
        raise RunError(f"{uri} holds no sweep")
    return {"dataset": facts["dataset"]["uri"], "code_version": facts["code_version"]}


def _said(
    uri: str,
    counts: dict[str, int],
    best: dict[int | None, PointResult],
    outcomes: Sequence[Outcome],
    *,
    page_uri: str,
) -> str:
    left = counts["begun"] + counts["new"]
    lines = [
        f"{counts['done']} trials done, {counts['stopped']} stopped early, "
        f"{counts['failed']} failed" + (f", {left} left" if left else "")
    ]
    for scale, result in best.items():
        spread = "" if result.psnr_std is None else f" +- {result.psnr_std:.3f}"
        lines += [
            f"  best     {label_of(result.point)}: {result.psnr_db:.3f}{spread} dB",
            f"           jobs/train.py --config {storage.join(uri, best_name(scale))}",
        ]
    lines += [f"  report   {page_uri}"]
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    lines += [
        f"  failed   {label_of(o.trial.point)}, seed {o.trial.seed}: {o.reason}" for o in failed[:5]
    ]
    return "\n".join(lines)


def make_report(
    space: Space,
    outcomes: Sequence[Outcome],
    results: Sequence[PointResult],
    *,
    facts: dict[str, str],
    base: TrainConfig,
    seconds: float,
    machine: str,
) -> SweepReport:
    """The page's content; arguments as `write_sweep`, with what each point came to."""
    best = best_by_scale(results).get(None)
    return SweepReport(
        title=space.title,
        space_name=space.name,
        question=space.question,
        dataset_uri=facts["dataset"],
        code_version=facts["code_version"],
        seconds=seconds,
        machine=machine,
        metric_name="validation PSNR, dB",
        columns=space.columns,
        points=tuple(_point(result) for result in results),
        failures=tuple(
            Failure(
                trial=outcome.trial.name,
                values=outcome.trial.point,
                seed=outcome.trial.seed,
                reason=outcome.reason or "",
            )
            for outcome in outcomes
            if outcome.state == "failed"
        ),
        best=None if best is None else list(results).index(best),
        figure=space.figure.kind,
        x=space.figure.x,
        group=space.figure.group,
        paper=tuple(
            PaperPoint(
                values={name: value for name, value in point.items() if name != "psnr_db"},
                psnr_db=float(point["psnr_db"]),
            )
            for point in space.published
        ),
        curves=_curves(outcomes),
        notes=_notes(space, base),
    )


def _notes(space: Space, base: TrainConfig) -> tuple[str, ...]:
    columns = space.columns
    steps = "as many updates as it says" if "steps" in columns else f"{base.steps:,} updates"
    batch_size = base.patches.batch_size
    batch = "" if "batch_size" in columns else f" of {batch_size} patches"
    crop = base.validation.validation_crop_px
    part = "whole tiles" if crop is None else f"the middle {crop} px of each tile"
    return (
        f"Each trial trains for {steps}{batch}; the paper's train for 300,000. The order of points "
        "may change with the budget.",
        f"Scores are the best validation's, on {part} of the validation split, which no trial "
        f"trains on. {convention()} The winner was chosen by them, so its own score flatters it: "
        "evaluate it on the test split.",
    )


def _point(result: PointResult) -> Point:
    return Point(
        values=result.point,
        psnr_db=math.nan if result.psnr_db is None else result.psnr_db,
        psnr_std=result.psnr_std,
        ssim=math.nan if result.ssim is None else result.ssim,
        ssim_std=result.ssim_std,
        num_seeds=len(result.seeds),
        seeds=result.seeds,
        seconds=result.seconds,
        params=result.num_params,
        flops=result.flops,
        stopped_early=result.state == "stopped",
        state=_STATES.get(result.state, "running"),
    )


def _curves(outcomes: Sequence[Outcome]) -> tuple[Curve, ...]:
    """Validation PSNR over updates, a point's seeds averaged; none where there are too many."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(label_of(outcome.trial.point), []).append(outcome)
    if len(groups) > MAX_CURVES:
        return ()
    curves = []
    for label, group in groups.items():
        by_step: dict[int, list[float]] = {}
        for outcome in group:
            for row in outcome.rows:
                if "validation_psnr" in row:
                    by_step.setdefault(int(row["step"]), []).append(row["validation_psnr"])
        # Where a seed is missing the mean would jump.
        steps = sorted(step for step, values in by_step.items() if len(values) == len(group))
        if steps:
            means = [float(np.mean(by_step[step])) for step in steps]
            curves.append(Curve(label=label, steps=np.array(steps), values=np.array(means)))
    return tuple(curves)
