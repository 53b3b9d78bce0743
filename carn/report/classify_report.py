"""The page of a classification study: is tissue in super-resolved pictures still recognised.

One HTML file that needs nothing else: no network, no script, pictures within. Names come from files
and are escaped. The same report gives the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from carn.report.bcsr_report import flatten
from carn.report.page import COLOURS, inline_svg, render_page
from carn.report.plots import CURVE_COLOURS, CYCLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of a ROC curve; more cannot be told apart on a screen.
MAX_ROC_POINTS = 400
ROW_IN = 0.34
SQUARE_IN = (4.6, 4.2)
HISTORY_IN = (5.6, 4.2)
LINE_STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))


class Range(NamedTuple):
    """A fraction with its 95 % interval, None where there is none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class KindRow:
    """What came of one kind of picture.

    Attributes:
        title: its name.
        detail: the second line, such as the checkpoint; may be empty.
        is_reference: whether it is GT or LR, which no method made.
        num_crops, num_slides: of the test.
        accuracy, auc: 0..1.
        over_gt, over_bicubic: accuracy less that of GT and of bicubic on the same crops, -1..1.
        paper: accuracy that the paper reports, 0..1, or None.
    """

    title: str
    detail: str
    is_reference: bool
    num_crops: int
    num_slides: int
    accuracy: Range
    auc: Range
    over_gt: Range | None
    over_bicubic: Range | None
    paper: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Roc:
    """A ROC curve; rates 0..1, rising."""

    label: str
    false_positive: npt.NDArray[np.float64]
    true_positive: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class History:
    """How a classifier was trained, an entry an epoch; `best` is the one it is of, from 1."""

    label: str
    loss: tuple[float, ...]
    validation_accuracy: tuple[float | None, ...]
    best: int


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A crop in one kind, and how probably tumour the classifier takes it for."""

    title: str
    png: bytes
    probability: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """A crop in all kinds."""

    title: str
    is_tumor: bool
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class CorpusReport:
    """What came of one dataset.

    Attributes:
        title: its name.
        facts: where it is, what it holds.
        notes: what to know before believing the numbers.
        rows: in the order of the paper's table.
        rocs: one a row.
        histories: one a classifier.
        examples: crops that some kind was taken for the other class.
    """

    title: str
    facts: dict[str, str]
    notes: tuple[str, ...]
    rows: tuple[KindRow, ...]
    rocs: tuple[Roc, ...]
    histories: tuple[History, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifyReport:
    """All that the page shows; `config` are nested dicts of plain values."""

    title: str
    scale: int
    facts: dict[str, str]
    corpora: tuple[CorpusReport, ...]
    config: dict[str, object]


def render(report: ClassifyReport) -> str:
    """The page, a complete HTML document in UTF-8."""
    sections = [
        {
            "corpus": corpus,
            "verdict": judge(corpus),
            "best": best_row(corpus.rows),
            "accuracy_plot": plot_accuracy(corpus.rows, name=f"accuracy-{number}"),
            "roc_plot": plot_rocs(corpus.rocs, name=f"roc-{number}"),
            "roc_keys": list_keys([roc.label for roc in corpus.rocs]),
            "history_plot": plot_histories(corpus.histories, name=f"history-{number}"),
            "history_keys": list_keys([history.label for history in corpus.histories]),
            "has_paper": any(row.paper is not None for row in corpus.rows),
        }
        for number, corpus in enumerate(report.corpora)
    ]
    return render_page(
        "classify.html",
        report=report,
        sections=sections,
        settings=list(flatten(report.config)),
        percent2=format_percent2,
        points=format_points,
        fixed=format_fixed,
    )


# ----------------------------------------------------------------------------------------- words


def format_percent2(fraction: float | None) -> str:
    """A fraction as a percentage of two digits, as the paper has them; a dash where none is."""
    return "–" if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.2f}"


def format_points(fraction: float | None) -> str:
    """A difference in percentage points, signed."""
    if fraction is None or not math.isfinite(fraction):
        return "–"
    return f"{100 * fraction:+.2f}".replace("-", "−")


def format_fixed(value: float | None) -> str:
    """A number of four digits after the point."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"


def best_row(rows: Sequence[KindRow]) -> KindRow | None:
    """The method with the highest accuracy, the first of equals; GT and LR are none."""
    methods = [row for row in rows if not row.is_reference]
    return max(methods, key=lambda row: row.accuracy.value) if methods else None


def judge(corpus: CorpusReport) -> tuple[bool, str] | None:
    """Whether the best trained method is better than bicubic, in a sentence; None without any."""
    methods = [row for row in corpus.rows if row.over_bicubic and not row.is_reference]
    best = best_row(methods)
    if best is None or best.over_bicubic is None:
        return None
    value, low, high = best.over_bicubic
    gain = f"{best.title}: {format_percent2(best.accuracy.value)} % accuracy, "
    gain += f"{format_points(value)} points to bicubic"
    if low is None or high is None:
        return False, f"{gain} (one slide: no interval, and nothing to say of other slides)."
    gain += f" (95 % interval {format_points(low)} to {format_points(high)})"
    if low > 0:
        return True, f"{gain}: better than bicubic."
    if high < 0:
        return False, f"{gain}: worse than bicubic."
    return False, f"{gain}: these crops do not tell it from bicubic."


# ----------------------------------------------------------------------------------------- plots


class Key(NamedTuple):
    """What a line looks like: a CSS colour, and a CSS border style."""

    label: str
    colour: str
    style: str


def list_keys(labels: Sequence[str]) -> list[Key]:
    """How lines of these names are drawn, in their order."""
    styles = ("solid", "dashed", "dotted")
    return [
        Key(
            label,
            f"var(--{CYCLE[place % len(CYCLE)]})",
            styles[place // len(CYCLE) % len(styles)],
        )
        for place, label in enumerate(labels)
    ]


def plot_accuracy(rows: Sequence[KindRow], *, name: str) -> Markup | None:
    """Accuracy of each kind with its interval, beside the paper's, as inline SVG."""
    from matplotlib.figure import Figure

    if not rows:
        return None
    figure = Figure(figsize=(7.6, 0.9 + ROW_IN * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        value, low, high = row.accuracy
        if low is not None and high is not None:
            ends = [100 * low, 100 * high]
            axes.plot(ends, [place, place], color=COLOURS["kept"], linewidth=2.2, alpha=0.55)
        axes.plot([100 * value], [place], "o", color=COLOURS["kept"], markersize=6.5)
        if row.paper is not None:
            axes.plot(
                [100 * row.paper],
                [place],
                marker="D",
                color=COLOURS["surplus"],
                markerfacecolor="none",
                markersize=6,
                linestyle="none",
                markeredgewidth=1.4,
            )
    axes.set_yticks(places, [row.title.replace("$", r"\$") for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("accuracy, %", color=COLOURS["muted"])
    _dress(axes, grid="x")
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    return inline_svg(figure, name=name, label="Accuracy of each kind of picture")


def plot_rocs(rocs: Sequence[Roc], *, name: str) -> Markup | None:
    """ROC curves as inline SVG; their names stand beside it."""
    from matplotlib.figure import Figure

    if not rocs:
        return None
    figure = Figure(figsize=SQUARE_IN, layout="constrained")
    axes = figure.add_subplot()
    for place, roc in enumerate(rocs):
        false, true = _thin(roc)
        axes.plot(100 * false, 100 * true, linewidth=1.5, clip_on=False, **_style(place))
    axes.plot([0, 100], [0, 100], color=COLOURS["line"], linewidth=1)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xlabel("normal crops taken for tumour, %", color=COLOURS["muted"])
    axes.set_ylabel("tumour crops found, %", color=COLOURS["muted"])
    _dress(axes, grid="both")
    return _with_variables(inline_svg(figure, name=name, label="ROC curves"))


def plot_histories(histories: Sequence[History], *, name: str) -> Markup | None:
    """Loss and validation accuracy over epochs, the epoch that was taken ringed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not histories:
        return None
    figure = Figure(figsize=HISTORY_IN, layout="constrained")
    has_scores = any(x is not None for h in histories for x in h.validation_accuracy)
    upper, lower = (
        figure.subplots(2, 1, sharex=True) if has_scores else (figure.add_subplot(), None)
    )
    for place, history in enumerate(histories):
        epochs = np.arange(1, len(history.loss) + 1)
        dots: dict[str, Any] = {"marker": ".", "markersize": 5} if len(epochs) <= 40 else {}
        upper.plot(epochs, history.loss, linewidth=1.5, **dots, **_style(place))
        if lower is not None:
            scores = [np.nan if x is None else 100 * x for x in history.validation_accuracy]
            lower.plot(epochs, scores, linewidth=1.5, **dots, **_style(place))
            lower.plot(
                [history.best],
                [scores[history.best - 1]],
                marker="o",
                markersize=8,
                markerfacecolor="none",
                color=COLOURS["ink"],
                clip_on=False,
            )
    upper.set_ylabel("training loss", color=COLOURS["muted"])
    last = upper if lower is None else lower
    last.set_xlabel("epochs", color=COLOURS["muted"])
    last.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    _dress(upper, grid="y")
    if lower is not None:
        lower.set_ylabel("validation acc., %", color=COLOURS["muted"])
        _dress(lower, grid="y")
    return _with_variables(inline_svg(figure, name=name, label="Training of the classifier"))


def _style(place: int) -> dict[str, Any]:
    colour = CYCLE[place % len(CYCLE)]
    return {
        "color": CURVE_COLOURS.get(colour) or COLOURS[colour],  # type: ignore[index]
        "linestyle": LINE_STYLES[place // len(CYCLE) % len(LINE_STYLES)],
    }


def _thin(roc: Roc) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    num = len(roc.false_positive)
    kept = np.unique(np.linspace(0, num - 1, min(num, MAX_ROC_POINTS)).round().astype(int))
    return roc.false_positive[kept], roc.true_positive[kept]


def _with_variables(svg: Markup) -> Markup:
    text = str(svg)
    for colour, code in CURVE_COLOURS.items():
        text = text.replace(code, f"var(--{colour})")
    return Markup(text)


def _dress(axes: "Axes", *, grid: str) -> None:
    axes.tick_params(colors=COLOURS["line"], labelcolor=COLOURS["muted"])
    axes.grid(axis=grid, color=COLOURS["line"], linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["line"])
