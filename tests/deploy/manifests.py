"""What is deployed, as tests read it: manifests, and the commands in them and in the page."""

import functools
import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster.yaml"
KUBERNETES = ROOT / "deploy" / "kubernetes"
DOCUMENT = ROOT / "docs" / "cluster.md"

# Jobs whose command line is parsed by a function; the others' is that of their class.
PARSERS = {"train": "jobs.train", "tune": "jobs.tune", "classify": "jobs.classify"}
CLASSES = {
    "build_bcsr": ("jobs.build_bcsr", "BuildJob"),
    "super_resolve": ("jobs.sr_config", "SuperResolveJob"),
    "evaluate": ("jobs.evaluate", "EvaluateJob"),
}
JOBS = {*PARSERS, *CLASSES}


class UniqueKeyLoader(yaml.CSafeLoader):
    """YAML whose mappings say each key once; PyYAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{node.start_mark}: a key is repeated among {keys}")
        return super().construct_mapping(node, deep=deep)


@functools.cache
def read_yaml(path: Path) -> list[Any]:
    """The documents of a file, which are not to be changed."""
    return list(yaml.load_all(path.read_text(), Loader=UniqueKeyLoader))


def read_cluster() -> dict[str, Any]:
    (config,) = read_yaml(CLUSTER)
    return config


def read_manifests() -> dict[Path, list[Any]]:
    return {path: read_yaml(path) for path in sorted(KUBERNETES.rglob("*.yaml"))}


def resources(kind: str) -> dict[str, Any]:
    """Manifests of a kind, by name."""
    found = [each for group in read_manifests().values() for each in group]
    return {each["metadata"]["name"]: each for each in found if each["kind"] == kind}


def parse_command(command: str) -> Any:
    """The job that `python [...]jobs/<job>.py arguments` asks for, by the job's own parser."""
    program, script, *arguments = shlex.split(command)
    assert program == "python", command
    assert script.startswith(("jobs/", "/opt/carn/jobs/")), command
    return parse_job(Path(script).stem, arguments)


def parse_job(name: str, arguments: Sequence[str]) -> Any:
    if name in PARSERS:
        return importlib.import_module(PARSERS[name]).parse(arguments)
    module, job = CLASSES[name]
    return tyro.cli(
        getattr(importlib.import_module(module), job),
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def shell_commands(text: str) -> list[str]:
    """Commands of a script, or of a page's indented blocks: continued lines joined, no comments."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line.strip() for line in joined.splitlines()]
    return [re.sub(r"\s+# .*", "", line) for line in lines if line and line[0] != "#"]


def documented(program: str) -> list[str]:
    """Commands of the page that begin with a program."""
    blocks = [line for line in _joined(DOCUMENT.read_text()) if line.startswith("    ")]
    return [line for line in shell_commands("\n".join(blocks)) if line.startswith(f"{program} ")]


def _joined(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", text).splitlines()


def job_commands() -> dict[str, str]:
    """Every `python [...]jobs/<job>.py ...` that is deployed or documented, by where it stands."""
    found = {
        f"{name} (RayJob)": job["spec"]["entrypoint"] for name, job in resources("RayJob").items()
    }
    night = (ROOT / "deploy" / "aws" / "night.sh").read_text()
    lines = [*shell_commands(night), *documented("ray")]
    for line in lines:
        command = line.partition(" -- ")[2]
        if "jobs/" in command:
            found[line] = command
    return found


def pod_templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that manifests describe, and where."""
    for name, cluster in cluster_specs().items():
        yield f"{name} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{name} {group['groupName']}", group["template"]
    for name, job in resources("RayJob").items():
        yield f"{name} submitter", job["spec"]["submitterPodTemplate"]
    for name, schedule in resources("CronJob").items():
        yield f"{name} schedule", schedule["spec"]["jobTemplate"]["spec"]["template"]


def cluster_specs() -> dict[str, dict[str, Any]]:
    """Specifications of Ray clusters: those of clusters and of jobs that bring their own."""
    found = {name: each["spec"] for name, each in resources("RayCluster").items()}
    jobs = resources("RayJob").items()
    return found | {name: each["spec"]["rayClusterSpec"] for name, each in jobs}
