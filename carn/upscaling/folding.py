"""Networks rewritten to compute the same function in fewer passes and multiplications.

1. A channel gate that is frozen is a constant: CARN's is positive and follows a ReLU, and
   gate * ReLU(conv) = ReLU(gate * conv); RCAN's follows a convolution. Both become part of that
   convolution's kernel and bias.
2. From the upsampler on nothing is nonlinear: all of it is one 5x5 convolution to 3 * scale**2
   channels and one PixelShuffle. Zero padding inside the upsampler is lost: SR of the outermost two
   LR px differs, so callers crop at least these (a halo as wide as the receptive radius does).
3. An adaptive CARN whose estimate is frozen is a plain CARN with other weights.
4. EDSR's scale of residuals and SRGAN's batch normalization become part of the convolution before.

The mean that networks take away first stays where it is: in a bias it would change the zero padding
of the first convolution.

FLOP of CARN for each LR px: 2.745 M become 2.475 M at x2, 3.97 M 2.59 M at x4, 8.85 M 3.05 M at x8.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from carn.models.adaptive_carn import AdaptedLayers, AdaptiveCarn, adapt, adapted
from carn.models.carn import Carb, Carn, ChannelAttentionRetention
from carn.models.edsr import Edsr
from carn.models.edsr import ResidualBlock as EdsrBlock
from carn.models.layers import upsampler_reach_px
from carn.models.rcan import ChannelAttention, Rcab, Rcan, ResidualGroup
from carn.models.rdn import Rdb, Rdn
from carn.models.srgan import Srgan
from carn.upscaling.pooling import FrozenMean, Pooling, frozen, refreeze


def can_fold(model: nn.Module) -> bool:
    """Whether `fold` makes anything of this model."""
    return isinstance(model, (Carn, Rcan, Edsr, Rdn, Srgan))


def fold(model: nn.Module, pooling: Pooling | None) -> nn.Module:
    """A copy of the model, as fast as it gets without rounding otherwise; float32.

    Args:
        model: a model of MODELS in evaluation mode; one that cannot be folded is copied only.
        pooling: freezes the global poolings at these means; None keeps them and their gates.

    Returns:
        A network with the model's contract, equal to it but for float32 roundings, beyond 2 LR px
        from the border.

    Raises:
        ValueError: the means are another model's.
    """
    folded = copy.deepcopy(model) if pooling is None else frozen(model, pooling)
    folded.requires_grad_(requires_grad=False)
    if not can_fold(model):
        return folded
    parts: list[_FoldedPart] = []
    if isinstance(folded, AdaptiveCarn):
        if pooling is None:  # each window has weights of its own
            _fold_tail(folded)
            return folded
        adaptive, folded = folded, adapted(folded)
        folded.requires_grad_(requires_grad=False)
        parts.append(_FoldedAdaptation(adaptive=adaptive, layers=AdaptedLayers.of(folded)))
        _set_all(parts, pooling)  # gates take their kernels from here
    if pooling is not None:
        parts += _take_out_gates(folded)
        folded.parts = parts  # type: ignore[assignment]
    for module in folded.modules():
        if isinstance(module, nn.Sequential):
            _fuse_norms(module)
    _spare_passes(folded)
    if not isinstance(model, Srgan):
        _fold_tail(folded)
    if pooling is not None:
        refold(folded, pooling)
    return folded


def refold(folded: nn.Module, pooling: Pooling) -> None:
    """Freeze a network that `fold` made, or `frozen`, at other means: its weights change in place.

    The network may have moved to another device, type or memory format since. What was compiled or
    captured from it goes on working, and sees the new weights.
    """
    _set_all(getattr(folded, "parts", []), pooling)
    refreeze(folded, pooling)


class FoldedTail(nn.Module):
    """An upsampler and the convolution behind it as one convolution and one PixelShuffle."""

    def __init__(self, tail: nn.Sequential, *, scale: int) -> None:
        """The equal of `tail`, whose last layer gives RGB.

        Its kernel is the tail's answer to one px of one channel, worked out in float64.
        """
        super().__init__()
        reach = upsampler_reach_px(scale, tail_px=1)
        side = 2 * reach + 1
        exact = copy.deepcopy(tail).double().cpu()
        first = exact.get_submodule("0.0")
        assert isinstance(first, nn.Conv2d)
        channels = first.in_channels
        px = torch.zeros(channels + 1, channels, side, side, dtype=torch.float64)
        for channel in range(channels):
            px[channel, channel, reach, reach] = 1
        with torch.no_grad():
            # (channels + 1, 3 * scale**2, side, side): what PixelShuffle would make the answers of.
            answers = nn.functional.pixel_unshuffle(exact(px), scale)
        bias = answers[-1, :, reach, reach]
        # The answer at distance d is the weight of the px at distance -d.
        weight = (answers[:-1] - answers[-1:]).flip(2, 3).transpose(0, 1)
        conv = nn.Conv2d(channels, 3 * scale**2, side, padding=reach)
        conv.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
        conv.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.conv = conv.to(next(tail.parameters()).device)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """SR of features."""
        sr: Tensor = self.shuffle(self.conv(features))
        return sr


class Skip(nn.Module):
    """A residual block whose layers are all in `residual`."""

    def __init__(self, residual: nn.Module) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features with what the block adds to them."""
        # Into memory that is in the cache, and that nobody else reads.
        residual: Tensor = self.residual(x)
        return residual.add_(x)


class DenseLayers(nn.Module):
    """What an RDB adds to its features."""

    def __init__(self, block: Rdb) -> None:
        super().__init__()
        self.layers = block.layers
        self.fuse = block.fuse

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The residual alone."""
        seen = x
        for layer in self.layers:
            seen = torch.cat([seen, layer(seen).relu_()], dim=1)
        residual: Tensor = self.fuse(seen)
        return residual


class _FoldedPart(Protocol):
    """Something that frozen means decide, within the weights of a folded network."""

    def set_mean(self, pooling: Pooling) -> None:
        """Work it out anew, in place."""


def _set_all(parts: Sequence[_FoldedPart], pooling: Pooling) -> None:
    for part in parts:
        part.set_mean(pooling)


@dataclass(frozen=True, eq=False)
class _FoldedAdaptation:
    """An adaptive CARN within the weights of a plain one."""

    adaptive: AdaptiveCarn
    layers: Sequence[AdaptedLayers]

    def set_mean(self, pooling: Pooling) -> None:
        """Adapt the plain network to the estimate that these means give."""
        refreeze(self.adaptive, pooling)
        with torch.no_grad():
            # Frozen, the estimate does not depend on pixels.
            device = self.adaptive.told.device
            numbers = self.adaptive.numbers(torch.zeros(1, 3, 8, 8, device=device))
        adapt(self.layers, self.adaptive, numbers)


@dataclass(frozen=True, eq=False)
class _FoldedGate:
    """A gate within a convolution: how to work it out, and the kernel without it."""

    gate: nn.Sequential
    conv: nn.Conv2d
    weight: Tensor
    bias: Tensor

    def set_mean(self, pooling: Pooling) -> None:
        """Put the gate that belongs to these means into the convolution."""
        refreeze(self.gate, pooling)
        with torch.no_grad():
            pool = self.gate[0]
            assert isinstance(pool, FrozenMean)
            gate = self.gate(pool.mean).flatten()
            self.conv.weight.copy_(self.weight * gate[:, None, None, None])
            assert self.conv.bias is not None
            self.conv.bias.copy_(self.bias * gate)


def _take_out_gates(folded: nn.Module) -> list[_FoldedGate]:
    """Each gate with the convolution before it, and nothing in its place."""
    gates = []
    for block in folded.modules():
        if not isinstance(block, (Carb, Rcab)):
            continue
        layers = block.residual
        attention = layers[-1]
        assert isinstance(attention, (ChannelAttentionRetention, ChannelAttention))
        conv = layers[-3] if isinstance(block, Carb) else layers[-2]
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        gates.append(
            _FoldedGate(
                gate=attention.gate,
                conv=conv,
                weight=conv.weight.detach().clone(),
                bias=conv.bias.detach().clone(),
            )
        )
        block.residual = nn.Sequential(*list(layers)[:-1])
    return gates


def _fold_tail(folded: nn.Module) -> None:
    tail = folded.get_submodule("tail")
    assert isinstance(tail, nn.Sequential)
    scale: int = folded.scale  # type: ignore[assignment]
    folded.set_submodule("tail", FoldedTail(tail, scale=scale))


def _spare_passes(folded: nn.Module) -> None:
    """Residual blocks that add in place; EDSR's with the scale of the residual in its kernel."""
    for name, block in list(folded.named_modules()):
        if isinstance(block, EdsrBlock):
            conv = block.residual[-1]
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            conv.weight.mul_(block.residual_scale)
            conv.bias.mul_(block.residual_scale)
        if isinstance(block, (EdsrBlock, Carb, Rcab, ResidualGroup)):
            folded.set_submodule(name, Skip(block.residual))
        elif isinstance(block, Rdb):
            folded.set_submodule(name, Skip(DenseLayers(block)))


def _fuse_norms(layers: nn.Sequential) -> None:
    """Batch normalization behind a convolution, in its kernel."""
    for place in range(len(layers) - 1):
        conv, norm = layers[place], layers[place + 1]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[place] = fuse_conv_bn_eval(conv, norm).requires_grad_(requires_grad=False)
            layers[place + 1] = nn.Identity()
