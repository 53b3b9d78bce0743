"""From a build's tables to its page: every number where it belongs, pictures in bounds."""

import io
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from carn.bcsr.build import (
    PAPER_CHANNEL_MEANS,
    failures_table,
    make_manifest,
    measured_failures,
    overlap_report,
    select_tiles,
)
from carn.bcsr.config import FilterConfig, SelectConfig
from carn.bcsr.schema import MEASURED, SPLITS
from carn.bcsr.shards import plan_shards
from carn.report import bcsr_summary
from carn.report.bcsr_report import BcsrReport, render
from carn.report.bcsr_summary import Place, slides_to_show, summarize, tiles_to_show


def measured(num_slides: int = 5, num_each: int = 12) -> pa.Table:
    """Tiles of some slides: one in six white; a tile of slide 1 failed, and all of the last."""
    rng = np.random.default_rng(0)
    rows = []
    for slide in range(num_slides):
        for number in range(num_each):
            row = {
                **{"slide": f"s{slide:03d}", "uri": f"/slides/s{slide:03d}.tif"},
                **{"x_l0": 2000 * number, "y_l0": 500, "width_px": 1024, "height_px": 1024},
                **{"label": "tumor", "inside_fraction": 1.0, "is_transient": False},
                **{"white_fraction": 0.8 if number % 6 == 5 else float(rng.uniform(0, 0.5))},
                **dict(zip(("mean_r", "mean_g", "mean_b"), rng.uniform(50, 250, 3), strict=True)),
                **{"mpp_x": 0.2, "mpp_y": 0.3, "reader": "tiled-tiff", "slide_identity": "e"},
                **{"slide_width_l0": 40_000, "slide_height_l0": 20_000},
            }
            is_gone = slide == num_slides - 1
            if is_gone or (slide, number) == (1, 0):
                row |= dict.fromkeys(("inside_fraction", "white_fraction", "mean_r", "mean_g"))
                row |= {"mean_b": None, "reason": "<damaged & gone>"}
                row["failed_scope"] = "slide" if is_gone else "tile"
            if is_gone:
                row |= dict.fromkeys(("mpp_x", "mpp_y", "reader"))
                row |= dict.fromkeys(("slide_width_l0", "slide_height_l0"))
            rows.append(row)
    return pa.Table.from_pylist(rows, schema=MEASURED)


def select(table: pa.Table, *, keep: int | None = 30) -> pa.Table:
    config = SelectConfig(keep=keep, num_test=5, num_validation=3, split="paper")
    return select_tiles(table, white=FilterConfig(), select=config, seed=1)


def manifest_of(selected: pa.Table, *, images: str | None = None) -> dict[str, Any]:
    plans = plan_shards(selected, encoding="jxl", tiles_per_shard=16)
    return make_manifest(
        selected,
        config={
            **{"images": images, "seed": 5, "filter": {"tile_px": 1024}},
            **{"select": {"split": "paper"}, "store": {"encoding": "jxl"}},
        },
        source_digest="d",
        empty_slides=[],
        lists={"/lists/tumor.txt": "sha256:1"},
        num_listed=70,
        num_missing=4,
        plans=plans,
        shard_bytes={plan.name: 1_000_000 for plan in plans},
        num_failures=2,
        overlaps=overlap_report(selected, tile_px=1024),
    )


def jpeg(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 9, 9)).save(buffer, "JPEG")
    return buffer.getvalue()


def pictures_of(selected: pa.Table) -> dict[Place, bytes]:
    """What a job takes: a picture of each tile and slide that it is told to show."""
    kept, dropped = tiles_to_show(selected)
    pictures: dict[Place, bytes] = {(uri, None, None): jpeg(1) for uri in slides_to_show(selected)}
    for number, row in enumerate((*kept, *dropped)):
        pictures[row["uri"], row["x_l0"], row["y_l0"]] = jpeg(number % 256)
    return pictures


def report_of(
    selected: pa.Table, pictures: dict[Place, bytes] | None = None, **options: Any
) -> BcsrReport:
    return summarize(
        selected,
        manifest=manifest_of(selected, **options),
        failures=failures_table(measured_failures(selected.select(MEASURED.names))).to_pylist(),
        pictures=pictures_of(selected) if pictures is None else pictures,
        max_white_fraction=0.6,
    )


@pytest.fixture(scope="module")
def selected() -> pa.Table:
    return select(measured())


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


# ------------------------------------------------------------------------------------------ report


def test_the_funnel_counts_down_to_what_is_kept(selected: pa.Table) -> None:
    funnel = report_of(selected).funnel
    assert [(name, count) for name, count, _ in funnel] == [
        ("positions known", 70),
        ("drawn", 60),
        ("read", 47),
        ("not white", 39),
        ("kept", 30),
    ]
    notes = [note for *_, note in funnel]
    assert notes[0] == "4 on missing slides"
    assert notes[2:] == [
        "13 could not be read",
        "8 more than 60% white",
        "9 ranked too low",
    ]


def test_numbers_of_the_report_are_those_of_the_tables(selected: pa.Table) -> None:
    report = report_of(selected)
    assert report.white_fraction.shape == (47,)
    assert (report.white_fraction > 0.6).sum() == 8
    assert report.distance.shape == (39,)
    assert (np.diff(report.distance) <= 0).all()
    assert report.is_kept.tolist() == [True] * 30 + [False] * 9
    train = selected.filter(pa.array([s == "train" for s in selected["status"].to_pylist()]))
    np.testing.assert_allclose(report.channel_means[1], train["mean_g"].to_numpy().mean() / 255)
    assert report.paper_channel_means == PAPER_CHANNEL_MEANS
    assert report.facts["Tiles"] == "30: 22 train, 3 validation, 5 test"
    assert report.facts["Slides"] == "4"
    assert report.facts["Stored as"] == "jxl, 4 Parquet shards, 4.0 MB"
    assert report.facts["Tile"] == "1024 x 1024 px at level 0"
    assert report_of(selected, images="/images").facts["Tile"] == "whole images"


def test_each_slide_has_its_row(selected: pa.Table) -> None:
    report = report_of(selected)
    assert [slide.name for slide in report.slides] == [f"s{number:03d}" for number in range(5)]
    assert report.num_slides_total == 5
    status = {
        slide.uri: [row["status"] for row in selected.to_pylist() if row["uri"] == slide.uri]
        for slide in report.slides
    }
    for slide in report.slides:
        found = status[slide.uri]
        assert slide.num_drawn == 12
        assert slide.num_failed == found.count("failed")
        assert slide.num_white == found.count("white")
        assert slide.splits == {name: found.count(name) for name in SPLITS}
        assert slide.num_kept == sum(slide.splits.values())
    read, gone = report.slides[1], report.slides[4]
    assert (read.width_px, read.height_px, read.reader) == (40_000, 20_000, "tiled-tiff")
    assert read.mpp == pytest.approx(0.25)
    assert read.thumbnail == jpeg(1)
    assert read.boxes[0].status == "failed"
    box = read.boxes[1]
    assert (box.x, box.y, box.width, box.height) == (0.05, 0.025, 0.0256, 0.0512)
    assert (gone.width_px, gone.mpp, gone.reader, gone.num_failed) == (0, None, "", 12)
    assert gone.thumbnail is None
    assert gone.boxes == ()


def test_failures_name_their_place_or_the_whole_slide(selected: pa.Table) -> None:
    found = [(row.slide, row.place, row.reason) for row in report_of(selected).failures]
    assert found == [
        ("s001", "(0, 500)", "<damaged & gone>"),
        ("s004", "", "<damaged & gone>"),
    ]


def test_pictures_say_why_a_tile_was_kept_or_dropped(selected: pa.Table) -> None:
    report = report_of(selected)
    assert [picture.detail.split(",")[0] for picture in report.kept] == [
        f"rank {number}" for number in range(1, 31)
    ]
    rows = {f"{r['slide']} ({r['x_l0']}, {r['y_l0']}) tumor": r for r in selected.to_pylist()}
    for picture in report.kept:
        row = rows[picture.caption]
        assert picture.detail == f"rank {row['rank'] + 1}, {row['status']}"
    details = [picture.detail for picture in report.dropped]
    assert details[:8] == ["white 80.0% > 60%"] * 8
    assert all(re.fullmatch(r"rank 3\d, too near .* \(\d+\.\d\)", text) for text in details[8:])
    assert len(details) == 17


def test_what_has_no_picture_is_left_out(selected: pa.Table) -> None:
    pictures = pictures_of(selected)
    some = dict(list(pictures.items())[::2])
    report = report_of(selected, some)
    shown = (
        len(report.kept) + len(report.dropped) + sum(s.thumbnail is not None for s in report.slides)
    )
    assert shown == len(some)
    without = report_of(selected, {})
    assert without.kept == without.dropped == ()
    assert all(slide.boxes == () for slide in without.slides)
    page = render(without)
    assert "data:image/jpeg" not in page
    assert "s003" in page


def test_the_page_shows_it_all(selected: pa.Table) -> None:
    page = render(report_of(selected))
    assert page == render(report_of(selected))
    text = text_of(page)
    for wanted in ("13 could not be read", "&lt;damaged &amp; gone&gt;", "train / test", "s004"):
        assert wanted in text
    assert page.count("data:image/jpeg") >= 30 + 17 + 4


@pytest.mark.parametrize("keep", [None, 12])
def test_the_page_of_other_selections(keep: int | None) -> None:
    page = render(report_of(select(measured(), keep=keep)))
    assert ("ranked too low" in page) == (keep is not None)


def test_one_tile_alone_makes_a_page() -> None:
    table = measured(2, 1).slice(0, 1)
    config = SelectConfig(keep=None, num_test=0, num_validation=0)
    selected = select_tiles(table, white=FilterConfig(), select=config, seed=1)
    assert "1 train" in text_of(render(report_of(selected)))


# ------------------------------------------------------------------------------------------ bounds


def test_pictures_are_bounded_and_spread_over_the_ranks() -> None:
    selected = select(measured(40, 30), keep=700)
    kept, dropped = tiles_to_show(selected)
    assert len(kept) == bcsr_summary.MAX_KEPT_PICTURES == 48
    ranks = [row["rank"] for row in kept]
    assert ranks == sorted(set(ranks))
    assert (ranks[0], ranks[-1]) == (0, 699)
    assert max(np.diff(ranks)) <= 16
    assert len(dropped) == bcsr_summary.MAX_DROPPED_PICTURES == 48
    assert [row["status"] for row in dropped] == ["white"] * 24 + ["surplus"] * 24
    assert dropped[24]["rank"] == 700
    assert dropped[-1]["rank"] == max(rank for rank in selected["rank"].to_pylist() if rank)
    slides = slides_to_show(selected)
    assert len(slides) == bcsr_summary.MAX_SLIDE_PICTURES == 24
    assert slides == sorted(slides)
    counts = dict.fromkeys(selected["uri"].to_pylist(), 0)
    for row in selected.to_pylist():
        counts[row["uri"]] += row["status"] in SPLITS
    shown = [counts[uri] for uri in slides]
    assert min(shown) >= sorted(counts.values(), reverse=True)[23]
    report = report_of(selected)
    assert sum(slide.thumbnail is not None for slide in report.slides) == 24


def test_dropped_pictures_go_to_surplus_where_few_are_white() -> None:
    table = measured(20, 5)  # number 5 of each would be the white one
    selected = select(table, keep=20)
    _, dropped = tiles_to_show(selected)
    assert [row["status"] for row in dropped] == ["surplus"] * 48


def test_slides_that_could_not_be_read_are_not_pictured(selected: pa.Table) -> None:
    assert slides_to_show(selected) == [f"/slides/s00{number}.tif" for number in range(4)]


def test_rows_of_slides_are_bounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bcsr_summary, "MAX_SLIDE_ROWS", 3)
    report = report_of(select(measured()))
    assert [slide.name for slide in report.slides] == ["s000", "s001", "s002"]
    assert report.num_slides_total == 5
    assert "s004" in text_of(render(report))  # among the failures, at least
