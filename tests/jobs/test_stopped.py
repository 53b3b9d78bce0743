"""Every job that is sent SIGTERM, as by `ray job stop`, ends in good order, and goes on."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.classification.lab import CROP_PX, write_labelled
from tests.evaluation.lab import write_run
from tests.jobs.lab import ROOT, own_lines
from tests.jobs.sr_lab import draw_inbox, write_model
from tests.jobs.train_lab import TINY, environment_of, kill_tree, wait_for, write_dataset

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.slow]

SPACE = (
    "settings: {steps: 400, validate_every: 200, validation_crop_px: 32}\n"
    "search: {reduction: [2, 8]}\n"
)
SEARCHED = tuple(
    part
    for name, value in zip(TINY[::2], TINY[1::2], strict=True)
    if name not in ("--reduction", "--seed", "--log-every")
    for part in (name, value)
)


def build_bcsr(slides: Path, tmp_path: Path) -> tuple[list[str], str]:
    return [
        *("--slides", str(slides / "slides"), "--tile-px", "64", "--per-class", "50"),
        *("--coordinates", str(slides / "tumor.txt"), str(slides / "normal.txt")),
        *("--keep", "60", "--num-test", "10", "--num-validation", "5", "--tiles-per-shard", "16"),
        *("--tiles-per-task", "2", "--num-workers", "1"),
    ], "_work/measured/*.parquet"


def train(_slides: Path, tmp_path: Path) -> tuple[list[str], str]:
    dataset = write_dataset(tmp_path / "bcsr", num_tiles=(8, 3, 1))
    steps = ("--steps", "400", "--validate-every", "200", "--checkpoint-every", "20")
    return ["--dataset", dataset, *TINY, *steps], "checkpoints/*/checkpoint.json"


def tune(_slides: Path, tmp_path: Path) -> tuple[list[str], str]:
    dataset = write_dataset(tmp_path / "bcsr", num_tiles=(8, 3, 1))
    (tmp_path / "space.yaml").write_text(SPACE)
    places = ["--space", str(tmp_path / "space.yaml"), "--dataset", dataset]
    return [*places, *SEARCHED, "--checkpoint-every", "20"], "trials/*/checkpoints/*/*.json"


def evaluate(_slides: Path, tmp_path: Path) -> tuple[list[str], str]:
    dataset = write_dataset(tmp_path / "bcsr", num_tiles=(4, 2, 60))
    write_run(str(tmp_path / "run"))
    options = ["--device", "cpu", "--no-timing", "--crops", "0"]
    return ["--dataset", dataset, "--runs", str(tmp_path / "run"), *options], "scores/*.parquet"


def classify(_slides: Path, tmp_path: Path) -> tuple[list[str], str]:
    labelled = write_labelled(tmp_path / "labelled")
    write_model(str(tmp_path / "model"))
    resnet = ["--crop-px", str(CROP_PX), "--depth", "18", "--batch-size", "8", "--epochs", "6"]
    places = ["--dataset", labelled, "--models", str(tmp_path / "model")]
    cpu = ["--device", "cpu", "--cpus-per-worker", "1"]
    return [*places, *resnet, *cpu], "bcsr/classifiers/gt/epoch-*.safetensors"


def super_resolve(_slides: Path, tmp_path: Path) -> tuple[list[str], str]:
    draw_inbox(tmp_path / "inbox", num_slides=3, width=900, height=700)
    write_model(str(tmp_path / "model"))
    return [
        *("--slides", str(tmp_path / "inbox"), "--checkpoint", str(tmp_path / "model")),
        *("--block-px", "256", "--tile-px", "64", "--device", "cpu", "--num-threads", "1"),
        *("--max-actors", "1"),
    ], "_work/*/*/blocks/*.npz"


@pytest.mark.parametrize(
    ("job", "number"),
    [
        *((job, signal.SIGTERM) for job in (build_bcsr, train, tune, evaluate, classify)),
        (super_resolve, signal.SIGTERM),
        (train, signal.SIGINT),
    ],
    ids=lambda value: getattr(value, "__name__", None) or value.name,
)
def test_a_stopped_job_says_so_and_goes_on(
    slides: Path,
    tmp_path: Path,
    job: Callable[[Path, Path], tuple[list[str], str]],
    number: signal.Signals,
) -> None:
    name = job.__name__
    options, begun = job(slides, tmp_path)
    output, said = tmp_path / "out", tmp_path / "said"
    # What a shell starts in the background ignores SIGINT, and so do its children.
    heard = ("env", "--default-signal=INT")
    job_path = str(ROOT / "jobs" / f"{name}.py")
    command = [*heard, sys.executable, job_path, *options, "--output", str(output)]
    with said.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment_of(), cwd="/", stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_for(lambda: bool(list(output.glob(begun))), process, log=said)
        process.send_signal(number)
        assert process.wait(timeout=120) == 130, said.read_text()
    finally:
        kill_tree(process)
    lines = own_lines(said.read_text())
    assert not [line for line in lines if line.startswith("Traceback")], said.read_text()
    if name == "super_resolve":
        assert [line for line in lines if "stopped: interrupted" in line]
        (run,) = (output / "runs").iterdir()
        assert (run / "report.html").exists()
        claims = list((output / "_state" / "claims").glob("*.json"))
        assert claims
        assert all(json.loads(path.read_text())["is_released"] for path in claims)
    else:
        assert [
            line for line in lines if line.startswith(f"{name}: stopped; the same command goes on")
        ]
    again = subprocess.run(
        command, env=environment_of(), cwd="/", capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
