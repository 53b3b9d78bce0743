"""Training goes on through lost workers, drivers and nodes, and ends where it would have ended."""

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from carn.training.config import (
    NetworkConfig,
    OptimizerConfig,
    PatchConfig,
    TrainConfig,
    ValidationConfig,
)
from carn.training.engine import EngineConfig
from carn.training.loop import train
from tests.jobs.cluster_lab import Cluster
from tests.jobs.lab import ROOT
from tests.jobs.train_lab import (
    TINY,
    environment_of,
    finish,
    has_checkpoint,
    kill_tree,
    metrics_rows,
    start_job,
    steps_of,
    train_workers,
    wait_for,
    weights_distance,
    weights_hash,
    write_dataset,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.usefixtures("nothing_is_left"),
]

STEPS = 400
EVERY = 40
LONG = ("--steps", str(STEPS), "--validate-every", "200", "--checkpoint-every", str(EVERY))
# Of a weight, when the number of workers changed on the way: sums were rounded in another order,
# and Adam's steps (of 1e-3 at the most) made more of it.
WORKERS_TOLERANCE = 1e-2
TWO = ("--num-workers", "2", "--cpus-per-worker", "1")
ONE = ("--num-workers", "1", "--cpus-per-worker", "1")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("lab") / "bcsr")


@pytest.fixture(scope="module")
def undisturbed(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by the loop alone, in one piece."""
    output = tmp_path_factory.mktemp("undisturbed")
    config = TrainConfig(
        network=NetworkConfig(scale=2, num_blocks=1, channels=16, reduction=4),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        patches=PatchConfig(batch_size=4, patch_px=32),
        validation=ValidationConfig(validate_every=200),
        steps=STEPS,
        seed=7,
    )
    engine = EngineConfig(device="cpu", num_threads=1, log_every=2, checkpoint_every=EVERY)
    threads = torch.get_num_threads()
    train(config, dataset_uri=dataset, output=str(output), engine=engine)
    torch.set_num_threads(threads)
    return output


def check_same(output: Path, undisturbed: Path) -> None:
    """To the last bit, and each row of metrics once."""
    assert steps_of(output) == steps_of(undisturbed)
    for name in ("last", "best"):
        assert weights_hash(output, name=name) == weights_hash(undisturbed, name=name)
    losses = [[row["loss"] for row in metrics_rows(folder)] for folder in (output, undisturbed)]
    assert losses[0] == losses[1]


def check_close(output: Path, undisturbed: Path) -> None:
    """But for roundings, and each row of metrics once."""
    assert steps_of(output) == steps_of(undisturbed)
    assert weights_distance(output, undisturbed) < WORKERS_TOLERANCE
    for row, other in zip(metrics_rows(output), metrics_rows(undisturbed), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=0.01), row["step"]


def began_at(log: Path) -> list[int]:
    """The updates that the run was begun and taken up again at, as its log says."""
    found = re.findall(r"training from update ([\d,]+) to", log.read_text())
    return [int(number.replace(",", "")) for number in found]


# --------------------------------------------------------------------------- on one machine


@pytest.mark.parametrize(
    "workers", [ONE, (*TWO, "--min-workers", "2")], ids=["one worker", "two workers"]
)
def test_a_killed_worker(
    dataset: str, undisturbed: Path, tmp_path: Path, workers: tuple[str, ...]
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    process = start_job(dataset, output, *LONG, *workers, log=log)
    try:
        wait_for(lambda: has_checkpoint(output, 2 * EVERY), process, log=log)
        found = train_workers([process.pid])
        assert found, "no worker was found to kill"
        found[-1].kill()
    finally:
        finish(process, log=log)
    begun = began_at(log)
    assert begun[0] == 0
    assert len(begun) == 2, "the kill was not noticed"
    assert 2 * EVERY <= begun[1] < STEPS
    assert begun[1] % EVERY == 0
    check = check_same if workers == ONE else check_close
    check(output, undisturbed)


def test_a_killed_driver_and_the_same_command_again(
    dataset: str, undisturbed: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    orphans: list[psutil.Process] = []
    for kill_after in (EVERY, 4 * EVERY):
        process = start_job(dataset, output, *LONG, *ONE, log=log)
        try:
            wait_for(lambda step=kill_after: has_checkpoint(output, step), process, log=log)
            orphans += psutil.Process(process.pid).children(recursive=True)
            # The driver alone: what it started finds out by itself, while the next one begins.
            process.kill()
        finally:
            process.wait()
    assert not has_checkpoint(output, STEPS), "the run was over before it could be killed"
    finish(start_job(dataset, output, *LONG, *ONE, log=log), log=log)
    _, left = psutil.wait_procs(orphans, timeout=30)
    for orphan in left:
        orphan.kill()
    assert not left, "processes of the killed drivers were still there"
    assert len(began_at(log)) == 3
    assert began_at(log)[0] == 0
    assert began_at(log)[2] >= 4 * EVERY
    check_same(output, undisturbed)
    # What was left of the killed starts is gone.
    assert not (output / "_ray").exists()


# -------------------------------------------------------------------------------- on a cluster


@pytest.mark.parametrize("workers", [ONE, TWO], ids=["one worker", "two workers"])
def test_a_killed_node(
    dataset: str,
    undisturbed: Path,
    tmp_path: Path,
    clusters: list[Cluster],
    workers: tuple[str, ...],
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    # The driver's node has no CPU to train on, so that workers lie on those that may go.
    clusters.append(cluster := Cluster(tmp_path, num_cpus=0))
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    process = start_job(dataset, output, *LONG, *workers, log=log, cluster=cluster.environment)
    try:
        wait_for(lambda: has_checkpoint(output, 2 * EVERY), process, log=log)
        (node, *others) = [node for node in nodes if train_workers([node.pid])]
        assert len(others) == (0 if workers == ONE else 1)
        kill_tree(node)
    finally:
        finish(process, log=log, timeout_s=400)
    assert began_at(log)[0] == 0
    assert 2 * EVERY <= began_at(log)[-1] < STEPS
    counts = re.findall(r"on (\d) worker", log.read_text())
    assert (counts[0], counts[-1]) == (("1", "1") if workers == ONE else ("2", "1"))
    check = check_same if workers == ONE else check_close
    check(output, undisturbed)


def test_a_submitted_job(
    dataset: str, undisturbed: Path, tmp_path: Path, clusters: list[Cluster]
) -> None:
    clusters.append(cluster := Cluster(tmp_path, num_cpus=2))

    def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "job", "submit", "--working-dir", ".", "--", "python", "jobs/train.py"]
        return subprocess.run(
            [*command, "--dataset", dataset, *TINY, *LONG, *arguments],
            cwd=ROOT,
            env=environment_of(cluster.environment | cluster.dashboard),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    done = submit("--output", str(tmp_path / "run"), *ONE)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    # The log a person follows: where it began, how far it is, where the report lies.
    assert f"training from update 0 to {STEPS} on 1 worker" in said
    assert f"update {STEPS} of {STEPS}: loss " in said
    assert "report.html" in said
    check_same(tmp_path / "run", undisturbed)

    # The folder that the job starts in is thrown away: a run may not be kept there.
    refused = submit()
    assert refused.returncode == 1
    assert "--output" in refused.stdout + refused.stderr
