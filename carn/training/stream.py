"""Patches of a dataset that fits nowhere: read window by window, by whoever can read.

The samples are those that `samples.Sampler` plans with `order="windowed"`, so a run that streams
equals one that holds its tiles in memory. What maps the reading over processes is given from
outside: a few threads here, Ray Data in the job.
"""

import dataclasses
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carn.bcsr.dataset import TileGroup, named_tiles
from carn.degradation.variants import LrMaker
from carn.errors import DatasetError
from carn.training.patches import Batch, cut_patches, make_store, sample_numbers
from carn.training.samples import Sampler, Window

# Maps a function over units of work, ahead of need, results in the order of the units.
MapUnits = Callable[
    [Callable[[dict[str, Any]], dict[str, Any]], Iterable[dict[str, Any]]],
    Iterator[dict[str, Any]],
]

# Windows that are read ahead of need on one machine, and the threads that read them.
READ_AHEAD = 4


def windows_in_order(
    sampler: Sampler, slots: Sequence[int], *, first_step: int, last_step: int
) -> Iterator[Window]:
    """The windows of some slots that steps first_step .. last_step - 1 need, as they need them."""
    waiting = [(first_step, slot) for slot in slots]
    heapq.heapify(waiting)
    while waiting:
        step, slot = heapq.heappop(waiting)
        if step >= last_step:
            continue
        window = sampler.window(slot, step)
        yield window
        heapq.heappush(waiting, (window.first_step + window.num_steps, slot))


@dataclass(frozen=True, kw_only=True)
class WindowReader:
    """Reads windows, in whatever process it is sent to.

    Attributes:
        groups: the training tiles as they lie on storage.
        sampler: says which patches a window holds.
        scale: the SR factor.
        patch_px: side of an HR patch.
        maker: of LR.
        has_numbers: say how the LR of each patch was made.
    """

    groups: Sequence[TileGroup]
    sampler: Sampler
    scale: int
    patch_px: int
    maker: LrMaker = field(default_factory=LrMaker)
    has_numbers: bool = False

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """All patches of a window, the fields of which are the unit.

        Returns:
            The unit with "lr" (n, h, w, 3) and "hr" (n, H, W, 3), uint8, in the order of steps,
            and where they are wanted "numbers" (n, k) float32.

        Raises:
            DatasetError: the shard is damaged.
            StorageError: it cannot be read.
        """
        window = Window(**unit)
        group = self.groups[window.group]
        tile_ids, tiles = zip(*named_tiles(group), strict=True)
        store = make_store(tiles, scale=self.scale, maker=self.maker, tile_ids=tile_ids)
        samples = self.sampler.window_samples(window)
        samples = dataclasses.replace(samples, tile=samples.tile - group.first)
        lr, hr = cut_patches(store, samples, patch_px=self.patch_px)
        result = {**unit, "lr": _to_bytes(lr), "hr": _to_bytes(hr)}
        if self.has_numbers:
            result["numbers"] = sample_numbers(store, samples).numpy()
        return result


def _to_bytes(patches: Tensor) -> Any:
    return patches.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def stream_batches(
    results: Iterator[dict[str, Any]],
    sampler: Sampler,
    slots: Sequence[int],
    *,
    first_step: int,
    last_step: int,
) -> Iterator[Batch]:
    """The batch (channels_last) of each step, from windows read in order.

    Raises:
        DatasetError: a window is missing, or out of its order.
    """
    current: dict[int, tuple[Window, dict[str, Any]]] = {}
    for step in range(first_step, last_step):
        lr, hr, numbers = [], [], []
        for slot in slots:
            window = current[slot][0] if slot in current else None
            if window is None or step >= window.first_step + window.num_steps:
                window = sampler.window(slot, step)
                current[slot] = (window, _expect(window, next(results, None)))
            patches = current[slot][1]
            at = step - window.first_step
            lr.append(patches["lr"][at])
            hr.append(patches["hr"][at])
            if "numbers" in patches:
                numbers.append(patches["numbers"][at])
        known = torch.from_numpy(np.stack(numbers)) if numbers else None
        yield Batch(lr=_to_floats(lr), hr=_to_floats(hr), numbers=known)


def _expect(window: Window, result: dict[str, Any] | None) -> dict[str, Any]:
    """Patches of another window would train just as well, and wrongly."""
    if result is None or any(int(result[n]) != v for n, v in dataclasses.asdict(window).items()):
        raise DatasetError(f"the patches of {window} were not read; see the errors before this")
    return result


def _to_floats(patches: Sequence[Any]) -> Tensor:
    stacked = torch.from_numpy(np.stack(patches))
    return stacked.to(torch.float32).div_(255).permute(0, 3, 1, 2)


def map_in_threads(
    function: Callable[[dict[str, Any]], dict[str, Any]], units: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The plain way to read ahead, on one machine without Ray."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting: deque[Future[dict[str, Any]]] = deque()
        for unit in units:
            waiting.append(pool.submit(function, unit))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
