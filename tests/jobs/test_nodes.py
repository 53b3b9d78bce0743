"""Every job on a cluster of three nodes, one of which is lost at each stage of it.

The result is that of an undisturbed run on one machine: the same bytes for datasets, slides and
tables. Training has such tests beside its others, in test_train_killed.py.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from jobs.build_bcsr import main as build
from tests.classification.lab import CROP_PX, write_labelled
from tests.classification.lab import write_model as write_small_model
from tests.evaluation.lab import write_run_folder
from tests.jobs.cluster_lab import Cluster, Network
from tests.jobs.lab import ROOT, content_of, make_job
from tests.jobs.sr_lab import draw_inbox, write_model
from tests.jobs.train_lab import TINY, environment_of, kill_tree, write_dataset

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.xdist_group("ray-slides"),
    pytest.mark.usefixtures("nothing_is_left"),
]

PATIENCE_S = 420.0


class Run:
    """A job of a cluster whose driver runs beside it."""

    def __init__(self, job: str, arguments: Sequence[object], *, cluster: Cluster, log: Path):
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*cluster.before, sys.executable, str(ROOT / "jobs" / job), *map(str, arguments)],
                env=environment_of(cluster.environment),
                cwd="/",
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert self.process.poll() is None, f"it ended too early:\n{self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def finish(self) -> None:
        try:
            assert self.process.wait(timeout=PATIENCE_S) == 0, self.said
        finally:
            kill_tree(self.process)


@pytest.fixture
def nodes(tmp_path: Path, clusters: list[Cluster]) -> Cluster:
    """A head that computes nothing, and two nodes of one CPU that do."""
    cluster = Cluster(tmp_path, num_cpus=0)
    clusters.append(cluster)
    cluster.workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    return cluster


@pytest.fixture
def hosts(tmp_path: Path, clusters: list[Cluster]) -> Cluster:
    """The same, each node a host of its own on a network."""
    if why := Network.why_not():
        pytest.skip(why)
    cluster = Cluster(tmp_path, num_cpus=0, network=Network())
    clusters.append(cluster)
    cluster.workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    return cluster


def lose(cluster: Cluster, *, with_process: str) -> None:
    """SIGKILL the node that is at work in a process of such a name, with all of its processes."""
    kill_tree(find(cluster, with_process))


def find(cluster: Cluster, name: str) -> "subprocess.Popen[bytes]":
    """The node that is at work in a process of such a name."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for node in cluster.workers:
            if node.poll() is None and _runs(node.pid, name):
                return node
        time.sleep(0.02)
    pytest.fail(f"no node runs {name}")


def _runs(pid: int, name: str) -> bool:
    for child in psutil.Process(pid).children(recursive=True):
        try:
            title = " ".join(child.cmdline())
            if name in title and "ray::IDLE" not in title:
                return True
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return False


# ----------------------------------------------------------------------------------- bcSR


@pytest.mark.parametrize("when", ["_work/measured/*.parquet", "tiles/*.parquet"])
def test_a_node_lost_while_a_dataset_is_built(
    slides: Path, tmp_path: Path, nodes: Cluster, ray_here: None, when: str
) -> None:
    expected = tmp_path / "expected"
    assert build(make_job(slides, expected)) == 0
    output = tmp_path / "out"
    arguments = [
        *("--slides", slides / "slides", "--output", output, "--per-class", "50"),
        *("--coordinates", slides / "tumor.txt", slides / "normal.txt"),
        *("--tile-px", "64", "--keep", "60", "--num-test", "10", "--num-validation", "5"),
        *("--tiles-per-shard", "16", "--tiles-per-task", "2"),
    ]
    run = Run("build_bcsr.py", arguments, cluster=nodes, log=tmp_path / "log")
    try:
        run.wait_for(lambda: list(output.glob(when)))
        lose(nodes, with_process="ray::")
    finally:
        run.finish()
    assert content_of(output) == content_of(expected)


# ------------------------------------------------------------------------- super-resolution


@pytest.mark.parametrize(
    ("when", "process"),
    [
        ("_work/*/*/cells.npz", "ray::"),
        ("_work/*/*/blocks/*.npz", "Upscaler"),
        ("_work/*/*/blocks/000014.npz", "ray::"),
    ],
    ids=["when it is inspected", "among its blocks", "at its last block"],
)
def test_a_node_lost_in_the_night(tmp_path: Path, nodes: Cluster, when: str, process: str) -> None:
    check_night(tmp_path, nodes, when=when, disturb=lambda: lose(nodes, with_process=process))


def test_a_node_cut_off_in_the_night(tmp_path: Path, hosts: Cluster) -> None:
    # Its processes go on for a while, and what they write is what the others write.
    check_night(
        tmp_path,
        hosts,
        when="_work/*/*/blocks/*.npz",
        disturb=lambda: hosts.cut(find(hosts, "Upscaler")),
    )


def test_a_head_lost_in_the_night(tmp_path: Path, clusters: list[Cluster]) -> None:
    # The job ends with it. On another cluster the same command goes on.
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        cluster = Cluster(tmp_path / name, num_cpus=0)
        clusters.append(cluster)
        cluster.workers = [cluster.add_node(num_cpus=1)]
    first, second = clusters
    check_night(
        tmp_path,
        first,
        when="_work/*/*/blocks/*.npz",
        disturb=lambda: kill_tree(first.head),
        cluster_after=second,
    )


def check_night(
    tmp_path: Path,
    cluster: Cluster,
    *,
    when: str,
    disturb: Callable[[], None],
    cluster_after: Cluster | None = None,
) -> None:
    """A night that is disturbed when such a file is there ends as one that is not.

    Where there is another cluster for it, the disturbance ends the job, which goes on there.
    """
    draw_inbox(tmp_path / "inbox", num_slides=2, width=600, height=300)
    write_model(str(tmp_path / "model"))

    def arguments(output: Path) -> list[object]:
        return [
            *("--slides", tmp_path / "inbox", "--checkpoint", tmp_path / "model"),
            *("--output", output, "--block-px", "256", "--tile-px", "64", "--progress-s", "0.5"),
            *("--device", "cpu", "--num-threads", "1", "--cpus-per-actor", "1"),
        ]

    output, expected = tmp_path / "sr", tmp_path / "expected"
    run = Run("super_resolve.py", arguments(output), cluster=cluster, log=tmp_path / "log")
    try:
        run.wait_for(lambda: list(output.glob(when)))
        disturb()
        if cluster_after is not None:
            assert run.process.wait(timeout=PATIENCE_S) != 0
            kept = {path: path.stat().st_mtime_ns for path in output.glob(when)}
            assert not list(output.glob("Case_*.tif"))
            cluster = cluster_after
            log = tmp_path / "log-after"
            run = Run("super_resolve.py", arguments(output), cluster=cluster, log=log)
            run.wait_for(lambda: len(list(output.glob(when))) > len(kept))
            assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    finally:
        run.finish()
    undisturbed = Run(
        "super_resolve.py", arguments(expected), cluster=cluster, log=tmp_path / "expected.log"
    )
    undisturbed.finish()
    for name in ("Case_1", "Case_2"):
        for end in (".tif", ".json", ".consistency.png"):
            assert (output / f"{name}{end}").read_bytes() == (
                expected / f"{name}{end}"
            ).read_bytes(), name + end
    assert not list((output / "_work").rglob("*.npz"))


# --------------------------------------------------------------------- sweeps and evaluation


def test_a_node_lost_in_a_sweep(tmp_path: Path, nodes: Cluster) -> None:
    import pyarrow.parquet as pq
    import yaml

    write_dataset(tmp_path / "bcsr", num_tiles=(8, 3, 1))
    space = {
        "settings": {"steps": 60, "validate_every": 10, "validation_crop_px": 32},
        "search": {"reduction": [2, 8]},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    options = [
        part
        for name, value in zip(TINY[::2], TINY[1::2], strict=True)
        if name not in ("--reduction", "--seed", "--log-every")
        for part in (name, value)
    ]

    def arguments(output: Path) -> list[object]:
        places = ("--space", tmp_path / "space.yaml", "--dataset", tmp_path / "bcsr")
        return [*places, "--output", output, *options]

    output, expected = tmp_path / "out", tmp_path / "expected"
    run = Run("tune.py", arguments(output), cluster=nodes, log=tmp_path / "log")
    try:
        run.wait_for(lambda: list(output.glob("trials/*/best.json")))
        lose(nodes, with_process="RayTrainWorker")
    finally:
        run.finish()
    Run("tune.py", arguments(expected), cluster=nodes, log=tmp_path / "other.log").finish()
    names = ["trial", "state", "step", "psnr_db", "ssim"]
    tables = [
        pq.read_table(folder / "trials.parquet").select(names) for folder in (output, expected)
    ]
    assert tables[0].sort_by("trial").equals(tables[1].sort_by("trial"))


def test_a_node_lost_in_an_evaluation(tmp_path: Path, nodes: Cluster) -> None:
    write_dataset(tmp_path / "bcsr", num_tiles=(4, 2, 60))
    for seed in (1, 7):
        write_run_folder(str(tmp_path / "runs" / f"seed{seed}"), best=7, last=7, seed=seed)

    def arguments(output: Path) -> list[object]:
        places = ("--dataset", tmp_path / "bcsr", "--runs", tmp_path / "runs", "--output", output)
        return [*places, "--device", "cpu", "--no-timing", "--crops", "0"]

    output, expected = tmp_path / "out", tmp_path / "expected"
    run = Run("evaluate.py", arguments(output), cluster=nodes, log=tmp_path / "log")
    try:
        run.wait_for(lambda: list(output.glob("scores/*.parquet")))
        lose(nodes, with_process="ray::")
    finally:
        run.finish()
    Run("evaluate.py", arguments(expected), cluster=nodes, log=tmp_path / "other.log").finish()
    for name in ("table2.csv", "significance.csv"):
        assert (output / name).read_bytes() == (expected / name).read_bytes()


def test_a_node_lost_in_a_classification(tmp_path: Path, nodes: Cluster) -> None:
    labelled = write_labelled(tmp_path / "bcsr")
    model = write_small_model(tmp_path / "carn")

    def arguments(output: Path) -> list[object]:
        return [
            *("--dataset", labelled, "--models", model, "--output", output, "--epochs", "4"),
            *("--crop-px", CROP_PX, "--depth", "18", "--batch-size", "8", "--device", "cpu"),
            *("--cpus-per-worker", "1"),
        ]

    output, expected = tmp_path / "out", tmp_path / "expected"
    run = Run("classify.py", arguments(output), cluster=nodes, log=tmp_path / "log")
    try:
        run.wait_for(lambda: list(output.rglob("*.safetensors")))
        lose(nodes, with_process="RayTrainWorker")
    finally:
        run.finish()
    Run("classify.py", arguments(expected), cluster=nodes, log=tmp_path / "other.log").finish()
    assert (output / "table.csv").read_bytes() == (expected / "table.csv").read_bytes()
