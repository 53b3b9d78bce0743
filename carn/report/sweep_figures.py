"""The plots of a sweep's page, each with its heading, its legend and the words below it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from carn.report.page import plural
from carn.report.plots import CYCLE, LegendEntry, list_legend, plot_curves
from carn.report.score_plots import Spot, frame, plot_scatter
from carn.report.sweep_plots import (
    Axis,
    Score,
    fit_frame,
    format_value,
    lay_axis,
    list_groups,
    plot_lines,
    plot_parallel,
    plot_ternary,
    share_of,
)
from carn.report.sweep_records import Point, SweepReport, Value

# Scores at different scales are of different tasks: there is a winner for each.
SCALE = "scale"
MAX_CURVES = 4
OURS, PAPER = "this sweep", "the paper"
PAPER_TITLE = "The paper, on its own data"
# A setting that no sweep has: whose difference it is.
WHO = "\0who"
# Colours of PSNR from low to high, the same in both themes. Source: viridis of matplotlib,
# https://bids.github.io/colormap/
RAMP = (
    *("#440154", "#482878", "#3e4989", "#31688e", "#26828e"),
    *("#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
)


class Panel(NamedTuple):
    """A plot with its heading, which may be empty, and the colours of its lines, if they differ."""

    title: str
    legend: list[LegendEntry]
    plot: Markup


class MainFigure(NamedTuple):
    """The plot of the question and what to say below it.

    Attributes:
        panels: one or several.
        ramp: both ends of the colours of PSNR, or None.
        words: sentences below.
    """

    panels: list[Panel]
    ramp: tuple[float, float] | None
    words: list[str]


def is_scored(point: Point) -> bool:
    """Whether a point has a finite PSNR that may still change or not."""
    return point.state != "failed" and math.isfinite(point.psnr_db)


def weights_of(report: SweepReport) -> tuple[str, ...]:
    """The columns of a ternary plot: the loss's weights, or the first three."""
    named = [name for name in ("alpha", "beta", "gamma") if name in report.columns]
    return tuple(named) if len(named) == 3 else report.columns[:3]


def score_of(point: Point, *, is_best: bool = False) -> Score:
    is_hollow = point.stopped_early or point.state != "done"
    return Score(point.values, point.psnr_db, point.psnr_std, is_hollow, is_best)


def ringed(report: SweepReport) -> Point | None:
    """The winner; None where there is one for each scale, and a ring round one would mislead."""
    is_one = report.best is not None and SCALE not in report.columns
    return report.points[report.best] if is_one and report.best is not None else None


def list_scores(report: SweepReport) -> list[Score]:
    best = ringed(report)
    return [score_of(point, is_best=point is best) for point in report.points if is_scored(point)]


def draw_figure(report: SweepReport) -> MainFigure | None:
    """The plot that answers the question; None when no point has a score."""
    scores = list_scores(report)
    if not scores:
        return None
    if report.figure == "lines":
        return _draw_lines(report, scores)
    low, high = frame([score.psnr_db for score in scores], margin=0.0)
    high = max(high, low + 1e-6)
    colours = [paint(score.psnr_db, low=low, high=high) for score in scores]
    words = [_hollow_words(scores, "dashed" if report.figure == "parallel" else "small")]
    if report.figure == "parallel":
        plot = plot_parallel(
            scores,
            columns=report.columns,
            colours=colours,
            psnr_range=(low, high),
            name="figure",
            y_label="PSNR, dB",
        )
    else:
        plot = plot_ternary(
            scores,
            columns=weights_of(report),
            colours=colours,
            paper=[point.values for point in report.paper],
            name="figure",
            label=f"{report.metric_name} by {', '.join(weights_of(report))}",
        )
        words += _ternary_words(report, scores)
    panels = [] if plot is None else [Panel("", [], plot)]
    return MainFigure(panels, (low, high), [word for word in words if word])


def paint(value: float, *, low: float, high: float) -> str:
    """The colour of a PSNR on the ramp from `low` to `high`; what is outside has an end's."""
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    at = share * (len(RAMP) - 1)
    first = min(int(at), len(RAMP) - 2)
    ends = [[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in RAMP[first : first + 2]]
    mixed = [round(a + (b - a) * (at - first)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _hollow_words(scores: Sequence[Score], looks: str) -> str:
    num = sum(score.is_hollow for score in scores)
    return f"{looks.capitalize()}: stopped early or not at the end ({num})." if num else ""


def _ternary_words(report: SweepReport, scores: Sequence[Score]) -> list[str]:
    columns = weights_of(report)
    words = []
    lost = sum(share_of(score.values, columns=columns) is None for score in scores)
    if lost:
        words.append(f"{plural(lost, 'point')} with weights that are no shares not drawn.")
    if any(share_of(point.values, columns=columns) is not None for point in report.paper):
        words.append("The square marks the paper's weights. Its score is of its own data.")
    if len(report.columns) > len(columns):
        others = ", ".join(name for name in report.columns if name not in columns)
        words.append(f"Where points differ in {others} alone, the best lies on top.")
    return words


def _draw_lines(report: SweepReport, scores: list[Score]) -> MainFigure:
    x, group = report.x or "", report.group
    scores = [score for score in scores if x in score.values]
    paper = [
        Score(point.values, point.psnr_db)
        for point in report.paper
        if x in point.values and math.isfinite(point.psnr_db)
    ]
    groups = list_groups([*scores, *paper], group=group)
    spans = [
        high - low
        for part in (scores, paper)
        if part
        for low, high in [fit_frame([score.psnr_db for score in part], span_db=0.0)]
    ]
    axis, span = lay_axis([*scores, *paper], column=x), max(spans, default=0.0)
    legend = _legend([f"{group} {format_value(value)}" for value in groups]) if group else []
    panels = []
    for place, (title, part) in enumerate((("This sweep", scores), (PAPER_TITLE, paper))):
        plot = plot_lines(
            part,
            axis=axis,
            x=x,
            group=group,
            groups=groups,
            span_db=span,
            name=f"figure-{place}",
            y_label="PSNR, dB" if place else report.metric_name,
        )
        if plot is not None:
            panels.append(Panel(title if paper else "", legend, plot))
    if group and len(groups) == 2:
        leads = [
            *find_leads(scores, x=x, group=group),
            *find_leads(paper, x=x, group=group, of=PAPER),
        ]
        first, second = map(format_value, groups)
        title = f"{group}: {first} less {second}"
        panels += _draw_leads(leads, axis=axis, x=x, title=title)
    words = [_hollow_words(scores, "hollow")]
    if paper:
        words.append(
            "The paper's scores are of other tiles, so their level says nothing here: they stand "
            "in a plot of their own, where a dB is as high as in the first. Differences may be "
            "compared."
        )
    if len(report.columns) > 1 + (group is not None):
        words.append("Where points share a place, the line goes through the best.")
    return MainFigure(panels, None, [word for word in words if word])


def _legend(labels: Sequence[str]) -> list[LegendEntry]:
    return [
        LegendEntry(label, f"var(--{CYCLE[place % len(CYCLE)]})", False, True)
        for place, label in enumerate(labels)
    ]


def find_leads(scores: Sequence[Score], *, x: str, group: str, of: str = OURS) -> list[Score]:
    """What the first of two groups is ahead of the second, dB, at each place that both have.

    Where points share a place, the best stands for them. Spreads are taken for independent.
    """
    first, second = list_groups(scores, group=group) if scores else (None, None)
    best: dict[tuple[Value, Value | None], Score] = {}
    for score in sorted(scores, key=lambda score: score.psnr_db):
        best[score.values[x], score.values.get(group)] = score
    leads = []
    for at in dict.fromkeys(at for at, _ in best):
        a, b = best.get((at, first)), best.get((at, second))
        if a is not None and b is not None:
            known = a.spread is not None and b.spread is not None
            spread = math.hypot(a.spread or 0.0, b.spread or 0.0) if known else None
            values: dict[str, Value] = {x: at, WHO: of}
            is_hollow = a.is_hollow or b.is_hollow
            leads.append(Score(values, a.psnr_db - b.psnr_db, spread, is_hollow))
    return leads


def _draw_leads(leads: list[Score], *, axis: Axis, x: str, title: str) -> list[Panel]:
    plot = plot_lines(
        leads,
        axis=axis,
        x=x,
        group=WHO,
        groups=(OURS, PAPER),
        span_db=0.0,
        has_zero=True,
        name="leads",
        y_label="difference, dB",
    )
    return [] if plot is None else [Panel(title, _legend([OURS, PAPER]), plot)]


def draw_costs(report: SweepReport) -> list[Panel]:
    best = ringed(report)
    costs: tuple[tuple[str, str, str, Callable[[Point], float]], ...] = (
        ("flops", "FLOPs", "FLOPs of an image, G", lambda point: point.flops / 1e9),
        ("time", "training time", "minutes a trial", lambda point: point.seconds / 60),
    )
    panels = []
    for name, title, x_label, measure in costs:
        spots = [
            Spot(
                measure(point),
                point.psnr_db,
                y_spread=point.psnr_std,
                is_hollow=point.stopped_early or point.state != "done",
                is_best=point is best,
            )
            for point in report.points
            if is_scored(point) and measure(point) > 0
        ]
        if len({spot.x for spot in spots}) > 1:
            plot = plot_scatter(spots, name=name, x_label=x_label, y_label=report.metric_name)
            panels += [] if plot is None else [Panel(f"PSNR by {title}", [], plot)]
    return panels


def draw_curves(report: SweepReport) -> list[Panel]:
    """The curves, a few in each plot: those that differ in the parting setting alone, if any."""
    num = 1
    if report.group is not None:
        num = len(list_groups([score_of(point) for point in report.points], group=report.group))
    size = num if 1 < num <= MAX_CURVES else MAX_CURVES
    max_step = max((int(c.steps[-1]) for c in report.curves if c.steps.size), default=0)
    panels = []
    for start in range(0, len(report.curves), size):
        part = report.curves[start : start + size]
        plot = plot_curves(part, name=f"curves-{start}", y_label="PSNR, dB", max_step=max_step)
        if plot is not None:
            panels.append(Panel("", list_legend(part), plot))
    return panels
