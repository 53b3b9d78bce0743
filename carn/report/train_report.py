"""The page a person opens during or after a training: does it learn, and is it better than bicubic.

One HTML file that needs nothing else: no network, no script, pictures within. Names come from files
and are escaped. The same report gives the same bytes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from carn.report.bcsr_report import flatten
from carn.report.page import NUM_BINS, Series, format_count, plot_histogram, plural, render_page
from carn.report.plots import Curve, Mark, list_legend, plot_curves

__all__ = ["CropRow", "Curve", "TrainReport", "render"]

MAX_TILES = 200
MAX_PRINTED_TILES = 40
NUM_HIGHLIGHTED = 5
# Room for a row of crops on a wide window, and the gap between two of them.
ROW_PX = 1150
GAP_PX = 14
LOSS_SIZE_IN = (7.6, 4.1)
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


@dataclass(frozen=True, kw_only=True)
class CropRow:
    """One place of a validation tile, in several versions side by side.

    Attributes:
        title: which tile, and where in it.
        detail: the second line; may be empty.
        images: caption and PNG of each version, in this order, such as "LR (nearest)",
            "bicubic 33.1 dB", "SR 35.0 dB", "HR". Smaller ones are shown as large as the largest.
    """

    title: str
    detail: str
    images: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainReport:
    """All that the page shows.

    Attributes:
        title: heading of the page and name of its window.
        facts: the table at the top, in this order: model, scale, dataset, updates, code version ...
        notices: "good" or "bad", and what there is to say, beside what the page finds by itself:
            the score against bicubic, losses that are not finite, tiles that got worse.
        loss_terms: the loss and its terms over updates, as they were logged.
        validation_psnr: dB over updates, the form of the paper's Figure 6. The first is the one
            that `best_step` speaks of; others, such as that of averaged weights, may follow.
        validation_ssim: 0..1 over updates, with the labels of `validation_psnr`.
        bicubic_psnr, bicubic_ssim: scores of bicubic upscaling on the same tiles, or None.
        best_step: updates done when the best checkpoint was written, or None.
        learning_rate: over updates; empty when it was not recorded.
        images_per_s: HR patches trained on in each second, over updates; empty when not recorded.
        crops: pictures to judge by eye.
        validation_table: (tile, bicubic PSNR, SR PSNR, bicubic SSIM, SR SSIM) of each tile, in any
            order; the 200 that gain least are listed.
        convention: how PSNR and SSIM are measured: channel, border, data range, averaging.
        config: the resolved configuration of the run, nested dicts of plain values.
        conditions: rows like those of `validation_table`, means over the tiles under each way of
            making LR; bicubic is that of the same LR. None where there is one way.
    """

    title: str
    facts: dict[str, str]
    notices: tuple[tuple[Literal["good", "bad"], str], ...]
    loss_terms: tuple[Curve, ...]
    validation_psnr: tuple[Curve, ...]
    validation_ssim: tuple[Curve, ...]
    bicubic_psnr: float | None
    bicubic_ssim: float | None
    best_step: int | None
    learning_rate: Curve
    images_per_s: Curve
    crops: tuple[CropRow, ...]
    validation_table: tuple[tuple[str, float, float, float, float], ...]
    convention: str
    config: dict[str, object]
    conditions: tuple[tuple[str, float, float, float, float], ...] = ()


class Notice(NamedTuple):
    """One line of verdict at the top of the page; `anchor` is the section that explains it."""

    is_good: bool
    text: str
    anchor: str = ""


class Gain(NamedTuple):
    """The scores of one tile, and what SR gains on bicubic: PSNR in dB, SSIM as such."""

    tile: str
    bicubic_psnr: float
    sr_psnr: float
    bicubic_ssim: float
    sr_ssim: float
    psnr_gain: float
    ssim_gain: float

    @property
    def is_worse(self) -> bool:
        """Whether the PSNR is below that of bicubic upscaling."""
        return self.psnr_gain < 0

    @property
    def is_unscored(self) -> bool:
        """Whether a PSNR is not a number."""
        return math.isnan(self.psnr_gain)


class Score(NamedTuple):
    """What one curve reached at one step; None where there is no finite value."""

    label: str
    place: str
    step: int | None
    psnr: float | None
    psnr_gain: float | None
    ssim: float | None
    ssim_gain: float | None


class LossChange(NamedTuple):
    """Mean of a loss term over the first and the last 5 % of its finite values, at least one."""

    first: float
    last: float


class Picture(NamedTuple):
    """One version of a crop, its width on the screen, and whether that is more than it has."""

    caption: str
    png: bytes
    width_px: int
    aspect: str
    is_enlarged: bool


def render(report: TrainReport) -> str:
    """The page, a complete HTML document in UTF-8.

    Raises:
        ValueError: a picture is no PNG.
    """
    gains = rank_tiles(report.validation_table)
    max_step = _max_step(report)
    return render_page(
        "train.html",
        report=report,
        notices=find_notices(report, gains),
        scores=list_scores(report),
        conditions=list_gains(report.conditions),
        psnr_plot=_plot_validation(report, "psnr", max_step),
        ssim_plot=_plot_validation(report, "ssim", max_step),
        loss_plot=plot_curves(
            report.loss_terms,
            name="loss",
            y_label="loss",
            max_step=max_step,
            y_scale="log",
            size_in=LOSS_SIZE_IN,
        ),
        loss_changes=[measure_change(curve) for curve in report.loss_terms],
        rate_plot=plot_curves(
            [report.learning_rate],
            name="rate",
            y_label="learning rate",
            max_step=max_step,
            y_scale="log",
        ),
        speed_plot=plot_curves(
            [report.images_per_s],
            name="speed",
            y_label="images/s",
            max_step=max_step,
            y_scale="from zero",
        ),
        median_speed=_median(report.images_per_s),
        list_legend=list_legend,
        crops=[(row, fit_pictures(row)) for row in report.crops],
        gain_plot=_plot_gains(gains),
        gains=gains[:MAX_TILES],
        num_tiles=len(gains),
        num_worse=sum(gain.is_worse for gain in gains),
        num_printed=MAX_PRINTED_TILES,
        num_highlighted=NUM_HIGHLIGHTED,
        quantiles=measure_spread(gains),
        means=_mean_gain(gains),
        settings=list(flatten(report.config)),
        signed=format_signed,
        fixed=format_fixed,
    )


def format_fixed(value: float | None, digits: int) -> str:
    """A number with so many digits after the point; a dash when there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−").replace("inf", "∞")


def format_signed(value: float | None, digits: int) -> str:
    """As `format_fixed`, with a plus before what is not negative: `+1.94`."""
    text = format_fixed(value, digits)
    return text if text[0] in "–−" else f"+{text}"


# -------------------------------------------------------------------------------------- verdicts


def find_notices(report: TrainReport, gains: Sequence[Gain]) -> list[Notice]:
    """What to know of the run: the score first, then the bad news, then the good."""
    rest = [Notice(kind == "good", text) for kind, text in report.notices]
    lost = [(curve, curve.steps[~np.isfinite(curve.values)]) for curve in report.loss_terms]
    terms = [
        f"{curve.label}: {plural(steps.size, 'value')}, the first at step {steps[0]:,}"
        for curve, steps in lost
        if steps.size
    ]
    if terms:
        rest.append(Notice(False, f"The loss is not finite ({'; '.join(terms)}).", "losses"))
    tiles = plural(len(gains), "validation tile")
    if num_worse := sum(gain.is_worse for gain in gains):
        text = f"Lower PSNR than bicubic on {format_count(num_worse)} of {tiles}."
        rest.append(Notice(False, text, "tiles"))
    if num_unscored := sum(gain.is_unscored for gain in gains):
        text = f"PSNR is not a number on {format_count(num_unscored)} of {tiles}."
        rest.append(Notice(False, text, "tiles"))
    return [judge_score(report), *sorted(rest, key=lambda notice: notice.is_good)]


def judge_score(report: TrainReport) -> Notice:
    """The PSNR at the best step, or the last there is, against that of bicubic upscaling."""
    found = _find_headline(report)
    if found is None:
        return Notice(False, "No validation PSNR was recorded.", "validation")
    step, psnr, is_best = found
    text = f"PSNR {format_fixed(psnr, 2)} dB at step {step:,}"
    if not is_best:
        text += ", the last validation"
    if not is_best and report.best_step is not None:
        text += f" (none is recorded for the best step, {report.best_step:,})"
    if report.bicubic_psnr is None:
        return Notice(True, f"{text}. There is no score of bicubic to compare it with.")
    gain = psnr - report.bicubic_psnr
    bicubic = f"bicubic ({format_fixed(report.bicubic_psnr, 2)} dB)"
    if gain > 0:
        return Notice(True, f"{text}: {format_signed(gain, 2)} dB over {bicubic}.")
    words = f"{format_fixed(-gain, 2)} dB below" if gain < 0 else "no better than"
    return Notice(False, f"{text}: {words} {bicubic}.", "validation")


def _find_headline(report: TrainReport) -> tuple[int, float, bool] | None:
    """Step and PSNR that the page speaks of, and whether it is the best step."""
    for curve in report.validation_psnr:
        best = _value_at(curve, report.best_step)
        if best is not None and report.best_step is not None:
            return report.best_step, best, True
    for curve in report.validation_psnr:
        step = _last_step(curve)
        last = _value_at(curve, step)
        if last is not None and step is not None:
            return step, last, False
    return None


def _value_at(curve: Curve | None, step: int | None) -> float | None:
    if curve is None or step is None:
        return None
    values = curve.values[curve.steps == step]
    return float(values[0]) if values.size and np.isfinite(values[0]) else None


def _last_step(curve: Curve | None) -> int | None:
    if curve is None or not np.isfinite(curve.values).any():
        return None
    return int(curve.steps[np.isfinite(curve.values)][-1])


def list_scores(report: TrainReport) -> list[Score]:
    """The scores of each curve at the best step and at its last, PSNR and SSIM joined by label."""
    return [score for label in _labels(report) for score in _scores_of(report, label)]


def _labels(report: TrainReport) -> list[str]:
    return list(dict.fromkeys(c.label for c in (*report.validation_psnr, *report.validation_ssim)))


def _scores_of(report: TrainReport, label: str) -> Iterator[Score]:
    psnr = next((curve for curve in report.validation_psnr if curve.label == label), None)
    ssim = next((curve for curve in report.validation_ssim if curve.label == label), None)
    last = max((s for s in (_last_step(psnr), _last_step(ssim)) if s is not None), default=None)
    places = {report.best_step: "at the best step"}
    places[last] = "at the best step, the last" if last == report.best_step else "last"
    for step, place in places.items():
        psnr_value, ssim_value = _value_at(psnr, step), _value_at(ssim, step)
        if psnr_value is not None or ssim_value is not None:
            yield Score(
                label,
                place,
                step,
                psnr_value,
                _subtract(psnr_value, report.bicubic_psnr),
                ssim_value,
                _subtract(ssim_value, report.bicubic_ssim),
            )


def _subtract(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value - reference


# ----------------------------------------------------------------------------------------- tiles


def rank_tiles(table: Sequence[tuple[str, float, float, float, float]]) -> list[Gain]:
    """The tiles by their gain in PSNR, the least first; what is not a number before all."""
    return sorted(
        list_gains(table),
        key=lambda g: (-math.inf if math.isnan(g.psnr_gain) else g.psnr_gain, g.tile),
    )


def list_gains(table: Sequence[tuple[str, float, float, float, float]]) -> list[Gain]:
    """Add to each row, in their order, what SR gains on bicubic."""
    return [Gain(*row, _gain(row[1], row[2]), _gain(row[3], row[4])) for row in table]


def _gain(bicubic: float, sr: float) -> float:
    # Two exact copies both score infinity: no gain, where the difference would not be a number.
    return 0.0 if bicubic == sr else sr - bicubic


def _mean_gain(gains: Sequence[Gain]) -> Gain | None:
    """Means over the tiles whose scores are all finite, or None when there is no such tile."""
    rows = [gain[1:] for gain in gains if all(map(math.isfinite, gain[1:]))]
    if not rows:
        return None
    of = "" if len(rows) == len(gains) else f" of {format_count(len(gains))}, where finite"
    return Gain(f"mean of {format_count(len(rows))}{of}", *np.mean(rows, axis=0).tolist())


def measure_spread(gains: Sequence[Gain]) -> list[tuple[str, float]]:
    """Quantiles of the finite gains in PSNR, dB, with their names; none when there is no gain."""
    finite = _finite_gains(gains)
    return [(name, float(np.quantile(finite, q))) for name, q in QUANTILES.items() if finite.size]


def _finite_gains(gains: Sequence[Gain]) -> npt.NDArray[np.float64]:
    return np.array([gain.psnr_gain for gain in gains if math.isfinite(gain.psnr_gain)])


def measure_change(curve: Curve) -> LossChange | None:
    """How a loss term began and where it stands; None when nothing of it is finite."""
    finite = curve.values[np.isfinite(curve.values)]
    num = math.ceil(0.05 * finite.size)
    return LossChange(float(finite[:num].mean()), float(finite[-num:].mean())) if num else None


def _median(curve: Curve) -> float | None:
    finite = curve.values[np.isfinite(curve.values)]
    return float(np.median(finite)) if finite.size else None


# ----------------------------------------------------------------------------------------- plots


def _max_step(report: TrainReport) -> int:
    curves = (
        *report.loss_terms,
        *report.validation_psnr,
        *report.validation_ssim,
        report.learning_rate,
        report.images_per_s,
    )
    return max((int(curve.steps[-1]) for curve in curves if curve.steps.size), default=0)


def _plot_validation(
    report: TrainReport, metric: Literal["psnr", "ssim"], max_step: int
) -> Markup | None:
    if metric == "psnr":
        curves, bicubic, y_label = report.validation_psnr, report.bicubic_psnr, "PSNR, dB"
    else:
        curves, bicubic, y_label = report.validation_ssim, report.bicubic_ssim, "SSIM"
    digits = 2 if metric == "psnr" else 4
    found = ((curve, _value_at(curve, report.best_step)) for curve in curves)
    best = next((value for _, value in found if value is not None), None)
    mark = None
    if best is not None and report.best_step is not None:
        mark = Mark(report.best_step, best, f"{best:.{digits}f} at {report.best_step:,}")
    reference = None if bicubic is None else (bicubic, f"bicubic {bicubic:.{digits}f}")
    return plot_curves(
        curves, name=metric, y_label=y_label, max_step=max_step, reference=reference, mark=mark
    )


def _plot_gains(gains: Sequence[Gain]) -> Markup | None:
    finite = _finite_gains(gains)
    return plot_histogram(
        [
            Series(label="worse than bicubic", values=finite[finite < 0], colour="alert"),
            Series(label="as good or better", values=finite[finite >= 0], colour="kept"),
        ],
        name="gain",
        x_label="gain in PSNR over bicubic, dB",
        x_range=_range_around_zero(finite) if finite.size else None,
        limit=(0.0, "bicubic"),
    )


def _range_around_zero(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """A range that holds the values, and in which 0 is the edge of a bin of the histogram."""
    below, above = max(0.0, -float(values.min())), max(0.0, float(values.max()))
    if below + above < 1e-9:
        return -1.0, 1.0
    # One bin at least is left above 0, where 0 itself belongs.
    num_below = min(NUM_BINS - 1, math.ceil(NUM_BINS * below / (below + above)))
    num_above = NUM_BINS - num_below
    # A little more than it takes, lest rounding push the outermost value out of the range.
    width = (1 + 1e-9) * max(below / max(1, num_below), above / num_above)
    return -num_below * width, num_above * width


# ----------------------------------------------------------------------------------------- crops


def fit_pictures(row: CropRow) -> list[Picture]:
    """The pictures of a row, all as wide as a whole multiple of the widest that fits in one line.

    Whole multiples, because a picture whose pixels are not all of one size cannot be judged.

    Raises:
        ValueError: a picture is no PNG.
    """
    if not row.images:
        return []
    sizes = [_png_size(png, f"crop {row.title!r}, {caption!r}") for caption, png in row.images]
    width, height = max(sizes)
    room = (ROW_PX - (len(sizes) - 1) * GAP_PX) // len(sizes)
    shown = width * max(1, room // width)
    return [
        Picture(caption, png, shown, f"{width} / {height}", own_width < shown)
        for (caption, png), (own_width, _) in zip(row.images, sizes, strict=True)
    ]


def _png_size(png: bytes, name: str) -> tuple[int, int]:
    # Source: PNG, third edition, 5.2 and 11.2.1 (signature, then IHDR with width and height),
    # https://www.w3.org/TR/png-3/
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise ValueError(f"{name}: the picture is no PNG; encode it as one, or leave it out")
    width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
    if not (width and height):
        raise ValueError(f"{name}: the PNG is {width} x {height} px; leave it out")
    return width, height
