"""Plots of scores with their spread, as inline SVG in the colours of the page."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from carn.report.page import COLOURS, inline_svg
from carn.report.plots import CURVE_COLOURS, CYCLE, format_tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SIZE_IN = (6.4, 3.4)
ROW_IN = 0.27
MAX_LABEL = 26
# More names than this cannot be told apart in a scatter plot.
MAX_NAMED = 40
# An axis becomes logarithmic where the largest value is so many times the smallest.
MIN_LOG_RATIO = 5.0
FONT_PT = 10.0
# Width of a letter of a name: most are capitals.
CAPITAL_EM = 0.72


class Dot(NamedTuple):
    """A row of a dot plot: a value, half the length of its bar, and what the paper has for it."""

    label: str
    value: float
    spread: float | None = None
    paper: float | None = None
    is_best: bool = False


class Spot(NamedTuple):
    """A point of a scatter plot; `x_range` and `y_spread` are its bars, all in the axes' units.

    A hollow one is not quite what the others are, and a best one is ringed.
    """

    x: float
    y: float
    label: str = ""
    x_range: tuple[float, float] | None = None
    y_spread: float | None = None
    is_hollow: bool = False
    is_best: bool = False


# ---------------------------------------------------------------------------------- shared ground


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Within it, matplotlib takes labels for what they are: no formulas, any script.

    A glyph that matplotlib's font lacks is no loss, for the text of an SVG is set by the browser.
    """
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


def new_axes(size_in: tuple[float, float]) -> "tuple[Figure, Axes]":
    """An empty figure without pyplot, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_in, layout="constrained")
    return figure, figure.add_subplot()


def to_svg(figure: "Figure", *, name: str, label: str) -> Markup:
    """As `inline_svg`, the colours of the curves too becoming variables of the page."""
    svg = str(inline_svg(figure, name=name, label=label))
    for colour, code in CURVE_COLOURS.items():
        svg = svg.replace(code, f"var(--{colour})")
    return Markup(svg)


def colour_code(place: int) -> str:
    """The colour of a place in `plots.CYCLE`, which starts again at its end."""
    colour = CYCLE[place % len(CYCLE)]
    return CURVE_COLOURS.get(colour) or COLOURS[colour]  # type: ignore[index]


def dress(axes: "Axes", *, grid: str = "y") -> None:
    """Thin lines and muted figures, as all plots of the pages have them."""
    axes.tick_params(colors=COLOURS["line"], labelcolor=COLOURS["muted"])
    axes.grid(axis=grid, color=COLOURS["line"], linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["line"])


def shorten(text: str, length: int = MAX_LABEL) -> str:
    """The text on one line, its middle left out where it is longer."""
    text = " ".join(text.split())
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def frame(
    values: Sequence[float] | npt.NDArray[np.float64], *, margin: float = 0.08
) -> tuple[float, float]:
    """Both ends of an axis that shows the values; what lies far below all others is outside.

    One training that came to nothing scores 10 dB; with that in the frame, the tenths of a dB that
    matter would be one heap. Values must be finite, and one at least.
    """
    array = np.asarray(values, dtype=np.float64)
    high, quartile = float(array.max()), float(np.quantile(array, 0.25))
    low = float(array[array >= quartile - 2 * (high - quartile)].min())
    span = (high - low) or 0.01 * abs(high) or 1.0
    return low - margin * span, high + margin * span


def reach(values: Sequence[tuple[float, float | None]]) -> list[float]:
    """Both ends of the bar of each value, given with half its length or None."""
    halves = [half if half is not None and math.isfinite(half) else 0.0 for _, half in values]
    pairs = zip((value for value, _ in values), halves, strict=True)
    return [end for value, half in pairs for end in (value - half, value + half)]


def is_log_range(values: Sequence[float], *, min_ratio: float = MIN_LOG_RATIO) -> bool:
    """Whether the values are better seen on a logarithmic axis."""
    return min(values) > 0 and max(values) / min(values) >= min_ratio


def number_axis(axis: "Axis", *, nbins: int = 5) -> None:
    """A few short numbers on a linear axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=nbins, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(round(value, 9))))


def log_axis(axes: "Axes", axis: "Axis", values: Sequence[float]) -> None:
    """A few short numbers on a logarithmic axis, which this makes of it."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    set_scale = axes.set_xscale if axis is axes.xaxis else axes.set_yscale
    set_scale("log")
    ratio = max(values) / min(values)
    exponents = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))))
    factors = (1, 2, 5) if ratio < 300 else (1,)
    ticks = [
        factor * 10.0**exponent for exponent in (*exponents, exponents.stop) for factor in factors
    ]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(float(f"{value:.3g}"))))


def note_below(axes: "Axes", num: int) -> None:
    """Says how many points are below the frame."""
    if num:
        axes.annotate(
            f"{num} more below the frame",
            (0.0, 0.0),
            xycoords="axes fraction",
            xytext=(4, 4),
            textcoords="offset points",
            color=COLOURS["muted"],
        )


# ------------------------------------------------------------------------------------------- dots


@plain_text()
def plot_dots(
    dots: Sequence[Dot], *, name: str, x_label: str, has_zero: bool = False
) -> Markup | None:
    """One row a value, the paper's hollow beside it; None when there is no finite value.

    Args:
        dots: from top to bottom. A value that is not finite leaves its row empty.
        name: prefix of the ids within the SVG, unique on the page: letters, digits and hyphens.
        x_label: what is measured, with its unit.
        has_zero: whether a line marks 0.

    Raises:
        ValueError: the name cannot stand in an id.
    """
    if not any(math.isfinite(dot.value) for dot in dots):
        return None
    figure, axes = new_axes((SIZE_IN[0], 0.7 + ROW_IN * len(dots)))
    if has_zero:
        axes.axvline(0, color=COLOURS["alert"], linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    for row, dot in enumerate(dots):
        if dot.paper is not None and math.isfinite(dot.paper):
            axes.plot(dot.paper, row, "o", markersize=6, mfc="none", mec=COLOURS["muted"])
        if math.isfinite(dot.value):
            spread = dot.spread if dot.spread is not None and math.isfinite(dot.spread) else 0.0
            axes.errorbar(
                dot.value,
                row,
                xerr=spread or None,
                fmt="o",
                markersize=6,
                capsize=3,
                color=COLOURS["kept"],
            )
    _name_rows(axes, [dot.label for dot in dots], {i for i, dot in enumerate(dots) if dot.is_best})
    axes.margins(x=0.06)
    axes.set_xlabel(x_label, color=COLOURS["muted"])
    number_axis(axes.xaxis, nbins=7)
    return to_svg(figure, name=name, label=f"{x_label} of {len(dots)} models")


def _name_rows(axes: "Axes", labels: Sequence[str], bold: set[int]) -> None:
    axes.set_yticks(range(len(labels)), [shorten(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    dress(axes, grid="both")
    axes.tick_params(axis="y", length=0)
    for row, text in enumerate(axes.get_yticklabels()):
        text.set_color(COLOURS["ink"])
        text.set_fontweight("bold" if row in bold else "normal")


@plain_text()
def plot_spread(
    rows: Sequence[tuple[str, npt.NDArray[np.float64]]], *, name: str, x_label: str
) -> Markup | None:
    """How values lie in each row: all, the middle 90 %, the middle half and the median.

    Args:
        rows: label and finite values, from top to bottom; a row without values stays empty.
        name: prefix of the ids within the SVG, unique on the page: letters, digits and hyphens.
        x_label: what is measured, with its unit; 0 is marked.

    Returns:
        The SVG, or None when there is no value.

    Raises:
        ValueError: the name cannot stand in an id.
    """
    if not any(values.size for _, values in rows):
        return None
    figure, axes = new_axes((SIZE_IN[0], 0.7 + ROW_IN * len(rows)))
    axes.axvline(0, color=COLOURS["alert"], linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    for row, (_, values) in enumerate(rows):
        if values.size:
            marks = np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).tolist()
            for half, width in ((0, 1.0), (1, 3.0), (2, 8.0)):
                axes.plot(
                    [marks[half], marks[-1 - half]],
                    [row, row],
                    color=COLOURS["kept" if half else "dropped"],
                    linewidth=width,
                    solid_capstyle="butt",
                )
            axes.plot(marks[3], row, "|", color=COLOURS["ink"], markersize=13, mew=2)
    _name_rows(axes, [label for label, _ in rows], set())
    axes.set_xlabel(x_label, color=COLOURS["muted"])
    number_axis(axes.xaxis, nbins=7)
    return to_svg(figure, name=name, label=f"{x_label}, spread over the tiles")


# ---------------------------------------------------------------------------------------- scatter


@plain_text()
def plot_scatter(
    spots: Sequence[Spot],
    *,
    name: str,
    x_label: str,
    y_label: str,
    size_in: tuple[float, float] = SIZE_IN,
) -> Markup | None:
    """Points with bars and names; None when no point has two finite coordinates.

    Args:
        spots: drawn in this order. The level axis is logarithmic where they reach over a factor
            of 5; what is far below all others is said to be below the frame. More than 40 go
            without their names.
        name: prefix of the ids within the SVG, unique on the page: letters, digits and hyphens.
        x_label: with its unit.
        y_label: with its unit.
        size_in: width and height; text has 10 points of 72 to the inch.

    Raises:
        ValueError: the name cannot stand in an id.
    """
    spots = [spot for spot in spots if math.isfinite(spot.x) and math.isfinite(spot.y)]
    if not spots:
        return None
    figure, axes = new_axes(size_in)
    low, high = frame(reach([(spot.y, spot.y_spread) for spot in spots]))
    for spot in spots:
        spread = spot.y_spread if spot.y_spread and math.isfinite(spot.y_spread) else None
        x_error = None
        if spot.x_range is not None and all(map(math.isfinite, spot.x_range)):
            x_error = [[max(0.0, spot.x - spot.x_range[0])], [max(0.0, spot.x_range[1] - spot.x)]]
        axes.errorbar(
            spot.x,
            spot.y,
            xerr=x_error,
            yerr=spread,
            fmt="o",
            markersize=6,
            elinewidth=1,
            color=COLOURS["kept"],
            markerfacecolor="none" if spot.is_hollow else COLOURS["kept"],
        )
        if spot.is_best:
            ring(axes, spot.x, spot.y)
    axes.set_ylim(low, high)
    xs = [spot.x for spot in spots]
    if is_log_range(xs):
        log_axis(axes, axes.xaxis, xs)
    else:
        number_axis(axes.xaxis)
    axes.margins(x=0.1)
    number_axis(axes.yaxis)
    axes.set_xlabel(x_label, color=COLOURS["muted"])
    axes.set_ylabel(y_label, color=COLOURS["muted"])
    dress(axes, grid="both")
    note_below(axes, sum(spot.y < low for spot in spots))
    if len(spots) <= MAX_NAMED:
        _name_spots(figure, axes, [spot for spot in spots if spot.y >= low])
    return to_svg(figure, name=name, label=f"{y_label} by {x_label}")


def ring(axes: "Axes", x: float, y: float, *, colour: str = COLOURS["alert"]) -> None:
    """A ring round a point."""
    axes.plot(x, y, "o", markersize=12, mfc="none", mec=colour, mew=1.8, zorder=5)


def _name_spots(figure: "Figure", axes: "Axes", spots: Sequence[Spot]) -> None:
    """Writes the names where they cover neither a point nor each other, as far as that can be."""
    figure.draw_without_rendering()
    to_px = axes.transData.transform
    per_pt = figure.dpi / 72
    points = np.array([to_px((spot.x, spot.y)) for spot in spots]).reshape(-1, 2)
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points.tolist()]
    inside = axes.get_window_extent()
    for spot, (x, y) in zip(spots, points.tolist(), strict=True):
        if not spot.label:
            continue
        text = shorten(spot.label)
        width, height = CAPITAL_EM * FONT_PT * per_pt * len(text), 1.1 * FONT_PT * per_pt
        options = []
        for ha, va, dx, dy in _PLACES:
            left = x + dx * per_pt - {"left": 0, "center": 0.5, "right": 1}[ha] * width
            bottom = y + dy * per_pt - {"bottom": 0, "center": 0.5, "top": 1}[va] * height
            box = (left, bottom, left + width, bottom + height)
            outside = max(0.0, inside.x0 - box[0]) + max(0.0, box[2] - inside.x1)
            options.append((sum(_overlap(box, other) for other in taken) + 99 * outside, box))
        best = min(range(len(options)), key=lambda place: options[place][0])
        ha, va, dx, dy = _PLACES[best]
        taken.append(options[best][1])
        axes.annotate(
            text,
            (spot.x, spot.y),
            xytext=(dx, dy),
            textcoords="offset points",
            ha=ha,
            va=va,
            color=COLOURS["ink"],
            fontweight="bold" if spot.is_best else "normal",
        )


_PLACES = (
    ("left", "center", 9, 0),
    ("right", "center", -9, 0),
    ("center", "bottom", 0, 8),
    ("center", "top", 0, -8),
    ("left", "bottom", 6, 6),
    ("left", "top", 6, -6),
    ("right", "bottom", -6, 6),
    ("right", "top", -6, -6),
)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)
