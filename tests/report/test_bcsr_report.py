"""The bcSR page: complete, self-contained, the same each time, and safe from what it is fed."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from carn.report import page
from carn.report.bcsr_report import (
    DRAWING_SIDE,
    MIN_BOX,
    STATUSES,
    BcsrReport,
    Failure,
    OverlapRow,
    Picture,
    SlideRow,
    TileBox,
    draw_boxes,
    drawing_size,
    find_notices,
    flatten,
    judge_overlaps,
    render,
)

VOID = {"meta", "img", "br", "hr", "link", "input"}
NASTY = "<script>alert('\"&')</script>"


class Page(HTMLParser):
    """Collects text, addresses, ids and styles of a page, and insists on balanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def jpeg(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def slide(**changes: object) -> SlideRow:
    row = SlideRow(
        name="Tumor_001",
        uri="s3://bucket/Tumor_001.tif",
        reader="direct",
        width_px=97792,
        height_px=221184,
        mpp=0.2431,
        num_drawn=4321,
        num_failed=1,
        num_white=20,
        num_kept=3000,
        splits={"test": 1000, "train": 2000},
        thumbnail=jpeg((230, 150, 190)),
        boxes=(
            TileBox(x=0.2, y=0.3, width=0.0105, height=0.0046, status="train"),
            TileBox(x=0.5, y=0.5, width=0.0105, height=0.0046, status="failed"),
        ),
    )
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


EMPTY = BcsrReport(
    title="Nothing",
    facts={},
    funnel=(),
    white_fraction=np.empty(0),
    max_white_fraction=0.6,
    distance=np.empty(0),
    is_kept=np.empty(0, dtype=np.bool_),
    kept=(),
    dropped=(),
    slides=(),
    num_slides_total=0,
    overlaps=(),
    failures=(),
    channel_means=(float("nan"),) * 3,
    paper_channel_means=None,
    config={},
)


def full(**changes: object) -> BcsrReport:
    rng = np.random.default_rng(0)
    distance = rng.gamma(3, 10, 300)
    report = BcsrReport(
        title="bcSR",
        facts={"output": "s3://bucket/bcsr", "tiles kept": "1,234"},
        funnel=(("drawn", 2000, "two lists"), ("kept", 1234, "farthest first"), ("none", 0, "")),
        white_fraction=rng.uniform(0, 1, 400),
        max_white_fraction=0.6,
        distance=distance,
        is_kept=distance > 25,
        kept=(Picture(jpeg=jpeg((200, 90, 150)), caption="kept one", detail="distance 9.9"),),
        dropped=(Picture(jpeg=jpeg((250,) * 3), caption="pale one", detail="white 72.1 % > 60 %"),),
        slides=(slide(), slide(name="Normal_002", thumbnail=None, boxes=(), mpp=None)),
        num_slides_total=2,
        overlaps=(
            OverlapRow(splits="train / test", num_pairs=0, num_tiles=0, num_tiles_over_half=0),
        ),
        failures=(),
        channel_means=(0.7, 0.4, 0.6),
        paper_channel_means=(0.7204, 0.4298, 0.6397),
        config={"split": {"kind": "by-slide", "seed": 7}, "limit": None},
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- the page as such


@pytest.mark.parametrize("report", [full(), EMPTY], ids=["full", "empty"])
def test_page_is_balanced_and_its_ids_and_links_are_sound(report: BcsrReport) -> None:
    parsed = Page(render(report))
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href.removeprefix("#") for href in parsed.attributes("href")} <= set(ids)
    clips = re.findall(r"url\(#(.*?)\)", " ".join(parsed.attributes("clip-path")))
    assert set(clips) <= set(ids)


def test_page_reaches_for_nothing_outside() -> None:
    html = render(full())
    parsed = Page(html)
    assert parsed.attributes("src")
    assert all(src.startswith("data:image/jpeg;base64,") for src in parsed.attributes("src"))
    assert all(href.startswith("#") for href in parsed.attributes("href"))
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_same_report_gives_same_bytes() -> None:
    first, second = render(full()), render(full())
    assert first == second
    assert first != render(full(white_fraction=np.full(400, 0.5)))


def test_plots_bring_no_style_sheet_of_their_own() -> None:
    tags = [tag for tag, _ in Page(render(full())).tags]
    assert tags.count("style") == 1
    assert "metadata" not in tags


def test_what_comes_from_files_is_escaped() -> None:
    picture = Picture(jpeg=jpeg((1, 2, 3)), caption=NASTY, detail=NASTY)
    report = full(
        title=NASTY,
        facts={NASTY: NASTY},
        funnel=((NASTY, 1, NASTY),),
        kept=(picture,),
        dropped=(picture,),
        slides=(slide(name=NASTY, uri=NASTY, reader=NASTY, splits={NASTY: 1}),),
        overlaps=(OverlapRow(splits=NASTY, num_pairs=1, num_tiles=2, num_tiles_over_half=1),),
        failures=(Failure(slide=NASTY, place=NASTY, reason=NASTY),),
        config={NASTY: {NASTY: NASTY}},
    )
    parsed = Page(render(report))  # which refuses script elements
    assert parsed.text.count(NASTY) >= 18
    assert parsed.attributes("alt").count(f"Slide {NASTY}") == 1


def test_names_of_any_script_survive() -> None:
    name = "Präparat_淋巴_№7"
    assert name in Page(render(full(slides=(slide(name=name),)))).text


# ------------------------------------------------------------------------------- what the page says


def test_counts_and_reasons_appear() -> None:
    text = Page(render(full())).text
    for part in ("2,000", "1,234", "61.7 %", "two lists", "farthest first", "white 72.1 % > 60 %"):
        assert part in text
    for part in ("limit 60 %", "97,792 × 221,184", "0.2431", "unknown", "by-slide", "split.seed"):
        assert part in text
    assert "4,321 1 20 1,300 3,000 2,000 1,000" in text  # drawn ... kept, then train before test
    assert "0.7204" in text
    assert "(-0.0204)" in text


def test_histograms_count_what_lies_on_either_side() -> None:
    white = np.array([0.0, 0.6, 0.61, 1.0, 0.9])
    report = full(white_fraction=white, distance=np.array([1.0, 2.0]), is_kept=np.array([1, 0]) > 0)
    text = Page(render(report)).text
    assert "go on to the ranking (2)" in text  # 0.6 itself is not above the limit
    assert "dropped (3)" in text
    assert "kept (1)" in text
    assert "surplus (1)" in text


def test_empty_report_says_so() -> None:
    text = Page(render(EMPTY)).text
    assert "No tile was kept." in text
    assert "No tile survived the white filter" in text
    assert "Every slide and every tile was read." in text
    assert "nan" not in text


def test_only_the_slides_given_are_listed_and_the_page_says_so() -> None:
    assert "2 of 270 slides are shown" in Page(render(full(num_slides_total=270))).text
    assert "All 2 slides" in Page(render(full())).text


def test_failures_raise_a_banner_and_are_cut_at_200() -> None:
    failures = (
        Failure(slide="lost", place="", reason="no such object"),
        *(Failure(slide="torn", place=f"({i}, 0)", reason="JPEG ends early") for i in range(1500)),
    )
    parsed = Page(render(full(failures=failures)))
    assert "1 slide and 1,500 tiles could not be read" in parsed.text
    assert "The first 200 of 1,501" in parsed.text
    assert "failures.parquet" in parsed.text
    assert parsed.text.count("JPEG ends early") == 199
    few = Page(render(full(failures=failures[:1]))).text
    assert "1 slide could not be read" in few
    assert "failures.parquet" not in few


def test_bad_news_comes_first() -> None:
    leak = OverlapRow(splits="train / test", num_pairs=3, num_tiles=5, num_tiles_over_half=1)
    notices = find_notices(full(overlaps=(leak,)))
    assert [notice.is_good for notice in notices] == [False, True]
    assert notices[0].anchor == "overlaps"


@pytest.mark.parametrize(
    ("rows", "is_apart", "words"),
    [
        ([], True, "no two splits"),
        ([("train / train", 9)], True, "no two splits"),
        ([("train / test", 0)], True, "No tile of one split overlaps a tile of another."),
        ([("train / test", 0), ("validation / test", 2)], False, "validation / test: 4 tiles in 2"),
    ],
)
def test_overlap_verdict(rows: list[tuple[str, int]], is_apart: bool, words: str) -> None:
    overlaps = tuple(
        OverlapRow(splits=splits, num_pairs=pairs, num_tiles=2 * pairs, num_tiles_over_half=0)
        for splits, pairs in rows
    )
    verdict, text = judge_overlaps(overlaps)
    assert verdict is is_apart
    assert words in text


# ------------------------------------------------------------------------------------ boxes, config


@given(
    x=st.floats(0, 1),
    y=st.floats(0, 1),
    side=st.floats(0, 1),
    status=st.sampled_from(list(STATUSES)),
    size=st.tuples(st.integers(1, 300_000), st.integers(1, 300_000)),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_box_keeps_its_centre_and_can_be_seen(
    x: float, y: float, side: float, status: str, size: tuple[int, int]
) -> None:
    box = TileBox(x=x, y=y, width=side, height=side, status=status)  # type: ignore[arg-type]
    row = slide(width_px=size[0], height_px=size[1], boxes=(box,))
    width, height = drawing_size(row)
    assert max(width, height) == pytest.approx(DRAWING_SIDE)
    (layer,) = draw_boxes(row)
    assert layer.status == status
    match = re.match(r"M(\S+) (\S+?)h(\S+?)v(\S+?)h-", layer.path)
    assert match
    left, top, box_width, box_height = map(float, match.groups())
    assert min(box_width, box_height) >= MIN_BOX
    assert left + box_width / 2 == pytest.approx((x + side / 2) * width, rel=2e-3, abs=0.2)
    assert top + box_height / 2 == pytest.approx((y + side / 2) * height, rel=2e-3, abs=0.2)


def test_boxes_of_one_status_are_one_layer_and_failures_lie_on_top() -> None:
    boxes = tuple(
        TileBox(x=0.1 * i, y=0.5, width=0.05, height=0.05, status=status)  # type: ignore[arg-type]
        for i, status in enumerate(["failed", "train", "surplus", "train"])
    )
    layers = draw_boxes(slide(boxes=boxes))
    assert [layer.status for layer in layers] == ["surplus", "train", "failed"]
    assert layers[1].path.count("z") == 2


def test_slide_of_unknown_size_is_shown_without_a_picture() -> None:
    lost = slide(width_px=0, height_px=0, mpp=None, reader="", thumbnail=None, boxes=(), splits={})
    parsed = Page(render(full(slides=(lost,), num_slides_total=1)))
    assert "Tumor_001" in parsed.text
    assert "drawing" not in parsed.attributes("class")


def test_config_is_flattened_in_order_and_sets_are_sorted() -> None:
    config = {"b": {"y": 1.5, "x": {"z": "ä"}}, "a": None, "s": {"q", "p", "r"}, "e": {}}
    assert list(flatten(config)) == [
        ("b.y", "1.5"),
        ("b.x.z", "ä"),
        ("a", "null"),
        ("s", '["p", "q", "r"]'),
        ("e", "{}"),
    ]


# ----------------------------------------------------------------------------------- wrong input


def test_survivors_without_a_verdict_are_refused() -> None:
    with pytest.raises(ValueError, match="is_kept"):
        full(distance=np.ones(3), is_kept=np.ones(2, dtype=np.bool_))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        render(full(white_fraction=np.array([0.1, np.nan])))


def test_plot_names_must_be_fit_for_an_id() -> None:
    series = page.Series(label="a", values=np.ones(3), colour="kept")
    with pytest.raises(ValueError, match="plot name"):
        page.plot_histogram([series], name='x" onload="', x_label="x")


def test_pictures_travel_whole_and_empty_ones_are_refused() -> None:
    content = jpeg((9, 8, 7))
    head, _, body = page.data_uri(content).partition(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(body) == content
    with pytest.raises(ValueError, match="0 bytes"):
        page.data_uri(b"")


def test_every_plot_colour_is_a_variable_of_the_page() -> None:
    html = render(EMPTY)
    light = html.partition(":root {")[2].partition("}")[0]
    for colour, code in page.COLOURS.items():
        assert f"--{colour}: {code};" in light
    assert not [code for code in page.COLOURS.values() if code in _plots(render(full()))]


def _plots(html: str) -> str:
    found = re.findall(r'<svg class="plot".*?</svg>', html, flags=re.S)
    assert len(found) == 2
    return "".join(found)
