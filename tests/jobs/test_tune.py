"""Sweeps as a job: trials, what is kept of them, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from carn.errors import CacheError, DatasetError, DivergedError, RunError
from carn.tuning.space import read_space
from carn.tuning.sweep import SweepFolder, make_trial
from jobs import train, tune
from jobs.trainer import CREDENTIALS, keep_credentials_out_of_runtime_environments
from jobs.tune import Sweep, main, parse
from jobs.tune_trials import _note_fatal
from tests.jobs.lab import ROOT
from tests.jobs.train_lab import TINY, train_workers, write_dataset

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

SPACE = {
    "title": "Two",
    "question": "Which?",
    "settings": {"steps": 8, "validate_every": 4, "validation_crop_px": 32},
    "search": {"reduction": [2, 8]},
    "seeds": [1],
    "figure": {"kind": "lines", "x": "reduction"},
}
# The tiny network of the tests of training, but for what the space says.
OPTIONS = tuple(
    part
    for name, value in zip(TINY[::2], TINY[1::2], strict=True)
    if name not in ("--reduction", "--seed", "--log-every")
    for part in (name, value)
)


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "bcsr", num_tiles=(8, 3, 1))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return tmp_path


def arguments(lab: Path, *more: str, output: str = "out") -> list[str]:
    places = ("--space", f"{lab}/space.yaml", "--dataset", f"{lab}/bcsr")
    return [*places, "--output", f"{lab}/{output}", *OPTIONS, *more]


def command(lab: Path, *more: str, output: str = "out") -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "tune.py"), *arguments(lab, *more, output=output)]


def test_credentials_are_no_part_of_a_trials_runtime_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ray writes runtime environments to its logs.
    from ray.tune.execution.class_cache import _ActorClassCache

    for name in CREDENTIALS:
        monkeypatch.setenv(name, "secret-1f3a")
    keep_credentials_out_of_runtime_environments()
    actor = _ActorClassCache().get(type("Trainable", (), {}))
    assert "secret-1f3a" not in str(actor._default_options)
    assert "PL_DISABLE_FORK" in str(actor._default_options), "it no longer comes this way"


def trials(lab: Path, output: str = "out") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(lab / output / "trials.parquet").to_pylist()
    return rows


def scores(lab: Path, output: str = "out") -> dict[str, tuple[Any, ...]]:
    return {
        row["trial"]: (row["state"], row["psnr_db"], row["ssim"]) for row in trials(lab, output)
    }


def test_a_sweep_of_two_points(lab: Path) -> None:
    done = subprocess.run(command(lab), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 trials done, 0 stopped early, 0 failed" in done.stdout
    assert [(row["reduction"], row["state"], row["step"]) for row in trials(lab)] == [
        (2, "done", 8),
        (8, "done", 8),
    ]
    best = ("--config", str(lab / "out" / "best.yaml"), "--dataset", str(lab / "bcsr"))
    config = train.parse(best).train
    winner = max(trials(lab), key=lambda row: row["psnr_db"])
    assert (config.network.reduction, config.steps) == (winner["reduction"], 8)
    assert "Which?" in (lab / "out" / "report.html").read_text()
    # Again: nothing to do, and no Ray.
    before = scores(lab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "start_ray", lambda **_: pytest.fail("Ray was started"))
        assert main(parse(arguments(lab))) == 0
        assert scores(lab) == before
        with pytest.raises(RunError, match="other settings"):
            main(parse(arguments(lab, "--steps", "9")))


def test_what_cannot_be_searched_is_said_before_anything_starts(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "start_ray", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match="reduction is what the space space searches"):
        main(parse(arguments(lab, "--reduction", "4")))
    with pytest.raises(ValueError, match="take one seed"):
        main(parse(arguments(lab, "--scheduler", "asha", "--seeds", "1", "2")))
    with pytest.raises(ValueError, match="searches reduction"):
        main(parse(arguments(lab, "--only", "scale=2")))
    with pytest.raises(ValueError, match="no point"):
        main(parse(arguments(lab, "--only", "reduction=4")))
    (lab / "space.yaml").write_text(yaml.safe_dump(SPACE | {"search": {"reduction": [2, 3]}}))
    with pytest.raises(ValueError, match="reduction=3 does not divide channels=16"):
        main(parse(arguments(lab)))
    drawn = {"figure": {"kind": "parallel"}}
    patches = drawn | {"search": {"patch_px": [32, 128]}}
    (lab / "space.yaml").write_text(yaml.safe_dump(SPACE | patches))
    with pytest.raises(ValueError, match="128"):
        main(parse([x for x in arguments(lab) if x not in ("--patch-px", "32")]))
    models = drawn | {"search": {"model": ["carn", "edsr"]}}
    (lab / "space.yaml").write_text(yaml.safe_dump(SPACE | models))
    with pytest.raises(ValueError, match="--recipe own"):
        main(parse([*arguments(lab), "--recipe", "own"]))
    (lab / "space.yaml").write_text(yaml.safe_dump(SPACE))
    with pytest.raises(RunError, match="5 workers cannot share a batch of 4"):
        main(parse(arguments(lab, "--workers-per-trial", "5")))
    with pytest.raises(ValueError, match="--order windowed"):
        main(parse(arguments(lab, "--data", "stream")))
    write_dataset(lab / "bcsr", num_tiles=(8, 0, 1))
    with pytest.raises(DatasetError, match="no validation tiles"):
        main(parse(arguments(lab)))


class _Monitor:
    """As a handle of a run's monitor that knows what ended it."""

    def __init__(self, error: Exception) -> None:
        self.fatal = self
        self.remote = lambda: error


def test_what_a_machine_lacked_is_tried_again(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get", lambda found: found)
    job = parse(arguments(lab))
    folder = SweepFolder(uri=job.output_uri)
    for reduction, error in (
        (2, CacheError("/cache", "set CARN_CACHE_GB higher")),
        (8, DivergedError(3, tile_ids=(), checkpoint=None)),
    ):
        trial = make_trial({"reduction": reduction}, seed=1)
        folder.note_trial(trial)
        assert _note_fatal(folder, trial, _Monitor(error))
    sweep = Sweep(job, read_space(job.space), folder, {"uri": "", "digest": ""})
    assert {o.trial.point["reduction"]: sweep._is_tried_again(o) for o in sweep.outcomes()} == {
        2: True,
        8: False,
    }


def test_a_suggested_point_wants_all_of_its_seeds(lab: Path) -> None:
    job = parse(arguments(lab, "--strategy", "optuna", "--seeds", "1", "7"))
    folder = SweepFolder(uri=job.output_uri)
    # Killed in the first seed: the second was not begun.
    folder.note_trial(make_trial({"reduction": 2}, seed=1, suggestion={"reduction": 2}))
    sweep = Sweep(job, read_space(job.space), folder, {"uri": "", "digest": ""})
    found = {(o.trial.seed, o.state): o.trial.suggestion for o in sweep.outcomes()}
    assert found == {(1, "begun"): {"reduction": 2}, (7, "new"): {"reduction": 2}}


@pytest.mark.slow
def test_hopeless_runs_end_early_and_go_on_when_that_is_wanted(lab: Path) -> None:
    steps = {"steps": 12, "validate_every": 2, "validation_crop_px": 32}
    # Rates that learn nothing must lose to one that does.
    search = {"learning_rate": [1e-3, 1e-9, 1e-10]}
    space = {**SPACE, "settings": steps, "search": search, "figure": {"kind": "parallel"}}
    (lab / "space.yaml").write_text(yaml.safe_dump(space))
    options = [*arguments(lab, "--max-concurrent", "1"), "--reduction", "4"]
    at = options.index("--learning-rate")
    del options[at : at + 2]
    job = [sys.executable, str(ROOT / "jobs" / "tune.py"), *options]
    early = ("--scheduler", "asha", "--grace-steps", "2", "--reduction-factor", "2")
    done = subprocess.run([*job, *early], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    states = {row["learning_rate"]: (row["state"], row["step"]) for row in trials(lab)}
    assert states[1e-3] == ("done", 12)
    stopped = [rate for rate, (state, _) in states.items() if state == "stopped"]
    assert stopped, done.stderr
    assert all(states[rate][1] < 12 for rate in stopped)
    # The same again, and nothing is left to do; without the scheduler, their ends are.
    again = subprocess.run([*job, *early], capture_output=True, text=True, check=False)
    assert "0 trials to do" in again.stderr
    whole = subprocess.run(job, capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    assert {row["state"] for row in trials(lab)} == {"done"}


@pytest.mark.slow
def test_a_trial_whose_workers_die_is_listed_and_tried_by_the_next_run(lab: Path) -> None:
    job = command(lab, "--only", "reduction=2", "--max-failures", "1")
    # Not to pipes, which nobody would empty meanwhile: every death fills some pages.
    with (lab / "said").open("w") as said_file, (lab / "log").open("w") as log_file:
        process = subprocess.Popen(job, stdout=said_file, stderr=log_file)
    killed: set[int] = set()
    while process.poll() is None:
        for worker in train_workers([process.pid]):
            killed.add(worker.pid)
            worker.kill()
        time.sleep(0.05)
    said, log = (lab / "said").read_text(), (lab / "log").read_text()
    assert process.returncode == 1, log
    # One that dies at work is replaced once, those that die while they start ten times; Tune makes
    # no attempt beyond those.
    assert 2 <= len(killed) <= 12, log
    assert "0 trials done, 0 stopped early, 1 failed" in said
    (row,) = trials(lab)
    assert row["state"] == "failed"
    assert row["reason"]
    again = subprocess.run(job, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert [row["state"] for row in trials(lab)] == ["done"]


@pytest.mark.slow
def test_trials_of_two_workers(lab: Path) -> None:
    more = ("--only", "reduction=2", "--workers-per-trial", "2", "--cpus-per-worker", "1")
    done = subprocess.run(command(lab, *more), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in trials(lab)] == ["done"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_with_the_same_table(lab: Path) -> None:
    whole = subprocess.run(command(lab, output="whole"), capture_output=True, check=False)
    assert whole.returncode == 0, whole.stderr
    killed = subprocess.Popen(command(lab, "--max-concurrent", "1"), start_new_session=True)
    while not list((lab / "out").glob("trials/*/best.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    _end_ray()
    again = subprocess.run(command(lab), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert scores(lab) == scores(lab, "whole")
    # What was begun was taken up, not begun anew: its metrics hold each validation once.
    for path in (lab / "out" / "trials").iterdir():
        steps = [line.split(",")[0] for line in (path / "metrics.csv").read_text().split()[1:]]
        assert steps == sorted(set(steps), key=int)


@pytest.mark.slow
def test_a_trial_that_diverges_is_listed_and_not_fatal(lab: Path) -> None:
    space = SPACE | {"search": {"learning_rate": [1e-3, 1e30]}}
    (lab / "space.yaml").write_text(yaml.safe_dump(space | {"figure": {"kind": "parallel"}}))
    options = arguments(lab)
    at = options.index("--learning-rate")
    del options[at : at + 2]
    options += ["--reduction", "4"]
    job = [sys.executable, str(ROOT / "jobs" / "tune.py"), *options]
    done = subprocess.run(job, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "1 trials done, 0 stopped early, 1 failed" in done.stdout
    failed = next(row for row in trials(lab) if row["state"] == "failed")
    assert "update" in failed["reason"]
    # It would diverge again: the same command leaves it.
    again = subprocess.run(job, capture_output=True, text=True, check=False)
    assert "0 trials to do" in again.stderr


@pytest.mark.slow
def test_optuna_goes_on_where_it_was(lab: Path) -> None:
    search = {"weights": {"simplex": ["alpha", "beta", "gamma"]}}
    space = SPACE | {"search": search, "figure": {"kind": "ternary"}}
    space["settings"] = {**SPACE["settings"], "loss": "combined"}  # type: ignore[dict-item]
    (lab / "space.yaml").write_text(yaml.safe_dump(space))
    options = ("--strategy", "optuna", "--reduction", "4")
    two = subprocess.run(
        command(lab, *options, "--num-samples", "2"), capture_output=True, text=True, check=False
    )
    assert two.returncode == 0, two.stderr
    before = scores(lab)
    assert len(before) == 2
    four = subprocess.run(
        command(lab, *options, "--num-samples", "3"), capture_output=True, text=True, check=False
    )
    assert four.returncode == 0, four.stderr
    assert before.items() <= scores(lab).items()
    assert len(scores(lab)) == 3
    for row in trials(lab):
        assert row["alpha"] + row["beta"] + row["gamma"] == pytest.approx(1)
    json.loads((lab / "out" / "summary.json").read_text())


def _end_ray() -> None:
    """What a killed driver has started by itself ends a little later."""
    time.sleep(3)
