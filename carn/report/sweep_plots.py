"""Plots of what a sweep found, as inline SVG: over one setting, three shares, or any number."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from carn.report.page import COLOURS
from carn.report.plots import format_tick
from carn.report.score_plots import (
    SIZE_IN,
    colour_code,
    dress,
    frame,
    is_log_range,
    log_axis,
    new_axes,
    note_below,
    number_axis,
    plain_text,
    reach,
    ring,
    shorten,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = float | int | str

TERNARY_SIZE_IN = (6.4, 5.4)
PARALLEL_SIZE_IN = (9.6, 3.8)
# Settings that grow by doubling (2, 4, 8, 16, 32) deserve equal steps; 2, 4, 8, 12, 16, 20 do not.
MIN_SETTING_RATIO = 16.0
MAX_TICKS = 6
# More lines than this hide each other, unless they let some of it through.
MAX_OPAQUE = 40
# Corners of the triangle: the first weight is at the top, the second left, the third right.
CORNERS = np.array([[0.5, math.sqrt(0.75)], [0.0, 0.0], [1.0, 0.0]])


class Score(NamedTuple):
    """A combination of settings and its finite PSNR in dB, with half the length of its bar.

    A hollow one was stopped before its end.
    """

    values: Mapping[str, Value]
    psnr_db: float
    spread: float | None = None
    is_hollow: bool = False
    is_best: bool = False


def is_number(value: Value | None) -> bool:
    """Whether a value of a setting has a place on an axis of numbers; True and False have none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_value(value: Value | None) -> str:
    """A setting in as few signs as it needs; a dash where it is not set."""
    if value is None:
        return "–"
    return format_tick(value) if is_number(value) else str(value)  # type: ignore[arg-type]


def list_groups(scores: Sequence[Score], *, group: str | None) -> list[Value | None]:
    """The values of the column that parts the lines, numbers by size and then words."""
    found = list(dict.fromkeys(score.values.get(group) if group else None for score in scores))
    return sorted(found, key=_order)


def _order(value: Value | None) -> tuple[bool, float, str]:
    is_numeric = is_number(value)
    return (not is_numeric, float(value) if is_numeric else 0.0, str(value))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ lines


class Axis(NamedTuple):
    """How a setting lies on an axis: by size, by order of size, or (`words`) as one after another.

    `known` are all its values, in order.
    """

    known: tuple[Value, ...]
    kind: str

    def place(self, value: Value) -> float:
        """Where a value stands, in data units of the axis."""
        return float(self.known.index(value)) if self.kind == "words" else float(value)


def lay_axis(scores: Sequence[Score], *, column: str) -> Axis:
    """The axis for the values that a setting takes."""
    known = {score.values[column] for score in scores if column in score.values}
    ordered = tuple(sorted(known, key=_order))
    if not all(is_number(value) for value in ordered):
        return Axis(ordered, "words")
    numbers = [float(value) for value in ordered]
    is_log = bool(numbers) and is_log_range(numbers, min_ratio=MIN_SETTING_RATIO)
    return Axis(ordered, "log" if is_log else "linear")


@plain_text()
def plot_lines(
    scores: Sequence[Score],
    *,
    axis: Axis,
    x: str,
    group: str | None,
    groups: Sequence[Value | None],
    span_db: float,
    name: str,
    y_label: str,
    has_zero: bool = False,
) -> Markup | None:
    """PSNR over one setting, a line for each value of another; None when there is no point.

    Args:
        scores: those that have a value of `x`. Where several share it, the line takes the best.
        axis: of `x`, by `lay_axis`; the same for two plots to be held against each other.
        x: name of the setting on the level axis.
        group: name of the setting that parts the lines, or None.
        groups: its values, by `list_groups`, in the order of `plots.CYCLE`.
        span_db: least height of the frame; equal in two plots, a dB is equally high in both.
        name: prefix of the ids within the SVG, unique on the page: letters, digits and hyphens.
        y_label: what is measured, with its unit.
        has_zero: whether a line marks 0, which is then in the frame.

    Raises:
        ValueError: the name cannot stand in an id.
    """
    scores = [score for score in scores if x in score.values]
    if not scores:
        return None
    figure, axes = new_axes(SIZE_IN)
    for place, value in reversed(list(enumerate(groups))):
        own = [score for score in scores if (score.values.get(group) if group else None) == value]
        _draw_line(axes, own, axis=axis, x=x, colour=colour_code(place))
    bars = [(score.psnr_db, score.spread) for score in scores]
    shown = reach(bars) + [0.0] * has_zero
    if has_zero:
        axes.axhline(0, color=COLOURS["alert"], linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    low, high = fit_frame(shown, span_db=span_db)
    axes.set_ylim(low, high)
    _lay_x(axes, axis)
    number_axis(axes.yaxis)
    axes.set_xlabel(shorten(x), color=COLOURS["muted"])
    axes.set_ylabel(shorten(y_label, 40), color=COLOURS["muted"])
    dress(axes)
    note_below(axes, sum(score.psnr_db < low for score in scores))
    return to_svg(figure, name=name, label=f"{y_label} by {x}")


def fit_frame(values: Sequence[float], *, span_db: float) -> tuple[float, float]:
    """Both ends of an axis that shows the values and is `span_db` high at least."""
    low, high = frame(values, margin=0.12)
    missing = max(0.0, span_db - (high - low))
    return low - missing / 2, high + missing / 2


def _draw_line(axes: "Axes", scores: Sequence[Score], *, axis: Axis, x: str, colour: str) -> None:
    best: dict[float, float] = {}
    for score in scores:
        at = axis.place(score.values[x])
        best[at] = max(best.get(at, -math.inf), score.psnr_db)
        axes.errorbar(
            at,
            score.psnr_db,
            yerr=score.spread or None,
            fmt="o",
            markersize=6,
            capsize=3,
            color=colour,
            markerfacecolor="none" if score.is_hollow else colour,
        )
        if score.is_best:
            ring(axes, at, score.psnr_db)
    places = sorted(best)
    axes.plot(places, [best[at] for at in places], color=colour, linewidth=1.6)


def _lay_x(axes: "Axes", axis: Axis) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    places = [axis.place(value) for value in axis.known]
    if axis.kind == "log":
        log_axis(axes, axes.xaxis, places)
        margin = (places[-1] / places[0]) ** 0.06
        axes.set_xlim(places[0] / margin, places[-1] * margin)
    else:
        margin = 0.06 * (places[-1] - places[0]) or 0.5
        axes.set_xlim(places[0] - margin, places[-1] + margin)
    if axis.kind == "words":
        labels = [shorten(format_value(value), max(6, 60 // len(places))) for value in axis.known]
        axes.set_xticks(places, labels)
    elif len(places) <= 12:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(places, [format_value(value) for value in axis.known])
    elif axis.kind == "linear":
        number_axis(axes.xaxis, nbins=8)


# ---------------------------------------------------------------------------------------- ternary


def share_of(
    values: Mapping[str, Value], *, columns: Sequence[str]
) -> npt.NDArray[np.float64] | None:
    """The three weights as parts of 1; None where that cannot be said."""
    weights = [values.get(column) for column in columns]
    if not all(is_number(weight) and float(weight) >= 0 for weight in weights):  # type: ignore[arg-type]
        return None
    array = np.array(weights, dtype=np.float64)
    return array / array.sum() if array.sum() > 0 else None


@plain_text()
def plot_ternary(
    scores: Sequence[Score],
    *,
    columns: Sequence[str],
    colours: Sequence[str],
    paper: Sequence[Mapping[str, Value]],
    name: str,
    label: str,
) -> Markup | None:
    """Each combination of three weights as a point of a triangle; None when there is none to draw.

    Args:
        scores: those whose weights are negative or not numbers are left out.
        columns: the three weights; the first is 1 at the top, the second left, the third right.
        colours: of each score, as CSS.
        paper: weights to mark with a square, whether tried or not.
        name: prefix of the ids within the SVG, unique on the page: letters, digits and hyphens.
        label: what a screen reader says.

    Raises:
        ValueError: the name cannot stand in an id.
    """
    shares = [share_of(score.values, columns=columns) for score in scores]
    if not any(share is not None for share in shares):
        return None
    figure, axes = new_axes(TERNARY_SIZE_IN)
    _draw_triangle(axes, columns)
    for score, share, colour in sorted(
        zip(scores, shares, colours, strict=True), key=lambda entry: entry[0].psnr_db
    ):
        if share is None:
            continue
        x, y = (share @ CORNERS).tolist()
        axes.plot(
            x,
            y,
            "o",
            markersize=11 if not score.is_hollow else 8,
            color=colour,
            mec=COLOURS["muted"],
            mew=0.7,
            zorder=3,
        )
        if score.is_best:
            axes.plot(x, y, "o", markersize=17, mfc="none", mec=COLOURS["alert"], mew=2, zorder=5)
    for values in paper:
        if (share := share_of(values, columns=columns)) is not None:
            x, y = (share @ CORNERS).tolist()
            axes.plot(x, y, "s", markersize=18, mfc="none", mec=COLOURS["ink"], mew=1.4, zorder=4)
    return to_svg(figure, name=name, label=label)


def _draw_triangle(axes: "Axes", columns: Sequence[str]) -> None:
    steps = np.linspace(0, 1, 6)
    for which in range(3):
        after, last = (which + 1) % 3, (which + 2) % 3
        for share in steps[:-1]:
            ends = np.zeros((2, 3))
            ends[:, which] = share
            ends[0, after] = ends[1, last] = 1 - share
            is_edge = share == 0
            axes.plot(
                *(ends @ CORNERS).T,
                color=COLOURS["muted" if is_edge else "line"],
                linewidth=1.0 if is_edge else 0.7,
                zorder=2 if is_edge else 1,
            )
            if 0 < share < 1:
                _note_share(axes, ends[0] @ CORNERS, which, float(share))
    # The corner's name says which setting is all there is at it.
    for column, corner, va in zip(columns, CORNERS, ("bottom", "top", "top"), strict=True):
        axes.annotate(
            f"only {shorten(column, 20)}",
            tuple(corner),
            xytext=(0, 11 if va == "bottom" else -24),
            textcoords="offset points",
            ha="center",
            va=va,
            color=COLOURS["ink"],
            fontweight="bold",
        )
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.margins(0.1)


def _note_share(axes: "Axes", at: npt.NDArray[np.float64], which: int, share: float) -> None:
    dx, dy, ha, va = (
        (-11, 0, "right", "center"),
        (0, -10, "center", "top"),
        (11, 0, "left", "center"),
    )[which]
    axes.annotate(
        f"{share:.1f}",
        tuple(at),
        xytext=(dx, dy),
        textcoords="offset points",
        ha=ha,
        va=va,
        color=COLOURS["muted"],
        fontsize=8.5,
    )


# --------------------------------------------------------------------------------------- parallel


@plain_text()
def plot_parallel(
    scores: Sequence[Score],
    *,
    columns: Sequence[str],
    colours: Sequence[str],
    psnr_range: tuple[float, float],
    name: str,
    y_label: str,
) -> Markup | None:
    """Each combination as a line through an upright axis a setting, PSNR the last.

    Args:
        scores: the worst is drawn first, the best last; where a setting is missing, a line ends.
        columns: the settings, from left to right.
        colours: of each score, as CSS.
        psnr_range: what the last axis reaches over; a lower value stands at its foot.
        name: prefix of the ids within the SVG, unique on the page: letters, digits and hyphens.
        y_label: what the last axis measures.

    Returns:
        The SVG, or None when there is nothing to draw.

    Raises:
        ValueError: the name cannot stand in an id.
    """
    if not scores:
        return None
    figure, axes = new_axes(PARALLEL_SIZE_IN)
    layouts = [lay_axis(scores, column=column) for column in columns]
    low, high = psnr_range
    for score, colour in sorted(
        zip(scores, colours, strict=True), key=lambda entry: entry[0].psnr_db
    ):
        heights = [
            _height(layout, score.values[column]) if column in score.values else math.nan
            for column, layout in zip(columns, layouts, strict=True)
        ]
        heights.append(min(1.0, max(0.0, (score.psnr_db - low) / (high - low))))
        axes.plot(
            heights,
            color=COLOURS["alert"] if score.is_best else colour,
            linewidth=2.4 if score.is_best else 1.3,
            alpha=1.0 if score.is_best or len(scores) <= MAX_OPAQUE else 0.5,
            linestyle=(0, (4, 2)) if score.is_hollow else "solid",
            zorder=4 if score.is_best else 3,
            marker="o",
            markersize=4,
        )
    width = max(8, 96 // (len(columns) + 1) - 2)
    for place, layout in enumerate(layouts):
        _label_axis(axes, place, layout, width)
    for value, height in ((low, 0.0), (high, 1.0)):
        _write(axes, len(columns), height, f"{value:.2f}")
    for place in range(len(columns) + 1):
        axes.axvline(place, color=COLOURS["line"], linewidth=1.2, zorder=1)
    names = [*columns, y_label]
    axes.set_xticks(range(len(names)), [shorten(text, width) for text in names])
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) + 0.35)
    axes.set_ylim(-0.06, 1.06)
    axes.tick_params(axis="x", length=0, labelcolor=COLOURS["ink"], pad=8)
    axes.spines[:].set_visible(False)
    return to_svg(figure, name=name, label=f"{y_label} by {', '.join(columns)}")


def _height(layout: Axis, value: Value) -> float:
    places = [layout.place(known) for known in layout.known]
    at, low, high = layout.place(value), places[0], places[-1]
    if layout.kind == "log":
        at, low, high = math.log(at), math.log(low), math.log(high)
    return (at - low) / (high - low) if high > low else 0.5


def _label_axis(axes: "Axes", place: int, layout: Axis, width: int) -> None:
    known = layout.known
    shown = known if len(known) <= MAX_TICKS or layout.kind == "words" else (known[0], known[-1])
    if len(shown) > 2 * MAX_TICKS:
        shown = (shown[0], shown[-1])
    last = -1.0
    for value in shown:
        height = _height(layout, value)
        if height - last > 0.05:
            _write(axes, place, height, shorten(format_value(value), width))
            last = height


def _write(axes: "Axes", place: int, height: float, text: str) -> None:
    axes.annotate(
        text,
        (place, height),
        xytext=(6, 2),
        textcoords="offset points",
        ha="left",
        va="bottom",
        color=COLOURS["ink"],
        fontsize=9,
        zorder=6,
    )
