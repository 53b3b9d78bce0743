"""The nightly job under kills, failing storage and company: the same bytes, or nothing half-made.

Each test runs the job as a process of its own, with a Ray of its own.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from carn import storage, uploads
from tests.conftest import Bucket
from tests.faulty_s3 import run_proxy
from tests.jobs import sr_faults
from tests.jobs.lab import ROOT, draw_slide
from tests.jobs.sr_faults import Fault
from tests.jobs.sr_lab import write_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray-slides")]

# Large enough, without loss, that most blocks are parts of their own on a real object store.
BLOCKS = {"Case_1": 4, "Case_2": 6}
EXTENTS = {"Case_1": (1300, 1100), "Case_2": (2600, 1600)}
SLIDES = tuple(f"{name}.tif" for name in BLOCKS)
SETTINGS = (
    *("--block-px", "2048", "--tile-px", "256", "--compression", "lossless"),
    *("--device", "cpu", "--num-threads", "1", "--cpus-per-actor", "1", "--max-actors", "1"),
    *("--progress-s", "0.5"),
)
# A job over the lab takes some 20 s on an idle machine.
PATIENCE_S = 240.0


@dataclass(frozen=True)
class Lab:
    """Slides, a network, and what an undisturbed run makes of them, by name: SHA-256."""

    inbox: str
    model: str
    expected: dict[str, str]


class Job:
    """The job as a process; notes all it starts, and looks at the slides while it runs."""

    def __init__(
        self,
        lab: Lab,
        output: str,
        *more: str,
        folder: Path,
        faults: Sequence[Fault] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.output = output
        self.faults = folder
        self.expected = lab.expected
        settings = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        settings |= {"RAY_USAGE_STATS_ENABLED": "0", "AWS_EC2_METADATA_DISABLED": "true"}
        settings |= sr_faults.prepare(folder, faults) | (environment or {})
        settings.pop("RAY_ADDRESS", None)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, str(ROOT / "jobs" / "super_resolve.py")),
                    *("--slides", lab.inbox, "--checkpoint", lab.model, "--output", output),
                    *(*SETTINGS, *more),
                ],
                env=settings,
                cwd="/",
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.wrong: list[str] = []
        self._children: set[psutil.Process] = set()
        self._seen: dict[str, object] = {}
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, *, timeout_s: float = PATIENCE_S) -> int:
        """The exit status; every process it started is gone, and no slide was seen half-made."""
        try:
            status = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s} s:\n{self.said}")
        finally:
            self.end()
        assert not self.wrong, self.wrong
        return status

    def end(self) -> None:
        """Kill what is left, of this job alone."""
        if self.process.poll() is None:
            self._note_children()
            self.process.kill()
            self.process.wait()
        # Ray's workers end with their driver, its agents half a minute later.
        deadline = time.monotonic() + 10
        while any(map(is_at_work, list(self._children))) and time.monotonic() < deadline:
            time.sleep(0.1)
        for child in filter(is_at_work, list(self._children)):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._is_over.set()
        self._watcher.join()

    def wait_for(self, index: int = 0) -> None:
        """Until a fault has struck."""
        deadline = time.monotonic() + PATIENCE_S
        while not sr_faults.count(self.faults, index):
            assert self.process.poll() is None, f"it ended too early:\n{self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def _watch(self) -> None:
        while not self._is_over.wait(0.2):
            self._note_children()
            self._look()
        self._look()

    def _note_children(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self._children.update(psutil.Process(self.process.pid).children(recursive=True))

    def _look(self) -> None:
        for name in SLIDES:
            uri = storage.join(self.output, name)
            try:
                found = storage.stat(uri)
                tag = found.etag or (found.size, Path(uri).stat().st_mtime_ns)
                if self._seen.get(name) == tag:
                    continue
                content = storage.read_bytes(uri)
            except (storage.MissingObjectError, FileNotFoundError):
                continue
            self._seen[name] = tag
            if hashlib.sha256(content).hexdigest() != self.expected.get(name):
                self.wrong.append(f"{name} was seen with {len(content)} bytes that are not its own")


def is_at_work(process: psutil.Process) -> bool:
    """Whether it runs; one that ended may stay a zombie where nobody asks how."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("lab")
    (root / "inbox").mkdir()
    for seed, (name, (width, height)) in enumerate(EXTENTS.items()):
        draw_slide(root / "inbox" / f"{name}.tif", seed, width=width, height=height)
    write_model(str(root / "model"))
    return with_expected(Lab(str(root / "inbox"), str(root / "model"), {}), root)


def with_expected(lab: Lab, root: Path, environment: dict[str, str] | None = None) -> Lab:
    output = root / "expected"
    job = Job(lab, str(output), folder=root / "undisturbed", environment=environment)
    status = job.process.wait(timeout=PATIENCE_S)
    job.end()
    assert status == 0, job.said
    found = Lab(lab.inbox, lab.model, made(str(output)))
    assert set(SLIDES) <= found.expected.keys()
    return found


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "sr")


def made(output: str) -> dict[str, str]:
    """SHA-256 of what lies directly below an output: slides, notes, maps."""
    return {
        storage.name_of(item.uri): hashlib.sha256(storage.read_bytes(item.uri)).hexdigest()
        for item in storage.list_objects(output)
        if "/" not in item.uri.removeprefix(output + "/")
    }


def last_summary(output: str) -> dict[str, Any]:
    found = [item.uri for item in storage.list_objects(f"{output}/runs")]
    newest = max(uri for uri in found if uri.endswith("/summary.json"))
    content: dict[str, Any] = json.loads(storage.read_bytes(newest))
    return content


def slides_of(output: str) -> dict[str, dict[str, Any]]:
    return {slide["name"]: slide for slide in last_summary(output)["slides"]}


def statuses(output: str) -> dict[str, str]:
    return {name: slide["status"] for name, slide in slides_of(output).items()}


def records(output: str, name: str) -> list[str]:
    """The recorded blocks of an unfinished slide."""
    found = [item.uri for item in storage.list_objects(f"{output}/_work/{name}")]
    return [uri for uri in found if "/blocks/" in uri]


def check_whole(output: str, lab: Lab) -> None:
    """All is there, to the byte, and nothing else is left."""
    assert made(output) == lab.expected
    assert not storage.list_objects(f"{output}/_work")
    assert not uploads.list_uploads(output)
    if not storage.is_s3(output):
        hidden = [*Path(output).glob(".*"), *Path(output, "_work").rglob(".*")]
        assert not hidden, "a killed process's files stay for ever"


def run(job: Job, *, expect: int = 0) -> None:
    assert job.wait() == expect, job.said


# ------------------------------------------------------------------------------ killed workers

WORKER_KILLS = {
    "inspecting": [Fault(function="carn.upscaling.work:inspect", when="after")],
    "calibrating": [Fault(function="carn.upscaling.calibration:calibrate", when="after")],
    "reading": [Fault(function="carn.upscaling.blocks:read_block", skip=1)],
    "inferring": [Fault(function="carn.upscaling.blocks:upscale_block", when="after", skip=2)],
    "encoding": [Fault(function="carn.slides.encoding:encode_block", when="after", skip=3)],
    "uploading": [
        Fault(function="carn.storage:write_durably", when="half", said="*.carn-upload/*", skip=1),
        Fault(function="carn.storage:write_durably", when="half", said="*/payloads/*", skip=1),
    ],
    "between upload and record": [
        Fault(function="carn.slides.slide_output:SlideOutput._write_record", skip=3)
    ],
    "finishing": [
        Fault(function="carn.slides.tiff_output:TiffOutput._put_rest", when="after"),
        Fault(function="carn.uploads:_append", when="after", skip=1),
        Fault(function="carn.uploads:complete", when="after"),
        Fault(function="carn.upscaling.outbox:mark_done", said="Case_2"),
    ],
    "tidying up": [
        Fault(function="carn.upscaling.outbox:mark_done", when="after", said="Case_1"),
        Fault(
            function="carn.slides.slide_output:SlideOutput._delete", when="after", said="*Case_2*"
        ),
    ],
}


@pytest.mark.parametrize("stage", WORKER_KILLS)
def test_a_killed_worker_changes_nothing(lab: Lab, out: str, tmp_path: Path, stage: str) -> None:
    faults = WORKER_KILLS[stage]
    job = Job(lab, out, folder=tmp_path / "run", faults=faults)
    run(job)
    assert [sr_faults.count(tmp_path / "run", index) for index in range(len(faults))] == [1] * len(
        faults
    )
    assert statuses(out) == dict.fromkeys(BLOCKS, "done")
    check_whole(out, lab)


@pytest.mark.parametrize("pipeline", ["fused", "split"])
def test_a_block_that_always_kills_its_process_fails_its_slide_alone(
    lab: Lab, out: str, tmp_path: Path, pipeline: str
) -> None:
    poison = {
        "fused": Fault(
            function="carn.upscaling.work:BlockMaker.begin_block", said="Case_1 1", times=99
        ),
        "split": Fault(function="carn.upscaling.work:BlockMaker.read", said="Case_1 1", times=99),
    }
    job = Job(lab, out, "--pipeline", pipeline, folder=tmp_path / "run", faults=[poison[pipeline]])
    run(job, expect=1)
    assert sr_faults.count(tmp_path / "run") == 3
    found = slides_of(out)
    assert found["Case_1"]["status"] == "failed"
    assert "took the process down 3 times" in found["Case_1"]["reason"]
    assert found["Case_2"]["status"] == "done"
    assert made(out) == {name: lab.expected[name] for name in lab.expected if "Case_2" in name}
    run(Job(lab, out, folder=tmp_path / "again"))
    assert slides_of(out)["Case_1"]["num_blocks_resumed"] >= 1
    check_whole(out, lab)


# ------------------------------------------------------------------------------- killed drivers

DRIVER_KILLS = {
    "between blocks": Fault(function="jobs.sr_night:Night._take", skip=3),
    "before a slide is finished": Fault(function="jobs.sr_night:Night._begin_finishing"),
    "before the commit": Fault(function="carn.uploads:complete", do="power_cut"),
    "amid the commit": Fault(function="carn.uploads:_append", when="after", skip=1, do="power_cut"),
    "after the commit": Fault(function="carn.uploads:complete", when="after", do="power_cut"),
    "before the note": Fault(function="carn.upscaling.outbox:mark_done", do="power_cut"),
    "after the note": Fault(
        function="carn.upscaling.outbox:mark_done", when="after", do="power_cut"
    ),
    "amid tidying up": Fault(
        function="carn.slides.slide_output:SlideOutput._delete", when="after", do="power_cut"
    ),
    "writing the report": Fault(
        function="carn.storage:write_durably", when="half", said="*summary.json*"
    ),
}


@pytest.mark.parametrize("moment", DRIVER_KILLS)
def test_a_killed_driver_and_the_same_command_again(
    lab: Lab, out: str, tmp_path: Path, moment: str
) -> None:
    killed = Job(lab, out, folder=tmp_path / "killed", faults=[DRIVER_KILLS[moment]])
    assert killed.wait() == -9, killed.said
    assert sr_faults.count(tmp_path / "killed") == 1
    assert not [item for item in storage.list_objects(out) if item.uri.endswith("summary.json")]
    there = made(out)
    kept = {name: len(records(out, name)) for name in BLOCKS}
    assert kept["Case_1"] >= 3 or "Case_1.tif" in there
    run(Job(lab, out, folder=tmp_path / "again"))
    found = slides_of(out)
    for name, num_blocks in BLOCKS.items():
        if f"{name}.tif" in there:
            # What is whole was either finished in every way, or only lacked the note of it.
            assert found[name]["status"] in ("skipped", "done")
            assert found[name]["num_blocks_resumed"] in (0, num_blocks)
            continue
        assert found[name]["status"] == "done"
        assert found[name]["num_blocks_resumed"] == kept[name] <= num_blocks
    check_whole(out, lab)


# ------------------------------------------------------------------------------- object storage


@pytest.fixture(scope="module")
def remote_lab(
    lab: Lab, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    """The lab with its slides on an object store: they are named by their ETags there."""
    bucket = Bucket(name=f"carn-inbox-{uuid.uuid4().hex[:12]}", client=client_of(s3_endpoint))
    bucket.client.create_bucket(Bucket=bucket.name)
    for name in SLIDES:
        bucket.put(f"inbox/{name}", Path(lab.inbox, name))
    remote = Lab(bucket.uri("inbox"), lab.model, {})
    yield with_expected(remote, tmp_path_factory.mktemp("remote"), settings_of(s3_endpoint))
    for key in bucket.list_keys():
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    bucket.client.delete_bucket(Bucket=bucket.name)


def client_of(endpoint: str) -> Any:
    import boto3

    names = settings_of(endpoint)
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=names["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=names["AWS_SECRET_ACCESS_KEY"],
    )


def settings_of(endpoint: str) -> dict[str, str]:
    is_real = "CARN_TEST_S3_ENDPOINT" in os.environ
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    keys = {name: os.environ[name] if is_real else "testing" for name in names}
    return keys | {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}


def test_a_store_that_is_busy_and_drops_connections(
    remote_lab: Lab, s3: Bucket, s3_endpoint: str, tmp_path: Path
) -> None:
    out = s3.uri("sr")
    with run_proxy(s3_endpoint) as (endpoint, faults):
        # No more for one request than it is sent again; the input is read through the proxy, too.
        for operation, target in (
            *(("UploadPart", rf"partNumber={number}\b") for number in (1, 2, 3)),
            *(("CreateMultipartUpload", name) for name in SLIDES),
            *(("GetObject", name) for name in SLIDES),
            *(("PutObject", name) for name in (r"begun", r"cells\.npz", r"blocks/0", r"\.json")),
        ):
            for kind in ("refuse_after", "reset", "lose_answer", "cut_answer"):
                faults.add(kind, operation, target=target)
        faults.add("cut_upload", "UploadPart", times=2)
        faults.add("refuse", "HeadObject|ListObjects|ListParts", times=4)
        for name, kinds in zip(
            SLIDES,
            (("refuse", "lose_answer"), ("error_in_200", "refuse_after", "cut_answer")),
            strict=True,
        ):
            for kind in kinds:
                faults.add(kind, "CompleteMultipartUpload", target=name)
        # All else is slow now and then.
        faults.add("delay", ".*", times=20, delay_s=3.0)
        run(Job(remote_lab, out, folder=tmp_path / "run", environment=settings_of(endpoint)))
        assert not [rule for rule in faults.rules if rule.times], "some faults never struck"
    assert statuses(out) == dict.fromkeys(BLOCKS, "done")
    for upload in uploads.list_uploads(out):
        # One whose beginning was not answered.
        assert not uploads.list_parts(upload.uri, upload.upload_id)
    # A later run removes it, though it has nothing else to do.
    settings = settings_of(s3_endpoint)
    job = Job(
        *(remote_lab, out, "--abandon-days", "1e-6"),
        folder=tmp_path / "again",
        environment=settings,
    )
    run(job)
    assert statuses(out) == dict.fromkeys(BLOCKS, "skipped")
    check_whole(out, remote_lab)


@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
def test_a_slide_that_cannot_be_stored_fails_alone_and_is_completed_later(
    remote_lab: Lab, s3: Bucket, s3_endpoint: str, tmp_path: Path, operation: str
) -> None:
    out = s3.uri("sr")
    with run_proxy(s3_endpoint) as (endpoint, faults):
        faults.add("refuse", operation, target="Case_2.tif", times=10**6)
        job = Job(remote_lab, out, folder=tmp_path / "run", environment=settings_of(endpoint))
        run(job, expect=1)
    found = slides_of(out)
    assert found["Case_1"]["status"] == "done"
    assert found["Case_2"]["status"] == "failed"
    assert "SlowDown" in found["Case_2"]["reason"]
    assert "Case_2.tif" not in made(out)
    kept = len(records(out, "Case_2"))
    run(Job(remote_lab, out, folder=tmp_path / "again", environment=settings_of(s3_endpoint)))
    assert slides_of(out)["Case_2"]["num_blocks_resumed"] == kept
    assert slides_of(out)["Case_1"]["status"] == "skipped"
    check_whole(out, remote_lab)


def test_a_store_that_goes_down_for_good(
    remote_lab: Lab, s3: Bucket, s3_endpoint: str, tmp_path: Path
) -> None:
    out = s3.uri("sr")
    waiting = Fault(
        function="carn.slides.slide_output:SlideOutput._write_record", do="wait", skip=2
    )
    with run_proxy(s3_endpoint) as (endpoint, faults):
        settings = settings_of(endpoint)
        job = Job(
            remote_lab,
            out,
            *("--outage-minutes", "0"),
            folder=tmp_path / "run",
            faults=[waiting],
            environment=settings,
        )
        job.wait_for()
        faults.add("drop", times=10**9)
        sr_faults.go(tmp_path / "run")
        # Each request is given up after some 16 s; slides and claims wait for a few of them.
        assert job.wait(timeout_s=2 * PATIENCE_S) in (1, 2), job.said
    tail = "\n".join(job.said.strip().splitlines()[-6:])
    assert "the object store cannot be reached" in tail, tail
    assert "Traceback" not in job.said
    assert not set(SLIDES) & made(out).keys()
    # It is down when a run begins, too.
    job = Job(remote_lab, out, folder=tmp_path / "down", environment=settings)
    assert job.wait() == 2, job.said
    assert "Traceback" not in job.said
    run(Job(remote_lab, out, folder=tmp_path / "again", environment=settings_of(s3_endpoint)))
    assert slides_of(out)["Case_1"]["num_blocks_resumed"] >= 2
    check_whole(out, remote_lab)


def test_an_outage_of_a_minute_costs_no_slide(
    remote_lab: Lab, s3: Bucket, s3_endpoint: str, tmp_path: Path
) -> None:
    out = s3.uri("sr")
    waiting = Fault(
        function="carn.slides.slide_output:SlideOutput._write_record", do="wait", skip=2
    )
    with run_proxy(s3_endpoint) as (endpoint, faults):
        settings = settings_of(endpoint)
        job = Job(remote_lab, out, folder=tmp_path / "run", faults=[waiting], environment=settings)
        job.wait_for()
        faults.add("drop", times=10**9)
        sr_faults.go(tmp_path / "run")
        deadline = time.monotonic() + PATIENCE_S
        while "waiting for the output to come back" not in job.said:
            assert job.process.poll() is None, job.said
            assert time.monotonic() < deadline, job.said
            time.sleep(0.5)
        faults.rules.clear()
        run(job)
    assert statuses(out) == dict.fromkeys(BLOCKS, "done")
    check_whole(out, remote_lab)


def test_two_jobs_at_once_make_each_slide_once(
    remote_lab: Lab, s3: Bucket, s3_endpoint: str, tmp_path: Path
) -> None:
    out = s3.uri("sr")
    with run_proxy(s3_endpoint) as (endpoint, faults):
        settings = settings_of(endpoint)
        jobs = [
            Job(remote_lab, out, folder=tmp_path / name, environment=settings)
            for name in ("one", "two")
        ]
        assert [job.wait() for job in jobs] == [0, 0], [job.said for job in jobs]
        assert faults.counts["CreateMultipartUpload"] == len(SLIDES)
        assert faults.counts["CompleteMultipartUpload"] == len(SLIDES)
    found = [json.loads(s3.get(key)) for key in s3.list_keys() if key.endswith("summary.json")]
    assert len(found) == 2
    by_slide = [
        sorted(slide["status"] for run in found for slide in run["slides"] if slide["name"] == name)
        for name in BLOCKS
    ]
    for both in by_slide:
        assert both in (["claimed", "done"], ["done", "skipped"])
    check_whole(out, remote_lab)


# --------------------------------------------------------------- what happens behind its back


@contextmanager
def held(job: Job) -> Iterator[None]:
    """What is done while the job waits at its fault."""
    try:
        job.wait_for()
        yield
    except BaseException:
        job.end()
        raise
    finally:
        sr_faults.go(job.faults)


TAMPERED_WHEN = {
    "among blocks": Fault(
        function="carn.slides.slide_output:SlideOutput._write_record", do="wait", skip=6
    ),
    "before it is finished": Fault(
        function="carn.upscaling.finish:finish", do="wait", said="Case_2*"
    ),
    "before the commit": Fault(function="carn.uploads:complete", do="wait", said="*Case_2*"),
}


# A small block is there for certain when all are, and joined with others at the commit.
TAMPERED = [
    *((what, when) for what in ("upload aborted", "part overwritten") for when in TAMPERED_WHEN),
    ("payload overwritten", "before it is finished"),
]


@pytest.mark.parametrize(("what", "moment"), TAMPERED)
def test_what_storage_lost_is_made_again(
    remote_lab: Lab, s3: Bucket, s3_endpoint: str, tmp_path: Path, moment: str, what: str
) -> None:
    out = s3.uri("sr")
    settings = settings_of(s3_endpoint)
    faults = [TAMPERED_WHEN[moment]]
    job = Job(remote_lab, out, folder=tmp_path / "run", faults=faults, environment=settings)
    with held(job):
        (upload,) = [item for item in uploads.list_uploads(out) if "Case_2" in item.uri]
        if what == "upload aborted":
            uploads.abort(upload.uri, upload.upload_id)
        elif what == "part overwritten":
            parts = uploads.list_parts(upload.uri, upload.upload_id)
            number = min(number for number in parts if number > 1)
            uploads.put_part(upload.uri, upload.upload_id, number, b"x" * parts[number].size)
        else:
            names = [item.uri for item in storage.list_objects(f"{out}/_work/Case_2")]
            payload = next(uri for uri in names if "/payloads/" in uri)
            storage.write_bytes(payload, b"x" * storage.stat(payload).size)
    run(job)
    assert statuses(out) == dict.fromkeys(BLOCKS, "done")
    check_whole(out, remote_lab)


# ------------------------------------------------------------------------------------ full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of which one slide of the lab fills nearly half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() or mount is None:
        pytest.skip("only root can mount a file system")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=50m", "none", folder], check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up(lab: Lab, small_disk: Path, tmp_path: Path) -> None:
    out = str(small_disk / "sr")
    job = Job(lab, out, folder=tmp_path / "run")
    run(job, expect=1)
    # Whether there is room for the report, or for joining the first slide while the parts of the
    # second fill the disk, is chance; what failed is said in any case.
    assert re.search("failed   Case_2: .*No space left on device", job.said), job.said
    assert made(out).get("Case_1.tif") in (None, lab.expected["Case_1.tif"])
    assert "Case_2.tif" not in made(out)
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    run(Job(lab, out, folder=tmp_path / "again"))
    assert slides_of(out)["Case_1"]["status"] in ("skipped", "done")
    assert slides_of(out)["Case_2"]["num_blocks_resumed"] >= 1
    check_whole(out, lab)
