"""What `make` starts is what the jobs take, for targets that no test runs from end to end."""

import subprocess
from typing import Any

import pytest

from tests.deploy.manifests import ROOT, parse_command, shell_commands


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def jobs_of(*arguments: str) -> list[Any]:
    """The jobs that a target starts, as their own parsers understand them."""
    shown = make("--dry-run", "RUN=python", "BIN=.", *arguments)
    assert shown.returncode == 0, shown.stderr
    lines = [line.removeprefix("./") for line in shell_commands(shown.stdout)]
    return [parse_command(line) for line in lines if line.startswith("python jobs/")]


@pytest.mark.parametrize(
    ("arguments", "place", "scale"),
    [
        (("own", "SLIDES=/data/my slides"), "own", 2),
        (("own", "SLIDES=/data/*.svs", "STORE=s3://lab/own", "SCALE=4"), "s3://lab/own", 4),
        (("camelyon",), "camelyon", 2),
        (("camelyon", "STORE=s3://lab/c16", "LISTS=s3://lab/lists"), "s3://lab/c16", 2),
    ],
)
def test_from_slides_to_a_network_that_is_held_against_ours(
    arguments: tuple[str, ...], place: str, scale: int
) -> None:
    build, train, evaluate = jobs_of(*arguments)
    assert build.output == train.dataset == evaluate.dataset == f"{place}/bcsr"
    assert train.train.network.scale == scale
    assert train.train.steps == 300_000
    assert evaluate.runs == (train.output, f"shipped:carn-x{scale}")
    if arguments[0] == "own":
        assert build.slides == (arguments[1].removeprefix("SLIDES="),)
        assert build.draw.per_class is None
    else:
        assert [name.rsplit("/")[-1] for name in build.coordinates] == [
            "tumor_train.txt",
            "normal_train.txt",
        ]


def test_training_takes_further_options() -> None:
    recipe = "--config carn/models/shipped/carn-x2.yaml --steps 100"
    _, train, _ = jobs_of("own", "SLIDES=/data", f"TRAIN={recipe}")
    assert (train.train.steps, train.train.optimizer.precision) == (100, "bf16")


def test_slides_have_to_be_said() -> None:
    refused = make("own", "--assume-old=.venv/.setup-done")
    assert refused.returncode == 2
    assert "make own SLIDES=/data/slides" in refused.stderr


def test_the_demo() -> None:
    jobs = jobs_of("demo")
    assert len(jobs) == 5
    assert jobs[2].checkpoint is None


def test_help_names_every_target() -> None:
    phony = (ROOT / "Makefile").read_text().partition(".PHONY:")[2].splitlines()[0].split()
    assert sorted(line.split()[0] for line in make("help").stdout.splitlines()) == sorted(phony)
