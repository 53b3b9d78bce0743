"""The tiles of a split, decoded once per node, and patches cut out of them.

A node's first worker decodes the tiles into files of the node's cache, HR beside its LR; every
worker maps these files into memory, so that they are there once, whatever the number of workers
(or of trials of a sweep), and a run that starts again finds them. On a GPU the tiles are copied to
the device, and patches are cut there by the same code.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from carn.bcsr.dataset import BcsrDataset
from carn.bcsr.degradation import DEGRADATION, crop_to_multiple, degrade
from carn.errors import DatasetError
from carn.node_cache import hold
from carn.slides.slide import Rgb
from carn.training.samples import Samples
from carn.version import code_version

# Tiles that one process degrades at a time while the cache is filled.
FILL_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class TileStore:
    """All tiles of a split as flat bytes, HR cropped to a multiple of the scale, and their LR.

    Attributes:
        scale: the SR factor.
        tile_ids: their names in the dataset, in its order.
        hr, lr: uint8, the (H, W, 3) tiles one after the other.
        hr_start, lr_start: (n,) int64, where each begins.
        lr_height, lr_width: (n,) int64; HR is `scale` times that.
        pin: keeps the node's cache from giving the files away.
    """

    scale: int
    tile_ids: tuple[str, ...]
    hr: UInt8[Tensor, " hr_bytes"]
    lr: UInt8[Tensor, " lr_bytes"]
    hr_start: Tensor
    lr_start: Tensor
    lr_height: Tensor
    lr_width: Tensor
    pin: IO[bytes] | None = None

    def to(self, device: torch.device) -> "TileStore":
        """The store on a device; itself where it is there already."""
        if self.hr.device == device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in self.__dict__.items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def extents_px(self) -> list[tuple[int, int]]:
        """(width, height) of each HR tile, cropped to a multiple of the scale."""
        sides = torch.stack([self.lr_width, self.lr_height], dim=1) * self.scale
        return [(width, height) for width, height in sides.tolist()]

    def pair(self, index: int) -> tuple[Rgb, Rgb]:
        """LR (h, w, 3) and HR (scale*h, scale*w, 3) uint8 of a tile."""
        height, width = int(self.lr_height[index]), int(self.lr_width[index])
        lr, hr = int(self.lr_start[index]), int(self.hr_start[index])
        scale = self.scale
        return (
            self.lr[lr : lr + height * width * 3].reshape(height, width, 3).cpu().numpy(),
            self.hr[hr : hr + height * width * 3 * scale**2]
            .reshape(height * scale, width * scale, 3)
            .cpu()
            .numpy(),
        )


def cut_patches(
    store: TileStore, samples: Samples, *, patch_px: int
) -> tuple[Float[Tensor, "n 3 h w"], Float[Tensor, "n 3 H W"]]:
    """LR and HR patches, float32 0..1 in channels_last order, on the store's device.

    Args:
        store: the tiles.
        samples: which patches, turned which way.
        patch_px: side of the HR patch.
    """
    device = store.hr.device
    places = (samples.tile, samples.top, samples.left)
    turns = (samples.flip_x, samples.flip_y, samples.transpose)
    # One small copy to the device, not six.
    table = torch.from_numpy(np.stack([*places, *turns]).astype(np.int64)).to(
        device, non_blocking=True
    )
    side = patch_px // store.scale
    lr = _cut(store.lr, table, store.lr_start, store.lr_width, side_px=side, zoom=1)
    hr = _cut(store.hr, table, store.hr_start, store.lr_width, side_px=patch_px, zoom=store.scale)
    return lr, hr


def _cut(
    flat: Tensor, table: Tensor, start: Tensor, lr_width: Tensor, *, side_px: int, zoom: int
) -> Tensor:
    tile, top, left, flip_x, flip_y, transpose = table
    along = torch.arange(side_px, device=flat.device)
    # Row and column in the patch that each output px (y, x) is taken from: the transpose is
    # applied last, so it is undone first.
    y, x = along[None, :, None], along[None, None, :]
    swap = transpose.bool()[:, None, None]
    row = torch.where(swap, x, y)
    column = torch.where(swap, y, x)
    row = torch.where(flip_y.bool()[:, None, None], side_px - 1 - row, row)
    column = torch.where(flip_x.bool()[:, None, None], side_px - 1 - column, column)
    width = (lr_width[tile] * zoom)[:, None, None]
    row = row + (top * zoom)[:, None, None]
    column = column + (left * zoom)[:, None, None]
    index = start[tile][:, None, None] + (row * width + column) * 3
    index = index[..., None] + torch.arange(3, device=flat.device)
    return flat[index].to(torch.float32).div_(255).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------ the cache


def load_tiles(dataset: BcsrDataset, *, split: str, scale: int) -> TileStore:
    """The tiles of a split, from the node's cache, which is filled first where it has to be.

    Raises:
        DatasetError: the split is empty, or a shard is damaged.
        StorageError: the tiles do not fit the node's cache; stream them then.
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

    folder, pin = hold(
        _cache_key(dataset, split=split, scale=scale),
        uri=dataset.uri,
        size=lambda: int(lr_bytes.sum()) * (1 + scale**2),
        fill=fill,
    )
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
    shards = json.dumps([[shard["name"], shard["num_tiles"]] for shard in _shards(dataset)])
    return hashlib.sha256(shards.encode()).hexdigest()[:32]


def _shards(dataset: BcsrDataset) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = dataset.manifest["shards"]
    return shards


def _cache_key(dataset: BcsrDataset, *, split: str, scale: int) -> str:
    # The code that degrades may change; LR of another version must not be taken for this one's.
    facts = f"{dataset_digest(dataset)}|{split}|x{scale}|{DEGRADATION}|{code_version()}"
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

    with (folder / "hr.u8").open("wb") as hr_file, (folder / "lr.u8").open("wb") as lr_file:
        for lr, hr in pairs():
            hr_file.write(hr.tobytes())
            lr_file.write(lr.tobytes())
        if lr_file.tell() != num_bytes or hr_file.tell() != num_bytes * scale**2:
            raise DatasetError(f"{dataset.uri}: the {split} shards do not hold what they list")


def _degraded(pixels: Rgb, scale: int) -> tuple[Rgb, Rgb]:
    return degrade(pixels, scale=scale), crop_to_multiple(pixels, scale)


def _map(path: Path) -> Tensor:
    # Copy-on-write: torch wants writable memory, and what nobody writes stays shared.
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
