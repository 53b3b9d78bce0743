"""Tiles in memory, and patches cut out of them by indexing alone, on whatever device they are.

Needs torch and numpy only: a bare GPU machine trains from tiles of its own.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from carn.degradation.bicubic import crop_to_multiple
from carn.degradation.numbers import numbers_of
from carn.degradation.variants import LrMaker
from carn.slides.slide import Rgb
from carn.training.samples import Samples


@dataclass(frozen=True, kw_only=True)
class TileStore:
    """All tiles of a split as flat bytes, HR cropped to a multiple of the scale, and their LR.

    Variants of a tile's LR lie one after the other.

    Attributes:
        scale: the SR factor.
        tile_ids: their names in the dataset, in its order.
        hr, lr: uint8, the (H, W, 3) tiles one after the other.
        hr_start, lr_start: (n,) int64, where each begins; LR with its first variant.
        lr_height, lr_width: (n,) int64; HR is `scale` times that.
        maker: how LR was made.
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
    maker: LrMaker = field(default_factory=LrMaker)
    pin: IO[bytes] | None = None

    def to(self, device: torch.device) -> "TileStore":
        """The store on a device; itself where it is there already."""
        if self.hr.device == device:
            return self
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    @cached_property
    def numbers(self) -> Float[Tensor, "n v k"]:
        """How each variant of each tile was made: `carn.degradation.numbers`, on the device."""
        variants = range(self.maker.num_variants)
        rows = [
            numbers_of(self.maker.way(tile=tile_id, variant=variant), scale=self.scale)
            for tile_id in self.tile_ids
            for variant in variants
        ]
        table = torch.from_numpy(np.stack(rows)).view(len(self.tile_ids), len(variants), -1)
        return table.to(self.hr.device)

    def extents_px(self) -> list[tuple[int, int]]:
        """(width, height) of each HR tile, cropped to a multiple of the scale."""
        sides = torch.stack([self.lr_width, self.lr_height], dim=1) * self.scale
        return [(width, height) for width, height in sides.tolist()]

    def pair(self, index: int, *, variant: int = 0) -> tuple[Rgb, Rgb]:
        """LR (h, w, 3) and HR (scale*h, scale*w, 3) uint8 of a tile."""
        height, width = int(self.lr_height[index]), int(self.lr_width[index])
        lr, hr = int(self.lr_start[index]), int(self.hr_start[index])
        lr += variant * height * width * 3
        scale = self.scale
        return (
            self.lr[lr : lr + height * width * 3].reshape(height, width, 3).cpu().numpy(),
            self.hr[hr : hr + height * width * 3 * scale**2]
            .reshape(height * scale, width * scale, 3)
            .cpu()
            .numpy(),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Patches of an update.

    Attributes:
        lr, hr: float32 0..1.
        numbers: how each patch's LR was made, see `carn.degradation.numbers`; None where nobody
            wants to know.
    """

    lr: Float[Tensor, "n 3 h w"]
    hr: Float[Tensor, "n 3 H W"]
    numbers: Float[Tensor, "n k"] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        numbers = None if self.numbers is None else self.numbers.to(device)
        return Batch(lr=self.lr.to(device), hr=self.hr.to(device), numbers=numbers)


def make_lr(tile: Rgb, maker: LrMaker, *, scale: int, tile_id: str) -> list[Rgb]:
    """Make all LR images of a tile.

    Raises:
        ValueError: the tile is smaller than one LR px.
    """
    return [
        maker.make(tile, scale=scale, tile=tile_id, variant=variant)
        for variant in range(maker.num_variants)
    ]


def make_store(
    tiles: Sequence[Rgb],
    *,
    scale: int,
    maker: LrMaker | None = None,
    tile_ids: Sequence[str] | None = None,
) -> TileStore:
    """A store of (H, W, 3) uint8 tiles, degraded here.

    Args:
        tiles: HR.
        scale: the SR factor.
        maker: of LR; None for bicubic LR.
        tile_ids: names of the tiles, which what is drawn for LR depends on; None for "" each.

    Raises:
        ValueError: a tile is smaller than one LR px.
    """
    maker = maker or LrMaker()
    names = tuple(tile_ids or ("",) * len(tiles))
    pairs = [
        (make_lr(tile, maker, scale=scale, tile_id=name), crop_to_multiple(tile, scale))
        for tile, name in zip(tiles, names, strict=True)
    ]
    heights, widths = (torch.tensor([lr[0].shape[axis] for lr, _ in pairs]) for axis in (0, 1))
    sizes = heights * widths * 3
    start = torch.cumsum(sizes, 0) - sizes
    return TileStore(
        scale=scale,
        tile_ids=names,
        lr=torch.from_numpy(
            np.concatenate([lr.ravel() for variants, _ in pairs for lr in variants])
        ),
        hr=torch.from_numpy(np.concatenate([hr.ravel() for _, hr in pairs])),
        lr_start=start * maker.num_variants,
        hr_start=start * scale**2,
        lr_height=heights,
        lr_width=widths,
        maker=maker,
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
    # One small copy to the device, not seven.
    table = samples_table(samples).to(store.hr.device, non_blocking=True)
    return cut_table(store, table, patch_px=patch_px)


def sample_numbers(store: TileStore, samples: Samples) -> Float[Tensor, "n k"]:
    """How the LR of each sample was made, see `carn.degradation.numbers`; on the store's device."""
    tile, variant = samples_table(samples)[:2].to(store.hr.device, non_blocking=True)
    return store.numbers[tile, variant]


def samples_table(samples: Samples) -> Int64[Tensor, "7 n"]:
    """Samples as one tensor, for `cut_table`."""
    places = (samples.tile, samples.variant, samples.top, samples.left)
    turns = (samples.flip_x, samples.flip_y, samples.transpose)
    return torch.from_numpy(np.stack([*places, *turns]).astype(np.int64))


def cut_table(
    store: TileStore, table: Int64[Tensor, "7 n"], *, patch_px: int
) -> tuple[Float[Tensor, "n 3 h w"], Float[Tensor, "n 3 H W"]]:
    """`cut_patches` of a table that is on the store's device; the host waits for nothing.

    A CUDA graph can hold it: only the table's content decides which patches they are.
    """
    tile, variant = table[0], table[1]
    lr_px = store.lr_height[tile] * store.lr_width[tile]
    lr_first = store.lr_start[tile] + variant * lr_px * 3
    side = patch_px // store.scale
    width = store.lr_width[tile]
    lr = _cut(store.lr, table, lr_first, width, side_px=side, zoom=1)
    zoom = store.scale
    hr = _cut(store.hr, table, store.hr_start[tile], width * zoom, side_px=patch_px, zoom=zoom)
    return lr, hr


def _cut(
    flat: Tensor, table: Tensor, first: Tensor, width: Tensor, *, side_px: int, zoom: int
) -> Tensor:
    """Patches out of images in `flat`; each image begins at `first` and is `width` px wide."""
    top, left, flip_x, flip_y, transpose = table[2:]
    along = torch.arange(side_px, device=flat.device)
    # Row and column in the patch that each output px (y, x) is taken from: the transpose is
    # applied last, so it is undone first.
    y, x = along[None, :, None], along[None, None, :]
    swap = transpose.bool()[:, None, None]
    row = torch.where(swap, x, y)
    column = torch.where(swap, y, x)
    row = torch.where(flip_y.bool()[:, None, None], side_px - 1 - row, row)
    column = torch.where(flip_x.bool()[:, None, None], side_px - 1 - column, column)
    row = row + (top * zoom)[:, None, None]
    column = column + (left * zoom)[:, None, None]
    index = first[:, None, None] + (row * width[:, None, None] + column) * 3
    index = index[..., None] + torch.arange(3, device=flat.device)
    return flat[index].to(torch.float32).div_(255).permute(0, 3, 1, 2)
