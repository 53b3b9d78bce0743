"""One Ray for all tests of the jobs; they share an xdist group, so one process holds it."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from carn import storage
from jobs.build_bcsr import main
from tests.jobs.cluster_lab import Cluster
from tests.jobs.lab import draw_slide, make_job

# Loopback only: without this, tests would write a token file into the user's home.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    import ray

    from jobs.ray_stage import start_ray

    os.environ.pop("RAY_ADDRESS", None)
    start_ray()
    yield
    ray.shutdown()


def written(root: str) -> list[storage.ObjectStat]:
    """What a test has left, which is something."""
    found = storage.list_objects(root)
    assert found
    return found


@pytest.fixture
def ray_here_s3(ray_here: None, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """An empty bucket at an S3 server over HTTP that Ray's workers know of, too.

    In the end, the secret of its credentials is in no log and in nothing that was written.
    """
    import secrets
    import uuid

    import boto3
    import ray

    from jobs.ray_stage import start_ray

    given = os.environ.get("CARN_TEST_S3_ENDPOINT")
    server = None
    if given is None:
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        given = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": given,
        "AWS_ACCESS_KEY_ID": os.environ.get("AWS_ACCESS_KEY_ID", "test"),
        "AWS_SECRET_ACCESS_KEY": os.environ.get("AWS_SECRET_ACCESS_KEY", secrets.token_hex(20)),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        bucket = f"test-{uuid.uuid4().hex[:12]}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        # Workers take their environment from the Ray instance that starts them.
        ray.shutdown()
        start_ray()
        yield f"s3://{bucket}"
        logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
        ray.shutdown()
        texts = {str(path): path.read_bytes() for path in logs.rglob("*") if path.is_file()}
        assert len(texts) > 5, "these are not the logs"
        texts |= {item.uri: storage.read_bytes(item.uri) for item in written(f"s3://{bucket}")}
        texts["log"] = caplog.text.encode()
        secret = settings["AWS_SECRET_ACCESS_KEY"].encode()
        assert not [name for name, text in texts.items() if secret in text]
    start_ray()
    if server is not None:
        server.stop()


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides and an NCRF list of each class; some tiles are white, two centres coincide."""
    root = tmp_path_factory.mktemp("lab")
    (root / "slides").mkdir()
    rng = np.random.default_rng(0)
    lines: dict[str, list[str]] = {"tumor": [], "normal": []}
    for number in range(6):
        name = f"Case_{number:03d}"
        draw_slide(root / "slides" / f"{name}.tif", number)
        for label in lines:
            xy = np.stack([rng.integers(32, 608, 12), rng.integers(32, 480, 12)], axis=1)
            lines[label] += [f"{name},{x},{y}" for x, y in xy]
    for label, rows in lines.items():
        (root / f"{label}.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def built(slides: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """The dataset of an undisturbed run."""
    output = tmp_path_factory.mktemp("built") / "bcsr"
    assert main(make_job(slides, output)) == 0
    return output


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[list[Cluster]]:
    started: list[Cluster] = []
    yield started
    for cluster in started:
        cluster.stop()


@pytest.fixture(scope="module")
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No process of a job or a cluster outlives these tests."""
    yield
    mine = str(tmp_path_factory.getbasetemp())
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != psutil.Process().pid
        and any(mine in part for part in process.info["cmdline"] or [])
    ]
    for process in left:
        process.kill()
    assert not left
