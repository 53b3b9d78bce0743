"""What there is to say of an evaluation before any table: who is better, and what weakens that."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from carn.evaluation.statistics import FEW_SLIDES
from carn.report.evaluation_records import (
    ALPHA,
    Comparison,
    ConditionRow,
    EvaluationReport,
    ModelRow,
)
from carn.report.page import format_count
from carn.report.train_report import format_fixed, format_signed

Kind = Literal["good", "bad", "note"]

# Source: 300 epochs of 1000 updates, https://doi.org/10.7717/peerj-cs.1196
PAPER_UPDATES = 300_000
MAX_NAMED = 6


class Notice(NamedTuple):
    """One line at the top of the page; `anchor` is the section that explains it."""

    kind: Kind
    text: str
    anchor: str = ""


def _join(names: Iterable[str]) -> str:
    known = list(dict.fromkeys(names))
    more = f" and {len(known) - MAX_NAMED} more" if len(known) > MAX_NAMED else ""
    return ", ".join(known[:MAX_NAMED]) + more


def _name(row: ModelRow) -> str:
    return f"{row.title} ×{row.scale}"


def find_notices(report: EvaluationReport) -> list[Notice]:
    """The verdict of each scale, then what weakens it, then what the caller has to say."""
    scales = sorted({row.scale for row in report.rows})
    verdicts = [judge_scale(report, scale=scale) for scale in scales]
    if not verdicts:
        verdicts = [Notice("bad", "No model was scored.")]
    return [
        *verdicts,
        *judge_scores(report.rows),
        *(judge_conditions(report.condition_rows) if len(report.conditions) > 1 else ()),
        *judge_slides(report),
        *judge_seeds(report.rows),
        *judge_left_out(report.left_out),
        *judge_budget(report.rows),
        *judge_data(report.rows),
        *(Notice("note", note) for note in report.notes),
    ]


def judge_scale(report: EvaluationReport, *, scale: int) -> Notice:
    """Which model scores highest at a scale, and by how much; not those scored on other tiles."""
    rows = [row for row in report.rows if row.scale == scale and row.variant != "*"]
    ranked = sorted(
        (row for row in rows if math.isfinite(row.psnr_db)), key=lambda row: -row.psnr_db
    )
    if not ranked:
        return Notice("bad", f"×{scale}: no model has a finite PSNR.", "scores")
    best = ranked[0]
    text = f"×{scale}: {best.title} scores highest, {format_fixed(best.psnr_db, 2)} dB"
    if best.key == "bicubic":
        if len(ranked) == 1:
            return Notice("note", f"×{scale}: only bicubic upscaling was scored.", "scores")
        return Notice("bad", f"{text}: no model is better than bicubic upscaling.", "scores")
    bicubic = find_bicubic(rows, best)
    second = next((row for row in ranked[1:] if row.key != "bicubic"), bicubic)
    if bicubic is not None and bicubic is not second and math.isfinite(bicubic.psnr_db):
        text += f", {format_signed(best.psnr_db - bicubic.psnr_db, 2)} dB over bicubic"
    if second is None:
        return Notice("note", f"{text}, and there is nothing to hold it against.", "scores")
    found = _find_comparison(report.comparisons, best, second)
    if found is None:
        return Notice("note", f"{text}. It was not compared with {second.title}.", "scores")
    return _judge_lead(text, found, best=best, second=second)


def _judge_lead(text: str, found: Comparison, *, best: ModelRow, second: ModelRow) -> Notice:
    """Whether the best is more than by chance better than what comes next."""
    sign = 1 if found.a == best.title else -1
    difference = sign * found.difference_db
    text += f"; {format_signed(difference, 3)} dB over {second.title}"
    if found.low_db is None or found.high_db is None:
        return Notice("note", f"{text}, with no interval to judge that by.", "differences")
    low, high = sorted((sign * found.low_db, sign * found.high_db))
    text += f" (95 % interval {format_signed(low, 3)} to {format_signed(high, 3)} dB"
    text += ")" if found.p_holm is None else f", corrected p {found.p_holm:.2g})"
    if found.unit == "tile":
        text += " on the tiles of one slide, which say nothing of other slides."
        return Notice("note", text, "differences")
    if found.is_clear and difference > 0:
        return Notice("good", f"{text}.", "differences")
    return Notice("note", f"{text}: too little to call it better.", "differences")


def find_bicubic(rows: Sequence[ModelRow], row: ModelRow) -> ModelRow | None:
    is_star = row.variant == "*"
    candidates = [
        other
        for other in rows
        if other.key == "bicubic" and other.scale == row.scale and (other.variant == "*") == is_star
    ]
    return candidates[0] if candidates else None


def _find_comparison(
    comparisons: Sequence[Comparison], a: ModelRow, b: ModelRow
) -> Comparison | None:
    """The comparison of two models, whichever of them it names first."""
    wanted = {a.title, b.title}
    here = (found for found in comparisons if found.scale == a.scale)
    return next((found for found in here if {found.a, found.b} == wanted), None)


def judge_scores(rows: Sequence[ModelRow]) -> list[Notice]:
    """Models whose PSNR is no number, or infinite."""
    lost = [_name(row) for row in rows if not math.isfinite(row.psnr_db)]
    return [Notice("bad", f"PSNR is not a finite number: {_join(lost)}.", "scores")] if lost else []


def judge_conditions(rows: Sequence[ConditionRow]) -> list[Notice]:
    """Name the models that are worse than bicubic interpolation under a condition."""
    worse: dict[str, list[str]] = {}
    for row in rows:
        if row.gain_db is not None and row.gain_db < 0:
            words = f"{row.condition} ({format_signed(row.gain_db, 2)} dB)"
            worse.setdefault(f"{row.model} ×{row.scale}", []).append(words)
    if not worse:
        return []
    who = "; ".join(f"{model} under {_join(words)}" for model, words in worse.items())
    text = f"Worse than bicubic interpolation of the same LR: {who}."
    return [Notice("bad", text, "conditions")]


def judge_slides(report: EvaluationReport) -> list[Notice]:
    """Slides so few that intervals and tests say little, or nothing, of other slides."""
    num = report.num_slides
    if not report.rows or num >= FEW_SLIDES:
        return []
    if num == 1:
        text = (
            "All tiles are of one slide. Intervals and p are over its tiles, which are alike: they "
            "say nothing of other slides, and no difference is taken for more than chance."
        )
        return [Notice("bad", text, "differences")]
    text = f"The tiles are of {num} slides only: intervals over so few are too narrow."
    # The least p of a signed-rank test: all slides have the same sign, which 2 of 2^n cases have.
    num_pairs = max(
        (sum(c.scale == found.scale for c in report.comparisons) for found in report.comparisons),
        default=0,
    )
    if num_pairs and num_pairs * 2.0 ** (1 - num) >= ALPHA:
        count = "one comparison" if num_pairs == 1 else f"{num_pairs} comparisons"
        text += (
            f" Corrected for {count}, p cannot fall below {ALPHA:g} with so few, whatever the "
            "difference: score more slides."
        )
    return [Notice("bad", text, "differences")]


def judge_left_out(left_out: Sequence[str]) -> list[Notice]:
    """Runs that are in no row, since they are not finished."""
    if not left_out:
        return []
    text = (
        f"Left out, since their training is not finished: {_join(left_out)}. Name such a run "
        "itself to have it scored as it is."
    )
    return [Notice("bad", text, "scores")]


def _trained(rows: Sequence[ModelRow]) -> list[ModelRow]:
    return [row for row in rows if row.key != "bicubic"]


def judge_seeds(rows: Sequence[ModelRow]) -> list[Notice]:
    """Models of one training: how far chance alone would move their score is not known."""
    single = [_name(row) for row in _trained(rows) if row.num_seeds < 2]
    if not single:
        return []
    who = "Every model" if len(single) == len(_trained(rows)) else _join(single)
    text = (
        f"{who}: one seed only, so how much a score moves from one training to the next is not "
        "known. Intervals are over slides and leave that out."
    )
    return [Notice("bad", text, "scores")]


def judge_budget(rows: Sequence[ModelRow]) -> list[Notice]:
    """Trainings shorter than the paper's, of different lengths, or of lengths nobody knows."""
    trained = _trained(rows)
    notices = []
    known = [row for row in trained if row.steps is not None]
    unfinished = [
        f"{_name(row)} ({row.steps:,} of {row.planned_steps:,})"
        for row in known
        if row.steps is not None and row.planned_steps is not None and row.steps < row.planned_steps
    ]
    if unfinished:
        text = f"Scored before its updates were all done: {_join(unfinished)}."
        notices.append(Notice("bad", text, "scores"))
    short = {row: row.steps for row in known if row.steps is not None and row.steps < PAPER_UPDATES}
    if short:
        low, high = min(short.values()), max(short.values())
        updates = format_count(low) if low == high else f"{format_count(low)} to {high:,}"
        who = "Every model" if len(short) == len(trained) else _join(map(_name, short))
        text = (
            f"{who}: trained for {updates} updates, the paper's for {PAPER_UPDATES:,}. A distance "
            "to the paper's scores may be that of the budget."
        )
        notices.append(Notice("bad", text, "scores"))
    uneven = [
        f"×{scale}"
        for scale in sorted({row.scale for row in known})
        if len({row.steps for row in known if row.scale == scale}) > 1
    ]
    if uneven:
        text = (
            f"At {_join(uneven)} models were trained for different numbers of updates: their "
            "order may be that of the budgets."
        )
        notices.append(Notice("bad", text, "scores"))
    if unknown := [_name(row) for row in trained if row.steps is None]:
        text = f"How many updates it was trained for is not known: {_join(unknown)}."
        notices.append(Notice("note", text, "scores"))
    return notices


def judge_data(rows: Sequence[ModelRow]) -> list[Notice]:
    """Models of one scale that learnt from different datasets."""
    mixed = [
        f"×{scale}"
        for scale in sorted({row.scale for row in rows})
        if len({row.trained_on for row in _trained(rows) if row.scale == scale}) > 1
    ]
    if not mixed:
        return []
    text = f"At {_join(mixed)} models were trained on different datasets."
    return [Notice("bad", text, "scores")]
