"""The page of a sweep: who wins and whether that is chance, complete, self-contained, escaped."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.report.sweep_figures import (
    PAPER_TITLE,
    RAMP,
    draw_costs,
    draw_curves,
    draw_figure,
    find_leads,
    paint,
)
from carn.report.sweep_plots import CORNERS, Score, fit_frame, format_value, lay_axis, share_of
from carn.report.sweep_report import (
    Failure,
    PaperPoint,
    Point,
    SweepReport,
    find_notices,
    judge_contest,
    lead_by_chance,
    list_contests,
    list_rows,
    render,
    write_command,
)
from tests.report.test_bcsr_report import NASTY, Page
from tests.report.test_train_report import curve

NAN, INF = float("nan"), float("inf")
LONG = "a setting of very many words " * 12


def point(psnr: float = 35.0, /, **values: object) -> Point:
    return Point(
        values=values,  # type: ignore[arg-type]
        psnr_db=psnr,
        psnr_std=0.01,
        ssim=0.95,
        ssim_std=0.0002,
        num_seeds=3,
        seeds=(1, 7, 11),
        seconds=1800.0,
        params=1_379_779,
        flops=11_264_000_000,
        stopped_early=False,
        state="done",
    )


def change(made: Point, **changes: object) -> Point:
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


BLOCKS = (
    point(34.7, num_blocks=2),
    point(35.1, num_blocks=8),
    change(point(35.6, num_blocks=12), stopped_early=True),
    change(point(35.5, num_blocks=16), state="running"),
    change(point(NAN, num_blocks=20), state="failed"),
)


def full(**changes: object) -> SweepReport:
    report = SweepReport(
        title="Number of blocks",
        space_name="blocks",
        question="What is each further CARB worth?",
        dataset_uri="s3://lab/bcsr",
        code_version="0.1.0",
        seconds=7265.0,
        machine="a machine",
        metric_name="validation PSNR, dB",
        columns=("num_blocks",),
        points=BLOCKS,
        failures=(Failure(trial="trial-9", values={"num_blocks": 20}, seed=7, reason="no memory"),),
        best=1,
        figure="lines",
        x="num_blocks",
        group=None,
        paper=(
            PaperPoint(values={"num_blocks": 2}, psnr_db=39.78),
            PaperPoint(values={"num_blocks": 8}, psnr_db=40.385),
        ),
        curves=(curve("combined", [33.0, 34.0, 35.0]), curve("MSE", [33.0, 33.9, 34.9])),
        notes=("Each trial is short.",),
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


WEIGHTS = tuple(
    point(35 - abs(a - 3) / 10, alpha=a / 5, beta=b / 5, gamma=(5 - a - b) / 5)
    for a in range(6)
    for b in range(6 - a)
)
TERNARY = full(
    columns=("alpha", "beta", "gamma"),
    points=WEIGHTS,
    best=0,
    figure="ternary",
    x=None,
    paper=(PaperPoint(values={"alpha": 0.8, "beta": 0.1, "gamma": 0.1}, psnr_db=40.358),),
)
PARALLEL = full(
    columns=("learning_rate", "loss", "augment"),
    points=tuple(
        point(
            34 + i / 200, learning_rate=10 ** (-5 + i / 100), loss="ab"[i % 2], augment=i % 3 == 0
        )
        for i in range(200)
    ),
    best=199,
    figure="parallel",
    x=None,
    paper=(),
)
SCALES = full(
    columns=("scale", "loss"),
    points=(
        point(35.0, scale=2, loss="combined"),
        point(34.9, scale=2, loss="mse"),
        point(29.0, scale=4, loss="combined"),
        point(29.2, scale=4, loss="mse"),
    ),
    best=0,
    x="scale",
    group="loss",
    paper=(
        PaperPoint(values={"scale": 2, "loss": "combined"}, psnr_db=40.358),
        PaperPoint(values={"scale": 2, "loss": "mse"}, psnr_db=40.336),
    ),
)
EMPTY = full(points=(), failures=(), best=None, paper=(), curves=(), notes=())
UNFINISHED = full(points=(change(point(NAN, num_blocks=2), state="running"),), best=None)
ONE = full(points=BLOCKS[:1], best=0)
SINGLE_SEED = full(
    points=tuple(
        change(made, num_seeds=1, seeds=(1,), psnr_std=None, ssim_std=None) for made in BLOCKS
    )
)
LOST = full(points=(point(NAN, num_blocks=2), point(INF, num_blocks=4), BLOCKS[1]), best=2)
DIVERGED = full(
    points=(point(12.3, num_blocks=2), *(point(35 + n / 100, num_blocks=n) for n in range(3, 9))),
    best=6,
)
PAGES = {
    "lines": full(),
    "ternary": TERNARY,
    "parallel": PARALLEL,
    "scales": SCALES,
    "empty": EMPTY,
    "unfinished": UNFINISHED,
    "one": ONE,
    "one seed": SINGLE_SEED,
    "lost": LOST,
    "diverged": DIVERGED,
    "one weight": dataclasses.replace(TERNARY, points=WEIGHTS[:1]),
    "no weight": dataclasses.replace(TERNARY, points=(), best=None),
    "one line": dataclasses.replace(PARALLEL, points=PARALLEL.points[:1], best=0),
}


def texts(report: SweepReport, kind: str | None = None) -> list[str]:
    return [n.text for n in find_notices(report) if kind is None or n.kind == kind]


# ------------------------------------------------------------------------------------- whole pages


@pytest.mark.parametrize("name", PAGES)
def test_page_is_well_formed_and_reaches_for_nothing(name: str) -> None:
    html = render(PAGES[name])
    parsed = Page(html)
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href.removeprefix("#") for href in parsed.attributes("href")} <= set(ids)
    assert parsed.attributes("src") == []
    assert "http:" not in html
    assert "https:" not in html
    assert "nan" not in " ".join(parsed.attributes("d")) + parsed.text


@pytest.mark.parametrize("name", ["lines", "ternary", "parallel"])
def test_same_report_gives_same_bytes(name: str) -> None:
    assert render(PAGES[name]) == render(PAGES[name])


def test_empty_sweep_says_so() -> None:
    text = Page(render(EMPTY)).text
    for part in (
        "No point is finished and scored yet.",
        "No point has a score yet.",
        "There is no point.",
        "No curve was given.",
        "None.",
        "Points none",
    ):
        assert part in text
    assert "jobs/train.py" not in text


@pytest.mark.parametrize("figure", ["lines", "ternary", "parallel"])
@pytest.mark.parametrize("name", [NASTY, LONG, "淋巴 $x$ №7", r"$\frac{$"])
def test_names_of_any_kind_are_plain_text(name: str, figure: str) -> None:
    columns = (name, "b", "c")
    values = {name: name if figure != "ternary" else 1.0, "b": 1.0, "c": 2.0}
    report = full(
        title=name,
        space_name=name,
        question=name,
        dataset_uri=name,
        machine=name,
        metric_name=name,
        columns=columns,
        points=(point(35.0, **values), point(34.0, **values)),
        failures=(Failure(trial=name, values=values, seed=1, reason=name),),
        best=0,
        figure=figure,
        x=name,
        group=name,
        paper=(PaperPoint(values=values, psnr_db=40.0),),
        curves=(curve(name, [1.0, 2.0]),),
        notes=(name,),
    )
    parsed = Page(render(report))  # which refuses script elements
    assert parsed.text.count(" ".join(name.split())) >= 14


def test_numbers_appear() -> None:
    text = Page(render(full())).text
    for part in (
        "What is each further CARB worth?",
        "num_blocks 8 is best with 35.100 ± 0.010 dB, +0.400 dB over the second.",
        "python jobs/train.py --dataset s3://lab/bcsr --config best.yaml",
        "8 35.100 ± 0.010 0 0.9500 ± 0.0002 1, 7, 11 1.380 M 11.26 G 30 min 00 s best",
        "2 34.700 ± 0.010 −0.400",
        "12 35.600 ± 0.010 +0.500 0.9500 ± 0.0002 1, 7, 11 1.380 M 11.26 G 30 min 00 s "
        "stopped early",
        "20 – –",
        "Points 5: 3 done (1 stopped early), 1 running, 1 failed",
        "trial-9 num_blocks 20 7 no memory",
        PAPER_TITLE,
        "2 h 01 min",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"best": 5}, "best=5 is no place in points, of which there are 5"),
        ({"best": -1}, "best=-1"),
        ({"figure": "ternary"}, "takes three columns of weights, not num_blocks"),
        ({"x": None}, "x=None, which is not one of num_blocks"),
        ({"x": "reduction"}, "x='reduction'"),
    ],
)
def test_reports_that_do_not_fit_are_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render(full(**changes))


# --------------------------------------------------------------------------------------- verdicts


def test_stopped_running_and_failed_points_win_nothing() -> None:
    (contest,) = list_contests(full())
    assert [made.values["num_blocks"] for made in contest.ranked] == [8, 2]
    rows = list_rows(full())
    assert [row.point.values["num_blocks"] for row in rows] == [12, 16, 8, 2, 20]
    assert [row.is_best for row in rows] == [False, False, True, False, False]
    assert [row.remark for row in rows] == ["stopped early", "running", "", "", "failed"]


def test_a_lead_within_chance_is_no_win() -> None:
    points = (point(35.0, n=1), point(35.01, n=2), point(34.0, n=3), point(34.995, n=4))
    (contest,) = list_contests(full(points=points))
    notice = judge_contest(contest)
    assert notice.kind == "note"
    assert notice.text == (
        "n 2 is best with 35.010 ± 0.010 dB, +0.010 dB over the second: not more than seeds change "
        "a score by (about 0.016 dB). 2 other points cannot be told from it; take the cheapest."
    )
    (contest,) = list_contests(full(points=points[1:3]))
    assert judge_contest(contest).kind == "good"


def test_chance_is_two_standard_errors_or_the_papers_spread() -> None:
    a, b = change(point(), psnr_std=0.03, num_seeds=9), change(point(), psnr_std=0.04, num_seeds=4)
    assert lead_by_chance(a, b) == pytest.approx(2 * np.hypot(0.01, 0.02))
    assert lead_by_chance(a, change(b, psnr_std=None)) == 0.03
    assert lead_by_chance(change(a, num_seeds=1), b) == 0.03


def test_what_weakens_the_winner_is_said() -> None:
    assert texts(full(), "bad") == ["1 trial failed."]
    assert any("1 point still without all seeds" in text for text in texts(full(), "note"))
    assert texts(full())[-1] == "Each trial is short."
    (said, _) = texts(SINGLE_SEED, "bad")
    assert said.startswith("Every point: one seed only.")
    mixed = (*BLOCKS[:1], *SINGLE_SEED.points[1:2])
    assert texts(full(points=mixed, failures=()), "bad")[0].startswith(
        "Some points: one seed only."
    )
    assert "PSNR of 2 finished points is not a finite number." in texts(LOST, "bad")
    assert texts(ONE, "note")[0].endswith("the only point that is finished.")


def test_scales_do_not_compete() -> None:
    assert [made.ranked[0].values["loss"] for made in list_contests(SCALES)] == ["combined", "mse"]
    assert texts(SCALES)[:2] == [
        "×2: loss combined is best with 35.000 ± 0.010 dB, +0.100 dB over the second.",
        "×4: loss mse is best with 29.200 ± 0.010 dB, +0.200 dB over the second.",
    ]
    rows = list_rows(SCALES)
    assert [row.is_best for row in rows] == [True, False, True, False]
    assert [row.behind_db for row in rows] == pytest.approx([0.0, 0.1, 0.0, 0.2])
    assert "The winner." not in Page(render(SCALES)).text
    assert "The winner." in Page(render(full())).text


def test_the_command_is_safe_to_paste() -> None:
    command = write_command(full(dataset_uri="/data/my bcsr; rm -rf x"))
    assert command == "python jobs/train.py --dataset '/data/my bcsr; rm -rf x' --config best.yaml"
    assert write_command(EMPTY) is None


def test_long_tables_are_scrolled_and_cut_in_print() -> None:
    html = render(PARALLEL)
    assert html.count("30 min 00 s") == 201
    assert "nth-child(n+61) { display: none; }" in html


# -------------------------------------------------------------------------------------------- lines


def test_the_paper_has_a_plot_of_its_own_in_which_a_db_is_as_high() -> None:
    figure = draw_figure(full())
    assert figure is not None
    assert [panel.title for panel in figure.panels] == ["This sweep", PAPER_TITLE]
    low, high = fit_frame([1.0, 2.0], span_db=9.0)
    assert high - low == pytest.approx(9.0)
    assert low + high == pytest.approx(3.0)
    low, high = fit_frame([1.0, 2.0], span_db=0.1)
    assert low < 1.0 < 2.0 < high
    alone = draw_figure(full(paper=()))
    assert alone is not None
    assert [panel.title for panel in alone.panels] == [""]


def test_two_groups_are_held_against_each_other_beside_the_papers() -> None:
    figure = draw_figure(SCALES)
    assert figure is not None
    assert [panel.title for panel in figure.panels][2:] == ["loss: combined less mse"]
    assert [entry.label for entry in figure.panels[2].legend] == ["this sweep", "the paper"]


def test_leads_are_of_the_best_at_each_place() -> None:
    def score(psnr: float, spread: float | None, **values: object) -> Score:
        return Score(values, psnr, spread)  # type: ignore[arg-type]

    scores = [
        score(35.0, 0.03, x=2, g="a"),
        score(34.0, 0.5, x=2, g="a"),
        score(34.9, 0.04, x=2, g="b"),
        score(30.0, None, x=4, g="a"),
        score(30.5, 0.1, x=4, g="b"),
        score(20.0, 0.1, x=8, g="b"),
    ]
    leads = {lead.values["x"]: lead for lead in find_leads(scores, x="x", group="g")}
    assert {at: lead.psnr_db for at, lead in leads.items()} == pytest.approx({2: 0.1, 4: -0.5})
    assert leads[2].spread == pytest.approx(0.05)
    assert leads[4].spread is None


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([2, 4, 8, 12, 16, 20], "linear"),
        ([2, 4, 8, 16, 32], "log"),
        ([0, 16, 32], "linear"),
        (["mse", "combined"], "words"),
        ([1, "auto"], "words"),
        ([True, False], "words"),
        ([7], "linear"),
    ],
)
def test_settings_get_the_axis_they_call_for(values: list[object], kind: str) -> None:
    scores = [Score({"x": value}, 35.0) for value in values]  # type: ignore[dict-item]
    axis = lay_axis(scores, column="x")
    assert axis.kind == kind
    places = [axis.place(value) for value in axis.known]
    assert places == sorted(places)
    assert len(axis.known) == len(values)
    report = full(columns=("x",), x="x", points=tuple(point(x=v) for v in values), best=0)
    assert draw_figure(report) is not None


def test_settings_are_written_short() -> None:
    values = (None, 8, 1e-5, 0.1, "mse", True, "_x$")
    assert [format_value(value) for value in values] == [
        "–",
        "8",
        "1e−5",
        "0.1",
        "mse",
        "True",
        "_x$",
    ]


# ------------------------------------------------------------------------------ ternary, parallel


@given(st.lists(st.floats(0, 1e3), min_size=3, max_size=3))
def test_shares_lie_in_the_triangle(weights: list[float]) -> None:
    share = share_of(dict(zip("abc", weights, strict=True)), columns="abc")
    if not sum(weights) > 0:
        assert share is None
        return
    assert share is not None
    assert share.sum() == pytest.approx(1)
    x, y = share @ CORNERS
    assert -1e-9 <= y <= np.sqrt(3) * min(x, 1 - x) + 1e-9


@pytest.mark.parametrize("weights", [(-1.0, 1.0, 1.0), (1.0, "a", 1.0), (NAN, 1.0, 1.0)])
def test_weights_that_are_no_shares_are_counted_and_not_drawn(weights: tuple[object, ...]) -> None:
    odd = point(35.0, **dict(zip(("alpha", "beta", "gamma"), weights, strict=True)))
    figure = draw_figure(dataclasses.replace(TERNARY, points=(*WEIGHTS, odd)))
    assert figure is not None
    assert "1 point with weights that are no shares not drawn." in figure.words
    alone = dataclasses.replace(TERNARY, points=(odd,), best=0)
    assert "No point can be drawn." in Page(render(alone)).text


def test_the_papers_weights_and_the_winner_are_marked() -> None:
    def marks(report: SweepReport) -> tuple[int, int]:
        figure = draw_figure(report)
        assert figure is not None
        svg = str(figure.panels[0].plot)
        return svg.count("stroke: var(--alert)"), svg.count("stroke: var(--ink)")

    ringed, squared = marks(TERNARY)
    assert marks(dataclasses.replace(TERNARY, best=None))[0] < ringed
    assert marks(dataclasses.replace(TERNARY, paper=()))[1] < squared


def test_colours_run_along_the_ramp() -> None:
    assert paint(1.0, low=1.0, high=2.0) == paint(-9.0, low=1.0, high=2.0) == RAMP[0]
    assert paint(2.0, low=1.0, high=2.0) == paint(99.0, low=1.0, high=2.0) == RAMP[-1]
    assert paint(1 + 4 / 9, low=1.0, high=2.0) == RAMP[4]
    figure = draw_figure(DIVERGED)
    assert figure is not None
    diverged = dataclasses.replace(TERNARY, points=(change(WEIGHTS[0], psnr_db=12.3), *WEIGHTS[1:]))
    ramp = draw_figure(diverged)
    assert ramp is not None
    assert ramp.ramp is not None
    assert ramp.ramp[0] > 34


# --------------------------------------------------------------------------------- cost and curves


def test_cost_is_drawn_where_it_differs() -> None:
    assert draw_costs(full()) == []
    points = tuple(
        change(made, flops=10**9 * (i + 1), seconds=60.0 * (i + 1)) for i, made in enumerate(BLOCKS)
    )
    assert [panel.title for panel in draw_costs(full(points=points))] == [
        "PSNR by FLOPs",
        "PSNR by training time",
    ]


def test_curves_stand_in_pairs_where_a_setting_parts_them() -> None:
    curves = tuple(curve(f"curve {i}", [30.0, 31.0]) for i in range(8))
    assert [len(p.legend) for p in draw_curves(full(curves=curves))] == [4, 4]
    parted = dataclasses.replace(SCALES, curves=curves)
    assert [len(p.legend) for p in draw_curves(parted)] == [2, 2, 2, 2]
    assert draw_curves(full(curves=(curve("lost", [NAN]), curve("none", [])))) == []


def test_every_colour_of_a_line_is_a_variable_of_the_page() -> None:
    points = tuple(point(35.0 + n / 10 + x / 100, x=x, g=n) for n in range(5) for x in (1, 2))
    html = render(full(columns=("x", "g"), x="x", group="g", points=points))
    used = set(re.findall(r"var\(--([a-z-]+)\)", html)) - {"curve"}
    assert {"green", "purple"} <= used
    for name in used:
        assert re.search(rf"--{name}: ?#", html), name
