"""cluster.yaml through Ray's AWS provider and the stack that it takes for granted, against moto.

In process: the provider's own object makes the requests. (`ray up` would go on to open SSH.)
"""

import copy
import gzip
import json
import logging
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.aws.utils import resource_cache
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import (
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_USER_NODE_TYPE,
)

from tests.conftest import point_at
from tests.deploy.manifests import ROOT, read_cluster

Config = dict[str, Any]
REGION = read_cluster()["provider"]["region"]


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An account that forgets, as the environment names it, and a home to keep keys in."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CARN_TEST_S3_ENDPOINT", raising=False)
        server.start()
        host, port = server.get_host_and_port()
        point_at(patch, f"http://{host}:{port}")
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        resource_cache.cache_clear()
        yield
        resource_cache.cache_clear()
    server.stop()


def client(service: str) -> Any:
    return boto3.client(service, region_name=REGION)


@pytest.fixture(scope="module")
def group(aws: None) -> str:
    """The security group of the stack."""
    (vpc,) = client("ec2").describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])[
        "Vpcs"
    ]
    values = {
        "VpcId": vpc["VpcId"],
        "Buckets": "arn:aws:s3:::lab",
        "BucketObjects": "arn:aws:s3:::lab/*",
    }
    client("cloudformation").create_stack(
        StackName="carn",
        TemplateBody=(ROOT / "deploy/aws/stack.yaml").read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in values.items()],
    )
    (stack,) = client("cloudformation").describe_stacks(StackName="carn")["Stacks"]
    return {each["OutputKey"]: each["OutputValue"] for each in stack["Outputs"]}["SecurityGroupId"]


@pytest.fixture(scope="module")
def config(group: str) -> Config:
    """cluster.yaml with its group filled in, as Ray completes it."""
    config = copy.deepcopy(read_cluster())
    for node_type in config["available_node_types"].values():
        node_type["node_config"]["SecurityGroupIds"] = [group]
    return bootstrap_aws(prepare_config(config))


def start(config: Config, name: str, **changes: Any) -> Config:
    """The instance that the provider starts for a node type."""
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {
        TAG_RAY_NODE_KIND: "head" if name == config["head_node_type"] else "worker",
        TAG_RAY_NODE_NAME: f"ray-carn-{name}",
        TAG_RAY_USER_NODE_TYPE: name,
        TAG_RAY_LAUNCH_CONFIG: "0",
    }
    node_config = config["available_node_types"][name]["node_config"] | changes
    (node,) = provider.create_node(node_config, tags, 1)
    (found,) = client("ec2").describe_instances(InstanceIds=[node])["Reservations"]
    (instance,) = found["Instances"]
    provider.non_terminated_nodes({})
    provider.terminate_node(node)
    return instance


def test_the_group_lets_in_its_own_nodes_alone(group: str) -> None:
    (found,) = client("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    (rule,) = found["IpPermissions"]
    assert rule["IpProtocol"] == "-1"
    assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [group]
    assert not rule.get("IpRanges")
    assert not rule.get("Ipv6Ranges")


def test_ray_takes_groups_and_profiles_as_they_are(config: Config, group: str) -> None:
    for node_type in config["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"] == [group]
        assert node_type["node_config"]["SubnetIds"]
    # Ray's own would be allowed all of EC2 and S3.
    names = [each["RoleName"] for each in client("iam").list_roles()["Roles"]]
    assert not [name for name in names if name.startswith("ray-autoscaler")]
    groups = client("ec2").describe_security_groups()["SecurityGroups"]
    assert not [each for each in groups if each["GroupName"].startswith("ray-autoscaler")]


def test_the_key_is_on_the_machine_that_starts_it(config: Config) -> None:
    key = Path(config["auth"]["ssh_private_key"])
    assert key.is_file()
    assert key.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", list(read_cluster()["available_node_types"]))
def test_a_node_of_every_type_is_started(config: Config, group: str, name: str) -> None:
    instance = start(config, name)
    wanted = config["available_node_types"][name]["node_config"]
    assert instance["InstanceType"] == wanted["InstanceType"]
    profile = "carn-head" if name == "head" else "carn-worker"
    assert instance["IamInstanceProfile"]["Arn"].endswith(f"instance-profile/{profile}")
    assert [each["GroupId"] for each in instance["SecurityGroups"]] == [group]
    assert (instance.get("InstanceLifecycle") == "spot") == name.endswith("_spot")
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    tags = {each["Key"]: each["Value"] for each in instance["Tags"]}
    # By which the head's role knows what it may end.
    assert tags["ray-cluster-name"] == config["cluster_name"]


def test_a_typo_in_an_instance_is_refused(config: Config) -> None:
    with pytest.raises(botocore.exceptions.ParamValidationError, match="InstanceMarketOption"):
        start(config, "gpu_spot", InstanceMarketOption={"MarketType": "spot"})


def test_nothing_starts_while_a_placeholder_is_left(
    aws: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        bootstrap_aws(prepare_config(copy.deepcopy(read_cluster())))
    assert "Failed to detect a security group" in capsys.readouterr().err
    instances = client("ec2").describe_instances()["Reservations"]
    states = [each["State"]["Name"] for found in instances for each in found["Instances"]]
    assert "running" not in states


def test_the_instances_have_what_is_said_of_them() -> None:
    """By moto's copy of EC2's catalogue: CPUs, GPUs, and room on the instance store."""
    found = files("moto.ec2") / "resources" / "instance_types.json.gz"
    catalogue = json.loads(gzip.decompress(found.read_bytes()))
    for name, node_type in read_cluster()["available_node_types"].items():
        facts = catalogue[node_type["node_config"]["InstanceType"]]
        if name == "head":
            continue
        assert facts["VCpuInfo"]["DefaultVCpus"] == node_type["resources"]["CPU"], name
        gpus = sum(gpu["Count"] for gpu in facts.get("GpuInfo", {}).get("Gpus", []))
        assert gpus == node_type["resources"]["GPU"], name
        assert facts["InstanceStorageInfo"]["TotalSizeInGB"] >= 600, name


def test_the_template_is_clean() -> None:
    from cfnlint.api import lint_file

    assert not lint_file(ROOT / "deploy/aws/stack.yaml")
