"""A dataset small enough to train on in a test, runs on it, and what they leave."""

import functools
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, multiprocessing

from carn.bcsr import dataset as dataset_module
from carn.bcsr.codec import encode
from carn.bcsr.dataset import write_manifest
from carn.bcsr.shards import shard_bytes, shard_uri
from carn.models.checkpoint import read_checkpoint
from carn.training.config import (
    NetworkConfig,
    OptimizerConfig,
    PatchConfig,
    TrainConfig,
    ValidationConfig,
)
from carn.training.engine import EngineConfig
from carn.training.loop import TrainResult, train
from carn.training.tiles import load_tiles

# (width, height) of the training tiles: sides that differ, and are multiples of no scale but one.
EXTENTS = [(64 + 7 * n % 33, 64 + 11 * n % 31) for n in range(20)]
VALIDATION_EXTENTS = [(64, 72), (73, 66), (80, 64), (65, 65)]
# Row groups of 16 and 2 tiles, then of 2.
TILES_PER_SHARD = 18

# The smallest network of each name that can be trained.
NETWORKS: dict[str, dict[str, int]] = {
    "carn": {"num_blocks": 1, "channels": 8, "reduction": 2},
    "adaptive-carn": {"num_blocks": 1, "channels": 8, "reduction": 2},
    "edsr": {"num_blocks": 1, "channels": 8},
    "rcan": {"num_blocks": 1, "channels": 8, "reduction": 2},
    "rdn": {"num_blocks": 1, "channels": 8},
    "srcnn": {},
    "srgan": {"num_blocks": 1, "channels": 8},
    "swdnet": {"num_blocks": 1, "channels": 4},
}

Event = dict[str, Any]


class Killed(Exception):
    """Stands for the end of a process."""


def draw_tile(width: int, height: int, *, seed: int) -> np.ndarray:
    """(height, width, 3) uint8 with edges, blobs and grain, unlike any of another seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([150 + 60 * np.sin(x / p + y / q) for p, q in rng.uniform(4, 30, (3, 2))], -1)
    for _ in range(6):
        centre_x, centre_y, radius = (
            rng.uniform(0, width),
            rng.uniform(0, height),
            rng.uniform(3, 9),
        )
        inside = (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2
        pixels[inside] = rng.uniform(40, 220, 3)
    return np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)


def write_dataset(
    uri: str,
    *,
    train: Sequence[tuple[int, int]] = EXTENTS,
    validation: Sequence[tuple[int, int]] = VALIDATION_EXTENTS,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a finished dataset of drawn tiles; returns their pixels by name, in its order."""
    drawn: dict[str, np.ndarray] = {}
    shards = []
    for split, extents in (("train", train), ("validation", validation)):
        rows, images = [], []
        for number, (width, height) in enumerate(extents):
            pixels = draw_tile(width, height, seed=1000 * seed + number + 100 * (split != "train"))
            name = f"{split}_{number}"
            drawn[name] = pixels
            images.append(encode(pixels, "png"))
            rows.append(
                {"tile_id": name, "slide": split, "uri": "/s.tif", "x_l0": number, "y_l0": 0}
                | {"width_px": width, "height_px": height, "label": "tumor", "mpp_x": 0.25}
                | {"inside_fraction": 1.0, "white_fraction": 0.0, "mpp_y": 0.25, "rank": number}
                | {"mean_r": 150.0, "mean_g": 150.0, "mean_b": 150.0, "distance": 0.0}
                | {"split": split, "encoding": "png"}
            )
        for number, start in enumerate(range(0, len(rows), TILES_PER_SHARD)):
            part = slice(start, start + TILES_PER_SHARD)
            # A build's shard is named by its content, which here is that of the seed.
            shard = f"{split}-{number:05d}-{seed:012x}.parquet"
            path = Path(shard_uri(uri, shard))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(shard_bytes(rows[part], images[part]))
            shards.append({"name": shard, "split": split, "num_tiles": len(rows[part])})
    manifest = {
        "channel_means": [0.6, 0.5, 0.55],
        "splits": {"train": len(train), "validation": len(validation), "test": 0},
        "shards": shards,
    }
    write_manifest(uri, manifest)
    return drawn


# ------------------------------------------------------------------------------------------ runs


def tiny_config(
    model: str = "carn",
    *,
    steps: int = 6,
    scale: int = 2,
    optimizer: dict[str, Any] | None = None,
    patches: dict[str, Any] | None = None,
    validation: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainConfig:
    """A run of a few updates: batches of 4 patches of 16 px, validations after 3 and at the end."""
    sizes = {"batch_size": 4, "patch_px": 24 if scale == 3 else 16, "samples_per_tile": 2}
    return TrainConfig(
        network=NetworkConfig(model=model, scale=scale, **NETWORKS[model]),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(**{"learning_rate": 1e-3} | (optimizer or {})),
        patches=PatchConfig(**sizes | (patches or {})),
        validation=ValidationConfig(
            **{"validate_every": 3, "validation_crop_px": 32} | (validation or {})
        ),
        steps=steps,
        **changes,
    )


def tiny_engine(**changes: Any) -> EngineConfig:
    """On the CPU; a row of metrics after each update, a checkpoint after every second."""
    settings = {"device": "cpu", "log_every": 1, "checkpoint_every": 2, "num_threads": 1}
    return EngineConfig(**settings | changes)


def kill_at(step: int, *, kind: str = "step") -> Callable[[Any], None]:
    """A listener that ends the run at an event of a step."""

    def listen(event: Event) -> None:
        if event["kind"] == kind and event["step"] == step:
            raise Killed

    return listen


def last_hashes(output: str) -> tuple[int | None, str, dict[str, str]]:
    """Step, weights and training state of the last checkpoint: equal where a run is."""
    checkpoint = read_checkpoint(f"{output}/last.json")
    return checkpoint.step, checkpoint.weights_sha256, dict(checkpoint.files)


# --------------------------------------------------------------------------------------- workers


def run_workers(
    task: Callable[..., Any], *arguments: Any, num_workers: int, folder: Path
) -> list[Any]:
    """What a module's function returns in each of several processes that form a group (gloo)."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = (num_workers, str(folder), task, arguments)
    multiprocessing.spawn(_work, args=settings, nprocs=num_workers)
    found = [folder / f"result-{rank}.pt" for rank in range(num_workers)]
    return [torch.load(path, weights_only=False) for path in found]


def _work(
    rank: int,
    world_size: int,
    folder: str,
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(f"{folder}/store", world_size)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    try:
        torch.save(task(*arguments), f"{folder}/result-{rank}.pt")
    finally:
        distributed.destroy_process_group()


def load_and_count(uri: str, barrier: Any, queue: Any) -> None:
    """Load the training tiles when others do; report tiles decoded and the sum of all bytes."""
    count = 0
    original = dataset_module.decode

    def decode(content: bytes, encoding: str, *, extent: tuple[int, int]) -> Any:
        nonlocal count
        count += 1
        return original(content, encoding, extent=extent)

    dataset_module.decode = decode
    dataset = dataset_module.open_dataset(uri)
    barrier.wait(120)
    store = load_tiles(dataset, split="train", scale=2)
    queue.put((count, int(store.hr.sum(dtype=torch.int64))))


def run(config: TrainConfig, dataset: str, output: str | Path, **options: Any) -> TrainResult:
    """`train` with this module's engine unless told otherwise."""
    options.setdefault("engine", tiny_engine())
    return train(config, dataset_uri=dataset, output=str(output), **options)


def listening() -> tuple[list[Event], Callable[[Any], None]]:
    """A list, and the listener that fills it."""
    events: list[Event] = []
    return events, functools.partial(_keep, events)


def _keep(events: list[Event], event: Any) -> None:
    events.append(dict(event))
