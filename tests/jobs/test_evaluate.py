"""The evaluation as a job: tables and a page, what is kept, what is refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from carn.degradation.conditions import CONDITIONS
from carn.errors import CheckpointError, DatasetError, StorageError
from carn.evaluation.study import read_took
from jobs import evaluate
from jobs.evaluate import (
    EvaluateJob,
    Evaluation,
    FiguresConfig,
    Part,
    ScoreConfig,
    TasksConfig,
    main,
)
from tests.evaluation.lab import write_run, write_run_folder
from tests.jobs.lab import ROOT
from tests.jobs.train_lab import write_dataset

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

FAST = FiguresConfig(timing_repeats=3, timing_seconds=0.1, crops=1)


def make_job(lab: Path, output: str = "out", **changes: object) -> EvaluateJob:
    fields: dict[str, object] = {
        "dataset": str(lab / "bcsr"),
        "runs": (str(lab / "run"),),
        "output": str(lab / output),
        "score": ScoreConfig(),
        "figures": FAST,
        "tasks": TasksConfig(device="cpu"),
    }
    return EvaluateJob(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "bcsr", num_tiles=(4, 2, 10))
    write_run(str(tmp_path / "run"))
    return tmp_path


def summary_of(lab: Path, output: str = "out") -> dict[str, object]:
    content: dict[str, object] = json.loads((lab / output / "summary.json").read_text())
    return content


def test_scores_crops_and_timings_and_nothing_twice(
    lab: Path, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(lab / "more", num_tiles=(4, 2, 12), seed=5)
    # Tiles 0_0 ... 9 of the second dataset are named as those of the first; two are not.
    score = ScoreConfig(removed=str(lab / "more"), scales=(4,))
    assert main(make_job(lab, score=score)) == 0
    said = capsys.readouterr().out
    assert "x4 bicubic" in said
    rows = summary_of(lab)["rows"]
    assert [(r["key"], r["scale"], r["variant"]) for r in rows] == [  # type: ignore[attr-defined,index]
        ("bicubic", 2, ""),
        ("carn", 2, ""),
        ("bicubic", 4, ""),
        ("carn", 2, "*"),
    ]
    page = (lab / "out" / "report.html").read_text()
    assert "trained on another dataset" in page
    assert "2 of " in page
    kept = {path: path.stat().st_mtime_ns for path in (lab / "out" / "scores").iterdir()}
    assert len(kept) == 3 * 2 + 1
    assert len(list((lab / "out" / "timings").iterdir())) == 3
    assert len(list((lab / "out" / "crops").iterdir())) == 1
    before = (lab / "out" / "table2.csv").read_bytes()
    took = read_took(str(lab / "out"))
    assert took[0] > 0
    write_run(str(lab / "second"), seed=7)
    assert main(make_job(lab, score=score)) == 0
    assert (lab / "out" / "table2.csv").read_bytes() == before
    # Nothing was done, so nothing was taken.
    assert read_took(str(lab / "out")) == took
    assert summary_of(lab)["seconds"] == took[0]
    assert summary_of(lab)["machine"] == took[1]
    job = make_job(lab, score=score, runs=(str(lab / "run"), str(lab / "second")))
    assert main(job) == 0
    assert read_took(str(lab / "out"))[0] > took[0]
    after = {path: path.stat().st_mtime_ns for path in (lab / "out" / "scores").iterdir()}
    assert kept.items() <= after.items()
    assert len(after) == len(kept) + 3
    seeds = [row["seeds"] for row in summary_of(lab)["rows"]]  # type: ignore[attr-defined]
    assert seeds == [[], [1, 7], [], [1, 7]]


def test_conditions_are_scored_beside_each_other_and_kept(
    lab: Path, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def kept() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (lab / "out" / "scores").iterdir()}

    def table_of(output: str = "out") -> list[dict[str, str]]:
        text = (lab / output / "conditions.csv").read_text()
        return list(csv.DictReader(text.splitlines()))

    assert main(make_job(lab)) == 0
    assert "same LR" not in capsys.readouterr().out
    plain, first = kept(), (lab / "out" / "table2.csv").read_bytes()
    assert [(row["key"], row["condition"]) for row in table_of()] == [
        ("bicubic", "bicubic"),
        ("carn", "bicubic"),
    ]
    assert "tiles and crops are of" not in (lab / "out" / "report.html").read_text()

    (lab / "mine.yaml").write_text("mine: {noise_levels: 5}\nplain: {}")
    names = ("bicubic", "jpeg80-420", str(lab / "mine.yaml"))
    assert main(make_job(lab, score=ScoreConfig(conditions=names))) == 0
    assert "bicubic interpolation of the same LR" in capsys.readouterr().out
    # What was made stays, and what is bicubic by another name is not made again.
    both = kept()
    assert plain.items() <= both.items()
    assert len(plain) == 2 * 2
    assert len(both) == 3 * len(plain)
    assert (lab / "out" / "table2.csv").read_bytes() == first
    rows = {(row["key"], row["condition"]): row for row in table_of()}
    psnrs = {name: rows["bicubic", name]["psnr_db"] for name in ("bicubic", "jpeg80-420", "mine")}
    assert len(set(psnrs.values())) == 3
    assert {**rows["carn", "plain"], "condition": "bicubic"} == rows["carn", "bicubic"]
    page = (lab / "out" / "report.html").read_text()
    assert "crops are of bicubic LR. How the models do on other LR" in page
    scores = pq.read_table(lab / "out" / "scores.parquet").to_pylist()
    assert len(scores) == 2 * 4 * 10

    # Again, and in another order: nothing is scored, and the tables are of the first.
    turned = (names[1], names[2], names[0])
    assert main(make_job(lab, score=ScoreConfig(conditions=turned))) == 0
    assert kept() == both
    (row, _) = csv.DictReader((lab / "out" / "table2.csv").read_text().splitlines())
    assert row["psnr_db"] == psnrs["jpeg80-420"] != psnrs["bicubic"]
    page = (lab / "out" / "report.html").read_text()
    way = "bicubic interpolation, JPEG quality 80, 4:2:0"
    assert f"crops are of LR made as jpeg80-420 ({way})." in page
    assert "numbers are of bicubic LR" in page

    # A lost part is made again, alone, and to the same bytes.
    lost = sorted(both.keys() - plain.keys())[0]
    content = (lab / "out" / "scores" / lost).read_bytes()
    (lab / "out" / "scores" / lost).unlink()
    before = table_of()
    assert main(make_job(lab, score=ScoreConfig(conditions=turned))) == 0
    assert (lab / "out" / "scores" / lost).read_bytes() == content
    assert {name for name, at in kept().items() if both[name] != at} == {lost}
    assert table_of() == before

    # A way that changes under its name is another.
    (lab / "mine.yaml").write_text("mine: {noise_levels: 6}")
    assert main(make_job(lab, score=ScoreConfig(conditions=(names[2],)))) == 0
    assert len(kept()) == len(both) + len(plain)
    assert table_of()[0]["psnr_db"] < psnrs["mine"]


def test_conditions_that_cannot_be_are_said_before_anything_starts(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "start_ray", lambda: pytest.fail("Ray was started"))
    (lab / "wrong.yaml").write_text("mine: {blur: 1}")
    for names, said in (
        (("jpeg80",), "'jpeg80' is not one of bicubic, mean"),
        (("mean", "mean"), "'mean' is there twice"),
        ((str(lab / "wrong.yaml"),), "condition 'mine': .* its fields are blur_px"),
    ):
        with pytest.raises(ValueError, match=said):
            main(make_job(lab, score=ScoreConfig(conditions=names)))
    with pytest.raises(StorageError, match=r"gone\.yaml"):
        main(make_job(lab, score=ScoreConfig(conditions=(str(lab / "gone.yaml"),))))
    with pytest.raises(ValueError, match="conditions names none"):
        ScoreConfig(conditions=())
    for names in (("mean",), ("bicubic", "mean"), ("all",)):
        with pytest.raises(ValueError, match="goes with the bicubic condition alone, not with"):
            ScoreConfig(protocol="misaligned", conditions=names)
    ScoreConfig(protocol="misaligned")
    assert not (lab / "out").exists()
    evaluation = Evaluation(make_job(lab, score=ScoreConfig(conditions=("mean", "all"))))
    evaluation.prepare()
    assert list(evaluation.conditions) == ["mean", *(n for n in CONDITIONS if n != "mean")]
    parts = evaluation._scoring()
    assert len({part.uri for part in parts}) == len(parts) == 2 * 2 * len(CONDITIONS)
    assert {part.name.partition(" under ")[2] for part in parts} == set(CONDITIONS)


def test_a_damaged_checkpoint_costs_its_own_row_only(
    lab: Path, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(str(lab / "bad"), seed=9)
    weights = lab / "bad" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    job = make_job(lab, runs=(str(lab / "run"), str(lab / "bad")))
    assert main(job) == 1
    summary = summary_of(lab)
    assert [row["key"] for row in summary["rows"]] == ["bicubic", "carn"]  # type: ignore[attr-defined]
    assert "bad" in str(summary["failures"])
    assert "failed" in capsys.readouterr().out


def _divided(*, device: str) -> bytes:
    return bytes(1 // len(device[:0]))


def _lost(*, device: str) -> bytes:
    os._exit(1)


def test_what_a_part_failed_for_is_said(lab: Path, ray_here: None) -> None:
    """An error that nobody foresaw is no process that died, and is not tried again."""

    def reason_of(call: object) -> str | None:
        part = Part(
            uri=str(lab / "never"),
            name="part",
            call=call,  # type: ignore[arg-type]
            arguments=(),
            options={},
        )
        resources = {"num_cpus": 1.0, "num_gpus": 0.0}
        ((_, reason),) = evaluate._done([part], device="cpu", threads=1, resources=resources)
        return reason

    assert ray.is_initialized()
    divided = reason_of(_divided)
    assert divided is not None
    assert divided.startswith("ZeroDivisionError")
    assert "died" not in divided
    lost = reason_of(_lost)
    assert lost is not None
    assert lost.startswith("its process died 3 times")


def test_unfinished_runs_and_tiles_of_training_slides_are_left_out(
    lab: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is known before anything starts."""
    write_run_folder(str(lab / "runs" / "whole"), best=5, last=7, seed=1)
    write_run_folder(str(lab / "runs" / "cut"), best=5, last=6, seed=2)
    write_dataset(lab / "more", num_tiles=(4, 2, 12), seed=5)
    score = ScoreConfig(removed=str(lab / "more"))
    job = make_job(lab, runs=(str(lab / "runs"),), score=score)
    evaluation = Evaluation(job)
    evaluation.prepare()
    assert [entrant.seed for entrant in evaluation.entrants] == [1, None]
    assert evaluation.left_out == [f"{lab}/runs/cut (update 6 of 7)"]
    assert "Left out" not in " ".join(evaluation._notes())
    # The test slides of the second dataset, test0 and test1, were trained on here.
    monkeypatch.setattr(evaluate, "find_removed", lambda *_: ([10], 1))
    evaluation = Evaluation(job)
    evaluation.prepare()
    said = f"1 test tile of {lab}/more is of slides that {lab}/bcsr has in training or validation"
    assert said in caplog.text
    assert any(
        f"1 of {lab}/more that are in no split. Left out: {said}." in note
        for note in evaluation._notes()
    )
    monkeypatch.setattr(evaluate, "find_removed", lambda *_: ([], 2))
    with pytest.raises(DatasetError, match=r"nothing of .* is left for CARN.*: 2 test tiles of"):
        Evaluation(job).prepare()


def test_an_aligned_x3_is_not_the_papers(lab: Path) -> None:
    for scales, protocol, said in (
        ((3,), "aligned", True),
        ((3,), "misaligned", False),
        ((4,), "aligned", False),
    ):
        score = ScoreConfig(scales=scales, protocol=protocol)  # type: ignore[arg-type]
        evaluation = Evaluation(make_job(lab, runs=(), score=score))
        evaluation.prepare()
        notes = " ".join(evaluation._notes())
        assert ("--protocol misaligned is like them" in notes) is said


def test_what_cannot_be_scored_is_said_before_anything_starts(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "start_ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        main(make_job(lab, runs=(str(lab / "bcsr"),)))
    with pytest.raises(ValueError, match="name --runs"):
        main(make_job(lab, runs=()))
    write_dataset(lab / "none", num_tiles=(4, 2, 0))
    with pytest.raises(DatasetError, match="no test tiles"):
        main(make_job(lab, dataset=str(lab / "none")))
    with pytest.raises(DatasetError, match="for tiles that its filter"):
        main(make_job(lab, score=ScoreConfig(removed=str(lab / "bcsr"))))
    with pytest.raises(ValueError, match="both"):
        ScoreConfig(lpips_alexnet="a.pth")
    score = ScoreConfig(lpips_alexnet=str(lab / "a.pth"), lpips_linear=str(lab / "l.pth"))
    with pytest.raises(ValueError, match=r"a\.pth cannot be read .*give a file that is there"):
        main(make_job(lab, score=score))


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_table(lab: Path) -> None:
    write_dataset(lab / "bcsr", num_tiles=(4, 2, 60))
    options = ("--dataset", f"{lab}/bcsr", "--runs", f"{lab}/run", "--device", "cpu")
    figures = ("--no-timing", "--crops", "0")
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), *options, *figures]

    def run(output: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--output", f"{lab}/{output}"], start_new_session=True)

    assert run("whole").wait() == 0
    killed = run("killed")
    scores = lab / "killed" / "scores"
    while not scores.exists() or len(list(scores.glob("*.parquet"))) < 3:
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (lab / "killed" / "table2.csv").exists()
    assert run("killed").wait() == 0
    for name in ("table2.csv", "significance.csv"):
        assert (lab / "killed" / name).read_bytes() == (lab / "whole" / name).read_bytes()
