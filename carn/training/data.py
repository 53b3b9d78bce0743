"""The training tiles of a run: which samples a step has, and where their pixels come from."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from carn.bcsr.dataset import BcsrDataset
from carn.degradation.variants import LrMaker
from carn.training.config import TrainConfig
from carn.training.engine import DataPath
from carn.training.group import WorkerGroup
from carn.training.patches import Batch, TileStore, cut_patches, sample_numbers
from carn.training.samples import Sampler, share
from carn.training.stream import MapUnits, WindowReader, stream_batches, windows_in_order
from carn.training.tiles import load_tiles


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The training split of a dataset, as one run samples it.

    Attributes:
        dataset: where the tiles are.
        sampler: which patches a step takes.
        tile_ids: the tiles' names, in the sampler's order.
        store: the tiles themselves, when they are in memory.
    """

    dataset: BcsrDataset
    sampler: Sampler
    tile_ids: tuple[str, ...]
    store: TileStore | None

    def batches(
        self,
        config: TrainConfig,
        *,
        group: WorkerGroup,
        device: torch.device,
        first_step: int,
        map_units: MapUnits,
    ) -> Iterator[Batch]:
        """This worker's patches of each step, on the device."""
        has_numbers = config.network.wants_numbers
        patch_px = config.patches.side_px(config.network.scale)
        if self.store is not None:
            store = self.store.to(device)
            for step in range(first_step, config.steps):
                samples = share(
                    self.sampler.step(step), rank=group.rank, world_size=group.world_size
                )
                lr, hr = cut_patches(store, samples, patch_px=patch_px)
                numbers = sample_numbers(store, samples) if has_numbers else None
                yield Batch(lr=lr, hr=hr, numbers=numbers)
            return
        slots = range(group.rank, config.patches.batch_size, group.world_size)
        span = {"first_step": first_step, "last_step": config.steps}
        reader = WindowReader(
            groups=self.dataset.groups("train"),
            sampler=self.sampler,
            scale=config.network.scale,
            patch_px=patch_px,
            maker=LrMaker(config=config.degradation),
            has_numbers=has_numbers,
        )
        windows = windows_in_order(self.sampler, slots, **span)
        results = map_units(reader, (dataclasses.asdict(window) for window in windows))
        for batch in stream_batches(results, self.sampler, slots, **span):
            yield batch.to(device)

    def names_at(self, step: int) -> tuple[str, ...]:
        """The tiles of a step's batch."""
        return tuple(self.tile_ids[tile] for tile in dict.fromkeys(self.sampler.step(step).tile))


def open_training_data(
    dataset: BcsrDataset, config: TrainConfig, *, path: DataPath
) -> TrainingData:
    """The training tiles of a dataset; decoded into the node's cache first, unless streamed.

    Raises:
        DatasetError: there are none, or a shard is damaged.
        ValueError: the patch is larger than a tile.
        StorageError: the tiles cannot be read, or do not fit the node's cache.
    """
    scale = config.network.scale
    store = None
    if path == "memory":
        maker = LrMaker(config=config.degradation)
        store = load_tiles(dataset, split="train", scale=scale, maker=maker)
        extents, tile_ids = store.extents_px(), store.tile_ids
    else:
        table = dataset.table("train")
        sides = zip(table["width_px"].to_pylist(), table["height_px"].to_pylist(), strict=True)
        extents, tile_ids = list(sides), tuple(table["tile_id"].to_pylist())
    sampler = make_sampler(dataset, extents, tile_ids, config)
    return TrainingData(dataset=dataset, sampler=sampler, tile_ids=tile_ids, store=store)


def make_sampler(
    dataset: BcsrDataset,
    extents_px: list[tuple[int, int]],
    tile_ids: tuple[str, ...],
    config: TrainConfig,
) -> Sampler:
    """The sampler of a run.

    Raises:
        ValueError: the patch is larger than a tile, which is named.
    """
    patches, scale = config.patches, config.network.scale
    side = patches.side_px(scale)
    for tile_id, extent in zip(tile_ids, extents_px, strict=True):
        if min(extent) // scale * scale < side:
            raise ValueError(
                f"patch_px={side} is larger than tile {tile_id} of {extent[0]} x {extent[1]} px; "
                f"choose --patch-px {min(extent) // scale * scale} or less"
            )
    return Sampler(
        extents_px,
        scale=scale,
        patch_px=side,
        batch_size=patches.batch_size,
        seed=config.seed,
        augment=patches.augment,
        order=patches.order,
        groups=[(group.first, group.count) for group in dataset.groups("train")],
        samples_per_tile=patches.samples_per_tile,
        num_variants=config.degradation.lr_variants,
    )
