"""The page a person opens after a run of super-resolution: what was made, how well, what is left.

One HTML file that needs nothing else: no network, no script, pictures within. Names come from files
and are escaped. The same run gives the same bytes.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from carn.report.bcsr_report import flatten
from carn.report.page import COLOURS, Colour, format_count, inline_svg, plural, render_page
from carn.report.plots import format_tick
from carn.report.sr_records import (
    STAGES,
    LowPlace,
    PictureKind,
    RunSummary,
    Seam,
    SlideSummary,
    Status,
)

# What needs a person comes first.
STATUSES: tuple[Status, ...] = (
    "failed",
    "conflict",
    "unfinished",
    "claimed",
    "done",
    "skipped",
)
FAILURES: tuple[Status, ...] = ("failed", "conflict")
LABELS: Mapping[Status, str] = {"claimed": "claimed elsewhere"}
WORDS_OF_STOP = {"deadline": "at the deadline", "interrupted": "when it was interrupted"}
MAX_SHOWN = 24
MAX_SEAMS = 3
MAX_LOW = 12
MAX_PRINTED_ROWS = 60
# All pictures together: a page of 32 MB (a third more, as text) still opens and still travels.
MAX_PICTURE_BYTES = 24 * 2**20
# A step at the border this much above all others is taken for a seam; below, it is tissue.
MIN_SEAM_EXCESS = 0.1
# And no less than this, in grey levels: on glass, where hardly anything differs, JPEG alone makes
# one border of its squares differ more than the next.
MIN_SEAM_LEVELS = 0.5
# JPEG codes squares of so many px. Source: ITU-T T.81, A.1.1, https://www.w3.org/Graphics/JPEG/
JPEG_BLOCK_PX = 8
PLOT_SIZE_IN = (6.4, 2.9)


class Notice(NamedTuple):
    """One line of verdict at the top of the page; `anchor` is the section that explains it."""

    is_good: bool
    text: str
    anchor: str


class Shown(NamedTuple):
    """A slide with its pictures, as content and MIME type by what they show.

    `aspect` is width over height.
    """

    anchor: str
    slide: SlideSummary
    aspect: float
    pictures: dict[PictureKind, tuple[bytes, str]]
    facts: list[tuple[str, str]]
    low: tuple[LowPlace, ...]


class SeamFigure(NamedTuple):
    """The steps at the borders of one slide, and a picture of such a border."""

    slide: SlideSummary
    plot: Markup
    verdict: str
    is_flat: bool
    picture: tuple[bytes, str] | None


class StageBar(NamedTuple):
    """One stage: seconds of all actors, and their part of an actor-second."""

    name: str
    seconds: float
    share: float


def render(run: RunSummary, pictures: Mapping[str, bytes]) -> str:
    """The page, a complete HTML document in UTF-8.

    Args:
        run: what the run did.
        pictures: content by file name; one that is named but not here is left out.

    Raises:
        ValueError: a picture is neither JPEG nor PNG, or `started` or `ended` is no ISO 8601.
    """
    shown = choose_shown(run, pictures)
    engines = {slide.engine for slide in run.slides if slide.engine}
    return render_page(
        "sr.html",
        run=run,
        notices=find_notices(run),
        facts=list_facts(run),
        slides=order_slides(run.slides),
        counts=count_statuses(run),
        failures=[slide for slide in order_slides(run.slides) if slide.status in FAILURES],
        left=[s for s in order_slides(run.slides) if s.status in ("unfinished", "claimed")],
        num_unseen=count_unseen(run),
        engine=engines.pop() if len(engines) == 1 else None,
        shown=shown,
        anchors={item.slide.uri: item.anchor for item in shown},
        num_done=sum(slide.status == "done" for slide in run.slides),
        seams=list_seams(run.slides, pictures),
        bars=measure_stages(run),
        pace_plot=_plot_pace(run),
        settings=list(flatten(run.config)),
        max_low=MAX_LOW,
        num_printed=MAX_PRINTED_ROWS,
        jpeg_px=JPEG_BLOCK_PX,
        labels=LABELS,
        background=background_share,
        decibels=format_decibels,
        mpp=format_mpp,
        extent=format_extent,
        size=format_bytes,
        duration=format_duration,
        fraction=format_fraction,
    )


# ------------------------------------------------------------------------------------------ words


def format_decibels(value: float | None) -> str:
    """A PSNR to a tenth: `41.3`; `∞` for equal pictures, a dash when there is none."""
    if value is None:
        return "–"
    return f"{value:.1f}".replace("-", "−").replace("inf", "∞")


def format_mpp(slide: SlideSummary) -> str:
    """Size of a px in um, of LR and SR: `0.2431 → 0.1216`; both of x and y where they differ."""
    if slide.mpp_in is None or slide.mpp_out is None:
        return "unknown"
    both = [[f"{value:.4g}" for value in mpp] for mpp in (slide.mpp_in, slide.mpp_out)]
    return " → ".join(" × ".join(dict.fromkeys(pair)) for pair in both)


def format_extent(extent: tuple[int, int] | None) -> str:
    """Width and height: `97,792 × 221,184`; a dash when unknown."""
    return " × ".join(map(format_count, extent)) if extent else "–"


def format_bytes(number: float | None) -> str:
    """Decimal units, three digits: `1.24 GB`; a dash when unknown."""
    if number is None:
        return "–"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.{max(0, 2 - math.floor(math.log10(value) + 1e-3))}f} {unit}"
    return f"{number:.0f} B"


def format_duration(seconds: float | None) -> str:
    """`0.4 s`, `52 s`, `3 min 20 s`, `7 h 05 min`; a dash when unknown."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60:02d} min"


def format_fraction(fraction: float | None) -> str:
    """A percentage in which little is not none: `12 %`, `0.31 %`, `< 0.01 %`, `0 %`."""
    if fraction is None:
        return "–"
    percent = 100 * fraction
    if percent == 0:
        return "0 %"
    if percent < 0.01:
        return "< 0.01 %"
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def background_share(slide: SlideSummary) -> float | None:
    """Part of the slide's pixels that did not go through the network, 0..1; None when none did."""
    total = slide.num_inferred_px + slide.num_background_px
    return slide.num_background_px / total if total else None


# --------------------------------------------------------------------------------------- verdicts


def order_slides(slides: Sequence[SlideSummary]) -> list[SlideSummary]:
    """What needs a person first, otherwise as they were listed."""
    return sorted(slides, key=lambda slide: STATUSES.index(slide.status))


def count_statuses(run: RunSummary) -> dict[Status, int]:
    """How many slides there are of each status, in the order of `STATUSES`; zeros are left out."""
    counts = Counter(slide.status for slide in run.slides)
    return {status: counts[status] for status in STATUSES if counts[status]}


def count_unseen(run: RunSummary) -> int:
    """Slides that were asked for and that the run never came to."""
    return max(0, run.num_listed - len(run.slides))


def find_notices(run: RunSummary) -> list[Notice]:
    """The verdict, then what to look at, then what is well."""
    done = [slide for slide in run.slides if slide.status == "done"]
    rest = [
        *_judge_suitability(done),
        *_judge_consistency(done),
        *_judge_damage(done),
        *_judge_seams(done),
    ]
    return [judge_run(run), *sorted(rest, key=lambda notice: notice.is_good)]


def judge_run(run: RunSummary) -> Notice:
    """What became of the slides, in one line."""
    counts = Counter(slide.status for slide in run.slides)
    num_failed, num_left = counts["failed"], counts["unfinished"] + count_unseen(run)
    parts = [f"{format_count(counts['done'])} done"]
    parts += [f"{format_count(counts['skipped'])} there already"] if counts["skipped"] else []
    parts += [f"{format_count(num_failed)} failed"] if num_failed else []
    if counts["conflict"]:
        parts.append(f"{format_count(counts['conflict'])} in conflict with what is there")
    if counts["claimed"]:
        parts.append(f"{format_count(counts['claimed'])} with another run")
    parts += [f"{format_count(num_left)} left for later"] if num_left else []
    num_slides = max(run.num_listed, len(run.slides))
    text = f"Of {plural(num_slides, 'slide')}: {', '.join(parts)}."
    if num_slides == 0:
        text = "No slide was listed."
    if run.is_stopped:
        text += f" The run stopped {WORDS_OF_STOP.get(run.is_stopped, f'({run.is_stopped})')}."
    if num_failed or counts["conflict"]:
        return Notice(False, text, "failures")
    if num_left or run.is_stopped or num_slides == 0:
        return Notice(False, text, "left" if num_slides else "facts")
    return Notice(True, text, "slides")


def _judge_suitability(done: Sequence[SlideSummary]) -> list[Notice]:
    warned = [slide for slide in done if slide.warnings]
    if not warned:
        return []
    text = (
        f"{plural(len(warned), 'slide')} of {format_count(len(done))} "
        f"{'is' if len(warned) == 1 else 'are'} unlike what the network was trained on; "
        f"{warned[0].name}: {warned[0].warnings[0]}."
    )
    return [Notice(False, text, "slides")]


def _judge_consistency(done: Sequence[SlideSummary]) -> list[Notice]:
    measured = [(slide, slide.consistency) for slide in done if slide.consistency is not None]
    if not measured:
        return []
    low = [(slide, found) for slide, found in measured if found.share_below > 0]
    if not low:
        worst = min(found.min_db for _, found in measured)
        text = f"SR made smaller again agrees with LR everywhere (worst cell {worst:.1f} dB)."
        return [Notice(True, text, "shown")]
    slide, found = max(low, key=lambda pair: pair[1].share_below)
    text = (
        f"SR made smaller again differs from LR in places of {plural(len(low), 'slide')}; most in "
        f"{slide.name}: {format_fraction(found.share_below)} of it is below "
        f"{found.threshold_db:g} dB, the worst cell {found.min_db:.1f} dB."
    )
    return [Notice(False, text, "shown")]


def _judge_damage(done: Sequence[SlideSummary]) -> list[Notice]:
    damaged = [slide for slide in done if slide.damage]
    if not damaged:
        return []
    num_places = sum(len(slide.damage) for slide in damaged)
    text = (
        f"{plural(num_places, 'place')} of {plural(len(damaged), 'slide')} could not be decoded "
        "and are filled from a coarser level: no detail there."
    )
    return [Notice(False, text, "slides")]


def _judge_seams(done: Sequence[SlideSummary]) -> list[Notice]:
    measured = [(slide, slide.seam) for slide in done if slide.seam is not None]
    if not measured:
        return []
    seen = [slide.name for slide, seam in measured if not judge_seam(seam)[0]]
    if not seen:
        text = f"No seam at the borders of blocks ({plural(len(measured), 'slide')} measured)."
        return [Notice(True, text, "seams")]
    text = f"There are steps at the borders of blocks of {', '.join(seen)}."
    return [Notice(False, text, "seams")]


def judge_seam(seam: Seam) -> tuple[bool, str]:
    """Whether the step across a border is like those beside it, and that in words.

    It is held against the largest of the others, not their mean: enlargement and JPEG make steps
    that come again every few px, and both are at one with the border.
    """
    across = [step for place, step in zip(seam.distance_px, seam.step, strict=True) if place == 0]
    others = [step for place, step in zip(seam.distance_px, seam.step, strict=True) if place != 0]
    if not across or not others:
        return True, "There is no distance 0 to judge."
    excess = across[0] - max(others)
    is_flat = excess <= max(MIN_SEAM_EXCESS * max(others), MIN_SEAM_LEVELS)
    return is_flat, (
        f"{'No seam' if is_flat else 'A seam'}: across a block border {across[0]:.2f} grey levels, "
        f"beside it {min(others):.2f}–{max(others):.2f}."
    )


# ------------------------------------------------------------------------------------------- facts


def list_facts(run: RunSummary) -> list[tuple[str, str]]:
    """The table at the top of the page."""
    done = [slide for slide in run.slides if slide.status == "done"]
    num_px = sum(slide.num_inferred_px + slide.num_background_px for slide in done)
    num_inferred = sum(slide.num_inferred_px for slide in done)
    rate = run.lr_mpx_per_s
    actors = plural(run.num_actors, "inference actor")
    pace = "none" if rate is None else f"{rate:,.3g} LR MP/s with {actors}"
    started, ended = _span(run)
    zone = f" {started.tzname()}" if started.tzname() else ""
    last = ended.strftime("%H:%M" if started.date() == ended.date() else "%Y-%m-%d %H:%M")
    made = f"{_format_mpx(num_px)}, {_format_mpx(num_inferred)} of it inferred" if done else "none"
    return [
        ("Run", run.run_id),
        ("Time", f"{started:%Y-%m-%d %H:%M} – {last}{zone}"),
        ("Model", f"{run.model} ×{run.scale}" + ", self-ensemble" * run.self_ensemble),
        ("Took", f"{_wall_s(run) / 3600:.2f} hours"),
        ("LR made", made),
        ("Throughput", pace),
        ("Written", format_bytes(sum(slide.size_bytes or 0 for slide in done))),
        ("Code", run.code_version),
        ("Checkpoint", f"{run.checkpoint} ({run.checkpoint_hash})"),
        ("Output", run.output),
    ]


def _format_mpx(number: int) -> str:
    return f"{number / 1e6:,.0f} Mpx" if number >= 1e8 else f"{number / 1e6:,.3g} Mpx"


def _span(run: RunSummary) -> tuple[datetime, datetime]:
    return datetime.fromisoformat(run.started), datetime.fromisoformat(run.ended)


def _wall_s(run: RunSummary) -> float:
    started, ended = _span(run)
    return max(0.0, (ended - started).total_seconds())


def measure_stages(run: RunSummary) -> list[StageBar]:
    """The stages' parts of the time of all actors; not a number when that is not known."""
    actor_s = _wall_s(run) * run.num_actors
    return [
        StageBar(name.removesuffix("_s"), seconds, seconds / actor_s if actor_s else math.nan)
        for name in STAGES
        for seconds in [run.stages.get(name, 0.0)]
    ]


# ---------------------------------------------------------------------------------------- pictures


def choose_shown(run: RunSummary, pictures: Mapping[str, bytes]) -> list[Shown]:
    """The done slides to picture, those to look at first, otherwise as they were listed.

    At most `MAX_SHOWN`, and pictures of at most `MAX_PICTURE_BYTES` together.
    """
    candidates = [
        (slide, {kind: pictures[name] for kind, name in slide.pictures.items() if name in pictures})
        for slide in run.slides
        if slide.status == "done"
    ]
    candidates = [(slide, found) for slide, found in candidates if found]
    candidates.sort(key=lambda pair: not needs_look(pair[0]))
    shown: list[Shown] = []
    room = MAX_PICTURE_BYTES
    for slide, found in candidates[:MAX_SHOWN]:
        room -= sum(map(len, found.values()))
        if room < 0 and shown:
            break
        low = slide.consistency.low if slide.consistency else ()
        shown.append(
            Shown(
                anchor=f"slide-{len(shown) + 1}",
                slide=slide,
                aspect=slide.lr_extent[0] / slide.lr_extent[1] if slide.lr_extent else 1.0,
                pictures={k: (content, _mime(content, k)) for k, content in found.items()},
                facts=_slide_facts(slide),
                low=tuple(sorted(low, key=lambda place: place.db)),
            )
        )
    return shown


def needs_look(slide: SlideSummary) -> bool:
    """Whether something of a done slide wants a person's eye."""
    is_low = slide.consistency is not None and slide.consistency.share_below > 0
    has_seam = slide.seam is not None and not judge_seam(slide.seam)[0]
    return bool(slide.damage) or bool(slide.warnings) or is_low or has_seam


def _mime(content: bytes, name: str) -> str:
    # Source: the signature, PNG 5.2, https://www.w3.org/TR/png-3/; SOI and a marker, T.81 B.1
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    raise ValueError(f"picture {name!r} is neither JPEG nor PNG; encode it as one of them")


def _slide_facts(slide: SlideSummary) -> list[tuple[str, str]]:
    sr_extent = None
    if slide.lr_extent is not None and slide.scale is not None:
        sr_extent = (slide.lr_extent[0] * slide.scale, slide.lr_extent[1] * slide.scale)
    resumed = f", {slide.num_blocks_resumed:,} of an earlier run" * (slide.num_blocks_resumed > 0)
    accuracy = (
        "" if slide.accuracy_db is None else f"{format_decibels(slide.accuracy_db)} dB to fp32"
    )
    parts = "" if slide.num_parts is None else f" in {plural(slide.num_parts, 'part')}"
    return [
        *(("Unlike training", warning) for warning in slide.warnings),
        ("Input", slide.uri),
        ("Output", slide.output_uri or "–"),
        ("LR → SR, px", f"{format_extent(slide.lr_extent)} → {format_extent(sr_extent)}"),
        ("MPP, µm", format_mpp(slide)),
        *_lr_facts(slide),
        ("Background", f"{format_fraction(background_share(slide))} not inferred"),
        ("Blocks", f"{format_count(slide.num_blocks)}{resumed}"),
        ("Size", f"{format_bytes(slide.size_bytes)}{parts}, {format_duration(slide.seconds)}"),
        ("Engine", ": ".join(filter(None, (slide.engine, accuracy))) or "–"),
    ]


def _lr_facts(slide: SlideSummary) -> list[tuple[str, str]]:
    """What was found out about the input's pixels."""
    if slide.lr is None:
        return []
    facts = [("Stored as", slide.lr.compression)] if slide.lr.compression else []
    facts += [("Not as the file says", note) for note in slide.lr.notes]
    if slide.lr.blur_px is not None:
        value, low, high = slide.lr.blur_px
        facts.append(("Softness", f"as by a blur of {value:.2f} ({low:.2f}–{high:.2f}) HR px"))
    if slide.lr.numbers:
        listed = ", ".join(
            f"{name.replace('_', ' ')} {value:.2f}" for name, value in slide.lr.numbers.items()
        )
        facts.append(("Said of LR" if slide.lr.is_told else "Network's estimate", listed))
    return facts


def list_seams(slides: Sequence[SlideSummary], pictures: Mapping[str, bytes]) -> list[SeamFigure]:
    """Seam figures of the first slides that have one, those with a seam before the others."""
    measured = [(slide, slide.seam) for slide in slides if slide.seam and slide.seam.distance_px]
    measured.sort(key=lambda pair: judge_seam(pair[1])[0])
    figures = []
    for place, (slide, seam) in enumerate(measured[:MAX_SEAMS]):
        is_flat, verdict = judge_seam(seam)
        content = pictures.get(slide.pictures.get("seam", ""))
        picture = None if content is None else (content, _mime(content, "seam"))
        plot = _plot_seam(seam, name=f"seam-{place + 1}")
        figures.append(SeamFigure(slide, plot, verdict, is_flat, picture))
    return figures


# ------------------------------------------------------------------------------------------- plots


class _Line(NamedTuple):
    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Colour


def _plot_seam(seam: Seam, *, name: str) -> Markup:
    return _plot_lines(
        [_Line("across borders of blocks", seam.distance_px, seam.step, "kept")],
        name=name,
        x_label="distance from the border, SR px",
        y_label="mean step, grey levels",
        level=(seam.baseline, "away from borders"),
        x_mark=0.0,
    )


def _plot_pace(run: RunSummary) -> Markup | None:
    if run.pace is None or not run.pace.seconds:
        return None
    seconds = np.array(run.pace.seconds)
    unit, size = ("hours", 3600.0) if seconds[-1] > 2 * 3600 else ("minutes", 60.0)
    return _plot_lines(
        [_Line("over time", (seconds / size).tolist(), run.pace.lr_mpx_per_s, "kept")],
        name="pace",
        x_label=f"{unit} since the start",
        y_label="LR MP/s",
        level=None if run.lr_mpx_per_s is None else (run.lr_mpx_per_s, "whole run"),
    )


def _plot_lines(
    lines: Sequence[_Line],
    *,
    name: str,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None = None,
    x_mark: float | None = None,
) -> Markup:
    """Lines over a linear axis from 0 up, with a level line and an upright one, as inline SVG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=PLOT_SIZE_IN, layout="constrained")
    axes = figure.add_subplot()
    if x_mark is not None:
        axes.axvline(x_mark, color=COLOURS["dropped"], linewidth=1.2, zorder=1)
    if level is not None:
        style: dict[str, Any] = {"linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
        axes.axhline(level[0], color=COLOURS["muted"], label=level[1], **style)
    for line in lines:
        axes.plot(
            line.x,
            line.y,
            color=COLOURS[line.colour],
            linewidth=1.6,
            marker="o" if len(line.x) <= 60 else "",
            markersize=3,
            label=line.label,
        )
    values = [value for line in lines for value in line.y] + ([level[0]] if level else [])
    axes.set_ylim(0, 1.15 * max(values) or 1.0)
    axes.margins(x=0.02)
    if x_mark is None:
        axes.set_xlim(left=0)
    axes.set_xlabel(x_label, color=COLOURS["muted"])
    axes.set_ylabel(y_label, color=COLOURS["muted"])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 4, 5, 8, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(round(value, 9))))
    axes.tick_params(colors=COLOURS["line"], labelcolor=COLOURS["muted"])
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["line"])
    figure.legend(
        loc="outside upper left",
        ncols=len(lines) + 1,
        frameon=False,
        labelcolor=COLOURS["ink"],
        handlelength=1.6,
    )
    return inline_svg(figure, name=name, label=f"{y_label} by {x_label}")
