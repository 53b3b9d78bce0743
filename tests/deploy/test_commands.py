"""Every command that is deployed or documented is one that its program takes."""

import re
import shlex
from typing import Any

import click
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from deploy import hold_nodes
from tests.deploy.manifests import (
    DOCUMENT,
    JOBS,
    ROOT,
    documented,
    job_commands,
    parse_command,
    parse_job,
    resources,
    shell_commands,
)


@pytest.fixture(autouse=True)
def on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs ask for more where their folder is thrown away."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", job_commands().values())
def test_a_job_takes_its_command(command: str) -> None:
    job = parse_command(command)
    # Whatever a cluster's job reads and writes is in object storage.
    for name in ("output", "dataset", "checkpoint"):
        place = getattr(job, name, None)
        assert place is None or place.startswith("s3://"), name


def test_every_job_is_documented() -> None:
    scripts = {re.search(r"jobs/(\w+)\.py", command)[1] for command in job_commands().values()}
    assert scripts == JOBS


@pytest.mark.parametrize(
    "command",
    [
        "python jobs/super_resolve.py --slides s3://a/b --checkpoint s3://a/c --outputs s3://a/d",
        "python jobs/train.py --dataset s3://a/b --scal 2 --output s3://a/d",
        "python jobs/evaluate.py --dataset s3://a/b --runs s3://a/c --gpus 1 --output s3://a/d",
    ],
)
def test_a_renamed_flag_would_be_found(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command(command)
    capsys.readouterr()


def test_an_output_has_to_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_job("train", ["--dataset", "s3://lab/bcsr"])
    assert "--output" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ ray's own


def parse_ray(command: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a `ray` command, by Ray's own parser."""
    context: click.Context | None = None
    group: click.Command = ray_cli
    words, path = shlex.split(command)[1:], ""
    while isinstance(group, click.Group):
        name = words.pop(0)
        found = group.commands.get(name)
        assert found is not None, f"ray has no {path} {name}"
        group, path = found, f"{path} {name}".strip()
        context = click.Context(group, parent=context, info_name=name)
    assert context is not None
    context.ignore_unknown_options = False
    group.parse_args(context, words)
    return path, context.params


def ray_commands() -> list[str]:
    night = (ROOT / "deploy/aws/night.sh").read_text()
    # The script's function, and `docker exec`, in full.
    (prefix,) = re.findall(r'docker exec ray_docker (ray job submit .*) "\$@"', night)
    lines = [re.sub(r"trap '(.*)' EXIT", r"\1", line) for line in shell_commands(night)]
    called = [f"{prefix} {line[7:]}" for line in lines if line.startswith("submit ")]
    assert len(called) == 3
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    started = [
        part.strip()
        for name in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in config[name]
        for part in line.split(";")
        if part.strip().startswith("ray ")
    ]
    return [*documented("ray"), *called, *started]


@pytest.mark.parametrize("command", ray_commands())
def test_ray_takes_its_command(command: str) -> None:
    name, options = parse_ray(command)
    if name == "job submit":
        program, script, *arguments = options["entrypoint"]
        assert program == "python"
        assert "jobs/" in script or script == "/opt/carn/deploy/hold_nodes.py"
        if options["runtime_env_json"]:
            yaml.safe_load(options["runtime_env_json"])
        if "hold_nodes" in script:
            assert arguments


def test_a_typo_in_an_option_of_ray_would_be_found() -> None:
    with pytest.raises(click.NoSuchOption):
        parse_ray("ray job submit --work-dir . -- python jobs/train.py")
    with pytest.raises(AssertionError, match="no job"):
        parse_ray("ray job kill x")


def test_commands_inside_a_line_are_rays_own_too() -> None:
    """Those in the text, between backquotes."""
    for command in re.findall(r"`(ray [a-z][^`]*)`", DOCUMENT.read_text()):
        if " --" in command or "cluster.yaml" in command:
            parse_ray(command)


# -------------------------------------------------------------------------------- what it names


def test_the_stack_is_given_its_parameters() -> None:
    class Loader(yaml.SafeLoader):
        """Takes CloudFormation's tags for what stands behind them."""

    Loader.add_multi_constructor("!", lambda loader, _, node: node.value)
    stack = yaml.load((ROOT / "deploy/aws/stack.yaml").read_text(), Loader=Loader)
    (command,) = [line for line in documented("aws") if "deploy" in line]
    words = shlex.split(command)
    given = {word.split("=")[0] for word in words[words.index("--parameter-overrides") + 1 :]}
    needed = {name for name, each in stack["Parameters"].items() if "Default" not in each}
    assert given == needed
    assert words[words.index("--template-file") + 1] == "deploy/aws/stack.yaml"


def test_every_file_that_is_named_is_there() -> None:
    text = DOCUMENT.read_text()
    named = set(re.findall(r"(?<![\w/])(?:deploy|jobs|tune_spaces|docs)/[\w./-]*\w", text))
    assert "deploy/kubernetes/night" in named
    for name in named - {"deploy/aws/night"}:
        assert (ROOT / name).exists(), name


def test_what_kubectl_is_asked_for_is_there() -> None:
    text = DOCUMENT.read_text()
    kinds = {
        "raycluster/": "RayCluster",
        "cronjob/": "CronJob",
        "patch cronjob ": "CronJob",
        "delete raycluster ": "RayCluster",
        "get rayjob ": "RayJob",
        "delete rayjob ": "RayJob",
    }
    for prefix, kind in kinds.items():
        for name in re.findall(rf"{prefix}([\w-]+)", text):
            assert name in resources(kind), f"{prefix}{name}"
    # The operator's names for a cluster's service and secret.
    (service,) = set(re.findall(r"service/([\w-]+)", text))
    assert service.removesuffix("-head-svc") in resources("RayCluster")
    assert set(re.findall(r"-n (\w+)", text)) == set(resources("Namespace"))


# --------------------------------------------------------------------------------- hold_nodes.py


class Ray:
    """A cluster that grows by a GPU and 16 CPUs each time that somebody looks."""

    def __init__(self, *, most: int) -> None:
        self.asked: list[tuple[int, list[dict[str, float]]]] = []
        self.nodes, self.most = 0, most

    def request_resources(self, *, num_cpus: int, bundles: list[dict[str, float]]) -> None:
        self.asked.append((num_cpus, bundles))

    def cluster_resources(self) -> dict[str, float]:
        self.nodes = min(self.nodes + 1, self.most)
        return {"GPU": float(self.nodes), "CPU": 16.0 * self.nodes}


@pytest.fixture
def grow(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*, most: int = 8) -> Ray:
        cluster = Ray(most=most)
        monkeypatch.setattr(hold_nodes.ray, "init", lambda **_: None)
        monkeypatch.setattr(hold_nodes.ray, "cluster_resources", cluster.cluster_resources)
        monkeypatch.setattr(hold_nodes, "request_resources", cluster.request_resources)
        monkeypatch.setattr(hold_nodes, "POLL_S", 0.0)
        return cluster

    return make


def test_nodes_are_asked_for_and_waited_for(grow: Any) -> None:
    cluster = grow()
    assert hold_nodes.main(["--gpus", "3", "--cpus", "20"]) == 0
    assert cluster.asked == [(20, [{"GPU": 1}] * 3)]
    assert cluster.nodes == 3


def test_nodes_that_do_not_come_are_missed(grow: Any) -> None:
    cluster = grow(most=1)
    assert hold_nodes.main(["--gpus", "2", "--wait-minutes", "0"]) == 1
    assert cluster.nodes == 1


def test_nodes_are_let_go(grow: Any) -> None:
    cluster = grow()
    assert hold_nodes.main(["--none"]) == 0
    assert cluster.asked == [(0, [])]
    assert cluster.nodes == 0


@pytest.mark.parametrize("arguments", [[], ["--none", "--gpus", "1"], ["--gpus", "-1"]])
def test_it_has_to_be_told_what(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hold_nodes.main(arguments)
    capsys.readouterr()


@pytest.mark.parametrize("command", [line for line in documented("ray") if "hold_nodes.py" in line])
def test_it_takes_the_commands_of_the_page(command: str, grow: Any) -> None:
    grow()
    assert hold_nodes.main(shlex.split(command.partition("hold_nodes.py")[2])) == 0
