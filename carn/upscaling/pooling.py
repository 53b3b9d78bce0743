"""Global poolings measured once over many windows of a slide, and then kept fixed.

CARN, RCAN and SWD-Net pool over all pixels they are shown, so a window's result depends on where it
was cut, and neighbours disagree at their seam. With the means measured once per slide and frozen, a
network is purely convolutional: windows agree wherever they are cut, given enough context.

Frozen means were suggested by the local means of Chu et al., "Improving image restoration by
revisiting global information aggregation", https://arxiv.org/abs/2112.04491, which still differ
from place to place.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from carn.errors import CarnError
from carn.models.layers import GlobalMean
from carn.models.swdnet import SwdNet, WeightedMean
from carn.slides.slide import Rgb

MAX_POOLED_PX = 1 << 22
"""LR px (halos included) that one pass may hold, over all windows.

In float32 each feature map of 64 channels takes 256 bytes a px, and about four live at a time: 1.3
GB for 32 windows of 128 + 72 px (1.28 Mpx), 4 GB at this limit. SWD-Net's last poolings lie behind
its upsampler: there a px of LR counts as scale**2 / 4 of them.
"""


@dataclass(frozen=True, eq=False)
class Pooling:
    """What each global pooling of a model gave.

    Attributes:
        means: (1, channels, 1, 1) float32 on the CPU, by the pooling's module name.
    """

    means: Mapping[str, Tensor]

    def to_bytes(self) -> bytes:
        """As safetensors, equal for equal means; `from_bytes` is the way back."""
        import safetensors.torch

        return safetensors.torch.save(
            {name: mean.contiguous() for name, mean in self.means.items()}
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> "Pooling":
        """What `to_bytes` wrote.

        Raises:
            CarnError: the bytes are something else.
        """
        import safetensors
        import safetensors.torch

        try:
            return cls(safetensors.torch.load(content))
        except (safetensors.SafetensorError, ValueError) as error:
            raise CarnError(
                f"these {len(content)} bytes are no stored pooling ({error}); measure it again"
            ) from error


def pooling_names(model: nn.Module) -> tuple[str, ...]:
    """Module names of a model's global poolings, in the order of its modules."""
    kinds = (GlobalMean, WeightedMean)
    return tuple(name for name, module in model.named_modules() if isinstance(module, kinds))


def has_pooling(model: nn.Module) -> bool:
    """Whether a window's result depends on all of its pixels."""
    return bool(pooling_names(model))


def pool_over(
    model: nn.Module,
    windows: Sequence[Rgb],
    *,
    halo_px: int,
    weights: Sequence[NDArray[np.bool_]] | None = None,
) -> Pooling:
    """The means of a model's global poolings over the interiors of all windows taken together.

    One float32 pass over all windows at once, where the model lies. Each pooling hands every window
    the common mean, so later layers see the gates of earlier ones as they will be: the result is
    that of a pass over one image made of the interiors (where they tile it, and but for its
    zero-padded rim). A px of a coarser feature map counts by the share of its area that does.

    Args:
        model: a model of MODELS; it is not changed.
        windows: (h + 2 * halo_px, w + 2 * halo_px, 3), all of one shape, cut at positions that are
            multiples of 4; at most MAX_POOLED_PX in all.
        halo_px: LR px of context to each side, a multiple of 4; best the engine's.
        weights: for each window, which of its (h, w) px count; None for all of them.

    Raises:
        ValueError: no windows, shapes that differ or hold no interior, more than MAX_POOLED_PX, or
            weights that leave nothing.
    """
    names = pooling_names(model)
    if not names:
        return Pooling({})
    shape = _checked_shape(windows, halo_px=halo_px)
    pixels_per_px = max(1.0, int(model.scale) ** 2 / 4) if isinstance(model, SwdNet) else 1.0
    if (total := len(windows) * shape[0] * shape[1] * pixels_per_px) > MAX_POOLED_PX:
        raise ValueError(
            f"{len(windows)} windows of {shape[1]} x {shape[0]} px are {total:,.0f} px to pool "
            f"over, and one pass holds {MAX_POOLED_PX:,}; sample fewer or smaller windows"
        )
    population = _Population(
        window_px=shape,
        halo_px=halo_px,
        counts=_counts(weights, shape=shape, halo_px=halo_px, number=len(windows)),
        num_left=len(names),
    )
    device = next(model.parameters()).device
    pooled = copy.deepcopy(model).float().eval()
    means: dict[str, Tensor] = {}
    for name in names:
        module = pooled.get_submodule(name)
        kind = _PopulationWeightedMean if isinstance(module, WeightedMean) else _PopulationMean
        pooled.set_submodule(name, kind(population, means, name))
    pooled.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.inference_mode():
        # Channels lie together in this memory already.
        lr = torch.from_numpy(np.stack(windows)).to(device).permute(0, 3, 1, 2).float() / 255
        with suppress(_AllPooledError):
            pooled(lr)
    return Pooling({name: means[name].clone() for name in names})


def frozen(model: nn.Module, pooling: Pooling) -> nn.Module:
    """A copy of the model whose global poolings return fixed means: purely convolutional.

    Raises:
        ValueError: the means are another model's.
    """
    check_pooling(model, pooling)
    copied = copy.deepcopy(model)
    for name, mean in pooling.means.items():
        device = next(model.parameters()).device
        copied.set_submodule(name, FrozenMean(mean.to(device), name=name))
    return copied


def refreeze(copied: nn.Module, pooling: Pooling) -> None:
    """Give a copy that `frozen` made other means, in place, whatever has been wrapped round it."""
    with torch.no_grad():
        for module in copied.modules():
            if isinstance(module, FrozenMean):
                module.mean.copy_(pooling.means[module.name])


def check_pooling(model: nn.Module, pooling: Pooling) -> None:
    """Raise ValueError where the means are not those of this model's poolings."""
    names = set(pooling_names(model))
    if names != set(pooling.means):
        raise ValueError(
            f"the pooling was measured with another model: it has {_listed(set(pooling.means))}, "
            f"{type(model).__name__} has {_listed(names)}; measure it again with pool_over"
        )


class FrozenMean(nn.Module):
    """Stands for a global pooling: the same means whatever the pixels."""

    mean: Tensor

    def __init__(self, mean: Float[Tensor, "1 c 1 1"], *, name: str) -> None:
        super().__init__()
        self.name = name  # of the pooling it stands for
        self.register_buffer("mean", mean.clone(), persistent=False)

    def forward(
        self, x: Float[Tensor, "b c h w"], *, scores: Float[Tensor, "b 1 h w"] | None = None
    ) -> Float[Tensor, "1 c 1 1"]:
        """The means in the type of the features."""
        del scores
        return self.mean.to(x.dtype)


class _AllPooledError(Exception):
    """The last pooling is done: what the network does beyond it is not wanted."""


@dataclass
class _Population:
    """The windows of a pass: their size, which of their px count, how many poolings are to come."""

    window_px: tuple[int, int]
    halo_px: int
    counts: Tensor  # (number, h, w) float32, on LR px of the interior
    num_left: int

    def interiors(self, x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """For each window where its interior lies in a feature map, and how much each px counts."""
        spans = [
            _interior(features, window_px=window, halo_px=self.halo_px)
            for features, window in zip(x.shape[-2:], self.window_px, strict=True)
        ]
        size = (spans[0].stop - spans[0].start, spans[1].stop - spans[1].start)
        for count in self.counts:
            area = functional.interpolate(count[None, None].to(x.device), size=size, mode="area")
            yield spans[0], spans[1], area[0, 0].double()


def _interior(features: int, *, window_px: int, halo_px: int) -> slice:
    """Along one axis of a feature map, what a window's interior became."""
    # Grids are multiples of a quarter LR px, or blocks of eight; sides that they do not divide were
    # continued or cut a little.
    ratio = Fraction(round(4 * features / window_px), 4) or Fraction(1, 8)
    # Blocks that do not fit the window whole are left out.
    return slice(round(halo_px * ratio), min(round((window_px - halo_px) * ratio), features))


class _PopulationMean(nn.Module):
    """Mean of each channel over the interiors of all windows, for every window."""

    def __init__(self, population: _Population, means: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self._population = population
        self._means = means
        self._name = name

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        """The common means, once for each window."""
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        count = torch.zeros((), dtype=torch.float64, device=x.device)
        places = self._population.interiors(x)
        for window, (rows, columns, area) in zip(x, places, strict=True):
            total += torch.einsum("chw,hw->c", window[:, rows, columns].double(), area)
            count += area.sum()
        return self._handed_out(total / count, num_windows=x.shape[0])

    def _handed_out(self, mean: Tensor, *, num_windows: int) -> Tensor:
        mean = mean.float()[None, :, None, None]
        assert self._name not in self._means  # once each, or num_left would lie
        self._means[self._name] = mean.cpu()
        self._population.num_left -= 1
        if not self._population.num_left:
            raise _AllPooledError
        return mean.expand(num_windows, -1, 1, 1)


class _PopulationWeightedMean(_PopulationMean):
    """Likewise, weighted by the softmax of the scores of all windows together."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b c h w"], *, scores: Float[Tensor, "b 1 h w"]
    ) -> Float[Tensor, "b c 1 1"]:
        """The common means, once for each window."""
        # On the scores of all px, halos too: any number serves, as long as exp stays finite.
        largest = scores.max().double()
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        count = torch.zeros((), dtype=torch.float64, device=x.device)
        places = self._population.interiors(x)
        for window, score, (rows, columns, area) in zip(x, scores, places, strict=True):
            share = area * (score[0, rows, columns].double() - largest).exp()
            total += torch.einsum("chw,hw->c", window[:, rows, columns].double(), share)
            count += share.sum()
        return self._handed_out(total / count, num_windows=x.shape[0])


def _checked_shape(windows: Sequence[Rgb], *, halo_px: int) -> tuple[int, int]:
    shapes = {window.shape for window in windows}
    if len(shapes) != 1:
        raise ValueError(f"windows must be of one shape and at least one, not {sorted(shapes)}")
    (shape,) = shapes
    if len(shape) != 3 or shape[2] != 3 or min(shape[:2]) <= 2 * halo_px:
        raise ValueError(f"windows of shape {shape} leave no RGB within a halo of {halo_px} px")
    return shape[0], shape[1]


def _counts(
    weights: Sequence[NDArray[np.bool_]] | None,
    *,
    shape: tuple[int, int],
    halo_px: int,
    number: int,
) -> Tensor:
    size = (shape[0] - 2 * halo_px, shape[1] - 2 * halo_px)
    if weights is None:
        return torch.ones(number, *size)
    if len(weights) != number or any(weight.shape != size for weight in weights):
        raise ValueError(f"weights must be {number} of shape {size}, one for each interior")
    counts = torch.from_numpy(np.stack(weights)).float()
    if not counts.any():
        raise ValueError("no px of any window counts; choose windows that hold tissue")
    return counts


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
