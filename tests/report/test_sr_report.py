"""The page of a run of super-resolution: complete, self-contained, and right about what it says."""

import dataclasses
import io
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from carn.report import sr_report
from carn.report.sr_records import (
    ConsistencySummary,
    DamagedPlace,
    LowPlace,
    LrSummary,
    Pace,
    RunSummary,
    Seam,
    SlideSummary,
)
from carn.report.sr_report import (
    MAX_LOW,
    MAX_SHOWN,
    _slide_facts,
    background_share,
    choose_shown,
    find_notices,
    format_bytes,
    format_decibels,
    format_duration,
    format_fraction,
    format_mpp,
    judge_run,
    judge_seam,
    list_facts,
    list_seams,
    measure_stages,
    needs_look,
    order_slides,
    render,
)
from tests.report.test_bcsr_report import NASTY, Page

WARNING = "super-resolved, not for primary diagnosis"
STAGES = {"read_s": 100.0, "infer_s": 1800.0, "encode_s": 90.0, "upload_s": 30.0, "wait_s": 10.0}


def picture(kind: str = "JPEG", colour: tuple[int, int, int] = (200, 120, 160)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, kind)
    return buffer.getvalue()


FLAT = Seam(distance_px=tuple(range(-16, 17)), step=(5.0, 4.0, 4.5) * 11, baseline=4.5)
STEEP = dataclasses.replace(FLAT, step=(4.0,) * 16 + (9.0,) + (4.0,) * 16)
AGREES = ConsistencySummary(median_db=44.4, min_db=38.2, share_below=0.0, threshold_db=30.0, low=())
DIFFERS = ConsistencySummary(
    median_db=41.7,
    min_db=21.3,
    share_below=0.021,
    threshold_db=30.0,
    low=tuple(
        LowPlace(x_l0=64 * i, y_l0=1234567, width=64, height=64, db=29.0 - i / 2) for i in range(15)
    ),
)
PICTURES = {"lr": "a.lr.jpg", "sr": "a.sr.jpg", "crop": "a.crop.jpg", "consistency": "a.png"}
CONTENT = {name: picture() for name in PICTURES.values()} | {"a.png": picture("PNG")}


def slide(name: str = "Tumor_001", **changes: Any) -> SlideSummary:
    found = SlideSummary(
        name=name,
        uri=f"s3://inbox/{name}.tif",
        output_uri=f"s3://sr/{name}.tif",
        status="done",
        lr_extent=(97792, 221184),
        mpp_in=(0.2431, 0.2431),
        mpp_out=(0.12155, 0.12155),
        scale=2,
        num_blocks=5184,
        num_inferred_px=25_000_000,
        num_background_px=75_000_000,
        engine="bf16, folded",
        accuracy_db=61.83,
        consistency=AGREES,
        size_bytes=1_234_000_000,
        num_parts=5185,
        seconds=754.0,
    )
    return dataclasses.replace(found, **changes)


def other(name: str, status: Any, reason: str | None = None) -> SlideSummary:
    return SlideSummary(name=name, uri=f"s3://inbox/{name}.tif", status=status, reason=reason)


def run(*slides: SlideSummary, **changes: Any) -> RunSummary:
    found = RunSummary(
        run_id="2026-01-12T22-00-00",
        started="2026-01-12T22:00:00+01:00",
        ended="2026-01-12T22:10:00+01:00",
        checkpoint="s3://models/carn-x2",
        checkpoint_hash="sha256:0123abcd",
        model="carn",
        scale=2,
        output="s3://sr",
        code_version="0.1.0",
        is_stopped=None,
        num_listed=len(slides),
        slides=slides,
        stages=STAGES,
        busy_share=0.75,
        num_actors=4,
        lr_mpx_per_s=12.3,
        config={"engine": {"precision": "auto"}},
    )
    return dataclasses.replace(found, **changes)


def busy() -> RunSummary:
    return run(
        slide(pictures=PICTURES, consistency=DIFFERS, seam=STEEP),
        slide("Normal_002", seam=FLAT, engine="fp32"),
        other("Skipped_003", "skipped", "done before"),
        other("Failed_004", "failed", "torn at byte 16"),
        other("Late_005", "unfinished", "3 of 9 blocks are kept"),
        other("Else_006", "claimed"),
        other("Conflict_007", "conflict", "made of another checkpoint"),
        is_stopped="deadline",
        num_listed=9,
        pace=Pace(seconds=(60.0, 120.0, 180.0), lr_mpx_per_s=(1.0, 12.0, 13.0)),
    )


# -------------------------------------------------------------------------------- the page as such


@pytest.mark.parametrize("found", [busy(), run()], ids=["full", "empty"])
def test_page_is_balanced_and_its_ids_and_links_are_sound(found: RunSummary) -> None:
    parsed = Page(render(found, CONTENT))
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href.removeprefix("#") for href in parsed.attributes("href")} <= set(ids)


def test_page_reaches_for_nothing_outside_and_is_the_same_each_time() -> None:
    html = render(busy(), CONTENT)
    assert html == render(busy(), CONTENT)
    parsed = Page(html)
    kinds = [src.partition(";")[0] for src in parsed.attributes("src")]
    assert sorted(kinds) == ["data:image/jpeg"] * 3 + ["data:image/png"]
    assert all(href.startswith("#") for href in parsed.attributes("href"))
    assert not re.search(r"https?:", html)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_the_page_says_what_is_unlike_training_and_what_lr_was_taken_for() -> None:
    lr = LrSummary(
        compression="JPEG, quality 40 by ijg tables (exact), chroma 4:2:0",
        blur_px=(0.5, 0.25, 0.75),
        numbers={"luma_step": 0.61},
    )
    odd = slide(lr=lr, warnings=("JPEG quality 40; net was trained on 50 to 97",))
    plain = slide("other", lr=dataclasses.replace(lr, is_told=True))
    assert needs_look(odd)
    assert not needs_look(plain)
    page = render(run(plain, odd), {})
    assert "1 slide of 2 is unlike what the network was trained on" in page
    assert page.count("JPEG quality 40; net was trained on 50 to 97") == 2
    facts = dict(_slide_facts(odd))
    assert facts["Unlike training"] == odd.warnings[0]
    assert facts["Stored as"] == lr.compression
    assert facts["Softness"] == "as by a blur of 0.50 (0.25–0.75) HR px"
    assert facts["Network's estimate"] == "luma step 0.61"
    assert "Said of LR" in dict(_slide_facts(plain))
    found = run(odd)
    assert RunSummary.from_json(found.to_json()) == found


def test_the_page_says_whether_slides_are_self_ensembled() -> None:
    assert ("Model", "carn ×2") in list_facts(run())
    assert ("Model", "carn ×2, self-ensemble") in list_facts(run(self_ensemble=True))
    found = run(self_ensemble=True)
    assert RunSummary.from_json(found.to_json()) == found
    # A run of before there was a choice.
    content = json.loads(run().to_json())
    del content["self_ensemble"]
    assert RunSummary.from_json(json.dumps(content)) == run()
    with pytest.raises(ValueError, match="where true or false belongs"):
        RunSummary.from_json(json.dumps(content | {"self_ensemble": 1}))


def test_what_comes_from_files_is_escaped() -> None:
    place = DamagedPlace(x_l0=0, y_l0=0, width=1, height=1, reason=NASTY)
    found = run(
        slide(NASTY, pictures=PICTURES, damage=(place,), engine=NASTY, seam=FLAT),
        other(NASTY, "failed", NASTY),
        other(NASTY, "unfinished", NASTY),
        run_id=NASTY,
        checkpoint=NASTY,
        is_stopped=NASTY,
        config={NASTY: NASTY},
    )
    parsed = Page(render(found, CONTENT))  # which refuses script elements
    assert parsed.text.count(NASTY) >= 18


def test_every_shown_sr_says_what_it_is_not_for() -> None:
    parsed = Page(render(run(slide(pictures={**PICTURES, "seam": "a.lr.jpg"}, seam=FLAT)), CONTENT))
    assert parsed.text.count(WARNING) == 1 + 3  # the head; SR, crop and seam


def test_three_thousand_slides_stay_a_page() -> None:
    skipped = [other(f"2026/batch/Slide_{i:05d}", "skipped", "done before") for i in range(2000)]
    done = [slide(f"Slide_{i:05d}", pictures=PICTURES) for i in range(700)]
    failed = [other(f"Bad_{i:05d}", "failed", "damaged tile " * 5) for i in range(300)]
    html = render(run(*skipped, *done, *failed), CONTENT)
    assert len(html) < 5e6
    assert all(f"Slide_{i:05d}" in html for i in range(2000))
    assert html.count("damaged tile damaged") == 2 * 2 * 300
    assert html.count('class="slide"') == MAX_SHOWN
    assert f"{MAX_SHOWN} of 700 done slides" in html


# ----------------------------------------------------------------------------------- what it says


def test_numbers_appear_in_the_order_of_the_columns() -> None:
    text = Page(render(busy(), CONTENT)).text
    row = "Tumor_001 done 97,792 × 221,184 0.2431 → 0.1216 75 % 5,184 61.8 41.7 2.1 % 0 1.23 GB"
    assert f"{row} 12 min 34 s" in text.replace("bf16, folded ", "")
    for part in (
        "195,584 × 442,368",
        "bf16, folded: 61.8 dB to fp32",
        "sha256:0123abcd",
        "200 Mpx, 50 Mpx of it inferred",
        "12.3 LR MP/s with 4 inference actors",
        "0.17 hours",
        "engine.precision",
        "inferred for 75 % of their time",
        "infer 0.750 30 min 00 s",
        "torn at byte 16",
        "3 of 9 blocks are kept",
        "claimed elsewhere",
        "2 listed slides were not come to at all",
        "minutes since the start",
        "distance from the border, SR px",
    ):
        assert part in text, part


def test_one_engine_is_said_once_and_several_with_each_slide() -> None:
    same = Page(render(run(slide("a"), slide("b")), {})).text
    assert same.count("bf16, folded") == 1
    mixed = Page(render(run(slide("a"), slide("b", engine="fp32")), {})).text
    assert "Engine of all" not in mixed
    assert "bf16, folded" in mixed
    assert "fp32 done" in mixed


def test_low_places_are_listed_worst_first_and_cut() -> None:
    text = Page(render(busy(), CONTENT)).text
    listed = re.findall(r"\(([\d,]+), 1,234,567\), 64 × 64: ([\d.]+) dB", text)
    assert len(listed) == MAX_LOW
    assert listed[0] == ("896", "22.0")
    assert [float(db) for _, db in listed] == sorted(float(db) for _, db in listed)
    assert f"Places below 30 dB, the worst {MAX_LOW}" in text


def test_colour_bar_says_its_ends_and_marks_the_threshold() -> None:
    html = render(busy(), CONTENT)
    assert "≤ 20 dB" in html
    assert "≥ 60 dB" in html
    assert "left: 25.00%" in html  # 30 dB on 20..60
    other_range = dataclasses.replace(DIFFERS, range_db=(35.0, 55.0))
    html = render(run(slide(pictures=PICTURES, consistency=other_range)), CONTENT)
    assert "≤ 35 dB" in html
    assert "left: " not in html.partition("<body>")[2]  # the threshold is off the bar


def test_colour_bar_is_that_of_the_heat_map() -> None:
    heat = pytest.importorskip("carn.upscaling.consistency")
    assert AGREES.range_db == heat.HEAT_RANGE_DB
    from matplotlib import colormaps

    html = render(run(slide(pictures=PICTURES)), CONTENT)
    ramp = re.findall(r"#[0-9a-f]{6}", html.partition("linear-gradient(90deg,")[2].split(";")[0])
    assert len(ramp) == 10
    for place, code in enumerate(ramp):
        red, green, blue = (round(255 * part) for part in colormaps["viridis"](place / 9)[:3])
        found = tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))
        assert found == pytest.approx((red, green, blue), abs=3)


def test_a_run_without_anything_says_so() -> None:
    text = Page(render(run(stages={}, busy_share=None, lr_mpx_per_s=None, num_actors=0), {})).text
    for part in ("No slide was listed.", "No stage was timed.", "No seam was measured."):
        assert part in text
    assert "nan" not in text
    assert "None" not in text.replace("None: the run", "").replace("Failures None.", "")


# --------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("found", "is_good", "anchor", "words"),
    [
        (run(slide(), other("b", "skipped")), True, "slides", "2 slides: 1 done, 1 there already."),
        (run(slide(), other("b", "failed")), False, "failures", "1 done, 1 failed."),
        (run(other("b", "conflict")), False, "failures", "1 in conflict"),
        (run(slide(), num_listed=4), False, "left", "4 slides: 1 done, 3 left for later."),
        (run(slide(), other("b", "claimed")), True, "slides", "1 done, 1 with another run."),
        (
            run(slide(), other("b", "unfinished"), is_stopped="deadline"),
            False,
            "left",
            "1 left for later. The run stopped at the deadline.",
        ),
        (run(slide(), is_stopped="interrupted"), False, "left", "when it was interrupted."),
        (run(slide(), is_stopped="out of disk"), False, "left", "stopped (out of disk)."),
        (run(), False, "facts", "No slide was listed."),
    ],
)
def test_verdict(found: RunSummary, is_good: bool, anchor: str, words: str) -> None:
    notice = judge_run(found)
    assert (notice.is_good, notice.anchor) == (is_good, anchor)
    assert words in notice.text


def test_good_news_and_bad_news_of_what_was_made() -> None:
    good = find_notices(run(slide(seam=FLAT)))
    assert [notice.is_good for notice in good] == [True, True, True]
    assert "everywhere (worst cell 38.2 dB)" in good[1].text
    place = DamagedPlace(x_l0=1, y_l0=2, width=3, height=4, reason="torn")
    bad = find_notices(
        run(
            slide("fine"),
            slide("low", consistency=DIFFERS),
            slide("torn", damage=(place, place)),
            slide("stepped", seam=STEEP),
        )
    )
    texts = [notice.text for notice in bad if not notice.is_good]
    assert len(texts) == 3
    assert "most in low: 2.1 % of it is below 30 dB" in texts[0]
    assert "2 places of 1 slide could not be decoded" in texts[1]
    assert "blocks of stepped" in texts[2]
    # What was not made in this run is not judged.
    assert len(find_notices(run(dataclasses.replace(slide(seam=STEEP), status="failed")))) == 1


def test_a_seam_is_a_step_above_all_others() -> None:
    assert judge_seam(FLAT)[0]
    is_flat, text = judge_seam(STEEP)
    assert not is_flat
    assert "across a block border 9.00 grey levels, beside it 4.00–4.00" in text
    # The input's own JPEG steps as high a few px on: not a seam.
    jpeg = dataclasses.replace(STEEP, step=(8.5, *STEEP.step[1:]))
    assert judge_seam(jpeg)[0]
    nowhere = dataclasses.replace(STEEP, distance_px=tuple(at + 100 for at in STEEP.distance_px))
    # Glass of a real slide: a tenth of a grey level more than at the next border of JPEG's squares.
    glass = Seam(distance_px=(-16, -8, 0, 8, 16), step=(0.36, 0.16, 0.57, 0.12, 0.47), baseline=0.2)
    assert judge_seam(glass)[0]
    assert judge_seam(nowhere) == (True, "There is no distance 0 to judge.")


def test_seam_figures_show_the_worst() -> None:
    names = [f"s{i}" for i in range(5)]
    slides = [slide(name, seam=FLAT) for name in names] + [slide("stepped", seam=STEEP)]
    figures = list_seams(slides, {})
    assert [figure.slide.name for figure in figures] == ["stepped", "s0", "s1"]
    assert figures[0].picture is None
    (figure,) = list_seams([slide(seam=FLAT, pictures={"seam": "x"})], {"x": picture("PNG")})
    assert "across borders of blocks" in figure.plot
    assert figure.picture is not None
    assert figure.picture[1] == "image/png"


def test_stages_are_parts_of_the_actors_time() -> None:
    bars = {bar.name: bar.share for bar in measure_stages(run())}
    assert bars["infer"] == pytest.approx(1800 / (4 * 600))
    assert list(bars) == ["read", "infer", "encode", "upload", "wait"]
    assert all(bar.share != bar.share for bar in measure_stages(run(num_actors=0)))
    assert measure_stages(run(stages={"infer_s": 3.0}))[0].seconds == 0


# ---------------------------------------------------------------------------------- what is shown


def test_slides_that_need_a_person_come_first() -> None:
    found = [s.status for s in order_slides(busy().slides)]
    assert found == ["failed", "conflict", "unfinished", "claimed", "done", "done", "skipped"]
    slides = [
        slide("a", pictures=PICTURES),
        slide("b", pictures={}),
        slide("c", pictures=PICTURES, consistency=DIFFERS),
        other("d", "failed"),
        slide("e", pictures={"lr": "not there"}),
    ]
    assert [item.slide.name for item in choose_shown(run(*slides), CONTENT)] == ["c", "a"]


def test_pictures_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    each = sum(map(len, CONTENT.values()))
    slides = [slide(str(i), pictures=PICTURES) for i in range(9)]
    monkeypatch.setattr(sr_report, "MAX_PICTURE_BYTES", int(3.5 * each))
    assert len(choose_shown(run(*slides), CONTENT)) == 3
    monkeypatch.setattr(sr_report, "MAX_PICTURE_BYTES", 1)
    assert len(choose_shown(run(*slides), CONTENT)) == 1


def test_a_picture_of_no_known_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'lr' is neither JPEG nor PNG"):
        render(run(slide(pictures=PICTURES)), CONTENT | {"a.lr.jpg": b"GIF89a"})


# ------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (12_340_000, "12.3 MB"),
        (123_400_000, "123 MB"),
        (2_500_000_000_000, "2.50 TB"),
    ],
)
def test_bytes(number: int | None, words: str) -> None:
    assert format_bytes(number) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "–"),
        (0.04, "0.0 s"),
        (9.97, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (25_500, "7 h 05 min"),
    ],
)
def test_durations(seconds: float | None, words: str) -> None:
    assert format_duration(seconds) == words


@given(number=st.integers(0, 10**15))
@settings(max_examples=80)
def test_bytes_are_right_to_three_digits(number: int) -> None:
    value, unit = format_bytes(number).split()
    size = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(value) * size == pytest.approx(number, rel=0.006)


def test_little_is_not_none() -> None:
    found = [format_fraction(value) for value in (None, 0.0, 1e-6, 0.0031, 0.034, 0.123, 1.0)]
    assert found == ["–", "0 %", "< 0.01 %", "0.31 %", "3.4 %", "12 %", "100 %"]
    assert [format_decibels(value) for value in (None, 41.26, float("inf"))] == ["–", "41.3", "∞"]


def test_mpp_and_background() -> None:
    assert format_mpp(slide(mpp_in=(0.25, 0.26), mpp_out=(0.125, 0.13))) == (
        "0.25 × 0.26 → 0.125 × 0.13"
    )
    assert format_mpp(slide(mpp_in=None)) == "unknown"
    assert background_share(slide()) == 0.75
    assert background_share(slide(num_inferred_px=0, num_background_px=0)) is None
