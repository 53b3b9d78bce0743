"""The Dockerfile, as far as it can be judged without Docker."""

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.manifests import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()


def test_a_linter_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_there_is_an_image_for_each_kind_of_node() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE)
    assert {"cpu", "cuda"} <= set(stages)


def test_its_commands_are_shell(tmp_path: Path) -> None:
    for command in re.findall(r"^RUN (.*?[^\\])$", DOCKERFILE, re.MULTILINE | re.DOTALL):
        subprocess.run(["bash", "-n", "-c", command.replace("\\\n", "")], check=True)


def test_the_cpu_image_wants_to_know_where_torch_is() -> None:
    (command,) = re.findall(r'RUN (test -n "\$TORCH_INDEX_URL".*?) && pip', DOCKERFILE, re.DOTALL)
    for url, code in (("", 1), ("https://index.example", 0)):
        done = subprocess.run(
            ["bash", "-c", command.replace("\\\n", "")],
            env={"TORCH_INDEX_URL": url, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
    assert re.search(r'TORCH_INDEX_URL=""', DOCKERFILE)
    lock = (ROOT / "requirements.lock").read_text()
    assert len(re.findall("^torch==", lock, re.MULTILINE)) == 1


def test_nothing_runs_as_root() -> None:
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert users == ["1000:1000"]
    assert "HOME=/home/carn" in DOCKERFILE


def test_its_python_is_the_locks_own() -> None:
    (version,) = re.findall(r"FROM python:(\d+\.\d+)-", DOCKERFILE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == f">={version}"


def is_sent(path: str) -> bool:
    """Whether a file is part of what is sent to Docker: the last pattern that fits decides."""
    sent = True
    for line in IGNORED:
        if not line or line.startswith("#"):
            continue
        keeps, pattern = line.startswith("!"), line.lstrip("!").rstrip("/")
        parts = path.split("/")
        prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        patterns = [pattern, pattern.removeprefix("**/"), f"*/{pattern.removeprefix('**/')}"]
        tried = patterns if pattern.startswith("**/") else [pattern]
        if any(fnmatch.fnmatchcase(prefix, each) for prefix in prefixes for each in tried):
            sent = keeps
    return sent


@pytest.mark.parametrize(
    "path",
    [
        *("carn/report/templates/page.html", "jobs/train.py", "tune_spaces/blocks.yaml"),
        *("deploy/hold_nodes.py", "requirements.txt", "requirements.lock"),
    ],
)
def test_what_nodes_need_is_sent(path: str) -> None:
    assert is_sent(path)


@pytest.mark.parametrize(
    "path",
    [
        *(".git/config", ".venv/bin/python", "tests/conftest.py", "cluster.yaml", ".env"),
        *("carn/__pycache__/x.pyc", "demo/sr/x.tif", "deploy/aws/night.sh"),
    ],
)
def test_nothing_else_is_sent(path: str) -> None:
    assert not is_sent(path)


def test_everything_that_jobs_import_of_ours_is_sent() -> None:
    for path in [*(ROOT / "jobs").glob("*.py"), ROOT / "deploy/hold_nodes.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                package = node.module.split(".")[0]
                if (ROOT / package).is_dir():
                    assert is_sent(node.module.replace(".", "/") + "/x.py"), node.module
