"""Curves over the updates of a training, as inline SVG in the colours of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from carn.report.page import COLOURS, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

YScale = Literal["linear", "log", "from zero"]

# What page.COLOURS has no use for; train.html, sweep.html and classify.html of the templates hold
# the variables of these names, with which the curves follow the page into the dark theme.
# Source: Okabe and Ito, https://jfly.uni-koeln.de/color/
CURVE_COLOURS: Mapping[str, str] = {
    "green": "#009e73",
    "purple": "#cc79a7",
    "sky": "#56b4e9",
    "vermillion": "#d55e00",
}
# Seven, as many as there are networks to compare.
CYCLE = ("kept", "surplus", "green", "purple", "muted", "sky", "vermillion")
DASHES = (0, (4, 2))
MAX_POINTS = 600
# Up to so many points, each gets a dot, for there was a measurement and nothing between.
MAX_DOTS = 60
# A logarithmic axis of less than this ratio would stand without a label.
MIN_LOG_RATIO = 5.0
SMALL_IN = (6.4, 3.2)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One line of a plot.

    Attributes:
        label: its name in the legend.
        steps: (N,) updates done when the value was taken, each larger than the one before.
        values: (N,) any unit. Infinite values and those that are not a number are gaps.
        is_dashed: whether the line is broken, to tell it from another.

    Raises:
        ValueError: steps and values are not of one length, or the steps do not rise.
    """

    label: str
    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    is_dashed: bool = False

    def __post_init__(self) -> None:
        if self.steps.ndim != 1 or self.steps.shape != self.values.shape:
            raise ValueError(
                f"curve {self.label!r}: steps have shape {self.steps.shape} and values "
                f"{self.values.shape}; give both one entry for each measurement"
            )
        falls = np.flatnonzero(np.diff(self.steps) <= 0)
        if falls.size:
            first, second = self.steps[falls[0] : falls[0] + 2]
            raise ValueError(
                f"curve {self.label!r}: step {second} follows step {first}; after a resumed run, "
                "leave out what was done again"
            )


class LegendEntry(NamedTuple):
    """What a curve looks like; `colour` is a CSS value, `has_values` whether it is drawn at all."""

    label: str
    colour: str
    is_dashed: bool
    has_values: bool


class Mark(NamedTuple):
    """A point to ring, in the units of the axes, and what to write at it."""

    step: int
    value: float
    text: str


def downsample(
    curve: Curve, *, max_points: int = MAX_POINTS
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Steps and values of at most `max_points` points, which is at least 3.

    The first and the last point are kept; those between become the means of bins that hold as many
    points each, give or take one. A mean leaves out what is not finite; it is not a number only
    where nothing else is there.
    """
    num = curve.steps.size
    is_finite = np.isfinite(curve.values)
    steps = curve.steps.astype(np.float64)
    if num <= max_points:
        return steps, np.where(is_finite, curve.values, np.nan)
    num_bins = max_points - 2
    starts = 1 + np.arange(num_bins) * (num - 2) // num_bins
    sizes = np.diff(starts, append=num - 1)
    counts = np.add.reduceat(is_finite[:-1].astype(np.int64), starts)
    sums = np.add.reduceat(np.where(is_finite, curve.values, 0.0)[:-1], starts)
    means = np.divide(sums, counts, out=np.full(num_bins, np.nan), where=counts > 0)
    ends = np.where(is_finite, curve.values, np.nan)[[0, -1]]
    mean_steps = np.add.reduceat(steps[:-1], starts) / sizes
    return (
        np.concatenate([steps[:1], mean_steps, steps[-1:]]),
        np.concatenate([ends[:1], means, ends[1:]]),
    )


def list_legend(curves: Sequence[Curve]) -> list[LegendEntry]:
    """How `plot_curves` draws these curves.

    The legend stands beside the SVG, not in it: there the page wraps it, and names of any script
    and with any sign in them are plain text.
    """
    return [
        LegendEntry(
            label=curve.label,
            colour=f"var(--{CYCLE[place % len(CYCLE)]})",
            is_dashed=curve.is_dashed,
            has_values=bool(np.isfinite(curve.values).any()),
        )
        for place, curve in enumerate(curves)
    ]


def plot_curves(
    curves: Sequence[Curve],
    *,
    name: str,
    y_label: str,
    max_step: int,
    y_scale: YScale = "linear",
    reference: tuple[float, str] | None = None,
    mark: Mark | None = None,
    size_in: tuple[float, float] = SMALL_IN,
) -> Markup | None:
    """The curves over updates as inline SVG, or None when there is no finite value to draw.

    Args:
        curves: drawn in the colours of `CYCLE`; those without a finite value are left out.
        name: prefix of the ids within the SVG, unique on the page: letters, digits and hyphens.
        y_label: what is measured, with its unit.
        max_step: right end of the axis of updates, the same for all plots of a run.
        y_scale: "log" falls back to linear where the values are close, and is linear round 0 where
            some are not positive.
        reference: height of a level line, and what to write at it.
        mark: a point to ring.
        size_in: width and height; text has 10 points of 72 to the inch.

    Raises:
        ValueError: the name cannot stand in an id.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lines = [(place, curve, *downsample(curve)) for place, curve in enumerate(curves)]
    lines = [line for line in lines if np.isfinite(line[3]).any()]
    if not lines:
        return None
    figure = Figure(figsize=size_in, layout="constrained")
    axes = figure.add_subplot()
    is_dense = any(steps.size > MAX_DOTS for _, _, steps, _ in lines)
    for place, curve, steps, values in reversed(lines):
        colour = CYCLE[place % len(CYCLE)]
        axes.plot(
            steps,
            values,
            color=CURVE_COLOURS.get(colour) or COLOURS[colour],  # type: ignore[index]
            linewidth=1.1 if is_dense else 1.6,
            linestyle=DASHES if curve.is_dashed else "solid",
            marker="o" if steps.size <= MAX_DOTS else "",
            markersize=3,
        )
    _scale_y(axes, [values for *_, values in lines], y_scale, reference)
    axes.set_xlim(0, 1.02 * max(1, max_step))
    _note_start(axes, [(steps, values) for _, _, steps, values in lines])
    if reference is not None:
        _draw_reference(axes, *reference)
    if mark is not None:
        _draw_mark(axes, mark)
    axes.set_xlabel("updates", color=COLOURS["muted"])
    axes.set_ylabel(y_label, color=COLOURS["muted"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.tick_params(colors=COLOURS["line"], labelcolor=COLOURS["muted"])
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["line"])
    svg = str(inline_svg(figure, name=name, label=f"{y_label} over updates"))
    for colour, code in CURVE_COLOURS.items():
        svg = svg.replace(code, f"var(--{colour})")
    return Markup(svg)


# ---------------------------------------------------------------------------------------- y axis


def _scale_y(
    axes: "Axes",
    values: Sequence[npt.NDArray[np.float64]],
    y_scale: YScale,
    reference: tuple[float, str] | None,
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    finite = np.concatenate(values)
    finite = finite[np.isfinite(finite)]
    low, high = float(finite.min()), float(finite.max())
    if y_scale == "log" and low > 0 and high / low >= MIN_LOG_RATIO:
        axes.set_yscale("log")
        is_short = high / low < 200
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_short else (1.0,)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif y_scale == "log" and low <= 0 and (finite > 0).any():
        axes.set_yscale("symlog", linthresh=float(finite[finite > 0].min()))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        if y_scale == "from zero":
            low = min(0.0, low)
        else:
            low = min(_low_after_start(part) for part in values if np.isfinite(part).any())
        if reference is not None:
            low, high = min(low, reference[0]), max(high, reference[0])
        span = (high - low) or abs(high) or 1.0
        axes.set_ylim(low if y_scale == "from zero" else low - 0.14 * span, high + 0.18 * span)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))


def _low_after_start(values: npt.NDArray[np.float64]) -> float:
    """The least value once the first ones, far below all that follows, are past.

    A network that has learnt nothing yet may score 10 dB; with that in the frame, the tenths of a
    dB that matter would be one level line. A fall later in the run stays in the frame.
    """
    finite = values[np.isfinite(values)]
    high, quartile = float(finite.max()), float(np.quantile(finite, 0.25))
    is_near = finite >= quartile - 2 * (high - quartile)
    return float(finite[int(np.argmax(is_near)) :].min())


def format_tick(value: float) -> str:
    """A number as short as it can be: `12,000`, `0.5`, `2e-4`; up to 6 digits."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.5e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "−")


# ----------------------------------------------------------------------------------------- marks


def _note_start(
    axes: "Axes", lines: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
) -> None:
    """Says what value the curves start from where that is below the frame."""
    bottom = axes.get_ylim()[0]
    hidden = [(steps[values < bottom], values[values < bottom]) for steps, values in lines]
    hidden = [(steps, values) for steps, values in hidden if values.size]
    if hidden:
        axes.annotate(
            f"from {format_tick(float(f'{min(values.min() for _, values in hidden):.3g}'))}",
            (max(steps.max() for steps, _ in hidden), 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(12, 4),
            textcoords="offset points",
            ha="left",
            va="bottom",
            color=COLOURS["muted"],
        )


def _draw_reference(axes: "Axes", value: float, text: str) -> None:
    low, high = axes.get_ylim()
    is_high = value > (low + high) / 2
    axes.axhline(value, color=COLOURS["alert"], linewidth=1.3, linestyle=DASHES, zorder=1)
    axes.annotate(
        text,
        (1.0, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3 if is_high else -3),
        textcoords="offset points",
        ha="right",
        va="bottom" if is_high else "top",
        color=COLOURS["alert"],
    )


def _draw_mark(axes: "Axes", mark: Mark) -> None:
    is_right_half = mark.step > sum(axes.get_xlim()) / 2
    axes.plot(
        [mark.step],
        [mark.value],
        color=COLOURS["ink"],
        marker="o",
        markersize=8,
        markerfacecolor="none",
        markeredgewidth=1.6,
        clip_on=False,
    )
    axes.annotate(
        mark.text,
        (mark.step, mark.value),
        xytext=(6 if is_right_half else -6, 8),
        textcoords="offset points",
        ha="right" if is_right_half else "left",
        va="bottom",
        color=COLOURS["ink"],
        fontweight="bold",
    )
