"""Which patch is sample j of step k: a pure function of the seed, whoever asks and whenever.

No sampler state has to be saved to resume a run, and a batch is the same however many workers
share it. Two orders are offered. `shuffled`, the paper's: every tile once an epoch, in a new
order each time, one patch a visit. `windowed`: each slot of the batch draws many patches from one
group of neighbouring tiles before it moves on, so that a dataset which fits nowhere can be read in
long strokes; it gives the same samples from memory as from a stream.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Order = Literal["shuffled", "windowed"]

# Tells the streams of random numbers of one seed apart.
_TILES, _PLACES, _VARIANTS = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Where some patches lie, all arrays of length n.

    Attributes:
        tile: index of the tile in its split's order.
        variant: which of the tile's LR images.
        top, left: the patch's corner in LR px of its tile; the HR patch's is `scale` times that.
        flip_x, flip_y, transpose: what is done to the patch, the transpose last.
    """

    tile: NDArray[np.int64]
    variant: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    flip_x: NDArray[np.bool_]
    flip_y: NDArray[np.bool_]
    transpose: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tile)

    def take(self, which: slice | NDArray[np.int64]) -> "Samples":
        """Some of them, in the order asked for."""
        return Samples(**{name: getattr(self, name)[which] for name in self.__dict__})


@dataclass(frozen=True, kw_only=True)
class Window:
    """Consecutive samples of one slot of the batch, all from one group of tiles.

    Attributes:
        slot: 0 .. batch_size - 1.
        number: counts the slot's windows from 0.
        first_step: the step of its first sample.
        num_steps: its samples, one a step.
        group: index of the group of tiles.
    """

    slot: int
    number: int
    first_step: int
    num_steps: int
    group: int


class Sampler:
    """Samples of every step, from tile sizes, batch size and seed.

    Args:
        extents_px: (width, height) of each tile in HR px.
        scale: the SR factor.
        patch_px: side of a patch in HR px.
        batch_size: samples of a step, over all workers.
        seed: of everything that is drawn.
        augment: flip in x, flip in y and transpose, each with probability 1/2, as the code released
            with the CARN paper does.
        order: see the module.
        groups: with `windowed`, tiles of each group as (first, count), in the tiles' order.
        samples_per_tile: with `windowed`, patches of a tile in one window.
        num_variants: LR images of each tile, each as likely as the others.

    Raises:
        ValueError: no tiles, or a patch that is no multiple of the scale or larger than a tile.
    """

    def __init__(
        self,
        extents_px: Sequence[tuple[int, int]],
        *,
        scale: int,
        patch_px: int,
        batch_size: int,
        seed: int,
        augment: bool = True,
        order: Order = "shuffled",
        groups: Sequence[tuple[int, int]] = (),
        samples_per_tile: int = 32,
        num_variants: int = 1,
    ) -> None:
        if not extents_px:
            raise ValueError("there are no tiles to take patches from")
        if patch_px % scale or patch_px < scale:
            raise ValueError(f"patch_px={patch_px} is not a multiple of scale={scale}")
        extents = np.array(extents_px, dtype=np.int64) // scale
        smallest = int(extents.min(axis=1).argmin())
        if extents[smallest].min() < patch_px // scale:
            width, height = extents_px[smallest]
            raise ValueError(
                f"patch_px={patch_px} is larger than tile {smallest} of {width} x {height} px; "
                f"choose at most {int(extents[smallest].min()) * scale}"
            )
        # How many places a corner can take, per tile, in y and x.
        self._room = extents[:, ::-1] - patch_px // scale + 1
        self.num_tiles = len(extents)
        self.batch_size = batch_size
        self.order = order
        self._seed = seed
        self._augment = augment
        self._groups = list(groups)
        self._samples_per_tile = samples_per_tile
        self._num_variants = num_variants
        self._windows: dict[int, list[Window]] = {}
        self._current: dict[int, tuple[Window, Samples]] = {}
        if order == "windowed" and sum(count for _, count in groups) != self.num_tiles:
            raise ValueError(f"the groups of tiles do not hold the {self.num_tiles} tiles")

    def step(self, step: int) -> Samples:
        """The whole batch of a step (from 0)."""
        if self.order == "shuffled":
            first = step * self.batch_size
            tile = np.array([self._visit(first + j) for j in range(self.batch_size)])
            rng = np.random.default_rng([self._seed, _PLACES, step])
            return self._place(tile, rng, stream=(step,))
        parts = []
        for slot in range(self.batch_size):
            window = self.window(slot, step)
            at = step - window.first_step
            parts.append(self._current_window(window).take(slice(at, at + 1)))
        return Samples(
            **{n: np.concatenate([getattr(p, n) for p in parts]) for n in parts[0].__dict__}
        )

    def _visit(self, position: int) -> int:
        """The tile at a position of the endless line of shuffled epochs."""
        epoch, place = divmod(position, self.num_tiles)
        return int(_permutation(self._seed, epoch, self.num_tiles)[place])

    def _place(
        self, tile: NDArray[np.int64], rng: np.random.Generator, *, stream: tuple[int, ...]
    ) -> Samples:
        # A stream of its own, so that places are the same whatever the number of variants.
        variants = np.random.default_rng([self._seed, _VARIANTS, *stream])
        corners = rng.integers(0, self._room[tile])
        flips = rng.random((len(tile), 3)) < 0.5
        if not self._augment:
            flips[:] = False
        return Samples(
            tile=tile,
            variant=variants.integers(0, self._num_variants, len(tile)),
            top=corners[:, 0],
            left=corners[:, 1],
            flip_x=flips[:, 0],
            flip_y=flips[:, 1],
            transpose=flips[:, 2],
        )

    # -------------------------------------------------------------------------------- windows

    def window(self, slot: int, step: int) -> Window:
        """The window of a slot that holds a step."""
        windows = self._windows.setdefault(slot, [])
        while not windows or windows[-1].first_step + windows[-1].num_steps <= step:
            number = len(windows)
            first = windows[-1].first_step + windows[-1].num_steps if windows else 0
            epoch, place = divmod(number * self.batch_size + slot, len(self._groups))
            group = int(_permutation(self._seed, epoch, len(self._groups))[place])
            windows.append(
                Window(
                    slot=slot,
                    number=number,
                    first_step=first,
                    num_steps=self._groups[group][1] * self._samples_per_tile,
                    group=group,
                )
            )
        at = bisect.bisect_right(windows, step, key=lambda window: window.first_step) - 1
        return windows[at]

    def _current_window(self, window: Window) -> Samples:
        known = self._current.get(window.slot)
        if known is None or known[0] != window:
            known = self._current[window.slot] = (window, self.window_samples(window))
        return known[1]

    def window_samples(self, window: Window) -> Samples:
        """All samples of a window, in the order of its steps."""
        rng = np.random.default_rng([self._seed, _PLACES, window.slot, window.number])
        first, count = self._groups[window.group]
        tile = np.repeat(np.arange(first, first + count), self._samples_per_tile)
        return self._place(rng.permutation(tile), rng, stream=(window.slot, window.number))


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, _TILES, epoch]).permutation(count)


def share(samples: Samples, *, rank: int, world_size: int) -> Samples:
    """A worker's part of a batch: every `world_size`-th sample, disjoint from the others'."""
    return samples.take(np.arange(rank, len(samples), world_size))
