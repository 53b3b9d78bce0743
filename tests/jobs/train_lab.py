"""A small lab for the tests of training: a drawn dataset, and the job in a process of its own."""

import csv
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil

from carn import storage
from carn.bcsr.codec import encode
from carn.bcsr.dataset import write_manifest
from carn.bcsr.schema import SPLITS
from carn.bcsr.shards import shard_bytes, shard_uri
from carn.models.checkpoint import load_model, read_checkpoint
from tests.jobs.lab import ROOT
from tests.training.lab import draw_tile

# A network that is trained in seconds, and what a run of it takes.
TINY = (
    *("--scale", "2", "--num-blocks", "1", "--channels", "16", "--reduction", "4"),
    *("--patch-px", "32", "--batch-size", "4", "--learning-rate", "1e-3", "--seed", "7"),
    *("--device", "cpu", "--num-threads", "1", "--log-every", "2"),
)


def write_dataset(
    uri: str | Path,
    *,
    num_tiles: tuple[int, int, int] = (20, 3, 1),
    side_px: int = 64,
    seed: int = 0,
) -> str:
    """A finished bcSR dataset of drawn tiles, with counts in the order of SPLITS; returns its URI.

    Shards are named by their content, as a build's are: tiles are cached by these names.
    """
    uri, shards, means = str(uri), [], []
    for split, count in zip(SPLITS, num_tiles, strict=True):
        rows, images = [], []
        for number in range(count):
            pixels = draw_tile(
                side_px, side_px, seed=100 * seed + 33 * SPLITS.index(split) + number
            )
            mean = pixels.mean((0, 1)).tolist()
            slide = f"{split}{number // 8}"
            rows.append(
                {"tile_id": f"{slide}_{64 * number}_0", "slide": slide, "uri": f"/s/{slide}.tif"}
                | {"x_l0": 64 * number, "y_l0": 0, "width_px": side_px, "height_px": side_px}
                | {"label": "tumor", "inside_fraction": 1.0, "white_fraction": 0.0}
                | dict(zip(("mean_r", "mean_g", "mean_b"), mean, strict=True))
                | {"mpp_x": 0.25, "mpp_y": 0.25, "distance": 1.0, "rank": number}
                | {"split": split, "encoding": "png"}
            )
            images.append(encode(pixels, "png"))
            if split == "train":
                means.append(mean)
        if rows:
            content = shard_bytes(rows, images)
            name = f"{split}-00000-{hashlib.sha256(content).hexdigest()[:12]}.parquet"
            storage.write_bytes(shard_uri(uri, name), content)
            shards.append({"name": name, "split": split, "num_tiles": count})
    channel_means = (np.mean(means, axis=0) / 255).tolist() if means else [0.5, 0.5, 0.5]
    counts = dict(zip(SPLITS, num_tiles, strict=True))
    write_manifest(uri, {"channel_means": channel_means, "splits": counts, "shards": shards})
    return uri


# ------------------------------------------------------------------------------ what a run left


def weights_hash(output: str | Path, *, name: str = "last") -> str:
    """SHA-256 of the weights that a pointer of a run names, from its files alone."""
    checkpoint = read_checkpoint(storage.join(str(output), f"{name}.json"))
    return hashlib.sha256(storage.read_bytes(checkpoint.weights_uri)).hexdigest()


def weights_distance(first: str | Path, second: str | Path) -> float:
    """The largest difference of a weight between two runs' last checkpoints."""
    states = [
        load_model(read_checkpoint(storage.join(str(output), "last.json"))).state_dict()
        for output in (first, second)
    ]
    assert states[0].keys() == states[1].keys()
    return max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])


def metrics_rows(output: str | Path) -> list[dict[str, str]]:
    """The rows of metrics.csv as they stand in it."""
    text = storage.read_bytes(storage.join(str(output), "metrics.csv")).decode()
    return list(csv.DictReader(text.splitlines()))


def steps_of(output: str | Path) -> list[int]:
    return [int(row["step"]) for row in metrics_rows(output)]


# -------------------------------------------------------------------- the job as another process


def environment_of(cluster: dict[str, str] | None = None) -> dict[str, str]:
    """What the job's process sees: this one's settings, and the cluster's, if it is given one."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "AWS_EC2_METADATA_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    return environment | (cluster or {})


def start_job(
    dataset: str | Path,
    output: str | Path,
    *more: str,
    log: Path,
    cluster: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """The job in a process of its own, all it says in the log; it starts in the root folder."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [
                *(sys.executable, str(ROOT / "jobs" / "train.py"), "--dataset", str(dataset)),
                *("--output", str(output), *TINY, *more),
            ],
            env=environment_of(cluster),
            cwd="/",
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def finish(process: subprocess.Popen[bytes], *, log: Path, timeout_s: float = 240) -> None:
    """Wait for the job, which must end well; it is killed with all it started when it does not."""
    try:
        assert process.wait(timeout=timeout_s) == 0, log.read_text()
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and then what it started, as a node that loses power would."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.kill()
    process.wait()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def wait_for(
    is_so: Callable[[], bool],
    process: subprocess.Popen[bytes],
    *,
    log: Path,
    timeout_s: float = 120,
) -> None:
    """Wait until something is so; the job must be running all the while."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert process.poll() is None, f"the job ended too early:\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def has_checkpoint(output: Path, step: int) -> bool:
    return (output / "checkpoints" / f"step-{step:08d}" / "checkpoint.json").exists()


def train_workers(pids: Sequence[int]) -> list[psutil.Process]:
    """The processes of Ray Train's workers below some processes."""
    found = []
    for pid in pids:
        for child in psutil.Process(pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(child.cmdline()):
                    found.append(child)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
    return found
