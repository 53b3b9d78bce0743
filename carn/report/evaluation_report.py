"""The page a person opens after an evaluation: which model is better, by how much, and is it so.

One HTML file that needs nothing else: no network, no script, pictures within. Names come from files
and are escaped. The same report gives the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from markupsafe import Markup

from carn.report.evaluation_records import (
    Comparison,
    ConditionRow,
    CropStrip,
    EvaluationReport,
    ModelRow,
    TimingRow,
)
from carn.report.evaluation_verdicts import find_bicubic, find_notices
from carn.report.page import plural, render_page
from carn.report.score_plots import Dot, Spot, plot_dots, plot_scatter, plot_spread
from carn.report.sr_report import format_duration
from carn.report.train_report import format_fixed, format_signed

__all__ = ["Comparison", "CropStrip", "EvaluationReport", "ModelRow", "TimingRow", "render"]

Column = Literal["psnr_db", "ssim", "psnr_y_db", "ssim_y", "lpips"]

COLUMNS: tuple[Column, ...] = ("psnr_db", "ssim", "psnr_y_db", "ssim_y", "lpips")
# A difference of so many dB is half way between linear and logarithmic on its axis. The paper's own
# scores of one and the same configuration differ by 0.027 dB (Tables 2, 3 and 4).
KNEE_DB = 0.03
TICKS_DB = (0.0, 0.1, 1.0, 0.01, 0.3, 3.0, 10.0, 0.03, 30.0)
MIN_TICK_GAP = 0.12
MAX_ROWS = 200
PICTURE_PX = 176
TIME_SIZE_IN = (6.4, 4.2)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class TableRow(NamedTuple):
    """A row of the table, its gains over bicubic in dB, and the columns in which it is best."""

    row: ModelRow
    gain_db: float | None
    paper_gain_db: float | None
    best: frozenset[Column]


class Block(NamedTuple):
    """All rows of one scale, and a plot of what its title says."""

    scale: int
    rows: list[TableRow]
    has_lpips: bool
    plot_title: str
    plot: Markup | None
    has_paper: bool


class ConditionCell(NamedTuple):
    """The scores of a model under a condition, and whether its gain is the most and below 0."""

    row: ConditionRow
    is_best: bool
    is_worse: bool
    is_slide_worse: bool


class ConditionTable(NamedTuple):
    """Models by condition at one scale; None where a model has no scores."""

    scale: int
    rows: list[tuple[str, list[ConditionCell | None]]]


class ForestRow(NamedTuple):
    """A comparison, and where its numbers stand on the axis of its block, in percent from left."""

    comparison: Comparison
    at: float | None
    low: float | None
    high: float | None
    is_clear: bool


class Forest(NamedTuple):
    """The comparisons of one scale, and the ticks of their axis: percent from left, and text."""

    scale: int
    rows: list[ForestRow]
    ticks: list[tuple[float, str]]


class TimePlot(NamedTuple):
    """PSNR over time at one scale on one machine."""

    scale: int
    machine: str
    plot: Markup


def render(report: EvaluationReport) -> str:
    """The page, a complete HTML document in UTF-8.

    Raises:
        ValueError: a picture is no PNG, or shows less than one pixel.
    """
    blocks = list_blocks(report.rows)
    return render_page(
        "evaluation.html",
        report=report,
        facts=_list_facts(report),
        notices=find_notices(report),
        blocks=blocks,
        has_lpips=any(block.has_lpips for block in blocks),
        has_star=any(row.variant == "*" for row in report.rows),
        has_paper=any(block.has_paper for block in blocks),
        has_paper_params=any(row.paper_params is not None for row in report.rows),
        condition_tables=list_condition_tables(report) if len(report.conditions) > 1 else [],
        forests=list_forests(report.comparisons),
        max_rows=MAX_ROWS,
        time_plots=list_time_plots(report),
        timings=_order_timings(report.timings),
        machines=sorted({_machine(row) for row in report.timings}),
        machine_of=_machine,
        has_paper_time=any(row.paper_seconds is not None for row in report.timings),
        spread_plot=_plot_gains(report.spread),
        spread=[(label, measure_gains(gains)) for label, gains in report.spread],
        crops=[(strip, width_of(strip), best_names(strip)) for strip in report.crops],
        fixed=format_fixed,
        signed=format_signed,
        seconds=format_seconds,
        power=format_power,
        probability=format_probability,
        spread_text=format_spread,
        best_at=format_best_steps,
        image=format_image,
        torch_versions=sorted({row.torch_version for row in report.timings}),
    )


# ------------------------------------------------------------------------------------------ words


def format_with_spread(value: float, spread: float | None, digits: int) -> str:
    """`38.12 ± 0.03`; without the spread where there is none."""
    text = format_fixed(value, digits)
    is_known = spread is not None and math.isfinite(spread) and math.isfinite(value)
    return f"{text} ± {format_fixed(spread, digits)}" if is_known else text


def format_spread(value: float | None, spread: float | None, digits: int) -> str:
    """`± 0.03`, to stand below its value; nothing where there is none."""
    is_known = None not in (value, spread) and math.isfinite(value) and math.isfinite(spread)  # type: ignore[arg-type]
    return f"± {format_fixed(spread, digits)}" if is_known else ""


def format_seconds(seconds: float) -> str:
    """Three digits in the unit that fits: `28.3 ms`, `1.24 s`; a dash where it is no number."""
    if not math.isfinite(seconds):
        return "–"
    long = f"{seconds:,.0f} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:#.3g}".rstrip(".") + f" {unit}" if seconds < 1000 else long
    return f"{seconds / 1e-6:.3g} µs"


def format_power(number: int) -> str:
    """A count of parameters or FLOPs to four digits: `1.380 M`; a dash for none."""
    if number <= 0:
        return "–"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.{max(0, 3 - math.floor(math.log10(value)))}f} {unit}"
    return str(number)


def format_best_steps(row: ModelRow) -> list[str]:
    """After which update the weights were taken, in lines; none where that is no news."""
    steps = row.best_steps
    if not steps or set(steps) == {row.steps}:
        return []
    low, high = min(steps), max(steps)
    return [f"best at {low:,}"] + ([] if low == high else [f"to {high:,}"])


def format_image(row: TimingRow) -> str:
    """The image that was timed: `512 × 512 px`."""
    return f"{row.lr_width_px} × {row.lr_height_px} px"


def format_probability(p: float | None) -> str:
    """`0.031`, `< 0.001`; a dash where there is none."""
    if p is None or math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _list_facts(report: EvaluationReport) -> list[tuple[str, str]]:
    return [
        ("Dataset", report.dataset_uri),
        ("Scored", f"{plural(report.num_tiles, 'tile')} of {plural(report.num_slides, 'slide')}"),
        ("Code", report.code_version),
        ("Took", format_duration(report.seconds)),
        ("Machine", report.machine),
        ("Scores", report.convention),
        ("Y channel", report.convention_y),
    ]


# ------------------------------------------------------------------------------------------ table


def list_blocks(rows: Sequence[ModelRow]) -> list[Block]:
    """The rows by scale, in the order given; the best of each column is marked.

    Those scored on other tiles ("*") compete with nobody.
    """
    blocks = []
    for scale in sorted({row.scale for row in rows}):
        own = [row for row in rows if row.scale == scale]
        peaks = {column: _find_peak(own, column) for column in COLUMNS}
        table = [_table_row(row, own, peaks) for row in own]
        has_paper = any(
            value is not None
            for row in own
            for value in (row.paper_psnr_db, row.paper_ssim, row.paper_params)
        )
        has_lpips = any(row.lpips is not None for row in own)
        blocks.append(Block(scale, table, has_lpips, *_plot_block(table, scale=scale), has_paper))
    return blocks


def _plot_block(table: Sequence[TableRow], *, scale: int) -> tuple[str, Markup | None]:
    """Gains over bicubic, ours and the paper's; without bicubic PSNR, and ours alone."""
    gains = [
        Dot(row.title, gain, row.psnr_std, paper_gain, "psnr_db" in best)
        for row, gain, paper_gain, best in table
        if gain is not None
    ]
    name = f"psnr-x{scale}"
    if gains:
        x_label = "gain in PSNR over bicubic, dB"
        return "Gain over bicubic", plot_dots(gains, name=name, x_label=x_label, has_zero=True)
    dots = [
        Dot(entry.row.title, entry.row.psnr_db, entry.row.psnr_std, None, "psnr_db" in entry.best)
        for entry in table
    ]
    return "PSNR", plot_dots(dots, name=name, x_label="PSNR, dB")


def _find_peak(rows: Sequence[ModelRow], column: Column) -> float | None:
    values = [getattr(row, column) for row in rows if row.variant != "*"]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return None
    return float(min(finite) if column == "lpips" else max(finite))


def _table_row(
    row: ModelRow, rows: Sequence[ModelRow], peaks: Mapping[Column, float | None]
) -> TableRow:
    bicubic = find_bicubic(rows, row)
    gain = paper_gain = None
    if bicubic is not None and row.key != "bicubic":
        gain = row.psnr_db - bicubic.psnr_db
        if row.paper_psnr_db is not None and bicubic.paper_psnr_db is not None:
            paper_gain = row.paper_psnr_db - bicubic.paper_psnr_db
    best = frozenset(
        column
        for column, peak in peaks.items()
        if peak is not None and row.variant != "*" and getattr(row, column) == peak
    )
    return TableRow(row, gain, paper_gain, best)


# ------------------------------------------------------------------------------------- conditions


def list_condition_tables(report: EvaluationReport) -> list[ConditionTable]:
    """Put scores in tables of model by condition, one a scale; the most of a column is marked."""
    names = [name for name, _ in report.conditions]
    tables = []
    for scale in sorted({row.scale for row in report.condition_rows}):
        own = [row for row in report.condition_rows if row.scale == scale]
        known = {(row.model, row.condition): row for row in own}
        most: dict[str, float] = {}
        for name in names:
            gains = [
                row.gain_db for row in own if row.condition == name and row.gain_db is not None
            ]
            if len(gains) > 1:
                most[name] = max(gains)
        rows = [
            (model, [_condition_cell(known.get((model, name)), most) for name in names])
            for model in dict.fromkeys(row.model for row in own)
        ]
        tables.append(ConditionTable(scale, rows))
    return tables


def _condition_cell(row: ConditionRow | None, most: Mapping[str, float]) -> ConditionCell | None:
    if row is None:
        return None
    gain, least = row.gain_db, row.least_slide_gain_db
    return ConditionCell(
        row,
        is_best=gain is not None and most.get(row.condition) == gain,
        is_worse=gain is not None and gain < 0,
        is_slide_worse=least is not None and least < 0,
    )


# ------------------------------------------------------------------------------------ differences


def list_forests(comparisons: Sequence[Comparison]) -> list[Forest]:
    """The comparisons by scale, in the order given, each scale with an axis of its own."""
    forests = []
    for scale in sorted({found.scale for found in comparisons}):
        own = [found for found in comparisons if found.scale == scale]
        numbers = [n for found in own for n in (found.difference_db, found.low_db, found.high_db)]
        bends = [bend(n) for n in numbers if n is not None and math.isfinite(n)]
        low, high = min([0.0, *bends]), max([0.0, *bends])
        span = (high - low) or 1.0
        low, span = low - 0.06 * span, 1.12 * span

        def place(value: float | None, *, low: float = low, span: float = span) -> float | None:
            is_shown = value is not None and math.isfinite(value)
            return round(100 * (bend(value) - low) / span, 2) if is_shown else None  # type: ignore[arg-type]

        rows = [
            ForestRow(
                found,
                place(found.difference_db),
                place(found.low_db),
                place(found.high_db),
                found.is_clear,
            )
            for found in own
        ]
        forests.append(Forest(scale, rows, _place_ticks(low, span)))
    return forests


def bend(value_db: float) -> float:
    """A difference on an axis that is linear near 0 and logarithmic far from it.

    Against bicubic, models differ by dB, and among themselves by hundredths; both are to be seen.
    """
    return math.asinh(value_db / KNEE_DB)


def _place_ticks(low: float, span: float) -> list[tuple[float, str]]:
    ticks: list[tuple[float, str]] = []
    for size in TICKS_DB:
        for value in (size, -size) if size else (0.0,):
            at = (bend(value) - low) / span
            if 0.03 <= at <= 0.97 and all(
                abs(100 * at - other) > 100 * MIN_TICK_GAP for other, _ in ticks
            ):
                ticks.append((round(100 * at, 2), f"{value:+g}".replace("-", "−") if size else "0"))
    return sorted(ticks)


# ------------------------------------------------------------------------------------------- time


def _order_timings(timings: Sequence[TimingRow]) -> list[TimingRow]:
    return sorted(timings, key=lambda row: (row.scale, row.device, row.threads))


def _machine(row: TimingRow) -> str:
    return _name_machine(row.device, row.threads)


def _name_machine(device: str, threads: int) -> str:
    return f"{device}, {plural(threads, 'thread')}"


def list_time_plots(report: EvaluationReport) -> list[TimePlot]:
    """PSNR over seconds, a plot for each scale, machine and number of threads.

    The paper's seconds are of a machine of its own and stay in the table.
    """
    plots = []
    keys = [(row.scale, row.device, row.threads) for row in _order_timings(report.timings)]
    for place, (scale, device, threads) in enumerate(dict.fromkeys(keys)):
        spots = [
            Spot(
                timing.seconds,
                row.psnr_db,
                timing.model,
                x_range=(timing.low_s, timing.high_s),
                y_spread=row.psnr_std,
            )
            for timing in report.timings
            if (timing.scale, timing.device, timing.threads) == (scale, device, threads)
            for row in [_find_scores(report.rows, timing)]
            if row is not None
        ]
        plot = plot_scatter(
            spots,
            name=f"time-{place}",
            x_label="seconds an image",
            y_label="PSNR, dB",
            size_in=TIME_SIZE_IN,
        )
        if plot is not None:
            plots.append(TimePlot(scale, _name_machine(device, threads), plot))
    return plots


def _find_scores(rows: Sequence[ModelRow], timing: TimingRow) -> ModelRow | None:
    own = [row for row in rows if row.scale == timing.scale and row.variant != "*"]
    named = [row for row in own if timing.model in (row.title, row.key)]
    return next(iter(named + [row for row in own if row.model == timing.model]), None)


# ----------------------------------------------------------------------------------------- spread


class Gains(NamedTuple):
    """Gains over tiles, dB: quantiles of the finite ones, and how many are below 0."""

    num: int
    num_lower: int
    least: float
    median: float
    most: float


def measure_gains(gains: Sequence[float]) -> Gains | None:
    """How the finite gains lie; None where there is none."""
    finite = [gain for gain in gains if math.isfinite(gain)]
    if not finite:
        return None
    return Gains(
        len(finite),
        sum(gain < 0 for gain in finite),
        min(finite),
        float(np.median(finite)),
        max(finite),
    )


def _plot_gains(spread: Sequence[tuple[str, tuple[float, ...]]]) -> Markup | None:
    rows = [
        (label, np.array([gain for gain in gains if math.isfinite(gain)]))
        for label, gains in spread
    ]
    return plot_spread(rows, name="spread", x_label="gain in PSNR over bicubic by tile, dB")


# ------------------------------------------------------------------------------------------ crops


def width_of(strip: CropStrip) -> int:
    """Width on the screen of each picture of a strip: a whole multiple of its side, near 176 px.

    Whole multiples, because a picture whose pixels are not all of one size cannot be judged.

    Raises:
        ValueError: a picture is no PNG, or the side is below 1 px.
    """
    where = f"crop of {strip.tile_id!r} at ({strip.x}, {strip.y})"
    if strip.side_px < 1:
        raise ValueError(f"{where}: side_px={strip.side_px} must be at least 1")
    for name, content, _ in strip.pictures:
        if not content.startswith(PNG_SIGNATURE):
            raise ValueError(f"{where}, {name!r}: the picture is no PNG; encode it as one")
    return strip.side_px * max(1, round(PICTURE_PX / strip.side_px))


def best_names(strip: CropStrip) -> frozenset[str]:
    """Names of the pictures with the highest PSNR; none where fewer than two have one."""
    scored = {name: psnr for name, _, psnr in strip.pictures if psnr is not None}
    known = [psnr for psnr in scored.values() if not math.isnan(psnr)]
    if len(known) < 2:
        return frozenset()
    return frozenset(name for name, psnr in scored.items() if psnr == max(known))
