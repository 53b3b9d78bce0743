"""The page of a study: every case of its numbers, and nothing that could run or fetch."""

import dataclasses
import re

import numpy as np
import pytest

from carn.bcsr.codec import encode
from carn.report.classify_report import (
    ClassifyReport,
    CorpusReport,
    Example,
    History,
    KindRow,
    Picture,
    Range,
    Roc,
    best_row,
    judge,
    list_keys,
    render,
)


def row(title: str, accuracy: float, gain: Range | None, **changes: object) -> KindRow:
    fields: dict[str, object] = {
        "title": title,
        "detail": "",
        "is_reference": title in ("GT", "LR"),
        "num_crops": 1200,
        "num_slides": 12,
        "accuracy": Range(accuracy, accuracy - 0.02, accuracy + 0.02),
        "auc": Range(0.95, 0.9, 0.97),
        "over_gt": None,
        "over_bicubic": gain,
        "paper": 0.5,
    }
    return KindRow(**(fields | changes))  # type: ignore[arg-type]


def corpus(*rows: KindRow, **changes: object) -> CorpusReport:
    rates = np.linspace(0, 1, 1000)
    png = encode(np.full((8, 8, 3), 120, np.uint8), "png")
    fields: dict[str, object] = {
        "title": "bcSR",
        "facts": {"Dataset": "/d"},
        "notes": ("Something to know.",),
        "rows": rows,
        "rocs": tuple(
            Roc(label=r.title, false_positive=rates, true_positive=rates**0.5) for r in rows
        ),
        "histories": (
            History(label="GT", loss=(1.0, 0.5), validation_accuracy=(0.6, 0.8), best=2),
        ),
        "examples": (
            Example(
                title="t1 at 0, 0 px",
                is_tumor=True,
                pictures=(
                    Picture(title="GT", png=png, probability=0.9),
                    Picture(title="LR", png=png, probability=0.2),
                ),
            ),
        ),
    }
    return CorpusReport(**(fields | changes))  # type: ignore[arg-type]


def page(*corpora: CorpusReport) -> str:
    return render(
        ClassifyReport(title="Study", scale=2, facts={"a": "b"}, corpora=corpora, config={"k": 1})
    )


ROWS = (
    row("GT", 0.91, None),
    row("LR", 0.62, None),
    row("bicubic", 0.80, None),
    row("CARN", 0.90, Range(0.1, 0.05, 0.14)),
    row("EDSR", 0.85, Range(0.05, -0.01, 0.1), paper=None),
)


def test_the_best_method_is_told_from_gt() -> None:
    best = best_row(ROWS)
    assert best is not None
    assert best.title == "CARN"
    assert best_row(ROWS[:2]) is None


@pytest.mark.parametrize(
    ("gain", "is_good", "words"),
    [
        (Range(0.1, 0.05, 0.14), True, r"\+10.00 points to bicubic .*better than bicubic"),
        (Range(-0.1, -0.2, -0.05), False, "−10.00 points .*worse than bicubic"),
        (Range(0.01, -0.02, 0.04), False, "do not tell it from bicubic"),
        (Range(0.01, None, None), False, "one slide: no interval"),
    ],
)
def test_the_verdict_follows_the_interval(gain: Range, is_good: bool, words: str) -> None:
    found = judge(corpus(*ROWS[:3], row("CARN", 0.9, gain)))
    assert found is not None
    assert found[0] is is_good
    assert re.search(words, found[1])
    assert judge(corpus(*ROWS[:3])) is None


def test_numbers_stand_on_the_page_in_percent() -> None:
    html = page(corpus(*ROWS))
    for text in (
        "90.00",
        "88.00 to 92.00",
        "0.9500",
        "+10.00",
        "+5.00 to +14.00",
        "50.00",
        "1,200",
    ):
        assert text in html, text
    assert "Something to know." in html
    assert html.count("<b>wrong</b>") == 1
    assert html.count('class="best"') == 1
    assert "the paper's" in html
    assert "the paper's" not in page(corpus(*(dataclasses.replace(r, paper=None) for r in ROWS)))


def test_the_same_report_is_the_same_page_and_two_datasets_share_no_id() -> None:
    both = page(corpus(*ROWS), corpus(*ROWS, title="PCam"))
    assert both == page(corpus(*ROWS), corpus(*ROWS, title="PCam"))
    ids = re.findall(r'\bid="([^"]+)"', both)
    assert len(ids) == len(set(ids))


def test_markup_in_names_is_text() -> None:
    evil = '<img src=x onerror="alert(1)"> $x_1$ & co'
    html = page(
        corpus(
            *(dataclasses.replace(r, title=evil, detail=evil) for r in ROWS),
            title=evil,
            notes=(evil,),
        )
    )
    assert "<img src=x" not in html
    assert "&lt;img src=x" in html


def test_a_bare_study_has_a_page() -> None:
    no_auc = Range(float("nan"), None, None)
    lone = dataclasses.replace(row("GT", 1.0, None), accuracy=Range(1.0, None, None), auc=no_auc)
    no_scores = History(label="GT", loss=(1.0,), validation_accuracy=(None,), best=1)
    html = page(corpus(lone, histories=(no_scores,), examples=(), notes=(), rocs=()))
    assert "No kind of picture (but LR) made the classifier err" in html
    assert "100.00" in html
    assert page(corpus(histories=(), examples=(), rocs=()))


def test_lines_of_many_models_can_be_told_apart() -> None:
    keys = list_keys([f"m{n}" for n in range(12)])
    assert len({(key.colour, key.style) for key in keys}) == 12
