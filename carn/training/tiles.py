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
from carn.degradation.bicubic import BICUBIC, crop_to_multiple
from carn.degradation.variants import LrMaker
from carn.errors import CacheError, DatasetError
from carn.node_cache import hold
from carn.slides.slide import Rgb
from carn.training.patches import TileStore, make_lr
from carn.version import code_version

# Tiles that one process degrades at a time while the cache is filled.
FILL_THREADS = 8


def load_tiles(
    dataset: BcsrDataset, *, split: str, scale: int, maker: LrMaker | None = None
) -> TileStore:
    """The tiles of a split, from the node's cache, which is filled first where it has to be.

    Args:
        dataset: a finished dataset.
        split: of it.
        scale: the SR factor.
        maker: of LR; None for bicubic LR.

    Raises:
        DatasetError: the split is empty, or a shard is damaged.
        CacheError: the tiles do not fit the node's cache.
    """
    maker = maker or LrMaker()
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
        num_bytes = int(lr_bytes.sum())
        _fill(folder, dataset, split=split, scale=scale, maker=maker, num_bytes=num_bytes)

    try:
        folder, pin = hold(
            _cache_key(dataset, split=split, scale=scale, maker=maker),
            uri=dataset.uri,
            size=lambda: int(lr_bytes.sum()) * (maker.num_variants + scale**2),
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
        lr_start=torch.from_numpy(start * maker.num_variants),
        lr_height=torch.from_numpy(sides[0].astype(np.int64)),
        lr_width=torch.from_numpy(sides[1].astype(np.int64)),
        maker=maker,
        pin=pin,
    )


def dataset_digest(dataset: BcsrDataset) -> str:
    """A hash of what the dataset holds: its shards' names hold those of their content."""
    shards = [[shard["name"], shard["num_tiles"]] for shard in dataset.manifest["shards"]]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:32]


def _cache_key(dataset: BcsrDataset, *, split: str, scale: int, maker: LrMaker) -> str:
    # The code that degrades may change; LR of another version must not be taken for this one's.
    lr = BICUBIC if maker == LrMaker() else json.dumps(maker.facts(), sort_keys=True)
    facts = f"{dataset_digest(dataset)}|{split}|x{scale}|{lr}|{code_version()}"
    return "tiles" + hashlib.sha256(facts.encode()).hexdigest()[:32]


def _fill(
    folder: Path,
    dataset: BcsrDataset,
    *,
    split: str,
    scale: int,
    maker: LrMaker,
    num_bytes: int,
) -> None:
    def pairs() -> Iterator[tuple[list[Rgb], Rgb]]:
        # Decoding holds the iterator; degrading, the larger part, runs beside it.
        with ThreadPoolExecutor(min(FILL_THREADS, os.cpu_count() or 1)) as pool:
            waiting: list[Any] = []
            for row, pixels in dataset.tiles(split):
                job = pool.submit(make_lr, pixels, maker, scale=scale, tile_id=row["tile_id"])
                waiting.append((job, crop_to_multiple(pixels, scale)))
                if len(waiting) > FILL_THREADS:
                    done, hr = waiting.pop(0)
                    yield done.result(), hr
            for done, hr in waiting:
                yield done.result(), hr

    try:
        with (folder / "hr.u8").open("wb") as hr_file, (folder / "lr.u8").open("wb") as lr_file:
            for variants, hr in pairs():
                hr_file.write(hr.tobytes())
                for lr in variants:
                    lr_file.write(lr.tobytes())
            sizes = lr_file.tell(), hr_file.tell()
    except OSError as error:  # a full disk may only be noticed when the files are closed
        reason = f"cannot be decoded into {folder} ({error.strerror})"
        raise CacheError(dataset.uri, reason) from error
    if sizes != (num_bytes * maker.num_variants, num_bytes * scale**2):
        raise DatasetError(f"{dataset.uri}: the {split} shards do not hold what they list")


def _map(path: Path) -> Tensor:
    # Copy-on-write: torch wants writable memory, and what nobody writes stays shared.
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
