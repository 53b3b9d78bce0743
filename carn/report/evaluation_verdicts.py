"""What there is to say of an evaluation before any table: who is better, and what weakens that."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from carn.report.evaluation_records import Comparison, EvaluationReport, ModelRow
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
        *judge_seeds(report.rows),
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
    if bicubic is not None and math.isfinite(bicubic.psnr_db):
        text += f", {format_signed(best.psnr_db - bicubic.psnr_db, 2)} dB over bicubic"
    second = next((row for row in ranked[1:] if row.key != "bicubic"), None)
    found = None if second is None else _find_comparison(report.comparisons, best, second)
    if second is None or found is None:
        return Notice("good", f"{text}.", "scores")
    return _judge_lead(f"{text}; {format_signed(found[0], 3)} dB over {second.title}", *found[1:])


def _judge_lead(text: str, low: float | None, high: float | None) -> Notice:
    if low is None or high is None:
        return Notice("note", f"{text}, with no interval to judge that by.", "differences")
    text += f" (95 % interval {format_signed(low, 3)} to {format_signed(high, 3)} dB)"
    if low > 0:
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
) -> tuple[float, float | None, float | None] | None:
    for found in comparisons:
        if found.scale == a.scale and (found.a, found.b) == (a.title, b.title):
            return found.difference_db, found.low_db, found.high_db
        if found.scale == a.scale and (found.b, found.a) == (a.title, b.title):
            low = None if found.high_db is None else -found.high_db
            high = None if found.low_db is None else -found.low_db
            return -found.difference_db, low, high
    return None


def judge_scores(rows: Sequence[ModelRow]) -> list[Notice]:
    """Models whose PSNR is no number, or infinite."""
    lost = [_name(row) for row in rows if not math.isfinite(row.psnr_db)]
    return [Notice("bad", f"PSNR is not a finite number: {_join(lost)}.", "scores")] if lost else []


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
        "known. Intervals are over tiles and leave that out."
    )
    return [Notice("bad", text, "scores")]


def judge_budget(rows: Sequence[ModelRow]) -> list[Notice]:
    """Trainings shorter than the paper's, of different lengths, or of lengths nobody knows."""
    trained = _trained(rows)
    notices = []
    known = [row for row in trained if row.steps is not None]
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
