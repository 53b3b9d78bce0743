"""cluster.yaml by Ray's own schema, by EC2's, and by what neither looks at."""

import copy
import functools
import itertools
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from carn.node_cache import cache_bytes
from tests.deploy.manifests import CLUSTER, read_cluster, read_yaml

Config = dict[str, Any]


@pytest.fixture
def config() -> Config:
    # By way of JSON, as what anchors share would stay one object.
    return json.loads(json.dumps(read_cluster()))


def check(config: Config) -> None:
    """All that can be told of it without an account."""
    validate_config(prepare_config(copy.deepcopy(config)))
    check_nodes(config)
    for node_type in config["available_node_types"].values():
        check_instance(node_type["node_config"])


def check_nodes(config: Config) -> None:
    """What Ray takes and should not."""
    assert "head_node_type" in config, "Ray would fill in a head of its own"
    head = config["head_node_type"]
    for name, node_type in config["available_node_types"].items():
        if name == head:
            assert node_type["resources"]["CPU"] == 0, "the head would be given work"
            assert node_type["resources"].get("GPU", 0) == 0
            continue
        assert 0 <= node_type["min_workers"] <= node_type["max_workers"], name
        assert node_type["max_workers"] <= config["max_workers"], name
        assert node_type["resources"]["CPU"] > 0, name


def check_instance(node_config: Config) -> None:
    """The request that would start it, by the model of EC2's API."""
    request = {k: v for k, v in node_config.items() if k != "SubnetIds"}
    report = botocore.validate.ParamValidator().validate(
        request | {"MinCount": 1, "MaxCount": 1}, shape_of_run_instances()
    )
    assert not report.has_errors(), report.generate_report()


@functools.cache
def shape_of_run_instances() -> Any:
    model = botocore.session.get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def test_it_is_what_ray_and_ec2_expect(config: Config) -> None:
    check(config)


def _typo(path: str, wrong: str) -> Callable[[Config], None]:
    def make(config: Config) -> None:
        *parents, key = path.split(".")
        for parent in parents:
            config = config[parent]
        config[wrong] = config.pop(key)

    return make


def _set(path: str, value: Any) -> Callable[[Config], None]:
    def make(config: Config) -> None:
        *parents, key = path.split(".")
        for parent in parents:
            config = config[parent]
        config[key] = value

    return make


GPU = "available_node_types.gpu_spot"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (_typo("max_workers", "max_worker"), jsonschema.ValidationError),
        (_typo("docker.pull_before_run", "pull"), jsonschema.ValidationError),
        (_typo(f"{GPU}.max_workers", "max_worker"), jsonschema.ValidationError),
        (_typo("auth.ssh_user", "user"), jsonschema.ValidationError),
        (_set(f"{GPU}.resources", {"CPU": "16"}), jsonschema.ValidationError),
        (_set("head_node_type", "heap"), ValueError),
        (lambda config: config.pop("head_node_type"), (AssertionError, ValueError)),
        # From here on it is not Ray that finds it.
        (_set(f"{GPU}.min_workers", 5), AssertionError),
        (_set(f"{GPU}.max_workers", 50), AssertionError),
        (_set("available_node_types.head.resources", {"CPU": 8}), AssertionError),
        (_typo(f"{GPU}.node_config.InstanceType", "InstanceTyp"), AssertionError),
        (
            _typo(f"{GPU}.node_config.InstanceMarketOptions.MarketType", "Market"),
            AssertionError,
        ),
        (_set(f"{GPU}.node_config.MetadataOptions", {"HttpTokens": True}), AssertionError),
    ],
)
def test_what_is_wrong_in_it_is_found(
    config: Config, wrong: Callable[[Config], None], error: type[Exception]
) -> None:
    wrong(config)
    with pytest.raises(error):
        check(config)


def test_a_key_that_is_repeated_is_found(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("a: {b: 1, b: 2}\n")
    with pytest.raises(ValueError, match="repeated"):
        read_yaml(path)


def test_spot_comes_first_and_what_stands_in_for_it_is_the_same(config: Config) -> None:
    types = config["available_node_types"]
    for kind in ("cpu", "gpu"):
        spot, on_demand = types[f"{kind}_spot"], types[f"{kind}_on_demand"]
        assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert "InstanceMarketOptions" not in on_demand["node_config"]
        # The autoscaler prefers by fit, then by what could be had lately, then by priority.
        assert spot["resources"] == on_demand["resources"]
        assert spot["priority"] > on_demand["priority"]
        assert spot["node_config"]["InstanceType"] == on_demand["node_config"]["InstanceType"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]


def test_nothing_is_let_in_and_no_key_is_in_it(config: Config) -> None:
    text = CLUSTER.read_text()
    assert not re.search(r"AKIA|aws_secret|PRIVATE KEY|(?i:password: )", text)
    assert "ssh_private_key" not in config["auth"]
    assert config["provider"]["use_internal_ips"]
    assert config["auth"]["ssh_proxy_use_node_id"]
    for name, node_type in config["available_node_types"].items():
        node = node_type["node_config"]
        assert node["SecurityGroupIds"], "Ray would make a group that is open for SSH"
        wanted = "carn-head" if name == "head" else "carn-worker"
        assert node["IamInstanceProfile"] == {"Name": wanted}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    # Whoever listens beyond the loopback address asks for a token.
    (start,) = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=0.0.0.0" in start
    assert environment(config["docker"]["run_options"])["RAY_AUTH_MODE"] == "token"


def environment(options: list[str]) -> dict[str, str]:
    """Variables that options of `docker run` set."""
    words = [word for option in options for word in shlex.split(option)]
    pairs = itertools.pairwise(words)
    return dict(value.split("=", 1) for flag, value in pairs if flag == "-e")


def mounts(options: list[str]) -> dict[str, str]:
    """Where containers see folders of the host, by the container's path."""
    words = [word for option in options for word in shlex.split(option)]
    pairs = itertools.pairwise(words)
    return dict(reversed(value.split(":", 1)) for flag, value in pairs if flag == "-v")


def test_the_token_is_where_it_is_looked_for(config: Config) -> None:
    where = Path(environment(config["docker"]["run_options"])["RAY_AUTH_TOKEN_PATH"])
    assert str(where.parent) in config["file_mounts"]


def test_caches_are_on_the_instance_store(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config["docker"]["worker_run_options"]
    variables, seen = environment(options), mounts(options)
    assert seen["/tmp/ray"].startswith("/mnt/nvme/")
    assert seen[variables["CARN_CACHE_DIR"]].startswith("/mnt/nvme/")
    monkeypatch.setenv("CARN_CACHE_GB", variables["CARN_CACHE_GB"])
    # The instance store of g6e.4xlarge, the smaller of the two, less room for what Ray spills.
    assert cache_bytes() <= 600e9 - 150e9


def test_the_region_is_the_same_all_over(config: Config) -> None:
    region = config["provider"]["region"]
    found = re.findall(
        r"--region (\S+)|AWS_REGION=(\S+)|^  region: (\S+)", CLUSTER.read_text(), re.M
    )
    assert {each for match in found for each in match if each} == {region}


def test_what_is_yours_to_set_is_plain(config: Config) -> None:
    docker = config["docker"]
    cuda = config["available_node_types"]["gpu_spot"]["docker"]["worker_image"]
    for image in (docker["head_image"], docker["worker_image"], cuda):
        assert image.startswith("REPLACE_WITH_YOUR_REGISTRY/carn:")
    assert cuda.endswith("-cuda")
    assert docker["head_image"].endswith("-cpu")


# ------------------------------------------------------------------------- the instance store

STUBS = {
    "sudo": '"$@"',
    "mkdir": 'echo mkdir "$@" >> $LOG',
    "mount": 'echo mount "$@" >> $LOG',
    "chown": 'echo chown "$@" >> $LOG',
    "mdadm": 'echo mdadm "$@" >> $LOG',
    "mkfs.ext4": 'echo mkfs.ext4 "$@" >> $LOG',
    "mountpoint": '[ "$2" = "$MOUNTED" ]',
    "lsblk": 'printf "%b" "/dev/nvme0n1 Amazon Elastic Block Store\\n$DISKS"',
}
DISK = "/dev/nvme{}n1 Amazon EC2 NVMe Instance Storage\\n"


@pytest.fixture
def run_mount(config: Config, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run the command that mounts, on a machine that only writes down what it is told."""
    commands = config["available_node_types"]["cpu_spot"]["initialization_commands"]
    (script,) = [command for command in commands if "/mnt/nvme" in command]
    for name, body in STUBS.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(*, disks: str = "", mounted: str = "") -> tuple[int, str]:
        log = tmp_path / "log"
        log.write_text("")
        variables = {"LOG": str(log), "DISKS": disks, "MOUNTED": mounted}
        found = subprocess.run(
            # In parentheses behind other commands, as Ray runs it.
            ["bash", "-c", f"true && ({script})"],
            env=os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        return found.returncode, log.read_text() + found.stderr

    return run


def test_one_disk_is_mounted(run_mount: Callable[..., tuple[int, str]]) -> None:
    code, log = run_mount(disks=DISK.format(1))
    assert code == 0, log
    assert "mkfs.ext4 -q -E nodiscard /dev/nvme1n1" in log
    assert "mount -o noatime /dev/nvme1n1 /mnt/nvme" in log
    assert "chown 1000:1000 /mnt/nvme/ray /mnt/nvme/carn-cache" in log


def test_several_disks_become_one(run_mount: Callable[..., tuple[int, str]]) -> None:
    code, log = run_mount(disks=DISK.format(1) + DISK.format(2))
    assert code == 0, log
    assert "--raid-devices=2 /dev/nvme1n1 /dev/nvme2n1" in log
    assert "mount -o noatime /dev/md0 /mnt/nvme" in log


def test_what_is_mounted_is_left_alone(run_mount: Callable[..., tuple[int, str]]) -> None:
    code, log = run_mount(disks=DISK.format(1), mounted="/mnt/nvme")
    assert code == 0, log
    assert "mkfs" not in log
    code, log = run_mount(disks=DISK.format(1), mounted="/opt/dlami/nvme")
    assert code == 0, log
    assert "mkfs" not in log
    assert "mount --bind /opt/dlami/nvme /mnt/nvme" in log


def test_a_node_without_an_instance_store_is_refused(
    run_mount: Callable[..., tuple[int, str]],
) -> None:
    code, log = run_mount()
    assert code != 0
    assert "has no instance store" in log
    assert "chown" not in log
