"""A run's folder: what is written reads back, strictly, and the helpers measure what they say."""

import csv
import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from carn import storage
from carn.errors import RunError
from carn.models.bicubic import enlarge_bicubic
from carn.report.sr_records import Pace, RunSummary, Seam, SlideSummary
from carn.report.sr_report import judge_seam
from carn.report.sr_summary import (
    GAP_PX,
    crop_pair,
    crop_side_px,
    join_seams,
    list_failures,
    read_run,
    seam_profile,
    write_report,
    write_run,
)
from tests.conftest import Bucket, draw
from tests.report.test_sr_report import CONTENT, PICTURES, busy, other, run, slide

# ------------------------------------------------------------------------------------------- JSON

texts = st.text(max_size=8)
finite = st.floats(allow_nan=False)
pairs = st.tuples(st.integers(1, 10**6), st.integers(1, 10**6))
slides = st.builds(
    SlideSummary,
    name=texts,
    uri=texts,
    status=st.sampled_from(["done", "skipped", "failed", "unfinished", "claimed", "conflict"]),
    reason=st.none() | texts,
    lr_extent=st.none() | pairs,
    mpp_in=st.none() | st.tuples(finite, finite),
    accuracy_db=st.none() | finite,
    num_inferred_px=st.integers(0, 10**12),
    pictures=st.dictionaries(st.sampled_from(["lr", "sr"]), texts),
    seam=st.none()
    | st.builds(
        Seam,
        distance_px=st.just((-1, 0)),
        step=st.tuples(finite, finite),
        baseline=finite,
    ),
)


@given(found=slides)
@settings(max_examples=30)
def test_slides_read_back_equal(found: SlideSummary) -> None:
    text = found.to_json()
    assert SlideSummary.from_json(text) == found
    assert "Infinity" not in text  # which JSON does not have


def test_a_run_reads_back_equal_and_is_plain_json() -> None:
    found = busy()
    assert RunSummary.from_json(found.to_json()) == found
    assert json.loads(found.to_json())["slides"][0]["consistency"]["low"][0]["db"] == 29.0
    numbers = dataclasses.replace(found, num_listed=np.int64(9), busy_share=np.float32(0.75))
    assert RunSummary.from_json(numbers.to_json()) == found


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(busy().to_json()) | changes)


def without(name: str) -> str:
    content = json.loads(busy().to_json())
    del content[name]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[]", "RunSummary is .*an object belongs"),
        (changed(surprise=1), "unknown surprise"),
        (without("slides"), "slides missing"),
        (changed(num_listed=1.5), r"num_listed is 1\.5, where an integer belongs"),
        (changed(num_listed=True), "num_listed"),
        (changed(busy_share="much"), "busy_share is .*a number"),
        (changed(started=None), "started is null, where a text belongs"),
        (changed(slides={}), "slides is .*a list"),
        (changed(stages={"read_s": "long"}), r"stages\.read_s"),
        (changed(slides=[{"name": "a", "uri": "b", "status": "fine"}]), r"slides\[0\].status"),
        (
            changed(slides=[{"name": "a", "uri": "b", "status": "done", "lr_extent": [1]}]),
            r"slides\[0\].lr_extent is \[1\], where a list of 2",
        ),
        (
            changed(slides=[{"name": "a", "uri": "b", "status": "done", "pictures": {"x": "y"}}]),
            "'lr'",
        ),
        (changed(pace={"seconds": [1.0], "lr_mpx_per_s": []}), "0 rates at 1 times"),
    ],
)
def test_what_is_not_exactly_a_run_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunSummary.from_json(text)


def test_what_is_no_number_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"SlideSummary\.accuracy_db is not a number"):
        slide(accuracy_db=math.nan).to_json()
    with pytest.raises(ValueError, match="2 values of step at 1 distances"):
        Seam(distance_px=(0,), step=(1.0, 2.0), baseline=1.0)
    with pytest.raises(ValueError, match="1 rates at 2 times"):
        Pace(seconds=(1.0, 2.0), lr_mpx_per_s=(1.0,))


# ------------------------------------------------------------------------------------- the folder


def test_a_run_is_written_and_its_report_made_again(tmp_path: Path) -> None:
    report = Path(write_run(str(tmp_path), busy(), CONTENT))
    folder = tmp_path / "runs" / busy().run_id
    assert report == folder / "report.html"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pictures = {f"pictures/{name}" for name in CONTENT}
    assert names == {"report.html", "summary.json", "failures.csv"} | pictures
    assert read_run(str(folder)) == busy()
    page = report.read_bytes()
    report.unlink()
    said = write_report(str(folder))
    assert report.read_bytes() == page
    assert said.splitlines()[-1] == f"  report {report}"
    assert "Of 9 slides: 2 done" in said


def test_a_run_goes_to_object_storage_with_the_report_last(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    write = storage.write_bytes
    monkeypatch.setattr(
        storage, "write_bytes", lambda uri, content: (order.append(uri), write(uri, content))
    )
    report = write_run(s3.uri("sr"), busy(), CONTENT)
    assert report == s3.uri(f"sr/runs/{busy().run_id}/report.html")
    assert order[-1] == report
    assert len(order) == len(CONTENT) + 3
    page = s3.get(f"sr/runs/{busy().run_id}/report.html")
    write_report(s3.uri(f"sr/runs/{busy().run_id}"))
    assert s3.get(f"sr/runs/{busy().run_id}/report.html") == page


def test_failures_are_a_table(tmp_path: Path) -> None:
    odd = 'torn, "half"\nof it'
    found = run(other("a", "conflict", "taken"), slide(), other("b", "failed", odd))
    rows = list(csv.reader(io.StringIO(list_failures(found), newline="")))
    assert rows[0] == ["name", "uri", "output_uri", "status", "reason"]
    assert rows[1:] == [
        ["b", "s3://inbox/b.tif", "", "failed", odd],
        ["a", "s3://inbox/a.tif", "", "conflict", "taken"],
    ]


def test_a_report_is_made_without_the_pictures_that_are_gone(tmp_path: Path) -> None:
    folder = Path(write_run(str(tmp_path), run(slide(pictures=PICTURES)), CONTENT)).parent
    assert (folder / "report.html").read_text().count("<img") == 4
    (folder / "pictures" / PICTURES["crop"]).unlink()
    write_report(str(folder))
    assert (folder / "report.html").read_text().count("<img") == 3


def test_names_that_are_no_unicode_are_written(tmp_path: Path) -> None:
    # What Python makes of a file name in another encoding.
    found = run(slide("Pr\udce4parat"), other("\udcff", "failed", "torn"))
    folder = Path(write_run(str(tmp_path), found, {})).parent
    assert read_run(str(folder)) == found
    assert "Pr\\udce4parat" in (folder / "report.html").read_text()
    assert "\\udcff" in (folder / "failures.csv").read_text()


@pytest.mark.parametrize("name", ["../x.jpg", "a/b.jpg", ".hidden", "", "a\\b", "a\n"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no plain file name"):
        write_run(str(tmp_path), busy(), CONTENT | {name: b"x"})
    with pytest.raises(ValueError, match="no plain file name"):
        write_run(str(tmp_path), dataclasses.replace(busy(), run_id=name), {})
    assert not list(tmp_path.iterdir())


def test_a_summary_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(CONTENT["a.lr.jpg"])
    found = run(slide(pictures={"lr": "../../../secret.jpg"}))
    folder = Path(write_run(str(tmp_path), found, {})).parent
    (folder / "pictures").mkdir()
    assert (folder / "pictures" / "../../../secret.jpg").is_file()
    write_report(str(folder))
    assert "<img" not in (folder / "report.html").read_text()


def test_command_makes_the_report_again_and_names_what_is_wrong(tmp_path: Path) -> None:
    folder = Path(write_run(str(tmp_path), busy(), CONTENT)).parent
    (folder / "report.html").unlink()
    command = [sys.executable, "-m", "carn.report.sr_summary"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
    assert "9 slides: 2 done" in done.stdout
    assert (folder / "report.html").is_file()
    lost = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert lost.returncode == 1
    assert "summary.json is missing" in lost.stderr
    assert "Traceback" not in lost.stderr


def test_a_torn_summary_is_named(tmp_path: Path) -> None:
    folder = Path(write_run(str(tmp_path), busy(), CONTENT)).parent
    (folder / "summary.json").write_text('{"run_id": 3}')
    with pytest.raises(RunError, match=r"summary\.json: RunSummary"):
        write_report(str(folder))
    (folder / "summary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match=r"summary\.json"):
        write_report(str(folder))


# ------------------------------------------------------------------------------------------- seams


@given(
    pixels=arrays.arrays(np.uint8, st.just((40, 9, 3))),
    border=st.integers(17, 23),
    axis=st.sampled_from([0, 1]),
)
@settings(max_examples=40)
def test_profile_is_the_mean_step_of_each_pair(pixels: np.ndarray, border: int, axis: Any) -> None:
    turned = pixels if axis == 0 else pixels.swapaxes(0, 1)
    distances, steps = seam_profile(turned, border_px=border, axis=axis)
    assert distances.tolist() == list(range(-16, 17))
    for distance, step in zip(distances, steps, strict=True):
        below, above = (pixels[border + distance + side].astype(float) for side in (-1, 0))
        assert step == pytest.approx(np.abs(above - below).mean())


def test_a_step_between_blocks_shows_at_zero_and_nowhere_else() -> None:
    pixels = draw(200, 120, seed=3)
    flat = join_seams([seam_profile(pixels, border_px=100, axis=1)])
    assert judge_seam(flat)[0]
    pixels[:, 100:] += np.minimum(20, 255 - pixels[:, 100:])
    stepped = join_seams([seam_profile(pixels, border_px=100, axis=1)])
    assert not judge_seam(stepped)[0]
    assert int(np.argmax(stepped.step)) == stepped.distance_px.index(0)
    assert stepped.baseline == pytest.approx(flat.baseline, rel=0.05)


def test_profiles_join_to_their_mean() -> None:
    first, second = (seam_profile(draw(64, 64, seed=s), border_px=32, axis=0) for s in (1, 2))
    joined = join_seams([first, second])
    assert joined.step == pytest.approx(tuple((first[1] + second[1]) / 2))
    far = [s for d, s in zip(joined.distance_px, joined.step, strict=True) if abs(d) >= 4]
    assert joined.baseline == pytest.approx(np.mean(far))
    with pytest.raises(ValueError, match="no profile"):
        join_seams([])


@pytest.mark.parametrize(("border", "reach", "is_right"), [(17, 16, True), (16, 16, False)])
def test_a_border_needs_room_on_both_sides(border: int, reach: int, is_right: bool) -> None:
    for mirrored in (border, 64 - border):
        pixels = draw(64, 20)
        if is_right:
            seam_profile(pixels, border_px=mirrored, axis=1, reach_px=reach)
            continue
        with pytest.raises(ValueError, match=f"border_px {mirrored} of 64 px: 17 px"):
            seam_profile(pixels, border_px=mirrored, axis=1, reach_px=reach)
    distances, _ = seam_profile(draw(64, 20), border_px=32, axis=1, reach_px=31)
    assert distances.tolist() == list(range(-31, 32))


# ------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_pair_is_lr_enlarged_and_sr_side_by_side(scale: int) -> None:
    y, x = np.mgrid[0:40, 0:48]
    waves = [128 + 90 * np.sin((a * x + b * y) / 2) for a, b in ((1, 0), (0, 1), (1, 1))]
    lr = np.stack(waves, axis=-1).round().astype(np.uint8)
    tensor = torch.from_numpy(lr.copy()).permute(2, 0, 1)[None].float()
    enlarged = enlarge_bicubic(tensor, scale=scale)[0].permute(1, 2, 0).clamp(0, 255).numpy()
    sr = np.full((40 * scale, 48 * scale, 3), (10, 200, 90), dtype=np.uint8)
    pair = np.asarray(Image.open(io.BytesIO(crop_pair(lr, sr, scale))))
    width = 48 * scale
    assert pair.shape == (40 * scale, 2 * width + GAP_PX, 3)
    size = (width, 40 * scale)
    bilinear = np.asarray(Image.fromarray(lr).resize(size, Image.Resampling.BILINEAR), dtype=float)
    error, other_error = (np.abs(pair[:, :width] - of).mean() for of in (enlarged, bilinear))
    assert error < 2  # JPEG's share
    assert error < 0.9 * other_error
    assert np.abs(pair[:, width + GAP_PX :].astype(int) - sr).max() <= 3
    assert np.ptp(pair[:, width + 3 : width + 5]) <= 3


def test_crops_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="cut both from one place"):
        crop_pair(draw(10, 10), draw(20, 19), 2)
    with pytest.raises(ValueError, match="cut both"):
        crop_pair(np.zeros((0, 4, 3), np.uint8), np.zeros((0, 8, 3), np.uint8), 2)


def test_a_pair_is_as_wide_as_a_screen() -> None:
    assert [crop_side_px(scale) for scale in (2, 3, 4, 8)] == [256, 170, 128, 64]
