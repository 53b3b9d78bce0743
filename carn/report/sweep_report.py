"""The page a person opens during or after a sweep: which settings are best, and is it so.

One HTML file that needs nothing else: no network, no script, pictures within. Names come from files
and are escaped. The same report gives the same bytes.
"""

import math
import shlex
from collections.abc import Mapping
from typing import NamedTuple

from carn.report.evaluation_report import format_power, format_with_spread
from carn.report.evaluation_verdicts import Notice
from carn.report.page import format_count, plural, render_page
from carn.report.plots import Curve
from carn.report.sr_report import format_duration
from carn.report.sweep_figures import (
    RAMP,
    SCALE,
    draw_costs,
    draw_curves,
    draw_figure,
    is_scored,
    ringed,
    score_of,
    weights_of,
)
from carn.report.sweep_plots import format_value, list_groups
from carn.report.sweep_records import (
    Failure,
    FigureKind,
    PaperPoint,
    Point,
    State,
    SweepReport,
    Value,
)
from carn.report.train_report import format_fixed, format_signed

__all__ = [
    "Curve",
    "Failure",
    "FigureKind",
    "PaperPoint",
    "Point",
    "State",
    "SweepReport",
    "Value",
    "render",
]

# What one and the same configuration differs by in the paper, dB. Source: Tables 2, 3 and 4,
# https://doi.org/10.7717/peerj-cs.1196
PAPER_SPREAD_DB = 0.03
MAX_ROWS = 400
MAX_PRINTED_ROWS = 60


class Contest(NamedTuple):
    """The points that are held against each other: all of one scale.

    Attributes:
        scale: that of the points; None where the sweep is of one scale only.
        ranked: done, not stopped early and scored, best first.
    """

    scale: Value | None
    ranked: list[Point]


class Row(NamedTuple):
    """A row of the table of points; `remark` says why a score is not like the others."""

    point: Point
    is_best: bool
    behind_db: float | None
    remark: str


def render(report: SweepReport) -> str:
    """The page, a complete HTML document in UTF-8.

    Raises:
        ValueError: `best` is no place in `points`, or "ternary" has not three columns, or "lines"
            has no `x` among the columns.
    """
    _check(report)
    rows = list_rows(report)
    return render_page(
        "sweep.html",
        report=report,
        notices=find_notices(report),
        facts=_list_facts(report),
        winner=None if report.best is None else report.points[report.best],
        contests=[contest for contest in list_contests(report) if contest.ranked],
        is_ringed=ringed(report) is not None,
        command=write_command(report),
        figure=draw_figure(report),
        costs=draw_costs(report),
        rows=rows[:MAX_ROWS],
        num_rows=len(rows),
        num_printed=MAX_PRINTED_ROWS,
        curves=draw_curves(report),
        ramp_css=", ".join(RAMP),
        label=label_of,
        setting=format_value,
        fixed=format_fixed,
        signed=format_signed,
        power=format_power,
        duration=format_duration,
        with_spread=format_with_spread,
    )


def _check(report: SweepReport) -> None:
    if report.best is not None and not 0 <= report.best < len(report.points):
        raise ValueError(
            f"best={report.best} is no place in points, of which there are {len(report.points)}"
        )
    if report.figure == "ternary" and len(weights_of(report)) != 3:
        raise ValueError(
            f"figure='ternary' takes three columns of weights, not {', '.join(report.columns)}; "
            "choose 'parallel'"
        )
    if report.figure == "lines" and report.x not in report.columns:
        raise ValueError(
            f"figure='lines' with x={report.x!r}, which is not one of {', '.join(report.columns)}"
        )


# ------------------------------------------------------------------------------------------ words


def label_of(values: Mapping[str, Value]) -> str:
    """Settings in one line: `num_blocks 8, reduction 4`."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in values.items()) or "–"


def write_command(report: SweepReport) -> str | None:
    """The command that trains with the winner's settings; None where there is no winner.

    They are read from the file that a sweep writes beside its page, for it holds what all trials
    share as well.
    """
    if report.best is None:
        return None
    dataset = shlex.quote(report.dataset_uri)
    return f"python jobs/train.py --dataset {dataset} --config best.yaml"


def _list_facts(report: SweepReport) -> list[tuple[str, str]]:
    states = [point.state for point in report.points]
    parts = [f"{format_count(states.count('done'))} done"]
    if stopped := sum(point.stopped_early for point in report.points):
        parts[0] += f" ({format_count(stopped)} stopped early)"
    for state in ("running", "failed"):
        if number := states.count(state):
            parts.append(f"{format_count(number)} {state}")
    return [
        ("Space", report.space_name),
        ("Points", f"{format_count(len(states))}: {', '.join(parts)}" if states else "none"),
        ("Settings", ", ".join(report.columns) or "none"),
        ("Score", report.metric_name),
        ("Dataset", report.dataset_uri),
        ("Code", report.code_version),
        ("Took", format_duration(report.seconds)),
        ("Machine", report.machine),
    ]


# --------------------------------------------------------------------------------------- verdicts


def list_contests(report: SweepReport) -> list[Contest]:
    """The finished points by scale, the best first; one contest where scale is not swept."""
    own = SCALE in report.columns
    scales = list_groups([score_of(point) for point in report.points], group=SCALE if own else None)
    contests = []
    for scale in scales or [None]:
        ranked = sorted(
            (
                point
                for point in report.points
                if is_scored(point)
                and point.state == "done"
                and not point.stopped_early
                and (not own or point.values.get(SCALE) == scale)
            ),
            key=lambda point: -point.psnr_db,
        )
        contests.append(Contest(scale, ranked))
    return contests


def find_notices(report: SweepReport) -> list[Notice]:
    """The winners first, then what weakens them, then what the caller has to say."""
    contests = [contest for contest in list_contests(report) if contest.ranked]
    notices = [judge_contest(contest) for contest in contests]
    if not notices:
        notices = [Notice("bad", "No point is finished and scored yet.", "points")]
    done = [point for contest in contests for point in contest.ranked]
    if done and any(point.num_seeds < 2 for point in done):
        who = "Every point" if all(point.num_seeds < 2 for point in done) else "Some points"
        text = (
            f"{who}: one seed only. What chance does to a score is not known from that; in the "
            f"paper, one configuration scores differently by {PAPER_SPREAD_DB} dB."
        )
        notices.append(Notice("bad", text, "points"))
    if running := sum(point.state == "running" for point in report.points):
        text = f"The sweep is not at its end: {plural(running, 'point')} still without all seeds."
        notices.append(Notice("note", text, "points"))
    lost = [p for p in report.points if p.state == "done" and not math.isfinite(p.psnr_db)]
    if lost:
        text = f"PSNR of {plural(len(lost), 'finished point')} is not a finite number."
        notices.append(Notice("bad", text, "points"))
    if report.failures:
        text = f"{plural(len(report.failures), 'trial')} failed."
        notices.append(Notice("bad", text, "failures"))
    return [*notices, *(Notice("note", note) for note in report.notes)]


def judge_contest(contest: Contest) -> Notice:
    """Which point is best, and whether its lead is more than chance may give."""
    best = contest.ranked[0]
    at = "" if contest.scale is None else f"×{format_value(contest.scale)}: "
    settings = {name: value for name, value in best.values.items() if not at or name != SCALE}
    text = (
        f"{at}{label_of(settings)} is best with "
        f"{format_with_spread(best.psnr_db, best.psnr_std, 3)} dB"
    )
    if len(contest.ranked) < 2:
        return Notice("note", f"{text}, the only point that is finished.", "winner")
    second = contest.ranked[1]
    lead = best.psnr_db - second.psnr_db
    text += f", {format_signed(lead, 3)} dB over the second"
    chance = lead_by_chance(best, second)
    if lead > chance:
        return Notice("good", f"{text}.", "winner")
    close = sum(best.psnr_db - point.psnr_db <= chance for point in contest.ranked) - 1
    text += (
        f": not more than seeds change a score by (about {format_fixed(chance, 3)} dB). "
        f"{plural(close, 'other point')} cannot be told from it; take the cheapest."
    )
    return Notice("note", text, "winner")


def lead_by_chance(a: Point, b: Point) -> float:
    """What two points of equal worth may differ by, dB: two standard errors of their difference.

    Where a point has one seed, or none is known, the paper's own spread stands in for both.
    """
    if a.psnr_std is None or b.psnr_std is None or min(a.num_seeds, b.num_seeds) < 2:
        return PAPER_SPREAD_DB
    return 2 * math.sqrt(a.psnr_std**2 / a.num_seeds + b.psnr_std**2 / b.num_seeds)


# ------------------------------------------------------------------------------------------ table


def list_rows(report: SweepReport) -> list[Row]:
    """All points, the best first within each scale; those without a score last."""
    leaders = {
        contest.scale: contest.ranked[0] for contest in list_contests(report) if contest.ranked
    }
    best = None if report.best is None else report.points[report.best]
    own = SCALE in report.columns
    rows = []
    for point in report.points:
        leader = leaders.get(point.values.get(SCALE) if own else None)
        scored = is_scored(point) and leader is not None
        behind = leader.psnr_db - point.psnr_db if scored and leader is not None else None
        rows.append(Row(point, point is best or point is leader, behind, _remark(point)))
    order = list_groups([score_of(point) for point in report.points], group=SCALE if own else None)
    return sorted(
        rows,
        key=lambda row: (
            order.index(row.point.values.get(SCALE) if own else None),
            not is_scored(row.point),
            -row.point.psnr_db if is_scored(row.point) else 0.0,
        ),
    )


def _remark(point: Point) -> str:
    if point.state != "done":
        return point.state
    if point.stopped_early:
        return "stopped early"
    return "" if math.isfinite(point.psnr_db) else "no number"
