"""What `make` starts and what a newcomer reads is what the jobs take."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from carn.bcsr import ncrf
from carn.models.checkpoint import checkpoint_uri
from carn.models.shipped import shipped_names
from tests.deploy.manifests import JOBS, ROOT, parse_command, shell_commands

SUBMIT = "RUN=ray job submit --working-dir . -- python"


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
        (("own", "SLIDES=/data", "SCALE=3"), "own", 3),
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
    assert evaluate.output == f"{place}/evaluation-x{scale}"
    own, *ours = evaluate.runs
    assert own == train.output
    assert [checkpoint_uri(name) for name in ours] == [
        f"shipped:{name}" for name in shipped_names() if name.endswith(f"x{scale}")
    ]
    if arguments[0] == "own":
        assert build.slides == (arguments[1].removeprefix("SLIDES="),)
        # Of the paper's 2,000 positions 1,200 are kept, the farthest from the mean colour.
        assert (build.draw.per_class, build.draw.even_over_slides) == (2000, True)
    else:
        assert [name.rsplit("/")[-1] for name in build.coordinates] == list(ncrf.LISTS)


def test_lists_are_fetched_to_where_they_are_read_from() -> None:
    shown = make("--dry-run", "BIN=.", "camelyon", "STORE=s3://lab/c16").stdout
    assert "-m carn.bcsr.ncrf 's3://lab/c16/lists'" in shown
    assert "--coordinates 's3://lab/c16/lists/tumor_train.txt'" in shown


def test_each_job_takes_further_options() -> None:
    recipe = "--config carn/models/shipped/carn-x2.yaml --steps 100 --estimator-steps 20"
    build, train, evaluate = jobs_of(
        *("own", "SLIDES=/data", f"TRAIN={recipe}", "EVALUATE=--no-timing"),
        r"BUILD=--group-regex patient_\\d+",
    )
    assert (train.train.steps, train.train.optimizer.precision) == (100, "bf16")
    assert build.select.group_regex == r"patient_\d+"
    assert not evaluate.figures.timing


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("own",), "make own SLIDES=/data/slides"),
        (("own", "SLIDES=s3://lab/in", SUBMIT), "make own STORE=s3://lab/own"),
        (("camelyon", SUBMIT), "make camelyon STORE=s3://lab/camelyon"),
    ],
)
def test_what_has_to_be_said(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    refused = make(*arguments, f"VENV={tmp_path}/none")
    assert refused.returncode == 2
    assert says in refused.stderr
    assert not list(tmp_path.iterdir()), "something was installed before"


def test_the_demo() -> None:
    jobs = jobs_of("demo")
    assert len(jobs) == 5
    assert jobs[2].checkpoint is None


def test_help_names_every_target() -> None:
    phony = (ROOT / "Makefile").read_text().partition(".PHONY:")[2].splitlines()[0].split()
    assert sorted(line.split()[0] for line in make("help").stdout.splitlines()) == sorted(phony)


def read_by_newcomers() -> list[str]:
    """Commands of jobs in the README and in the cards of networks."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs" / "models").glob("*.md"))]
    lines = [
        line
        for page in pages
        for line in re.sub(r"\\\n\s*", "", page.read_text()).splitlines()
        if line.startswith("    ") and "python jobs/" in line
    ]
    return [line[line.index("python jobs/") :] for line in shell_commands("\n".join(lines))]


@pytest.mark.parametrize("command", read_by_newcomers())
def test_what_newcomers_read(command: str) -> None:
    parse_command(command)


def test_newcomers_read_of_every_job() -> None:
    commands = " ".join(read_by_newcomers())
    assert {name for name in JOBS if f"jobs/{name}.py" in commands} == JOBS
