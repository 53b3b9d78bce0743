"""What is settled once per slide: the means that global poolings are frozen at, what an adaptive
network takes the LR for, how sharp the tissue is, and how exact the engine is on its pixels.
"""

import dataclasses
import itertools
import json
import logging
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from carn.degradation.describe import BLOCK_PX, Estimate, PixelEstimates, describe_windows
from carn.degradation.numbers import NUMBERS
from carn.errors import CarnError, DamagedTileError
from carn.models.adaptive_carn import AdaptiveCarn
from carn.models.swdnet import SwdNet
from carn.slides.slide import Rgb
from carn.upscaling.accuracy import compare
from carn.upscaling.engine import Engine, free_memory, if_memory_suffices, reference_engine
from carn.upscaling.lr_view import LrView
from carn.upscaling.pooling import MAX_POOLED_PX, Pooling, frozen, has_pooling, pool_over
from carn.upscaling.windows import CELL_PX, TissueCells

logger = logging.getLogger(__name__)

# Up to this many LR px the whole view is pooled over: tiles and crops get exactly the means of the
# whole. For CARN 2.1 Mpx are about a minute of one core, and 2 GB.
MAX_WHOLE_PX = 1 << 21
# Windows that are pooled start at multiples of this, so that all have JPEG's grid at one place.
ALIGNMENT_PX = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What is settled once per slide.

    Attributes:
        pooling: what the network's global poolings are frozen at; None where it has none, or where
            each window pools for itself.
        accuracy_db: PSNR of the engine's results, before they are rounded to 8 bits, against the
            float32 reference's on some of the slide's tissue, over all px and channels; infinite
            where they are equal, NaN where it was not measured.
        numbers: what an adaptive network takes the LR for, by the names of
            `carn.degradation.numbers.NUMBERS`; empty for other networks, and where each window
            pools for itself.
        pixels: sharpness of the tissue; None where it was not looked at.
    """

    pooling: Pooling | None
    accuracy_db: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    pixels: PixelEstimates | None = None

    def to_bytes(self) -> bytes:
        """As bytes for another process; `from_bytes` is the way back."""
        pixels = self.pixels and dataclasses.asdict(self.pixels)
        facts = {"accuracy_db": self.accuracy_db, "numbers": dict(self.numbers), "pixels": pixels}
        head = json.dumps(facts).encode()
        means = self.pooling.to_bytes() if self.pooling else b""
        return struct.pack("<I", len(head)) + head + means

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """What `to_bytes` wrote.

        Raises:
            CarnError: the bytes are something else.
        """
        try:
            (length,) = struct.unpack_from("<I", content)
            start, stop = struct.calcsize("<I"), struct.calcsize("<I") + length
            facts = json.loads(content[start:stop])
            pixels = facts["pixels"] and _pixels_of(facts["pixels"])
            accuracy_db, numbers = float(facts["accuracy_db"]), dict(facts["numbers"])
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise CarnError(f"these {len(content)} bytes are no stored calibration") from error
        pooling = Pooling.from_bytes(content[stop:]) if content[stop:] else None
        return cls(pooling=pooling, accuracy_db=accuracy_db, numbers=numbers, pixels=pixels)


def _pixels_of(values: Mapping[str, Any]) -> PixelEstimates:
    estimates = {
        name: values[name] and Estimate(**values[name]) for name in ("blur_px", "noise_levels")
    }
    return PixelEstimates(**{**values, **estimates})


def calibrate(
    view: LrView,
    model: nn.Module,
    engine: Engine,
    *,
    tissue: TissueCells | None = None,
    seed: int = 1,
    pools: bool = True,
    side_px: int = 128,
    num_windows: int = 32,
    num_probes: int = 4,
) -> Calibration:
    """Measure the network's global poolings on a slide, set them on the engine, and try it out.

    Args:
        view: the slide or image.
        model: the network, in evaluation mode.
        engine: what runs it; its pooling is replaced.
        tissue: where to look; None is everywhere.
        seed: of the choice of windows.
        pools: freeze the poolings; otherwise each window pools for itself.
        side_px: side of a window in LR px, a multiple of ALIGNMENT_PX.
        num_windows: windows to pool over, fewer where the network takes much memory or there is
            little of it.
        num_probes: windows, at most, to hold the engine against the reference on; with 0 the
            accuracy is NaN.

    Raises:
        DamagedTileError: no window can be decoded.
        StorageError: storage failed under a read.
        CarnError: memory does not suffice for one window.
    """
    pools = pools and has_pooling(model)
    if not pools and not num_probes:
        engine.set_pooling(None)
        return Calibration(pooling=None, accuracy_db=math.nan)
    tissue = TissueCells.everywhere(view.extent) if tissue is None else tissue
    halo = engine.halo_px
    pooled_px = _max_pooled_px(model)
    num_windows = max(1, min(num_windows, pooled_px // (side_px + 2 * halo) ** 2))
    sides = {"side_px": side_px, "num_windows": num_windows, "halo_px": halo, "seed": seed}
    max_whole_px = min(MAX_WHOLE_PX, pooled_px) if pools else 0
    windows, weights = sample_windows(view, tissue, **sides, max_whole_px=max_whole_px)
    pooling = None
    if pools:
        pooling = _pooled(model, windows, weights, halo_px=halo)
        if pooling is None and len(windows) == 1:  # the view as a whole
            logger.warning(
                "out of memory while pooling over all of %s: sampling it", view.slide.uri
            )
            windows, weights = sample_windows(view, tissue, **sides, max_whole_px=0)
            pooling = _pooled(model, windows, weights, halo_px=halo)
        if pooling is None:
            raise CarnError(
                f"memory does not suffice to pool over one window of {side_px} + 2 x {halo} px; "
                "give the process more memory, or run fewer of them beside each other"
            )
    engine.set_pooling(pooling)
    accuracy_db = math.nan
    if num_probes:
        reference = reference_engine(model, self_ensemble=engine.self_ensemble)
        reference.set_pooling(pooling)
        probes = _probes(windows, number=num_probes, halo_px=halo, side_px=side_px)
        accuracy_db = compare(engine, reference, probes).psnr_db
    return Calibration(
        pooling=pooling,
        accuracy_db=accuracy_db,
        numbers=_numbers(model, pooling),
        # Of images smaller than a block nothing is told.
        pixels=describe_windows(windows) if min(windows[0].shape[:2]) >= BLOCK_PX else None,
    )


def _numbers(model: nn.Module, pooling: Pooling | None) -> dict[str, float]:
    """What an adaptive network takes LR for where its poolings are frozen; nothing of others."""
    if pooling is None or not isinstance(model, AdaptiveCarn):
        return {}
    adaptive = frozen(model, pooling)
    assert isinstance(adaptive, AdaptiveCarn)
    with torch.no_grad():
        # Frozen, the estimate does not depend on pixels.
        found = adaptive.numbers(torch.zeros(1, 3, 8, 8, device=adaptive.told.device))
    return dict(zip(NUMBERS, found.flatten().tolist(), strict=True))


def sample_windows(
    view: LrView,
    tissue: TissueCells,
    *,
    side_px: int = 128,
    num_windows: int = 32,
    halo_px: int,
    seed: int,
    max_whole_px: int = MAX_WHOLE_PX,
) -> tuple[list[Rgb], list[NDArray[np.bool_]]]:
    """Windows that stand for a slide's tissue, and which of their px count.

    Where the whole view, context included, has at most `max_whole_px`, it is the one window.
    Otherwise tissue is put in the order of a Z curve and cut into as many parts as there are
    windows; each is centred on a px drawn from its part. Places that cannot be decoded are left
    out; the same seed gives the same windows.

    Args:
        view: the slide or image.
        tissue: its tissue.
        side_px: side of a window in LR px, a multiple of ALIGNMENT_PX.
        num_windows: how many.
        halo_px: LR px of context to each side, mirrored beyond the slide's border.
        seed: of the draw.
        max_whole_px: LR px up to which the view is taken whole.

    Returns:
        (side + 2 * halo_px, side + 2 * halo_px, 3) uint8 each, and for each (side, side) bool,
        True on the slide's tissue. Windows are distinct, of one shape, and hold tissue.

    Raises:
        DamagedTileError: no window can be decoded.
        StorageError: storage failed under a read.
    """
    width, height = view.extent
    damage: DamagedTileError | None = None
    if (width + 2 * halo_px) * (height + 2 * halo_px) <= max_whole_px:
        counts = tissue.is_tissue(np.arange(width), np.arange(height))
        try:
            whole = view.read(-halo_px, -halo_px, width + 2 * halo_px, height + 2 * halo_px)
            return [whole], [counts if counts.any() else np.ones_like(counts)]
        except DamagedTileError as error:
            damage = error
    windows, weights = [], []
    for x, y in _corners(tissue, side_px=side_px, num_windows=num_windows, seed=seed):
        counts = tissue.is_tissue(np.arange(x, x + side_px), np.arange(y, y + side_px))
        if not counts.any():  # moved off a speck by the alignment
            continue
        side = side_px + 2 * halo_px
        try:
            windows.append(view.read(x - halo_px, y - halo_px, side, side))
            weights.append(counts)
        except DamagedTileError as error:
            damage = error
    if not windows:
        assert damage is not None  # the window on a part's middle px would hold that px
        raise damage
    return windows, weights


def _corners(
    tissue: TissueCells, *, side_px: int, num_windows: int, seed: int
) -> list[tuple[int, int]]:
    """Top-left corners of windows in LR px, distinct, at multiples of ALIGNMENT_PX."""
    width, height = tissue.extent
    # Px of the mask, or cells where there is none.
    where = tissue.cells if tissue.mask is None else tissue.mask
    rows, columns = np.nonzero(where)
    order = np.argsort(_interleaved(rows) * 2 + _interleaved(columns), kind="stable")
    rng = np.random.default_rng(seed)
    corners: dict[tuple[int, int], None] = {}
    edges = np.linspace(0, len(order), num_windows + 1)
    for start, stop in itertools.pairwise(edges):
        number = order[min(int(rng.uniform(start, stop)), len(order) - 1)]
        shift_x, shift_y = rng.uniform(size=2)
        unit_x, unit_y = width / where.shape[1], height / where.shape[0]
        if tissue.mask is None:
            unit_x = unit_y = CELL_PX
        x = (columns[number] + shift_x) * unit_x - side_px / 2
        y = (rows[number] + shift_y) * unit_y - side_px / 2
        corners[_aligned(x, width - side_px), _aligned(y, height - side_px)] = None
    return list(corners)


def _aligned(place: float, last: int) -> int:
    """A multiple of ALIGNMENT_PX near a place, where a window lies on the slide."""
    return round(min(max(place, 0), max(last, 0)) / ALIGNMENT_PX) * ALIGNMENT_PX


def _interleaved(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers below 2**16 with a 0 before each bit: half of a place on a Z curve.

    Source: S. E. Anderson, "Bit twiddling hacks", interleave bits by binary magic numbers,
    https://graphics.stanford.edu/~seander/bithacks.html#InterleaveBMN.
    """
    spread = numbers.astype(np.int64)
    for shift, bits in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        spread = (spread | (spread << shift)) & bits
    return spread


def _pooled(
    model: nn.Module,
    windows: Sequence[Rgb],
    weights: Sequence[NDArray[np.bool_]],
    *,
    halo_px: int,
) -> Pooling | None:
    """The means over windows, of every second one as often as it takes until memory suffices.

    They lie in the order of a Z curve, so that every second one still comes from all of the tissue.

    Returns:
        None where memory does not suffice for one.
    """
    device = next(model.parameters()).device
    step = 1
    while step <= len(windows):
        pool = partial(pool_over, halo_px=halo_px, weights=weights[::step])
        pooling = if_memory_suffices(partial(pool, model, windows[::step]))
        if pooling is not None:
            if step > 1:
                logger.warning(
                    "out of memory on %s while pooling over %d windows: going on with %d",
                    *(device, len(windows), len(windows[::step])),
                )
            return pooling
        free_memory(device)
        step *= 2
    return None


def _max_pooled_px(model: nn.Module) -> int:
    """LR px, context included, that one pooling pass of a model may hold."""
    # SWD-Net's last poolings lie behind its upsampler: see `carn.upscaling.pooling`.
    share = max(1.0, model.scale**2 / 4) if isinstance(model, SwdNet) else 1.0
    return int(MAX_POOLED_PX / share)


def _probes(windows: Sequence[Rgb], *, number: int, halo_px: int, side_px: int) -> list[Rgb]:
    """Up to `number` of the windows, evenly chosen, cut to `side_px` and context."""
    number = min(number, len(windows))
    chosen = [windows[place * len(windows) // number] for place in range(number)]
    probes = []
    for window in chosen:
        height, width = window.shape[:2]
        top, left = (max(0, (side - side_px - 2 * halo_px) // 2) for side in (height, width))
        side = side_px + 2 * halo_px
        probes.append(np.ascontiguousarray(window[top : top + side, left : left + side]))
    return probes
