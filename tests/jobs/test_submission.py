"""The job under `ray job submit`, on a head of its own, as a cluster runs it."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from carn import storage
from carn.bcsr.dataset import open_dataset
from tests.classification.lab import CROP_PX, write_labelled
from tests.conftest import Bucket
from tests.jobs.cluster_lab import free_ports
from tests.jobs.lab import ROOT, content_of
from tests.jobs.sr_lab import draw_inbox, write_model
from tests.jobs.train_lab import TINY, write_dataset

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray"), pytest.mark.slow]

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head with its dashboard on loopback; yields the environment of its clients."""
    gcs, dashboard, agent, client = free_ports(4)
    # Ray's sockets live below it, and their paths must stay short.
    folder = tmp_path_factory.mktemp("h")
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    # As in an activated virtual environment: `python` of the entry point is looked up at the head.
    # As in cluster.yaml: Ray kills a job 3 s after it was to stop.
    environment["RAY_JOB_STOP_WAIT_TIME_S"] = "120"
    environment["PATH"] = f"{Path(RAY).parent}{os.pathsep}{environment['PATH']}"
    # A node has its keys from a role; where the store is, the job says.
    environment.setdefault("AWS_ACCESS_KEY_ID", "testing")
    environment.setdefault("AWS_SECRET_ACCESS_KEY", secrets.token_hex(20))
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION"):
        environment.pop(name, None)
    temp_dir = f"/tmp/{folder.parent.name[-4:]}{gcs}"
    started = subprocess.run(
        [
            *(RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}"),
            *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--ray-client-server-port={client}", "--num-cpus=2", "--disable-usage-stats"),
            *("--include-dashboard=true", f"--temp-dir={temp_dir}"),
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
        "HEAD_LOGS": f"{temp_dir}/session_latest/logs",
    }
    # Only the processes of this head: `ray stop` would end the other tests' Ray, too.
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if any(str(gcs) in part for part in process.info["cmdline"] or []):
            process.kill()


def submit(
    head: dict[str, str],
    *arguments: object,
    job: str = "build_bcsr.py",
    options: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(RAY, "job", "submit", "--working-dir", ".", *options, "--"),
            *("python", f"jobs/{job}", *map(str, arguments)),
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


def test_every_job_is_submitted(head: dict[str, str], tmp_path: Path) -> None:
    """Each job from a laptop: what it leaves, what it says on the way, its exit status."""
    bcsr = write_dataset(tmp_path / "bcsr", num_tiles=(8, 3, 4))
    (tmp_path / "space.yaml").write_text(
        "settings: {steps: 8, validate_every: 4, validation_crop_px: 32}\n"
        "search: {reduction: [2, 8]}\n"
    )
    labelled = write_labelled(tmp_path / "labelled")
    draw_inbox(tmp_path / "inbox", num_slides=1)
    run = tmp_path / "run"
    searched = without(TINY, "--reduction", "--seed", "--log-every")
    pictures = ("--crop-px", CROP_PX, "--depth", 18, "--batch-size", 8, "--cpus-per-worker", 1)
    scored = ("--device", "cpu", "--no-timing", "--crops", 0)
    blocks = ("--block-px", 256, "--tile-px", 64, "--num-threads", 1)
    jobs: dict[str, tuple[tuple[object, ...], str, str]] = {
        "train.py": (("--dataset", bcsr, *TINY, "--steps", 8), "best.json", "update 8 of 8"),
        "tune.py": (
            ("--space", tmp_path / "space.yaml", "--dataset", bcsr, *searched),
            "best.yaml",
            "2 trials done",
        ),
        "super_resolve.py": (
            ("--slides", tmp_path / "inbox", "--checkpoint", run, "--device", "cpu", *blocks),
            "Case_1.tif",
            "6 of 6 blocks",
        ),
        "evaluate.py": (("--dataset", bcsr, "--runs", run, *scored), "table2.csv", "x2 bicubic"),
        "classify.py": (
            ("--dataset", labelled, "--models", run, "--epochs", 1, "--device", "cpu", *pictures),
            "table.csv",
            "accuracy",
        ),
    }
    for job, (arguments, left, said) in jobs.items():
        output = run if job == "train.py" else tmp_path / job
        done = submit(head, *arguments, "--output", output, job=job)
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        assert (output / left).exists(), text
        assert said in text
        # What cannot begin ends with another status than 0, and says why.
        refused = submit(head, *arguments, job=job)
        assert refused.returncode == 1
        assert "--output" in refused.stdout + refused.stderr


def test_every_job_from_and_to_object_storage(
    head: dict[str, str],
    slides: Path,
    s3: Bucket,
    s3_endpoint: str,
    tmp_path: Path,
) -> None:
    """The store is named by the job's runtime environment; the nodes' secret is told nowhere."""
    for path in slides.rglob("*.*"):
        s3.put(f"in/{path.relative_to(slides)}", path)
    bcsr, labelled = write_dataset(s3.uri("bcsr"), num_tiles=(8, 3, 4)), s3.uri("labelled")
    write_labelled(labelled)
    draw_inbox(tmp_path / "inbox", num_slides=1)
    s3.put("inbox/Case_1.tif", tmp_path / "inbox" / "Case_1.tif")
    s3.put(
        "space.yaml",
        b"settings: {steps: 8, validate_every: 4, validation_crop_px: 32}\n"
        b"search: {reduction: [2, 8]}\n",
    )
    run = s3.uri("train.py")
    places = {"AWS_ENDPOINT_URL": s3_endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    options = ("--runtime-env-json", json.dumps({"env_vars": places}))
    pictures = ("--crop-px", CROP_PX, "--depth", 18, "--batch-size", 8, "--cpus-per-worker", 1)
    jobs: dict[str, tuple[tuple[object, ...], str]] = {
        "build_bcsr.py": (
            (
                *("--slides", s3.uri("in/slides"), "--tile-px", 64, "--per-class", 50),
                *("--coordinates", s3.uri("in/tumor.txt"), s3.uri("in/normal.txt"), "--keep", 60),
                *("--num-test", 10, "--num-validation", 5),
            ),
            "manifest.json",
        ),
        "train.py": (("--dataset", bcsr, *TINY, "--steps", 8), "best.json"),
        "tune.py": (
            (
                *("--space", s3.uri("space.yaml"), "--dataset", bcsr),
                *without(TINY, "--reduction", "--seed", "--log-every"),
            ),
            "best.yaml",
        ),
        "super_resolve.py": (
            (
                *("--slides", s3.uri("inbox"), "--checkpoint", run, "--device", "cpu"),
                *("--block-px", 256, "--tile-px", 64, "--num-threads", 1),
            ),
            "Case_1.tif",
        ),
        "evaluate.py": (
            ("--dataset", bcsr, "--runs", run, "--device", "cpu", "--no-timing", "--crops", 0),
            "table2.csv",
        ),
        "classify.py": (
            ("--dataset", labelled, "--models", run, "--epochs", 1, "--device", "cpu", *pictures),
            "table.csv",
        ),
    }
    said = ""
    for job, (arguments, left) in jobs.items():
        done = submit(head, *arguments, "--output", s3.uri(job), job=job, options=options)
        said += done.stdout + done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        assert storage.is_file(s3.uri(f"{job}/{left}")), done.stdout + done.stderr
        # And what has to fail: there is no such bucket.
        failed = submit(
            head, *arguments, "--output", "s3://no-such-bucket-x/out", job=job, options=options
        )
        said += failed.stdout + failed.stderr
        assert failed.returncode == 1
        assert "no-such-bucket-x" in failed.stdout + failed.stderr
    secret = head["AWS_SECRET_ACCESS_KEY"].encode()
    texts = {str(path): path.read_bytes() for path in Path(head["HEAD_LOGS"]).rglob("*.*")}
    assert len(texts) > 20, "these are not the logs"
    texts |= {item.uri: storage.read_bytes(item.uri) for item in storage.list_objects(s3.uri())}
    texts["said"] = said.encode()
    assert not [name for name, text in texts.items() if secret in text]


def test_a_stopped_job_ends_in_good_order_and_goes_on(head: dict[str, str], tmp_path: Path) -> None:
    draw_inbox(tmp_path / "inbox", num_slides=3, width=900, height=700)
    write_model(str(tmp_path / "model"))
    output = tmp_path / "sr"
    arguments = [
        *("--slides", tmp_path / "inbox", "--checkpoint", tmp_path / "model", "--output", output),
        *("--block-px", 256, "--tile-px", 64, "--device", "cpu", "--num-threads", 1),
        *("--max-actors", 1),
    ]
    options = ("--submission-id", "night-1", "--no-wait")
    assert submit(head, *arguments, job="super_resolve.py", options=options).returncode == 0
    deadline = time.monotonic() + 200
    while not list(output.glob("_work/*/*/blocks/*.npz")):
        assert time.monotonic() < deadline
        time.sleep(0.1)

    def ask(*words: str) -> str:
        asked = subprocess.run(
            [RAY, "job", *words, "night-1"], env=head, capture_output=True, text=True, check=False
        )
        return asked.stdout + asked.stderr

    ask("stop")
    while "STOPPED" not in (status := ask("status")).upper():
        assert time.monotonic() < deadline, status
        time.sleep(0.5)
    log = ask("logs")
    assert "stopped: interrupted" in log, log
    claims = list((output / "_state" / "claims").glob("*.json"))
    assert claims
    assert all(json.loads(path.read_text())["is_released"] for path in claims)
    again = submit(head, *arguments, job="super_resolve.py")
    said = again.stdout + again.stderr
    assert again.returncode == 0, said
    assert "0 left" in said
    assert len(list(output.glob("Case_*.tif"))) == 3


def without(options: tuple[str, ...], *names: str) -> tuple[str, ...]:
    pairs = zip(options[::2], options[1::2], strict=True)
    return tuple(part for pair in pairs if pair[0] not in names for part in pair)
