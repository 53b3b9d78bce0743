"""The evaluation page: who is better, what weakens that, complete, self-contained and escaped."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.report.evaluation_report import (
    Comparison,
    ConditionRow,
    CropStrip,
    EvaluationReport,
    ModelRow,
    TimingRow,
    bend,
    best_names,
    format_power,
    format_probability,
    format_seconds,
    format_with_spread,
    list_blocks,
    list_condition_tables,
    list_forests,
    list_time_plots,
    measure_gains,
    render,
    width_of,
)
from carn.report.evaluation_verdicts import Notice, find_notices, judge_scale
from carn.report.score_plots import Dot, Spot, frame, plot_dots, plot_scatter, plot_spread, shorten
from tests.report.test_bcsr_report import NASTY, Page
from tests.report.test_train_report import png

NAN, INF = float("nan"), float("inf")
LONG = "a model of very many words " * 12


def row(model: str = "CARN", psnr: float = 36.0, **changes: object) -> ModelRow:
    is_bicubic = model == "bicubic"
    made = ModelRow(
        model=model,
        key=model.lower(),
        scale=2,
        variant="",
        num_seeds=0 if is_bicubic else 3,
        seeds=() if is_bicubic else (1, 7, 11),
        psnr_db=psnr,
        psnr_std=None if is_bicubic else 0.02,
        ssim=psnr / 40,
        ssim_std=None if is_bicubic else 0.0004,
        psnr_y_db=psnr + 1,
        psnr_y_std=None if is_bicubic else 0.03,
        ssim_y=psnr / 39,
        ssim_y_std=None if is_bicubic else 0.0005,
        lpips=None,
        lpips_std=None,
        params=0 if is_bicubic else 1_379_779,
        flops=0 if is_bicubic else 11_264_000_000,
        steps=None if is_bicubic else 300_000,
        planned_steps=None if is_bicubic else 300_000,
        best_steps=() if is_bicubic else (287_000, 300_000, 291_000),
        trained_on="" if is_bicubic else "9f3a",
        paper_psnr_db=35.25 if is_bicubic else 40.36,
        paper_ssim=0.98,
        paper_params=None if is_bicubic else 1.389,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def comparison(
    a: str, b: str, difference: float, half: float | None = 0.02, **changes: object
) -> Comparison:
    made = Comparison(
        scale=2,
        a=a,
        b=b,
        difference_db=difference,
        low_db=None if half is None else difference - half,
        high_db=None if half is None else difference + half,
        p=0.0123,
        p_holm=0.0456,
        ssim_difference=0.0021,
        ssim_low=0.0012,
        ssim_high=0.0031,
        ssim_p=0.0031,
        ssim_p_holm=0.0062,
        unit="slide",
        num_tiles=200,
        num_slides=41,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def timing(model: str = "CARN", seconds: float = 1.5, **changes: object) -> TimingRow:
    made = TimingRow(
        model=model,
        scale=2,
        seconds=seconds,
        low_s=0.9 * seconds,
        high_s=1.2 * seconds,
        lr_width_px=512,
        lr_height_px=512,
        repeats=20,
        params=1_379_779,
        flops=721_000_000_000,
        device="CPU X",
        threads=2,
        torch_version="2.9.1",
        paper_seconds=0.0283,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def strip(**changes: object) -> CropStrip:
    made = CropStrip(
        tile_id="tile-7",
        slide="Tumor_001",
        x=64,
        y=128,
        side_px=96,
        scale=2,
        pictures=(
            ("HR", png(96), None),
            ("LR", png(96), None),
            ("bicubic", png(96), 30.0),
            ("CARN", png(96), 33.333),
        ),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


ROWS = (
    row("bicubic", 33.0),
    row("EDSR", 35.9),
    row("CARN", 36.0),
    row("CARN", 35.8, variant="MSE"),
)


def under(
    condition: str, gain: float | None = None, *, model: str = "CARN", **changes: object
) -> ConditionRow:
    made = ConditionRow(
        scale=2,
        model="bicubic" if gain is None else model,
        key="bicubic" if gain is None else "carn",
        condition=condition,
        num_seeds=0 if gain is None else 3,
        psnr_db=33.0 + (gain or 0.0),
        ssim=0.9 + (gain or 0.0) / 100,
        gain_db=gain,
        ssim_gain=None if gain is None else gain / 100,
        num_images=200,
        num_slides=41,
        least_gain_db=None if gain is None else gain - 0.5,
        least_slide_gain_db=None if gain is None else gain - 0.25,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def full(**changes: object) -> EvaluationReport:
    report = EvaluationReport(
        title="Evaluation",
        dataset_uri="s3://lab/bcsr",
        convention="RGB, no border.",
        convention_y="Y, border of scale px.",
        num_tiles=200,
        num_slides=41,
        code_version="0.1.0",
        seconds=7265.0,
        machine="a machine",
        rows=ROWS,
        comparisons=(comparison("CARN", "EDSR", 0.1), comparison("CARN", "bicubic", 3.0)),
        timings=(timing("bicubic", 0.01, paper_seconds=None), timing()),
        crops=(strip(),),
        notes=("Two slides are on both sides of the split.",),
        spread=(("CARN ×2", (-0.5, 1.0, 2.0, NAN)), ("lost", (NAN,))),
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


CONDITIONS = {
    "conditions": (("bicubic", "by interpolation"), ("jpeg", "JPEG quality 80")),
    "condition_rows": (
        *(under("bicubic"), under("jpeg")),
        *(under("bicubic", 3.0), under("jpeg", -0.125)),
        *(under("bicubic", 2.5, model="EDSR"), under("jpeg", 0.125, model="EDSR")),
    ),
}
EMPTY = full(rows=(), comparisons=(), timings=(), crops=(), notes=(), spread=())
LOST = full(
    rows=(row("bicubic", INF), row("EDSR", NAN, psnr_std=NAN), row("CARN", NAN, steps=None)),
    comparisons=(comparison("CARN", "EDSR", NAN), comparison("CARN", "bicubic", INF, None)),
    timings=(timing(seconds=NAN),),
    crops=(strip(pictures=(("SR", png(4), INF), ("other", png(4), NAN))),),
)
MANY = full(
    rows=tuple(row(f"model {i}", 30 + i / 100) for i in range(80)),
    comparisons=tuple(comparison(f"model {i}", "CARN", i / 100 - 1) for i in range(250)),
    timings=tuple(timing(f"model {i}", 1 + i) for i in range(50)),
)


def texts(report: EvaluationReport, kind: str | None = None) -> list[str]:
    return [n.text for n in find_notices(report) if kind is None or n.kind == kind]


# ------------------------------------------------------------------------------------- whole pages


@pytest.mark.parametrize(
    "report",
    [
        *(full(), EMPTY, LOST, MANY, full(rows=ROWS[2:3]), full(rows=ROWS[:1])),
        full(**CONDITIONS),
    ],
    ids=["full", "empty", "lost", "many", "one model", "only bicubic", "conditions"],
)
def test_page_is_well_formed_and_reaches_for_nothing(report: EvaluationReport) -> None:
    html = render(report)
    parsed = Page(html)
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href.removeprefix("#") for href in parsed.attributes("href")} <= set(ids)
    assert all(src.startswith("data:image/png;base64,") for src in parsed.attributes("src"))
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert "nan" not in " ".join(parsed.attributes("d")) + parsed.text


def test_same_report_gives_same_bytes() -> None:
    assert render(full()) == render(full())
    assert render(full()) != render(full(num_tiles=201))


def test_empty_report_says_so() -> None:
    text = Page(render(EMPTY)).text
    for part in (
        "No model was scored.",
        "No two models were compared.",
        "Gains by tile were not given.",
        "Nothing was timed.",
        "No crop was kept.",
    ):
        assert part in text


@pytest.mark.parametrize("name", [NASTY, LONG, "淋巴 $x$ №7", r"$\frac{$"])
def test_names_of_any_kind_are_plain_text(name: str) -> None:
    report = full(
        title=name,
        dataset_uri=name,
        convention=name,
        machine=name,
        notes=(name,),
        rows=(row("bicubic", 33.0), row(name, 35.0, trained_on=name)),
        comparisons=(comparison(name, "bicubic", 2.0),),
        timings=(timing(name, device=name),),
        crops=(strip(tile_id=name, slide=name, pictures=((name, png(), 30.0),)),),
        spread=((name, (1.0, 2.0)),),
        conditions=((name, name), ("other", "words")),
        condition_rows=(under(name, 2.0, model=name),),
    )
    parsed = Page(render(report))  # which refuses script elements
    assert parsed.text.count(" ".join(name.split())) >= 12
    assert f"{name}: {name}" in parsed.attributes("alt")


def test_numbers_appear() -> None:
    text = Page(render(full())).text
    for part in (
        "200 tiles of 41 slides",
        "CARN 36.00 ± 0.02 +3.00 0.9000 ± 0.0004 37.00 ± 0.03 0.9231 ± 0.0005 "
        "3 × 300,000 best at 287,000 to 300,000 1.380 M 11.26 G 40.36 +5.11 0.9800 1.389",
        "CARN (MSE) 35.80 ± 0.02 +2.80",
        "bicubic 33.00 – 0.8250 34.00 0.8462 – – – 35.25 – 0.9800 –",
        "CARN less EDSR +0.100 +0.080 to +0.120 0.046 p 0.012 +0.0021 +0.0012 to +0.0031 "
        "0.006 p 0.003",
        "×2 on 200 tiles of 41 slides",
        "CARN ×2 3 1 −0.50 +1.00 +2.00",
        "lost no finite gain",
        "CARN ×2 1.50 s 1.35 s to 1.80 s 20 512 × 512 px 1.380 M 721.0 G 28.3 ms",
        "torch 2.9.1",
        "tile-7",
        "CARN 33.33 dB",
        "2 h 01 min",
    ):
        assert part in text, part


# ------------------------------------------------------------------------------------- conditions


def test_conditions_are_a_table_of_gains() -> None:
    html = render(full(**CONDITIONS))
    text = Page(html).text
    for part in (
        "model bicubic jpeg bicubic 33.00 dB 0.9000 33.00 dB 0.9000",
        "CARN +3.00 36.00 dB 0.9300 slide +2.75 ▼ −0.12 32.88 dB 0.8988 slide ▼ −0.38",
        "EDSR +2.50 35.50 dB 0.9250 slide +2.25 +0.12 33.12 dB 0.9012 slide ▼ −0.12",
        "bicubic by interpolation jpeg JPEG quality 80",
    ):
        assert part in text, part
    assert "gain in SSIM −0.0013; least gain of a tile −0.62 dB" in html
    # A gain below 0 is marked, and only that; of each column the most is bold.
    section = html.partition('<section id="conditions">')[2].partition("</section>")[0]
    cells = re.findall(r'<td class="number( worse)?"><abbr[^>]*>(?:<b>)?([^<]*)', section)
    assert [(bool(worse), words) for worse, words in cells] == [
        *((False, "+3.00"), (True, "▼ −0.12")),
        *((False, "+2.50"), (False, "+0.12")),
    ]
    assert re.findall(r"<b>([^<]*)</b>", section) == ["+3.00", "+0.12"]


def test_one_condition_needs_no_table() -> None:
    one = {name: values[:1] for name, values in CONDITIONS.items()}
    assert render(full(**one)) == render(full())
    assert 'href="#conditions"' not in render(full())
    assert 'href="#conditions"' in render(full(**CONDITIONS))


def test_scales_have_tables_of_their_own_and_gaps_are_dashes() -> None:
    rows = (*CONDITIONS["condition_rows"][:3], under("jpeg", 0.0, scale=4))
    report = full(**CONDITIONS | {"condition_rows": rows})
    two, four = list_condition_tables(report)
    assert [(model, len(cells)) for model, cells in two.rows] == [("bicubic", 2), ("CARN", 2)]
    assert two.rows[1][1][1] is None
    assert [model for model, _ in four.rows] == ["CARN"]
    (empty, cell) = four.rows[0][1]
    assert empty is None
    # No gain is no loss, and one model has nothing to be better than.
    assert cell is not None
    assert (cell.is_best, cell.is_worse, cell.is_slide_worse) == (False, False, True)
    assert "CARN +3.00 36.00 dB 0.9300 slide +2.75 –" in Page(render(report)).text


def test_what_is_worse_than_interpolation_is_said_on_top() -> None:
    (said,) = texts(full(**CONDITIONS), "bad")
    assert said == (
        "Worse than bicubic interpolation of the same LR: CARN ×2 under jpeg (−0.12 dB)."
    )
    better = tuple(row for row in CONDITIONS["condition_rows"] if (row.gain_db or 0) >= 0)
    assert not texts(full(**CONDITIONS | {"condition_rows": better}), "bad")
    # With one condition the verdict of the scale says it.
    assert not texts(full(condition_rows=CONDITIONS["condition_rows"]), "bad")


# ---------------------------------------------------------------------------------------- notices


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        (
            {},
            "good",
            "×2: CARN scores highest, 36.00 dB, +3.00 dB over bicubic; +0.100 dB over EDSR "
            "(95 % interval +0.080 to +0.120 dB, corrected p 0.046).",
        ),
        (
            # Of two slides with the same sign, resampled, the interval is clear of 0, always.
            {"comparisons": (comparison("CARN", "EDSR", 0.1, p=0.5, p_holm=1.0),)},
            "note",
            "×2: CARN scores highest, 36.00 dB, +3.00 dB over bicubic; +0.100 dB over EDSR "
            "(95 % interval +0.080 to +0.120 dB, corrected p 1): too little to call it better.",
        ),
        (
            {"comparisons": (comparison("CARN", "EDSR", 0.1, p_holm=0.05),)},
            "note",
            "×2: CARN scores highest, 36.00 dB, +3.00 dB over bicubic; +0.100 dB over EDSR "
            "(95 % interval +0.080 to +0.120 dB, corrected p 0.05): too little to call it better.",
        ),
        (
            {"comparisons": (comparison("CARN", "EDSR", 0.1, unit="tile", p_holm=0.001),)},
            "note",
            "×2: CARN scores highest, 36.00 dB, +3.00 dB over bicubic; +0.100 dB over EDSR "
            "(95 % interval +0.080 to +0.120 dB, corrected p 0.001) on the tiles of one slide, "
            "which say nothing of other slides.",
        ),
        (
            {"comparisons": (comparison("EDSR", "CARN", -0.1),)},
            "good",
            "×2: CARN scores highest, 36.00 dB, +3.00 dB over bicubic; +0.100 dB over EDSR "
            "(95 % interval +0.080 to +0.120 dB, corrected p 0.046).",
        ),
        (
            {
                "rows": (row("bicubic", 33.0), row("CARN", 36.0)),
                "comparisons": (comparison("CARN", "bicubic", 3.0),),
            },
            "good",
            "×2: CARN scores highest, 36.00 dB; +3.000 dB over bicubic (95 % interval +2.980 to "
            "+3.020 dB, corrected p 0.046).",
        ),
        (
            {"rows": (row("CARN", 36.0),), "comparisons": ()},
            "note",
            "×2: CARN scores highest, 36.00 dB, and there is nothing to hold it against.",
        ),
        (
            {"comparisons": (comparison("EDSR", "CARN", -0.01),)},
            "note",
            "×2: CARN scores highest, 36.00 dB, +3.00 dB over bicubic; +0.010 dB over EDSR "
            "(95 % interval −0.010 to +0.030 dB, corrected p 0.046): too little to call it better.",
        ),
        (
            {"comparisons": (comparison("CARN", "EDSR", 0.1, None),)},
            "note",
            "×2: CARN scores highest, 36.00 dB, +3.00 dB over bicubic; +0.100 dB over EDSR, with "
            "no interval to judge that by.",
        ),
        (
            # Neither is CARN: without a test between them there is nothing to tick off.
            {"rows": (*ROWS, row("RDN", 36.1), row("RCAN", 36.2))},
            "note",
            "×2: RCAN scores highest, 36.20 dB, +3.20 dB over bicubic. It was not compared with "
            "RDN.",
        ),
        (
            {"rows": (row("bicubic", 33.0), row("CARN", 32.0))},
            "bad",
            "×2: bicubic scores highest, 33.00 dB: no model is better than bicubic upscaling.",
        ),
        ({"rows": ROWS[:1]}, "note", "×2: only bicubic upscaling was scored."),
        ({"rows": (row(psnr=NAN),)}, "bad", "×2: no model has a finite PSNR."),
    ],
)
def test_verdict_of_a_scale(changes: dict[str, object], kind: str, text: str) -> None:
    assert judge_scale(full(**changes), scale=2)[:2] == (kind, text)


def test_models_scored_on_other_tiles_do_not_win() -> None:
    rows = (*ROWS, row("CARN", 39.0, variant="*"))
    assert judge_scale(full(rows=rows), scale=2).text.startswith("×2: CARN scores highest, 36.00")
    entries = list_blocks(rows)[0].rows
    assert [sorted(entry.best) for entry in entries] == [
        [],
        [],
        ["psnr_db", "psnr_y_db", "ssim", "ssim_y"],
        [],
        [],
    ]
    assert entries[-1].gain_db is None
    starred = list_blocks((*rows, row("bicubic", 37.0, variant="*")))[0].rows
    assert starred[-2].gain_db == pytest.approx(2.0)


def test_a_run_like_the_papers_needs_no_warning() -> None:
    assert [n.kind for n in find_notices(full(notes=()))] == ["good"]


def test_one_seed_is_said() -> None:
    rows = (
        ROWS[0],
        row("EDSR", 35.0),
        row(
            *("CARN", 36.0),
            **{"num_seeds": 1, "psnr_std": None, "ssim_std": None},
            **{"psnr_y_std": None, "ssim_y_std": None},
        ),
    )
    (said,) = texts(full(rows=rows), "bad")
    assert said.startswith("CARN ×2: one seed only")
    (said,) = texts(full(rows=(rows[0], rows[2])), "bad")
    assert said.startswith("Every model: one seed only")
    assert "±" not in re.findall(r"<tbody>.*?</tbody>", render(full(rows=rows[::2])), re.S)[0]


@pytest.mark.parametrize(
    ("num_slides", "num_pairs", "said"),
    [
        (1, 2, "All tiles are of one slide. Intervals and p are over its tiles"),
        (2, 1, "2 slides only: .* Corrected for one comparison, p cannot fall below 0.05"),
        (6, 2, "6 slides only: .* Corrected for 2 comparisons, p cannot fall below 0.05"),
        # The least p of six slides is 2 / 2^6 = 0.031.
        (6, 1, "6 slides only: intervals over so few are too narrow.$"),
        (9, 2, "9 slides only: intervals over so few are too narrow.$"),
    ],
)
def test_few_slides_are_said(num_slides: int, num_pairs: int, said: str) -> None:
    comparisons = full().comparisons[:num_pairs]
    (text,) = texts(full(num_slides=num_slides, comparisons=comparisons), "bad")
    assert re.search(said, text)
    assert not texts(full(num_slides=10, comparisons=comparisons), "bad")


def test_what_intervals_are_over_is_said() -> None:
    assert "are over slides, not over tiles" in Page(render(full())).text
    alone = Page(render(full(num_slides=1))).text
    assert "intervals and tests are over its tiles" in alone
    assert "are over slides, not" not in alone


def test_unfinished_runs_are_said() -> None:
    (said,) = texts(full(left_out=("/runs/a (update 7 of 100)",)), "bad")
    assert said.startswith("Left out, since their training is not finished: /runs/a (update 7 of")
    rows = (ROWS[0], row("CARN", 36.0, planned_steps=400_000))
    assert texts(full(rows=rows), "bad") == [
        "Scored before its updates were all done: CARN ×2 (300,000 of 400,000)."
    ]


def test_an_early_best_checkpoint_is_no_short_training() -> None:
    (early,) = (r for r in ROWS if r.model == "EDSR")
    assert max(early.best_steps) == early.steps == 300_000
    rows = (*ROWS, row("RCAN", 35.0, best_steps=(12_000,)))
    assert texts(full(rows=rows), "bad") == []
    assert "best at 12,000" in Page(render(full(rows=rows))).text
    assert "best at" not in Page(render(full(rows=(row(best_steps=(300_000,)),)))).text


def test_a_shorter_training_than_the_papers_is_said() -> None:
    short = tuple(
        dataclasses.replace(r, steps=r.steps and 20_000, planned_steps=r.steps and 20_000)
        for r in ROWS
    )
    (said,) = texts(full(rows=short), "bad")
    assert said.startswith("Every model: trained for 20,000 updates, the paper's for 300,000.")
    mixed = (
        *ROWS[:2],
        row("CARN", 36.0, steps=20_000, planned_steps=20_000),
        row("RCAN", 35.0, steps=4000, planned_steps=4000),
    )
    shorter, uneven = texts(full(rows=mixed), "bad")
    assert shorter.startswith("CARN ×2, RCAN ×2: trained for 4,000 to 20,000 updates")
    assert uneven.startswith("At ×2 models were trained for different numbers of updates")
    unknown = texts(full(rows=(ROWS[0], row("CARN", 36.0, steps=None))), "note")
    assert "How many updates it was trained for is not known: CARN ×2." in unknown


def test_different_data_and_lost_scores_are_said() -> None:
    rows = (*ROWS, row("RCAN", NAN, trained_on="0000"))
    assert texts(full(rows=rows), "bad") == [
        "PSNR is not a finite number: RCAN ×2.",
        "At ×2 models were trained on different datasets.",
    ]


def test_the_callers_notes_come_last_and_are_no_verdict() -> None:
    assert find_notices(full())[-1] == Notice("note", "Two slides are on both sides of the split.")


def test_many_names_are_cut() -> None:
    rows = (*(row(f"m{i}", num_seeds=1) for i in range(9)), row("two"))
    (said,) = texts(full(rows=rows), "bad")
    assert "m5 ×2 and 3 more: one seed only" in said
    assert "m6" not in said


# ------------------------------------------------------------------------------------------ table


def test_the_least_lpips_is_best_and_its_column_is_there_only_with_it() -> None:
    rows = (row("EDSR", 35.0, lpips=0.1, lpips_std=0.003), row("CARN", 36.0, lpips=0.2))
    assert [sorted(entry.best)[0] for entry in list_blocks(rows)[0].rows] == ["lpips", "psnr_db"]
    text = Page(render(full(rows=rows))).text
    assert "LPIPS" in text
    assert "0.1000 ± 0.0030" in text
    assert "LPIPS" not in Page(render(full())).text


def test_scales_do_not_compete() -> None:
    rows = (*ROWS, row("EDSR", 30.0, scale=4), row("CARN", 29.0, scale=4))
    blocks = list_blocks(rows)
    assert [block.scale for block in blocks] == [2, 4]
    assert ["psnr_db" in entry.best for entry in blocks[1].rows] == [True, False]
    assert blocks[1].rows[0].gain_db is None
    assert [block.plot_title for block in blocks] == ["Gain over bicubic", "PSNR"]


def test_the_papers_columns_are_marked_and_leave_where_there_is_nothing() -> None:
    assert "the paper" in Page(render(full())).text
    rows = tuple(
        dataclasses.replace(r, paper_psnr_db=None, paper_ssim=None, paper_params=None) for r in ROWS
    )
    html = render(full(rows=rows, timings=()))
    assert "the paper" not in Page(html).text
    assert 'class="number theirs' not in html


# ------------------------------------------------------------------------------------ differences


def test_the_axis_bends_and_keeps_order() -> None:
    assert bend(0.0) == 0
    assert bend(-1.0) == -bend(1.0)
    assert bend(0.01) / bend(0.001) == pytest.approx(10, rel=0.02)
    assert bend(10.0) - bend(1.0) == pytest.approx(math.log(10), rel=1e-3)


@given(
    st.lists(
        st.tuples(st.floats(-40, 40), st.none() | st.floats(0, 5)),
        min_size=1,
        max_size=8,
    )
)
def test_bars_and_ticks_lie_within_the_strip(found: list[tuple[float, float | None]]) -> None:
    (forest,) = list_forests([comparison("a", "b", d, half) for d, half in found])
    for made, (difference, half) in zip(forest.rows, found, strict=True):
        assert made.at is not None
        assert 0 <= made.at <= 100
        assert (made.low is None) == (half is None)
        if made.low is not None and made.high is not None:
            assert 0 <= made.low <= made.at <= made.high <= 100
        assert made.is_clear == (half is not None and abs(difference) > half)
    assert "0" in [text for _, text in forest.ticks]
    places = [at for at, _ in forest.ticks]
    assert places == sorted(places)
    assert all(0 <= at <= 100 for at in places)


def test_clear_differences_are_filled_and_others_are_not() -> None:
    all_three = (
        *(comparison("a", "b", 0.1), comparison("c", "d", 0.01), comparison("e", "f", NAN, None)),
        comparison("g", "h", 0.1, p_holm=0.2),
        comparison("i", "j", 0.1, unit="tile"),
    )
    html = render(full(comparisons=all_three))
    assert html.count('<circle class="clear"') == 1
    assert html.count('<circle class="open"') == 3
    assert html.count('class="strip"') == 5


# ------------------------------------------------------------------------------------------- time


def test_machines_and_scales_are_never_drawn_together() -> None:
    timings = (
        timing(),
        timing("EDSR"),
        timing(device="GPU"),
        timing(threads=1),
        timing(scale=4),
        timing("unscored", device="other"),
    )
    plots = list_time_plots(full(timings=timings, rows=(*ROWS, row(scale=4))))
    assert [(plot.scale, plot.machine) for plot in plots] == [
        (2, "CPU X, 1 thread"),
        (2, "CPU X, 2 threads"),
        (2, "GPU, 2 threads"),
        (4, "CPU X, 2 threads"),
    ]
    assert "EDSR" in plots[1].plot
    assert "EDSR" not in plots[2].plot


def test_one_machine_is_named_once_and_several_in_a_column() -> None:
    assert "<caption>On CPU X, 2 threads, torch 2.9.1; one image" in render(full())
    html = render(full(timings=(timing(), timing(device="GPU"))))
    assert "<caption>On" not in html
    assert '<td class="wrap">GPU, 2 threads</td>' in html


def test_the_papers_seconds_are_in_no_plot() -> None:
    plain = [timing(paper_seconds=None)]
    assert list_time_plots(full(timings=plain)) == list_time_plots(full(timings=[timing()]))


# ------------------------------------------------------------------------------- spread and crops


def test_gains_count_what_is_worse_and_leave_out_what_is_no_number() -> None:
    assert measure_gains((-1.0, NAN, 0.0, 3.0, INF)) == (3, 1, -1.0, 0.0, 3.0)
    assert measure_gains((NAN,)) is None


@given(side=st.integers(1, 700))
def test_crops_are_shown_by_whole_pixels(side: int) -> None:
    width = width_of(strip(side_px=side))
    assert width % side == 0
    assert width == side or 100 <= width <= 270


def test_the_best_crop_is_bold() -> None:
    assert best_names(strip()) == {"CARN"}
    assert best_names(strip(pictures=(("a", png(), 1.0), ("b", png(), 1.0)))) == {"a", "b"}
    assert best_names(strip(pictures=(("a", png(), INF), ("b", png(), NAN)))) == frozenset()
    html = render(full())
    assert re.findall(r'<figcaption class="best">(\w+)', html) == ["CARN"]
    assert "image-rendering: pixelated" in html


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pictures": (("SR", b"\xff\xd8\xff", 1.0),)}, r"'tile-7' at \(64, 128\), 'SR'.*no PNG"),
        ({"side_px": 0}, "side_px=0 must be at least 1"),
    ],
)
def test_crops_that_cannot_be_shown_are_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render(full(crops=(strip(**changes),)))


# ------------------------------------------------------------------------------------------ words


def test_numbers_are_short() -> None:
    assert [format_seconds(s) for s in (4e-5, 0.0283, 0.12, 1.5, 61.0, 12345.0, NAN)] == [
        "40 µs",
        "28.3 ms",
        "120 ms",
        "1.50 s",
        "61.0 s",
        "12,345 s",
        "–",
    ]
    assert [format_power(n) for n in (0, 12, 8129, 1_379_779, 721 * 10**9)] == [
        "–",
        "12",
        "8.129 k",
        "1.380 M",
        "721.0 G",
    ]
    assert [format_probability(p) for p in (None, NAN, 0.0, 0.0012, 1.0)] == [
        "–",
        "–",
        "< 0.001",
        "0.001",
        "1.000",
    ]
    assert format_with_spread(36.0, None, 2) == format_with_spread(36.0, NAN, 2) == "36.00"
    assert format_with_spread(NAN, 0.1, 2) == "–"
    assert shorten("a" * 50, 9) == "aaaa…aaaa"


# ------------------------------------------------------------------------------------------ plots


def test_a_score_far_below_all_others_is_out_of_the_frame() -> None:
    low, high = frame([12.3, 35.0, 35.1, 35.2, 35.3])
    assert 34.9 < low < 35.0
    assert high > 35.3
    spots = [Spot(1.0 + i, y) for i, y in enumerate([12.3, 35.0, 35.1, 35.2, 35.3])]
    svg = plot_scatter(spots, name="x", x_label="x", y_label="y")
    assert svg is not None
    assert "1 more below the frame" in svg


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_any_values_have_a_frame_that_holds_the_largest(values: list[float]) -> None:
    low, high = frame(values)
    assert low < high or max(values) == low
    assert low <= max(values) <= high


@pytest.mark.parametrize("y", [0.0, 1e-12, -3.0, 1e9])
@pytest.mark.parametrize("x", [1e-9, 1.0, 1e9])
def test_one_point_can_be_drawn(x: float, y: float) -> None:
    for svg in (
        plot_scatter([Spot(x, y, "a", (x, x), 0.0)], name="x", x_label="x", y_label="y"),
        plot_dots([Dot("a", y, 0.0, y)], name="x", x_label="x"),
        plot_spread([("a", np.array([y]))], name="x", x_label="x"),
    ):
        assert svg is not None
        Page(svg)


def test_nothing_finite_makes_no_plot() -> None:
    assert plot_scatter([Spot(NAN, 1.0), Spot(1.0, INF)], name="x", x_label="", y_label="") is None
    assert plot_dots([Dot("a", NAN, 1.0, 2.0)], name="x", x_label="") is None
    assert plot_spread([("a", np.array([]))], name="x", x_label="") is None


def test_the_papers_dots_are_hollow_and_only_there_when_given() -> None:
    def num_hollow(paper: float | None) -> int:
        svg = plot_dots([Dot("a", 1.0, None, paper)], name="x", x_label="")
        assert svg is not None
        return svg.count("fill: none; stroke: var(--muted)") + svg.count("fill-opacity: 0")

    assert num_hollow(2.0) > num_hollow(None)
    assert num_hollow(NAN) == num_hollow(None)
