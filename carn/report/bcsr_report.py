"""The page a person opens after bcSR is built: what was kept, what was dropped, and why.

One HTML file that needs nothing else: no network, no script, pictures within. Names come from files
and are escaped. The same report gives the same bytes.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from carn.report.page import Series, plot_histogram, plural, render_page

Status = Literal["train", "validation", "test", "white", "surplus", "failed"]

# In drawing order: what was kept lies on top of what was dropped, and a failure on top of all.
STATUSES: Mapping[Status, str] = {
    "surplus": "surplus: ranked below the number wanted",
    "white": "too white",
    "train": "train",
    "validation": "validation",
    "test": "test",
    "failed": "could not be read",
}
SPLITS = ("train", "validation", "test")
MAX_FAILURES = 200
# Longer side of the drawing of a slide, in its own units, and the least side of a box in them:
# about 7 px on the screen, for 2 px, as of a 1024-px tile on a 200,000-px slide, show no colour.
DRAWING_SIDE = 1000.0
MIN_BOX = 18.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A tile of the contact sheet.

    Attributes:
        jpeg: the encoded picture, some 100-300 px square.
        caption: which tile it is.
        detail: the second line, such as why it was dropped ("white 72.1 % > 60 %"); may be empty.
    """

    jpeg: bytes
    caption: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class TileBox:
    """Where a tile lies on its slide.

    Attributes:
        x, y: its top-left corner, as fractions 0..1 of the slide's width and height.
        width, height: its size, as fractions of the slide's width and height.
        status: the split it went to, or what kept it out of all splits.
    """

    x: float
    y: float
    width: float
    height: float
    status: Status


@dataclass(frozen=True, kw_only=True)
class SlideRow:
    """What became of the tiles of one slide.

    Attributes:
        name: as the coordinate list calls it.
        uri: where it was read from.
        reader: what served its pixels.
        width_px, height_px: level-0 size; 0 when the slide could not be opened.
        mpp: um per level-0 px; None when the slide does not say.
        num_drawn: tiles asked for.
        num_failed, num_white, num_kept: of these, unread, too white, and in a split. The rest
            survived the filter and were ranked below the number wanted.
        splits: kept tiles per split name.
        thumbnail: a JPEG of the whole slide, or None.
        boxes: the tiles on it.
    """

    name: str
    uri: str
    reader: str
    width_px: int
    height_px: int
    mpp: float | None
    num_drawn: int
    num_failed: int
    num_white: int
    num_kept: int
    splits: dict[str, int]
    thumbnail: bytes | None
    boxes: tuple[TileBox, ...]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that could not be read.

    Attributes:
        slide: name of the slide.
        place: "(x, y)" of the tile in level-0 px, or "" for the slide as a whole.
        reason: what is wrong.
    """

    slide: str
    place: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class OverlapRow:
    """How many tiles of two splits show the same tissue.

    Attributes:
        splits: the two names, "train / test".
        num_pairs: pairs of tiles, one of each split, that share pixels of a slide.
        num_tiles: tiles in at least one such pair.
        num_tiles_over_half: of these, tiles that share more than half of their area with another.
    """

    splits: str
    num_pairs: int
    num_tiles: int
    num_tiles_over_half: int


@dataclass(frozen=True, kw_only=True, eq=False)
class BcsrReport:
    """All that the page shows.

    Attributes:
        title: heading of the page and name of its window.
        facts: the table at the top, in this order: output, tiles kept, code version, ...
        funnel: (stage, tiles left after it, a note), first stage first.
        white_fraction: (N,) 0..1, every tile that was read.
        max_white_fraction: tiles with more white than this were dropped, 0..1.
        distance: (M,) |R_i - R_all| of the tiles that survived the white filter, in any
            unit.
        is_kept: (M,) whether the survivor was kept.
        kept, dropped: a sample of the tiles, for the contact sheets.
        slides: slides to show, a bounded number of them.
        num_slides_total: slides there are in all.
        overlaps: one row for each two splits; a row of a split with itself is no leak.
        failures: everything that could not be read; the first 200 are shown.
        channel_means: mean red, green and blue of the training split, 0..1; not a number when it is
            empty.
        paper_channel_means: the paper's for its training set, or None to leave it out.
        config: the resolved configuration of the run, nested dicts of plain values.

    Raises:
        ValueError: `distance` and `is_kept` differ in shape.
    """

    title: str
    facts: dict[str, str]
    funnel: tuple[tuple[str, int, str], ...]
    white_fraction: npt.NDArray[np.float64]
    max_white_fraction: float
    distance: npt.NDArray[np.float64]
    is_kept: npt.NDArray[np.bool_]
    kept: tuple[Picture, ...]
    dropped: tuple[Picture, ...]
    slides: tuple[SlideRow, ...]
    num_slides_total: int
    overlaps: tuple[OverlapRow, ...]
    failures: tuple[Failure, ...]
    channel_means: tuple[float, float, float]
    paper_channel_means: tuple[float, float, float] | None
    config: dict[str, object]

    def __post_init__(self) -> None:
        if self.distance.shape != self.is_kept.shape:
            raise ValueError(
                f"distance has shape {self.distance.shape} and is_kept {self.is_kept.shape}; "
                "give both one entry for each tile that survived the white filter"
            )


class Notice(NamedTuple):
    """One line of verdict at the top of the page; `anchor` is the section that explains it."""

    is_good: bool
    text: str
    anchor: str


class Layer(NamedTuple):
    """The boxes of one status on one slide, as the path data of an SVG element."""

    status: Status
    path: str


def render(report: BcsrReport) -> str:
    """The page, a complete HTML document in UTF-8.

    Raises:
        ValueError: a picture is empty, or a value of a histogram is not finite.
    """
    names = {name for slide in report.slides for name in slide.splits}
    return render_page(
        "bcsr.html",
        report=report,
        notices=find_notices(report),
        overlap_verdict=judge_overlaps(report.overlaps),
        white_plot=_plot_white(report),
        distance_plot=_plot_distance(report),
        split_names=[*(s for s in SPLITS if s in names), *sorted(names.difference(SPLITS))],
        drawings=[(slide, drawing_size(slide), draw_boxes(slide)) for slide in report.slides],
        statuses=STATUSES,
        status_counts=Counter(box.status for slide in report.slides for box in slide.boxes),
        legend_layers={status: _shape(status, 3, 3, 14, 14) for status in STATUSES},
        failures=report.failures[:MAX_FAILURES],
        settings=list(flatten(report.config)),
    )


# --------------------------------------------------------------------------------------- verdicts


def find_notices(report: BcsrReport) -> list[Notice]:
    """What to know before using the dataset, the bad news first."""
    num_kept = int(np.count_nonzero(report.is_kept))
    is_apart, overlap_text = judge_overlaps(report.overlaps)
    num_slides = sum(not failure.place for failure in report.failures)
    num_tiles = len(report.failures) - num_slides
    unread = [
        plural(number, noun)
        for number, noun in ((num_slides, "slide"), (num_tiles, "tile"))
        if number
    ]
    notices = [] if num_kept else [Notice(False, "No tile was kept.", "funnel")]
    if unread:
        text = f"{' and '.join(unread)} could not be read; the dataset was built without."
        notices.append(Notice(False, text, "failures"))
    else:
        notices.append(Notice(True, "Every slide and every tile was read.", "failures"))
    notices.append(Notice(is_apart, overlap_text, "overlaps"))
    return sorted(notices, key=lambda notice: notice.is_good)


def judge_overlaps(overlaps: tuple[OverlapRow, ...]) -> tuple[bool, str]:
    """Whether the splits are apart, and that in words."""
    between = [row for row in overlaps if len({s.strip() for s in row.splits.split("/")}) > 1]
    if not between:
        return True, "There are no two splits that could overlap."
    leaks = [row for row in between if row.num_pairs]
    if not leaks:
        return True, "No tile of one split overlaps a tile of another."
    parts = [
        f"{row.splits}: {plural(row.num_tiles, 'tile')} in {plural(row.num_pairs, 'pair')}, "
        f"{row.num_tiles_over_half:,} by more than half"
        for row in leaks
    ]
    return False, (
        f"Splits share tissue ({'; '.join(parts)}): scores on the held-out tiles will look better "
        "than they are. Split by slide to keep them apart."
    )


# ------------------------------------------------------------------------------------ plots, boxes


def _plot_white(report: BcsrReport) -> Markup | None:
    percent = 100 * report.white_fraction
    limit = 100 * report.max_white_fraction
    is_dark_enough = report.white_fraction <= report.max_white_fraction
    return plot_histogram(
        [
            Series(label="go on to the ranking", values=percent[is_dark_enough], colour="kept"),
            Series(label="dropped", values=percent[~is_dark_enough], colour="dropped"),
        ],
        name="white",
        x_label="white part of the tile, %",
        x_range=(0.0, 100.0),
        limit=(limit, f"limit {limit:g} %"),
    )


def _plot_distance(report: BcsrReport) -> Markup | None:
    return plot_histogram(
        [
            Series(label="kept", values=report.distance[report.is_kept], colour="kept"),
            Series(label="surplus", values=report.distance[~report.is_kept], colour="surplus"),
        ],
        name="distance",
        x_label="|R_i − R_all|: distance of a tile's mean colour from that of all survivors",
    )


def drawing_size(slide: SlideRow) -> tuple[float, float]:
    """Width and height of a slide's drawing, the longer `DRAWING_SIDE`; square when unknown."""
    longer = max(slide.width_px, slide.height_px)
    if not (slide.width_px and slide.height_px):
        return DRAWING_SIDE, DRAWING_SIDE
    return DRAWING_SIDE * slide.width_px / longer, DRAWING_SIDE * slide.height_px / longer


def draw_boxes(slide: SlideRow) -> list[Layer]:
    """The boxes as SVG paths in the units of `drawing_size`, one for each status there is.

    A box smaller than `MIN_BOX` is drawn that large round its centre, over the border if need be.
    """
    width, height = drawing_size(slide)
    paths: dict[Status, list[str]] = {status: [] for status in STATUSES}
    for box in slide.boxes:
        box_width, box_height = max(MIN_BOX, box.width * width), max(MIN_BOX, box.height * height)
        left = (box.x + box.width / 2) * width - box_width / 2
        top = (box.y + box.height / 2) * height - box_height / 2
        paths[box.status].append(_shape(box.status, left, top, box_width, box_height))
    return [Layer(status, "".join(parts)) for status, parts in paths.items() if parts]


def _shape(status: Status, left: float, top: float, width: float, height: float) -> str:
    # Colour is never the only sign: a failure is crossed, white is struck through once.
    box = f"M{left:.5g} {top:.5g}h{width:.4g}v{height:.4g}h{-width:.4g}z"
    falling = f"M{left:.5g} {top:.5g}l{width:.4g} {height:.4g}"
    rising = f"M{left:.5g} {top + height:.5g}l{width:.4g} {-height:.4g}"
    return box + {"failed": falling + rising, "white": rising}.get(status, "")


# ------------------------------------------------------------------------------------------ config


def flatten(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and printed value of each setting, in the order of the dict; sets are sorted."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
