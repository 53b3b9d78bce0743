"""The training page: complete, self-contained, the same each time, and safe from what it is fed."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from carn.report import plots
from carn.report.page import NUM_BINS
from carn.report.train_report import (
    MAX_TILES,
    ROW_PX,
    CropRow,
    Curve,
    TrainReport,
    find_notices,
    fit_pictures,
    judge_score,
    list_scores,
    measure_change,
    rank_tiles,
    render,
)
from tests.report.test_bcsr_report import NASTY, Page

NAN, INF = float("nan"), float("inf")


def png(width: int = 12, height: int | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height or width), (200, 90, 150)).save(buffer, "PNG")
    return buffer.getvalue()


def curve(label: str, values: list[float] | np.ndarray, *, every: int = 10) -> Curve:
    array = np.array(values, dtype=np.float64)
    return Curve(label=label, steps=every * np.arange(1, array.size + 1), values=array)


EMPTY = TrainReport(
    title="Nothing",
    facts={},
    notices=(),
    loss_terms=(),
    validation_psnr=(),
    validation_ssim=(),
    bicubic_psnr=None,
    bicubic_ssim=None,
    best_step=None,
    learning_rate=curve("learning rate", []),
    images_per_s=curve("images/s", []),
    crops=(),
    validation_table=(),
    convention="",
    config={},
)


def full(**changes: object) -> TrainReport:
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.9, 1.1, 3000)
    fall = np.linspace(1.0, 0.01, 3000)
    report = TrainReport(
        title="CARN ×4",
        facts={"model": "CARN, 18.4 M parameters", "updates": "30,000"},
        notices=(("good", "Same dataset as before."), ("bad", "Resumed twice.")),
        loss_terms=(curve("total", noise * fall), curve("L1", 0.5 * noise * fall)),
        validation_psnr=(
            curve("weights", [30.0, 33.5, 35.2, 35.1], every=4000),
            curve("EMA", [29.0, 33.0, 35.0, 35.3], every=4000),
        ),
        validation_ssim=(curve("weights", [0.8, 0.9, 0.95, 0.9512], every=4000),),
        bicubic_psnr=33.26,
        bicubic_ssim=0.9123,
        best_step=12_000,
        learning_rate=curve("learning rate", 2e-4 * fall),
        images_per_s=curve("images/s", 1450 * noise),
        crops=(
            CropRow(
                title="Tumor_001 (100, 200)",
                detail="largest gain",
                images=(("LR (nearest)", png(12)), ("SR 35.0 dB", png(48)), ("HR", png(48))),
            ),
        ),
        validation_table=(
            ("tile-good", 33.0, 35.5, 0.91, 0.95),
            ("tile-bad", 36.0, 35.25, 0.94, 0.93),
            ("tile-so-so", 33.0, 33.5, 0.91, 0.92),
        ),
        convention="PSNR on RGB, 4 px border left out.",
        config={"model": {"name": "carn"}, "steps": 30_000},
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


DIVERGED = full(
    loss_terms=(curve("total", [0.5, 0.2, NAN, INF]), curve("zero", [0.0, 0.0, 0.1, 0.2])),
    validation_psnr=(curve("weights", [NAN, NAN]), curve("EMA", [20.0, NAN])),
    validation_ssim=(curve("weights", [0.1]),),
    validation_table=(("lost", 33.0, NAN, 0.9, NAN), ("white", INF, INF, 1.0, 1.0)),
    crops=(CropRow(title="bare", detail="", images=()),),
)


# -------------------------------------------------------------------------------- the page as such


@pytest.mark.parametrize("report", [full(), EMPTY, DIVERGED], ids=["full", "empty", "diverged"])
def test_page_is_balanced_and_its_ids_and_links_are_sound(report: TrainReport) -> None:
    html = render(report)
    parsed = Page(html)
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href.removeprefix("#") for href in parsed.attributes("href")} <= set(ids)
    assert "nan" not in parsed.text
    assert "nan" not in " ".join(parsed.attributes("d"))


def test_page_reaches_for_nothing_outside() -> None:
    html = render(full())
    parsed = Page(html)
    assert len(parsed.attributes("src")) == 3
    assert all(src.startswith("data:image/png;base64,") for src in parsed.attributes("src"))
    assert all(href.startswith("#") for href in parsed.attributes("href"))
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert [tag for tag, _ in parsed.tags].count("style") == 1


def test_same_report_gives_same_bytes() -> None:
    first, second = render(full()), render(full())
    assert first == second
    assert first != render(full(bicubic_psnr=33.27))


def test_what_comes_from_files_is_escaped() -> None:
    named = curve(NASTY, [30.0, NAN])
    report = full(
        title=NASTY,
        facts={NASTY: NASTY},
        notices=(("bad", NASTY), ("good", NASTY)),
        loss_terms=(named,),
        validation_psnr=(named,),
        validation_ssim=(named,),
        learning_rate=named,
        images_per_s=named,
        crops=(CropRow(title=NASTY, detail=NASTY, images=((NASTY, png()),)),),
        validation_table=((NASTY, 1.0, 2.0, 0.1, 0.2),),
        convention=NASTY,
        config={NASTY: {NASTY: NASTY}},
    )
    parsed = Page(render(report))  # which refuses script elements
    assert parsed.text.count(NASTY) >= 18
    assert f"{NASTY}: {NASTY}" in parsed.attributes("alt")


@pytest.mark.parametrize("label", ["淋巴 $x$ №7", "_private", r"$\frac{$", 'id="x"'])
def test_labels_of_any_script_and_sign_survive(label: str) -> None:
    report = full(validation_psnr=(curve(label, [30.0, 31.0]),), loss_terms=(curve(label, [1.0]),))
    assert Page(render(report)).text.count(label) >= 3


def test_every_curve_colour_is_a_variable_of_the_page() -> None:
    terms = tuple(curve(str(place), [1.0, 2.0]) for place in range(len(plots.CYCLE)))
    html = render(full(loss_terms=terms))
    (loss,) = re.findall(r'<svg class="plot"[^>]*aria-label="loss .*?</svg>', html, flags=re.S)
    for colour in plots.CYCLE:
        assert f"var(--{colour})" in loss
        assert re.search(rf"--{colour}: #", html)
    for colour, code in plots.CURVE_COLOURS.items():
        assert f"--{colour}: {code};" in html
        assert code not in loss


# ------------------------------------------------------------------------------- what the page says


def test_numbers_appear() -> None:
    text = Page(render(full())).text
    for part in (
        "PSNR 35.20 dB at step 12,000: +1.94 dB over bicubic (33.26 dB).",
        "35.20 at 12,000",
        "bicubic 33.26",
        "bicubic 0.9123",
        "PSNR on RGB, 4 px border left out.",
        "weights at the best step 12,000 35.20 +1.94 0.9500 +0.0377",
        "weights last 16,000 35.10 +1.84 0.9512 +0.0389",
        "EMA last 16,000 35.30 +2.04 – –",
        "1 of 3 tiles got a lower PSNR",
        "tile-bad worse 36.00 35.25 −0.75 0.9400 0.9300 −0.0100",
        "tile-good 33.00 35.50 +2.50 0.9100 0.9500 +0.0400",
        "mean of 3 34.00 34.75 +0.75",
        "largest gain",
        "SR 35.0 dB",
        "18.4 M parameters",
        "model.name carn",
    ):
        assert part in text
    assert re.search(r"median 1,4\d\d images/s", text)


def test_empty_report_says_so() -> None:
    text = Page(render(EMPTY)).text
    for part in ("PSNR", "SSIM", "loss", "learning rate", "throughput"):
        assert f"No {part} was recorded." in text
    assert "No validation PSNR was recorded." in text
    assert "No crop was kept." in text
    assert "No tile was scored." in text
    assert "Nothing was set." in text


def test_diverged_run_shows_what_there_is_and_raises_its_voice() -> None:
    notices = find_notices(DIVERGED, rank_tiles(DIVERGED.validation_table))
    assert [n.text for n in notices if n.anchor == "losses"] == [
        "The loss is not finite (total: 2 values, the first at step 30)."
    ]
    text = Page(render(DIVERGED)).text
    assert "PSNR is not a number on 1 of 2 validation tiles." in text
    assert "weights (no value yet)" in text
    assert "lost no number 33.00 – –" in text
    assert "white ∞ ∞ +0.00" in text
    assert "mean of" not in text
    assert "There is no picture of it." in text


def test_score_comes_first_then_the_bad_news() -> None:
    report = full(validation_table=(("a", 2.0, 1.0, 0.2, 0.1),))
    notices = find_notices(report, rank_tiles(report.validation_table))
    assert notices[0].text.startswith("PSNR 35.20 dB")
    assert [notice.is_good for notice in notices] == [True, False, False, True]
    assert notices[2] == (False, "Lower PSNR than bicubic on 1 of 1 validation tile.", "tiles")


@pytest.mark.parametrize(
    ("changes", "is_good", "text"),
    [
        ({}, True, "PSNR 35.20 dB at step 12,000: +1.94 dB over bicubic (33.26 dB)."),
        (
            {"bicubic_psnr": 36.0},
            False,
            "PSNR 35.20 dB at step 12,000: 0.80 dB below bicubic (36.00 dB).",
        ),
        (
            {"bicubic_psnr": 35.2},
            False,
            "PSNR 35.20 dB at step 12,000: no better than bicubic (35.20 dB).",
        ),
        (
            {"bicubic_psnr": None},
            True,
            "PSNR 35.20 dB at step 12,000. There is no score of bicubic to compare it with.",
        ),
        (
            {"best_step": None},
            True,
            "PSNR 35.10 dB at step 16,000, the last validation: +1.84 dB over bicubic (33.26 dB).",
        ),
        (
            {"best_step": 999},
            True,
            "PSNR 35.10 dB at step 16,000, the last validation (none is recorded for the best step,"
            " 999): +1.84 dB over bicubic (33.26 dB).",
        ),
        ({"validation_psnr": ()}, False, "No validation PSNR was recorded."),
    ],
)
def test_verdict(changes: dict[str, object], is_good: bool, text: str) -> None:
    assert judge_score(full(**changes))[:2] == (is_good, text)


def test_best_and_last_step_are_one_row_when_they_are_one() -> None:
    scores = list_scores(full(best_step=16_000))
    assert [(score.label, score.place) for score in scores] == [
        ("weights", "at the best step, the last"),
        ("EMA", "at the best step, the last"),
    ]
    assert scores[1].ssim is None


def test_the_best_point_is_ringed_only_where_there_is_one() -> None:
    assert "35.20 at 12,000" in render(full())
    assert "at 12,000<" not in render(full(best_step=None))


# ----------------------------------------------------------------------------------------- tiles


def test_least_gain_comes_first_and_the_rest_is_cut() -> None:
    rows = [(f"tile{i:03d}x", 30.0, 30.0 + i / 10, 0.9, 0.91) for i in range(300)]
    parsed = Page(render(full(validation_table=tuple(rows[::-1]))))
    assert "the 200 tiles that gain least" in parsed.text
    shown = re.findall(r"tile(\d\d\d)x", parsed.text)
    assert shown == [f"{i:03d}" for i in range(MAX_TILES)]
    classes = parsed.attributes("class")
    assert classes.count("weak") == 5
    assert classes.count("worse") == 0
    assert "mean of 300 30.00 44.95 +14.95" in parsed.text


def test_rows_that_are_worse_stand_out_and_no_other() -> None:
    html = render(full())
    (row,) = re.findall(r'<tr class="worse">.*?</tr>', html)
    assert "tile-bad" in row
    assert "tile-bad" not in html.replace(row, "")


def test_tiles_without_a_number_come_before_all_and_exact_copies_gain_nothing() -> None:
    gains = rank_tiles(
        [
            ("b", 1.0, 0.0, 0.5, 0.5),
            ("copy", INF, INF, 1.0, 1.0),
            ("n", NAN, 1.0, 0.5, 0.5),
            ("a", 1.0, 0.0, 0.5, 0.5),
        ]
    )
    assert [gain.tile for gain in gains] == ["n", "a", "b", "copy"]
    assert [gain.is_worse for gain in gains] == [False, True, True, False]
    assert gains[-1].psnr_gain == 0


@given(gains=st.lists(st.floats(-50, 50), min_size=1, max_size=40))
def test_histogram_of_gains_holds_every_tile_and_parts_at_zero(gains: list[float]) -> None:
    from carn.report.train_report import _range_around_zero

    values = np.array(gains)
    low, high = _range_around_zero(values)
    edges = np.linspace(low, high, NUM_BINS + 1)
    assert np.histogram(values, bins=edges)[0].sum() == len(gains)
    assert low <= 0 <= high
    assert np.abs(edges).min() <= 1e-9 * (high - low)


# ---------------------------------------------------------------------------------------- curves


@given(
    num=st.integers(0, 3000),
    max_points=st.integers(3, 700),
    seed=st.integers(0, 2**32 - 1),
)
def test_downsampling_keeps_both_ends_and_the_mean_of_the_rest(
    num: int, max_points: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=num)
    original = Curve(label="x", steps=np.cumsum(rng.integers(1, 9, num)), values=values)
    steps, means = plots.downsample(original, max_points=max_points)
    assert steps.size == means.size == min(num, max_points)
    assert (np.diff(steps) > 0).all()
    if num:
        assert (steps[0], steps[-1]) == (original.steps[0], original.steps[-1])
        assert (means[0], means[-1]) == (values[0], values[-1])
        assert values.min() - 1e-9 <= means.min()
        assert means.max() <= values.max() + 1e-9
    if num > max_points and (num - 2) % (max_points - 2) == 0:
        assert means[1:-1].mean() == pytest.approx(values[1:-1].mean(), abs=1e-9)


def test_a_bin_leaves_out_what_is_not_finite() -> None:
    values = np.array([NAN, 1.0, NAN, 3.0, INF, NAN, -INF, 5.0])
    original = Curve(label="x", steps=np.arange(8), values=values)
    steps, means = plots.downsample(original, max_points=4)
    np.testing.assert_array_equal(steps, [0, 2, 5, 7])
    np.testing.assert_array_equal(means, [NAN, 2.0, NAN, 5.0])
    np.testing.assert_array_equal(plots.downsample(original)[1][4:], [NAN, NAN, NAN, 5.0])


def test_long_curves_are_drawn_with_few_points() -> None:
    def num_points(num: int) -> int:
        long = curve("x", np.random.default_rng(0).uniform(1, 2, num))
        svg = plots.plot_curves([long], name="x", y_label="y", max_step=10 * num)
        assert svg is not None
        return max(path.count("L") for path in re.findall(r' d="(M.*?)"', svg))

    assert 100 < num_points(100_000) <= plots.MAX_POINTS


def test_a_low_start_leaves_the_frame_but_a_late_fall_does_not() -> None:
    rise = [10.0, 34.0, *np.linspace(34.5, 35.5, 20)]
    started = plots.plot_curves([curve("x", rise)], name="x", y_label="y", max_step=300)
    fallen = plots.plot_curves([curve("x", [*rise, 12.5])], name="x", y_label="y", max_step=300)
    assert started is not None
    assert fallen is not None
    assert "from 10" in started
    assert ">20<" not in started
    assert ">20<" in fallen


@pytest.mark.parametrize("scale", ["linear", "log", "from zero"])
@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0], [-1.0, -2.0], [1e-30, 1.0], [0.0, 1e-3, 1e3], [0.1, 0.11], [1e38, 1.0, NAN]],
)
def test_any_values_can_be_drawn(values: list[float], scale: plots.YScale) -> None:
    svg = plots.plot_curves(
        [curve("x", values)], name="x", y_label="y", max_step=0, y_scale=scale, reference=(0.1, "r")
    )
    assert svg is not None
    Page(svg)


def test_no_finite_value_makes_no_plot() -> None:
    curves = [curve("x", [NAN, INF]), curve("y", [])]
    assert plots.plot_curves(curves, name="x", y_label="y", max_step=9) is None
    assert [entry.has_values for entry in plots.list_legend(curves)] == [False, False]


def test_change_of_a_loss_is_of_its_ends() -> None:
    ends = [4.0] * 5 + [NAN] * 7 + [9.0] * 90 + [1.0] * 5
    assert measure_change(curve("x", ends)) == (4.0, 1.0)
    assert measure_change(curve("x", [2.0])) == (2.0, 2.0)
    assert measure_change(curve("x", [NAN])) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2e-4, "2e−4"),
        (0.005, "0.005"),
        (-0.5, "−0.5"),
        (35.25, "35.25"),
        (12_000.0, "12,000"),
        (2.5e7, "2.5e7"),
    ],
)
def test_tick_labels_are_short(value: float, text: str) -> None:
    assert plots.format_tick(value) == text


# ----------------------------------------------------------------------------------------- crops


@given(
    widths=st.lists(st.integers(1, 600), min_size=1, max_size=6),
)
def test_crops_are_of_one_size_and_a_whole_multiple_of_the_largest(widths: list[int]) -> None:
    images = tuple((str(place), png(width, 8)) for place, width in enumerate(widths))
    pictures = fit_pictures(CropRow(title="x", detail="", images=images))
    (shown,) = {picture.width_px for picture in pictures}
    assert shown % max(widths) == 0
    assert shown == max(widths) or shown * len(widths) <= ROW_PX
    assert [picture.is_enlarged for picture in pictures] == [width < shown for width in widths]
    assert [picture.caption for picture in pictures] == [str(p) for p in range(len(widths))]


def test_only_enlarged_pictures_show_their_pixels() -> None:
    images = (("LR", png(100)), ("SR", png(400)), ("HR", png(400)))
    html = render(full(crops=(CropRow(title="x", detail="", images=images),)))
    assert re.findall(r'<img( class="enlarged")?', html) == [' class="enlarged"', "", ""]
    assert ".enlarged { image-rendering: pixelated; }" in html


# ----------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 a JPEG", png()[:20]])
def test_pictures_that_are_no_png_are_named(content: bytes) -> None:
    row = CropRow(title="Tumor_001", detail="", images=(("SR", content),))
    with pytest.raises(ValueError, match=r"'Tumor_001', 'SR': the picture is no PNG"):
        render(full(crops=(row,)))


@pytest.mark.parametrize(
    ("steps", "values", "words"),
    [
        ([1, 2], [0.5], r"'L1'.*\(2,\).*\(1,\)"),
        ([[1, 2]], [[0.5, 0.5]], r"'L1'.*\(1, 2\)"),
        ([10, 30, 20], [1, 2, 3], "'L1': step 20 follows step 30"),
        ([10, 10], [1, 2], "'L1': step 10 follows step 10"),
    ],
)
def test_curves_that_do_not_fit_are_named(
    steps: list[int], values: list[float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Curve(label="L1", steps=np.array(steps), values=np.array(values, dtype=np.float64))


def test_mean_is_of_the_finite_rows() -> None:
    table = (("a", 30.0, 32.0, 0.9, 0.92), ("white", INF, INF, 1.0, 1.0))
    text = Page(render(full(validation_table=table))).text
    assert "mean of 1 of 2, where finite 30.00 32.00 +2.00" in text
    assert math.isinf(rank_tiles(table)[0].sr_psnr)
