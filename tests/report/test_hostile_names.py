"""No page lets what comes from files become its markup."""

import re
from pathlib import Path

import pytest

import carn.report
from carn.report.page import _environment, inline_svg, render_page
from tests.report.test_bcsr_report import NASTY

TEMPLATES = sorted((Path(carn.report.__file__).parent / "templates").glob("*.html"))


def test_whatever_is_put_into_a_template_is_escaped() -> None:
    assert _environment().autoescape is True
    made = _environment().from_string('<b title="{{ name }}">{{ name }}</b>').render(name=NASTY)
    assert "<script" not in made
    assert made.count('"') == 2


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_no_template_lets_anything_past(template: Path) -> None:
    text = template.read_text()
    assert not re.search(r"\|\s*safe\b|autoescape|<script|\bon\w+=|javascript:", text)
    # Outside of quotes an attribute ends at the first blank.
    assert not re.search(r"=\s*\{\{", text)


def test_pages_forbid_scripts_and_foreign_content() -> None:
    base = next(path for path in TEMPLATES if path.name == "base.html").read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in base
    pages = [path for path in TEMPLATES if path.name not in ("base.html", "config.html")]
    assert all("base.html" in path.read_text() for path in pages)
    assert callable(render_page)


def test_text_in_plots_is_text() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([1, 2], label=NASTY)
    axes.set_xlabel(f"--> {NASTY} <!-- ")
    axes.legend()
    svg = str(inline_svg(figure, name="a", label=NASTY))
    assert "<script" not in svg
    assert "alert(" in svg
