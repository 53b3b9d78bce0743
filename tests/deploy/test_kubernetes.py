"""The Kubernetes manifests by published schemas, by each other, and by the code that they run."""

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from jobs.sr_config import SuperResolveJob, parse_deadline
from tests.deploy.manifests import (
    KUBERNETES,
    ROOT,
    UniqueKeyLoader,
    cluster_specs,
    parse_command,
    pod_templates,
    read_manifests,
    resources,
)

# The oldest and the newest that are promised.
VERSIONS = ("1.31", "1.37")
SCHEMA = yaml.load(
    (Path(__file__).parent / "kuberay.schema.yaml").read_text(), Loader=UniqueKeyLoader
)
# Variables that are not ours: AWS's, Ray's, the C library's.
KNOWN_VARIABLES = {"AWS_REGION", "AWS_ENDPOINT_URL", "TZ", "RAY_JOB_STOP_WAIT_TIME_S", "NIGHT"}


@pytest.fixture(autouse=True, scope="module")
def schemas_are_read_once() -> Iterator[None]:
    """Kubernetes' definitions have megabytes, and are read anew for each manifest otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


def check_core(manifest: dict[str, Any]) -> None:
    """Whether Kubernetes knows every field of it, in all versions."""
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def check_ray(manifest: dict[str, Any]) -> None:
    """Whether KubeRay knows every field of it."""
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    check_core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]})
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    templates = [group["template"] for group in groups]
    if "submitterPodTemplate" in spec:
        templates.append(spec["submitterPodTemplate"])
    options = cluster["autoscalerOptions"]
    sidecar = {key: options[key] for key in ("resources", "securityContext")}
    templates.append({"spec": {"containers": [{"name": "autoscaler", **sidecar}]}})
    for template in templates:
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}}
        check_core(wrapped | {"template": template})


def test_they_are_what_kubernetes_and_kuberay_expect() -> None:
    for path, manifests in read_manifests().items():
        for manifest in manifests:
            if manifest["apiVersion"] == "ray.io/v1":
                check_ray(manifest)
            elif manifest["kind"] == "Kustomization":
                # No schema of it is published; see below.
                assert path.name == "kustomization.yaml"
            else:
                check_core(manifest)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("entrypont", "python"),
        ("activeDeadlineSeconds", "43200"),
        ("submissionMode", "K8sMode"),
        ("rayClusterSpec.authOptions.mode", "tokens"),
        ("rayClusterSpec.enableIntreeAutoscaling", True),
        ("rayClusterSpec.workerGroupSpecs.0.maxReplica", 4),
        ("rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("rayClusterSpec.headGroupSpec.template.spec.terminationGracePeriod", 60),
        ("rayClusterSpec.workerGroupSpecs.1.template.spec.containers.0.resource", {}),
        ("rayClusterSpec.autoscalerOptions.securityContext.runAsUsr", 1000),
        ("submitterPodTemplate.spec.containers.0.imag", "carn-cpu"),
    ],
)
def test_a_typo_is_found(path: str, value: Any) -> None:
    manifest = copy.deepcopy(resources("RayJob")["carn-night"])
    place: Any = manifest["spec"]
    *parents, key = path.split(".")
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[key] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_ray(manifest)


def test_a_typo_in_the_schedule_is_found() -> None:
    schedule = copy.deepcopy(resources("CronJob")["carn-night"])
    schedule["spec"]["concurencyPolicy"] = schedule["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        check_core(schedule)


# --------------------------------------------------------------------------------- kustomizations


def folders() -> list[Path]:
    return sorted(path.parent for path in KUBERNETES.rglob("kustomization.yaml"))


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_a_folder_takes_up_all_that_is_in_it(folder: Path) -> None:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    generated = [
        name for each in kustomization.get("configMapGenerator", []) for name in each["files"]
    ]
    listed = {*kustomization["resources"], *generated, "kustomization.yaml"}
    there = {path.name for path in folder.iterdir() if path.is_file()}
    assert there <= listed
    for name in listed:
        assert (folder / name).exists(), name


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_kustomize_names_every_image(folder: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True
    )
    manifests = list(yaml.load_all(done.stdout, Loader=UniqueKeyLoader))
    for manifest in manifests:
        if manifest["kind"] == "Namespace":
            continue
        assert manifest["metadata"]["namespace"] == "carn"
        if manifest["apiVersion"] == "ray.io/v1":
            check_ray(manifest)
        else:
            check_core(manifest)
    images = set(re.findall(r"image: (\S+)", done.stdout))
    assert all(re.fullmatch(r"REPLACE_WITH_YOUR_REGISTRY/carn:\S+-(cpu|cuda)", i) for i in images)


def test_every_image_has_a_name_to_be_set() -> None:
    for folder in folders():
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        if "images" not in kustomization:
            assert folder.name == "base"
            continue
        named = {each["name"]: each for each in kustomization["images"]}
        assert set(named) == {"carn-cpu", "carn-cuda"}
        for name, each in named.items():
            assert each["newName"] == "REPLACE_WITH_YOUR_REGISTRY/carn"
            assert each["newTag"].endswith(name.removeprefix("carn"))
    for where, template in pod_templates():
        for container in template["spec"]["containers"]:
            wants_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"] == ("carn-cuda" if wants_gpu else "carn-cpu"), where


def test_tags_are_the_same_everywhere() -> None:
    texts = [path.read_text() for path in KUBERNETES.rglob("kustomization.yaml")]
    texts += [
        (ROOT / name).read_text() for name in ("cluster.yaml", "Dockerfile", "docs/cluster.md")
    ]
    tags = {tag for text in texts for tag in re.findall(r"(?:carn:|newTag: )([\w.]+)-c\w+", text)}
    assert len(tags) == 1


# ------------------------------------------------------------------------------------------ pods


def test_pods_have_no_rights() -> None:
    for where, template in pod_templates():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], where
        assert pod["securityContext"]["runAsUser"] == 1000, where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), where
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), where
        # The head's autoscaler and the night speak to Kubernetes; nobody else does.
        speaks = pod.get("automountServiceAccountToken", True)
        assert speaks == where.endswith((" head", " schedule")), where
    for name, cluster in cluster_specs().items():
        context = cluster["autoscalerOptions"]["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name


def test_no_secret_is_in_the_files() -> None:
    assert not resources("Secret")
    for path in (ROOT / "deploy").rglob("*"):
        if path.is_file():
            assert not re.search(r"AKIA[A-Z0-9]{12}|PRIVATE KEY|(?i:password:)", path.read_text())
    for _, template in pod_templates():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", []):
                assert not re.search("KEY|SECRET|TOKEN", variable["name"])


def test_the_night_may_only_look_at_rayjobs_and_make_one() -> None:
    role = resources("Role")["carn-night"]
    (rule,) = role["rules"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}
    (subject,) = resources("RoleBinding")["carn-night"]["subjects"]
    schedule = resources("CronJob")["carn-night"]["spec"]["jobTemplate"]["spec"]["template"]
    assert subject["name"] == schedule["spec"]["serviceAccountName"]
    assert not resources("ClusterRole")


def test_service_accounts_and_settings_are_there() -> None:
    accounts, settings = resources("ServiceAccount"), resources("ConfigMap")
    for where, template in pod_templates():
        pod = template["spec"]
        if "serviceAccountName" in pod:
            assert pod["serviceAccountName"] in accounts, where
        for container in pod["containers"]:
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    assert source["configMapRef"]["name"] in settings, where


def test_clusters_of_all_manifests_are_alike() -> None:
    """They differ in how many nodes there are, and in nothing else."""
    stripped = []
    for cluster in cluster_specs().values():
        each = copy.deepcopy(cluster)
        for group in each["workerGroupSpecs"]:
            for name in ("replicas", "minReplicas", "maxReplicas"):
                del group[name]
        stripped.append(each)
    assert all(each == stripped[0] for each in stripped)


def test_clusters_are_sound() -> None:
    (locked,) = re.findall(r"(?m)^ray==(.+)$", (ROOT / "requirements.lock").read_text())
    for name, cluster in cluster_specs().items():
        assert cluster["rayVersion"] == locked
        assert cluster["authOptions"] == {"mode": "token"}, name
        start = cluster["headGroupSpec"]["rayStartParams"]
        assert (start["num-cpus"], start["num-gpus"]) == ("0", "0")
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # What Ray stops in good order has to be over when Kubernetes loses patience.
        head = cluster["headGroupSpec"]["template"]["spec"]
        wait_s = int(resources("ConfigMap")["carn-settings"]["data"]["RAY_JOB_STOP_WAIT_TIME_S"])
        assert head["terminationGracePeriodSeconds"] > wait_s


def test_the_cache_fits_its_volume() -> None:
    settings = resources("ConfigMap")["carn-settings"]["data"]
    for name, cluster in cluster_specs().items():
        for group in cluster["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            mounted = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
            sizes = {each["name"]: _bytes(each["emptyDir"]["sizeLimit"]) for each in pod["volumes"]}
            assert "/tmp/ray" in mounted, name
            cache = sizes[mounted[settings["CARN_CACHE_DIR"]]]
            assert float(settings["CARN_CACHE_GB"]) * 1e9 < 0.9 * cache
            asked = _bytes(container["resources"]["requests"]["ephemeral-storage"])
            assert sum(sizes.values()) <= asked


def _bytes(text: str) -> int:
    return int(text.removesuffix("Gi")) * 2**30


def test_every_variable_is_one_that_something_reads() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "carn").rglob("*.py"))
    ours = set(re.findall(r'environ(?:\.get\(|\[)"(CARN_\w+)"', code))
    set_here = set(resources("ConfigMap")["carn-settings"]["data"])
    for _, template in pod_templates():
        for container in template["spec"]["containers"]:
            set_here |= {variable["name"] for variable in container.get("env", [])}
    assert {"CARN_CACHE_DIR", "CARN_CACHE_GB"} <= set_here
    assert set_here <= ours | KNOWN_VARIABLES
    cluster = (ROOT / "cluster.yaml").read_text()
    assert set(re.findall(r"-e (\w+)=", cluster)) <= ours | KNOWN_VARIABLES | {
        *("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    }


def test_ray_pods_are_reached_by_each_other() -> None:
    policy = resources("NetworkPolicy")["carn-ray"]["spec"]
    label = policy["podSelector"]["matchLabels"]
    for where, template in pod_templates():
        labels = template.get("metadata", {}).get("labels", {})
        assert (label.items() <= labels.items()) == (not where.endswith("schedule")), where


# ------------------------------------------------------------------------------------- the night


def test_the_night_is_over_before_its_patience_is() -> None:
    schedule = resources("CronJob")["carn-night"]["spec"]
    pattern = resources("RayJob")["carn-night"]["spec"]
    settings = resources("ConfigMap")["carn-settings"]["data"]
    assert schedule["timeZone"] == settings["TZ"]
    minute, hour = map(int, schedule["schedule"].split()[:2])
    begin = datetime(2026, 11, 25, hour, minute).astimezone()
    job = parse_command(pattern["entrypoint"])
    assert job.run.deadline is not None
    length = parse_deadline(job.run.deadline, now=begin) - begin
    patience = [
        timedelta(seconds=each)
        for each in (
            pattern["activeDeadlineSeconds"],
            schedule["jobTemplate"]["spec"]["activeDeadlineSeconds"],
        )
    ]
    # Nodes come before it; blocks at hand and reports after it.
    assert length + timedelta(hours=1) < patience[0] < patience[1] < timedelta(days=1)


def test_the_night_is_a_pattern_that_the_schedule_copies() -> None:
    schedule = resources("CronJob")["carn-night"]["spec"]
    pattern = resources("RayJob")["carn-night"]["spec"]
    assert schedule["concurrencyPolicy"] == "Forbid"
    assert pattern["suspend"] is True
    # Without it KubeRay refuses a suspended job.
    assert pattern["shutdownAfterJobFinishes"] is True
    (container,) = schedule["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    arguments = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert arguments["--pattern"] in resources("RayJob")
    # A RayJob's submitter is a Job of its name, which must not be the schedule's own.
    assert arguments["--name"] == "$(NIGHT)-run"


def test_the_night_asks_for_as_many_gpus_as_there_can_be() -> None:
    night = resources("RayJob")["carn-night"]["spec"]
    groups = {group["groupName"]: group for group in night["rayClusterSpec"]["workerGroupSpecs"]}
    job: SuperResolveJob = parse_command(night["entrypoint"])
    assert job.cluster.gpus_per_actor
    assert job.cluster.max_actors
    wanted = job.cluster.gpus_per_actor * job.cluster.max_actors
    assert wanted == groups["gpu"]["maxReplicas"]
    # Jobs look at the nodes that are there.
    assert groups["gpu"]["minReplicas"] >= 1
    # Two CPUs of each actor, and two readers for it, all on the node with its GPU.
    (container,) = groups["gpu"]["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["cpu"]) >= 4 / job.cluster.gpus_per_actor


def test_training_asks_for_the_gpus_that_are_there() -> None:
    train = resources("RayJob")["carn-train-x2"]["spec"]
    groups = {group["groupName"]: group for group in train["rayClusterSpec"]["workerGroupSpecs"]}
    job = parse_command(train["entrypoint"])
    assert job.workers.num_workers == groups["gpu"]["minReplicas"] == groups["gpu"]["maxReplicas"]
