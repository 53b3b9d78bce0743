"""The tiles of a split, decoded once per node.

A node's first worker decodes the tiles into files of the node's cache, HR beside its LR; every
worker maps these files into memory, so that they are there once, whatever the number of workers
(or of trials of a sweep), and a run that starts again finds them. On a GPU the tiles are copied to
the device.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carn.bcsr.dataset import BcsrDataset
from carn.degradation.bicubic import BICUBIC, crop_to_multiple, degrade
from carn.errors import CacheError, DatasetError
from carn.node_cache import hold
from carn.slides.slide import Rgb
from carn.training.patches import TileStore
from carn.version import code_version

# Tiles that one process degrades at a time while the cache is filled.
FILL_THREADS = 8


def load_tiles(dataset: BcsrDataset, *, split: str, scale: int) -> TileStore:
    """The tiles of a split, from the node's cache, which is filled first where it has to be.

    Raises:
        DatasetError: the split is empty, or a shard is damaged.
        CacheError: the tiles do not fit the node's cache.
    """
    if not dataset.num_tiles(split):
        raise DatasetError(f"{dataset.uri} has no {split} tiles; build it with more of them")
    table = dataset.table(split).select(["tile_id", "width_px", "height_px"])
    ids = tuple(table["tile_id"].to_pylist())
    sides = np.array([table["height_px"].to_pylist(), table["width_px"].to_pylist()]) // scale
    lr_bytes = (sides[0] * sides[1] * 3).astype(np.int64)
    if not lr_bytes.all():
        smallest = ids[int(lr_bytes.argmin())]
        raise DatasetError(f"{dataset.uri}: tile {smallest} is smaller than {scale} px")

    def fill(folder: Path) -> None:
        _fill(folder, dataset, split=split, scale=scale, num_bytes=int(lr_bytes.sum()))

    try:
        folder, pin = hold(
            _cache_key(dataset, split=split, scale=scale),
            uri=dataset.uri,
            size=lambda: int(lr_bytes.sum()) * (1 + scale**2),
            fill=fill,
        )
    except CacheError as error:
        raise CacheError(
            error.uri, f"{error.reason}, or stream the tiles (--data stream --order windowed)"
        ) from error
    start = np.concatenate([[0], np.cumsum(lr_bytes)[:-1]])
    return TileStore(
        scale=scale,
        tile_ids=ids,
        hr=_map(folder / "hr.u8"),
        lr=_map(folder / "lr.u8"),
        hr_start=torch.from_numpy(start * scale**2),
        lr_start=torch.from_numpy(start),
        lr_height=torch.from_numpy(sides[0].astype(np.int64)),
        lr_width=torch.from_numpy(sides[1].astype(np.int64)),
        pin=pin,
    )


def dataset_digest(dataset: BcsrDataset) -> str:
    """A hash of what the dataset holds: its shards' names hold those of their content."""
    shards = [[shard["name"], shard["num_tiles"]] for shard in dataset.manifest["shards"]]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:32]


def _cache_key(dataset: BcsrDataset, *, split: str, scale: int) -> str:
    # The code that degrades may change; LR of another version must not be taken for this one's.
    facts = f"{dataset_digest(dataset)}|{split}|x{scale}|{BICUBIC}|{code_version()}"
    return "tiles" + hashlib.sha256(facts.encode()).hexdigest()[:32]


def _fill(folder: Path, dataset: BcsrDataset, *, split: str, scale: int, num_bytes: int) -> None:
    def pairs() -> Iterator[tuple[Rgb, Rgb]]:
        # Decoding holds the iterator; degrading, the larger part, runs beside it.
        with ThreadPoolExecutor(min(FILL_THREADS, os.cpu_count() or 1)) as pool:
            waiting: list[Any] = []
            for _, pixels in dataset.tiles(split):
                waiting.append(pool.submit(_degraded, pixels, scale))
                if len(waiting) > FILL_THREADS:
                    yield waiting.pop(0).result()
            for job in waiting:
                yield job.result()

    try:
        with (folder / "hr.u8").open("wb") as hr_file, (folder / "lr.u8").open("wb") as lr_file:
            for lr, hr in pairs():
                hr_file.write(hr.tobytes())
                lr_file.write(lr.tobytes())
            sizes = lr_file.tell(), hr_file.tell()
    except OSError as error:  # a full disk may only be noticed when the files are closed
        reason = f"cannot be decoded into {folder} ({error.strerror})"
        raise CacheError(dataset.uri, reason) from error
    if sizes != (num_bytes, num_bytes * scale**2):
        raise DatasetError(f"{dataset.uri}: the {split} shards do not hold what they list")


def _degraded(pixels: Rgb, scale: int) -> tuple[Rgb, Rgb]:
    return degrade(pixels, scale=scale), crop_to_multiple(pixels, scale)


def _map(path: Path) -> Tensor:
    # Copy-on-write: torch wants writable memory, and what nobody writes stays shared.
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
