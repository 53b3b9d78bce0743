"""Tiles in memory, and patches cut out of them by indexing alone, on whatever device they are.

Needs torch and numpy only: a bare GPU machine trains from tiles of its own.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from carn.degradation.bicubic import crop_to_multiple, degrade
from carn.slides.slide import Rgb
from carn.training.samples import Samples


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


def make_store(tiles: Sequence[Rgb], *, scale: int) -> TileStore:
    """A store of (H, W, 3) uint8 tiles, degraded here; they have no names.

    Raises:
        ValueError: a tile is smaller than one LR px.
    """
    pairs = [(degrade(tile, scale=scale), crop_to_multiple(tile, scale)) for tile in tiles]
    heights, widths = (torch.tensor([lr.shape[axis] for lr, _ in pairs]) for axis in (0, 1))
    sizes = heights * widths * 3
    start = torch.cumsum(sizes, 0) - sizes
    return TileStore(
        scale=scale,
        tile_ids=("",) * len(pairs),
        lr=torch.from_numpy(np.concatenate([lr.ravel() for lr, _ in pairs])),
        hr=torch.from_numpy(np.concatenate([hr.ravel() for _, hr in pairs])),
        lr_start=start,
        hr_start=start * scale**2,
        lr_height=heights,
        lr_width=widths,
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
    # One small copy to the device, not six.
    table = samples_table(samples).to(store.hr.device, non_blocking=True)
    return cut_table(store, table, patch_px=patch_px)


def samples_table(samples: Samples) -> Int64[Tensor, "6 n"]:
    """Samples as one tensor, for `cut_table`."""
    places = (samples.tile, samples.top, samples.left)
    turns = (samples.flip_x, samples.flip_y, samples.transpose)
    return torch.from_numpy(np.stack([*places, *turns]).astype(np.int64))


def cut_table(
    store: TileStore, table: Int64[Tensor, "6 n"], *, patch_px: int
) -> tuple[Float[Tensor, "n 3 h w"], Float[Tensor, "n 3 H W"]]:
    """`cut_patches` of a table that is on the store's device; the host waits for nothing.

    A CUDA graph can hold it: only the table's content decides which patches they are.
    """
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
