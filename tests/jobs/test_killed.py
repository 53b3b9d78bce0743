"""The job is killed, its driver or its workers, at any moment; what comes out is the same."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from carn.bcsr.dataset import open_dataset
from carn.errors import DatasetError
from jobs.build_bcsr import RunConfig, main
from tests.jobs.lab import ROOT, content_of, make_job

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


def command(slides: Path, output: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "jobs" / "build_bcsr.py"), "--slides", str(slides / "slides")),
        *("--coordinates", str(slides / "tumor.txt"), str(slides / "normal.txt")),
        *("--output", str(output), "--per-class", "50", "--tile-px", "64", "--keep", "60"),
        *("--num-test", "10", "--num-validation", "5", "--tiles-per-shard", "16", *more),
    ]


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the driver and then what it started, as a node that loses power would."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def run_and_kill(slides: Path, output: Path, *, when: str) -> None:
    """Start the job and kill it as soon as a file matches `when` below the output."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        command(slides, output, "--tiles-per-task", "2", "--num-workers", "1"),
        env=environment,
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(output.glob(when)):
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_tree(process)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["_work/measured/*.parquet", "tiles/*.parquet"])
def test_killed_driver_leaves_what_the_next_run_completes(
    slides: Path, built: Path, tmp_path: Path, ray_here: None, when: str
) -> None:
    output = tmp_path / "out"
    run_and_kill(slides, output, when=when)
    assert not (output / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in output.glob(when)}
    with pytest.raises(DatasetError, match="no finished bcSR"):
        open_dataset(output)
    assert main(make_job(slides, output, run=RunConfig(tiles_per_task=2))) == 0
    assert content_of(output) == content_of(built)
    if when.startswith("tiles"):
        still = {path: path.stat().st_mtime_ns for path in kept if path.exists()}
        assert still == kept, "a finished shard was written again"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_driver_killed_again_and_again_at_any_moment(
    slides: Path, built: Path, tmp_path: Path, ray_here: None, seed: int
) -> None:
    output = tmp_path / "out"
    rng = np.random.default_rng(seed)
    for _ in range(3):
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        environment.pop("RAY_ADDRESS", None)
        process = subprocess.Popen(
            command(slides, output, "--tiles-per-task", "2"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Ray takes some ten seconds to start; the work is done in about as many more.
        time.sleep(rng.uniform(6, 24))
        kill_tree(process)
    assert main(make_job(slides, output, run=RunConfig(tiles_per_task=2))) == 0
    assert content_of(output) == content_of(built)


def test_what_a_run_killed_at_its_very_end_left_is_tidied_up(
    slides: Path, built: Path, tmp_path: Path, ray_here: None
) -> None:
    import shutil

    output = tmp_path / "out"
    shutil.copytree(built, output)
    (output / "manifest.json").unlink()
    (output / "_work" / "measured").mkdir(parents=True)
    (output / "_work" / "measured" / "x.parquet").write_bytes(b"x")
    (output / "tiles" / ".train.parquet.abc.carn-part").write_bytes(b"x")
    (output / "tiles" / "train-00000-000000000000.parquet").write_bytes(b"an earlier selection's")
    assert main(make_job(slides, output)) == 0
    assert content_of(output) == content_of(built)


@pytest.mark.slow
def test_killed_workers_change_nothing(slides: Path, built: Path, tmp_path: Path) -> None:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    output = tmp_path / "out"
    process = subprocess.Popen(
        command(slides, output, "--tiles-per-task", "2"),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    num_killed = 0
    driver = psutil.Process(process.pid)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        # Two at the most: a unit is given up after three deaths of its process.
        if num_killed < 2 and len(list(output.glob("_work/measured/*"))) > 4 * num_killed:
            for child in driver.children(recursive=True):
                if "ray::MapBatches" in " ".join(_command_line(child)):
                    child.kill()
                    num_killed += 1
                    break
        time.sleep(0.005)
    assert process.wait(timeout=10) == 0, process.stderr.read() if process.stderr else b""
    assert num_killed > 0
    assert content_of(output) == content_of(built)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
