"""The job under `ray job submit`, on a head of its own, as a cluster runs it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from carn.bcsr.dataset import open_dataset
from tests.jobs.lab import ROOT, content_of

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head with its dashboard on loopback; yields the environment of its clients."""
    gcs, dashboard, agent, client = free_ports(4)
    # Ray's sockets live below it, and their paths must stay short.
    folder = tmp_path_factory.mktemp("h")
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    # As in an activated virtual environment: `python` of the entry point is looked up at the head.
    environment["PATH"] = f"{Path(RAY).parent}{os.pathsep}{environment['PATH']}"
    started = subprocess.run(
        [
            *(RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--ray-client-server-port={client}", "--num-cpus=2", "--disable-usage-stats"),
            *("--include-dashboard=true", f"--temp-dir=/tmp/{folder.parent.name[-4:]}{gcs}"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    yield environment | {
        "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "HEAD_GCS": f"127.0.0.1:{gcs}",
    }
    # Only the processes of this head: `ray stop` would end the other tests' Ray, too.
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if any(str(gcs) in part for part in process.info["cmdline"] or []):
            process.kill()


def submit(head: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(RAY, "job", "submit", "--working-dir", ".", "--"),
            *("python", "jobs/build_bcsr.py", *arguments),
        ],
        cwd=ROOT,
        env=head,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_submitted_job_builds_the_dataset(
    head: dict[str, str], slides: Path, tmp_path: Path
) -> None:
    arguments = [
        *("--slides", str(slides / "slides"), "--tile-px", "64", "--per-class", "50"),
        *("--coordinates", str(slides / "tumor.txt"), str(slides / "normal.txt")),
        *("--keep", "60", "--num-test", "10", "--num-validation", "5", "--tiles-per-shard", "16"),
    ]
    done = submit(head, *arguments, "--output", str(tmp_path / "out"), "--progress-s", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    # The log a person follows: what was drawn, how far it is, where the report lies.
    assert "drawn: 50 tumor tiles" in done.stdout + done.stderr
    assert "measuring: " in done.stdout + done.stderr
    assert "report.html" in done.stdout
    dataset = open_dataset(tmp_path / "out")
    assert sum(dataset.manifest["splits"].values()) == 60

    # Failures end it with another status, and the dataset is there all the same.
    (slides / "slides" / "Case_000.tif").rename(tmp_path / "away.tif")
    try:
        failing = submit(head, *arguments, "--output", str(tmp_path / "failing"))
    finally:
        (tmp_path / "away.tif").rename(slides / "slides" / "Case_000.tif")
    assert failing.returncode == 1
    assert "Case_000" in failing.stdout + failing.stderr
    assert pq.read_table(tmp_path / "failing" / "failures.parquet").num_rows == 1
    assert content_of(tmp_path / "failing")["manifest.json"]
