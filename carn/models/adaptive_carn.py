"""CARN that adapts to how its input was made: sharp or soft, clean, noisy or compressed.

A network trained on all kinds of LR at once has to guess, px by px, whether LR is soft because of
the optics or because of the tissue. This one estimates for the whole image how LR was made, and
tells each block. With frozen poolings it is a plain CARN with other weights, so that it costs
nothing where slides are super-resolved.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carn.degradation.numbers import NUMBERS
from carn.models.carn import Carb, Carn, CarnConfig, ChannelAttentionRetention
from carn.models.checks import check_counts
from carn.models.layers import GlobalMean, conv3x3

# The estimator looks at differences of neighbours, which are small: those of tissue are about
# 1/16 of the range.
_DETAIL_GAIN = 16.0
# JPEG works on blocks of this many px.
_BLOCK_PX = 8
# Luma of BT.601, which JPEG compresses.
_LUMA = (0.299, 0.587, 0.114)
# Frequencies (rows, columns) of a block whose coefficients JPEG makes zero on tissue, at the
# qualities of scanners: neither the lowest, nor those that are zero without it.
_FREQUENCIES = tuple((v, u) for v in range(5) for u in range(5) if 2 <= u + v <= 5)
# Grey levels within which a coefficient counts as zero: JPEG's pixels are rounded.
_ZERO_LEVELS = 0.8
# Standard deviation of what is added to the numbers while training, about their error: on tissue
# unlike that of training the estimate is wrong in new ways, which must not matter much.
_JITTER = 0.1
# Below it the logarithm of a mean feature says nothing.
_LEAST_FEATURE = 1e-3


@dataclass(frozen=True, kw_only=True)
class AdaptiveCarnConfig(CarnConfig):
    """CARN's configuration, and the size of what adapts it."""

    estimator_channels: int = 32
    """Feature channels of the estimator."""
    embedding: int = 64
    """Channels between the estimate and the blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(estimator_channels=self.estimator_channels, embedding=self.embedding)


class DegradationEstimator(nn.Module):
    """Estimate from LR how it was made: the numbers that `carn.degradation.numbers` defines.

    Sharpness and noise: four 3x3 convolutions see how each px differs from the mean of its
    neighbourhood, so that colour and brightness do not count; the logarithms of each layer's means
    over the image decide, so that ratios count. Compression: how many cosine coefficients of blocks
    of 8 x 8 px are near zero, for each of the 64 places where JPEG's grid may begin; the largest
    and the mean over these places decide.
    """

    cosines: Tensor

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(conv3x3(inputs, channels), nn.ReLU(inplace=True))
            for inputs in (3, channels, channels, channels)
        )
        self.means = nn.ModuleList(GlobalMean() for _ in self.layers)
        self.zeros = GlobalMean()
        self.register_buffer("cosines", _cosines(), persistent=False)
        inputs = len(self.layers) * channels + 2 * len(_FREQUENCIES)
        self.head = nn.Sequential(
            nn.Conv2d(inputs, 64, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, len(NUMBERS), 1),
        )

    def forward(self, lr: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "#b n 1 1"]:
        """Estimate from LR on 0..1; one for all images where poolings are frozen."""
        mean = functional.avg_pool2d(lr, 3, stride=1, padding=1, count_include_pad=False)
        features = (lr - mean) * _DETAIL_GAIN
        means = []
        for layer, pool in zip(self.layers, self.means, strict=True):
            features = layer(features)
            means.append(pool(features).float())
        # Rounding to bf16 here would show in every px.
        with _unrounded(lr.device):
            details = (torch.cat(means, dim=1) + _LEAST_FEATURE).log()
            estimate: Tensor = self.head(
                torch.cat([details, *self._compression(lr.float())], dim=1)
            )
        return estimate

    def _compression(self, lr: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor]:
        """Shares of coefficients near zero: of the likeliest grid, and over all grids."""
        luma = (lr * lr.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True) * 255
        if min(luma.shape[-2:]) < 2 * _BLOCK_PX:
            luma = functional.pad(luma, (0, 2 * _BLOCK_PX, 0, 2 * _BLOCK_PX), mode="replicate")
        coefficients = functional.conv2d(luma, self.cosines)
        height, width = (side // _BLOCK_PX * _BLOCK_PX for side in coefficients.shape[-2:])
        near = torch.exp(-(coefficients[..., :height, :width] / _ZERO_LEVELS).square())
        # A channel for each frequency and each place in the grid.
        by_place: Tensor = self.zeros(functional.pixel_unshuffle(near, _BLOCK_PX))
        shares = by_place.float().reshape(-1, len(_FREQUENCIES), _BLOCK_PX**2, 1, 1)
        return 4 * shares.amax(dim=2), 4 * shares.mean(dim=2)


def _unrounded(device: torch.device) -> AbstractContextManager[object]:
    """No autocast; nothing where there is none to switch off, such as for counting operations."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()


def _cosines() -> Float[Tensor, "f 1 8 8"]:
    """The two-dimensional DCT-II of a block at _FREQUENCIES, orthonormal."""
    place = torch.arange(_BLOCK_PX, dtype=torch.float64)
    order = place[:, None]
    waves = torch.cos((2 * place + 1) * order * torch.pi / (2 * _BLOCK_PX)) * 0.5
    waves[0] *= 0.5**0.5
    kernels = [torch.outer(waves[v], waves[u]) for v, u in _FREQUENCIES]
    return torch.stack(kernels)[:, None].float()


class Adaptation(nn.Module):
    """Turn an estimate into a factor and a shift for each block's middle, and a shift of its gate.

    All are zero at first, so that training can start from a plain CARN's weights.
    """

    def __init__(self, channels: int, *, num_blocks: int, embedding: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(len(NUMBERS), embedding, 1), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(
            nn.Conv2d(embedding, 3 * channels, 1) for _ in range(num_blocks)
        )
        for block in self.blocks:
            assert isinstance(block, nn.Conv2d)
            nn.init.zeros_(block.weight)
            assert block.bias is not None
            nn.init.zeros_(block.bias)

    def forward(
        self, numbers: Float[Tensor, "#b n 1 1"]
    ) -> list[tuple[Float[Tensor, "b c 1 1"], ...]]:
        """Factor less one, shift and shift of the gate's logit, for each block."""
        with _unrounded(numbers.device):
            embedded = self.embed(numbers.float())
            return [block(embedded).chunk(3, dim=1) for block in self.blocks]


class AdaptiveCarn(Carn):
    """CARN whose blocks are told how LR was made, by its own estimate unless somebody says.

    In each CARB the features before the first ReLU are scaled and shifted channel by channel, and
    the logits of its gate are shifted, all by an affine function of the embedded estimate.

    Source: the network is the CARN paper's (see `Carn`), the adaptation this project's; scaling and
    shifting features by a condition is that of Perez et al. 2018, https://arxiv.org/abs/1709.07871,
    telling a super-resolver its degradation that of Zhang et al. 2018,
    https://arxiv.org/abs/1712.06116.
    """

    told: Tensor

    def __init__(self, config: AdaptiveCarnConfig, *, scale: int) -> None:
        """The network with fresh weights, which make it CARN at first.

        Raises:
            ValueError: the scale is not 2, 3, 4 or 8.
        """
        super().__init__(config, scale=scale)
        self.estimator = DegradationEstimator(channels=config.estimator_channels)
        self.adaptation = Adaptation(
            config.channels, num_blocks=config.num_blocks, embedding=config.embedding
        )
        # NaN where the estimate counts.
        told = torch.full((1, len(NUMBERS), 1, 1), torch.nan)
        self.register_buffer("told", told, persistent=False)

    def tell(self, numbers: Mapping[str, float]) -> None:
        """Say how LR was made, from now on, in place of the estimate.

        Args:
            numbers: some of `carn.degradation.numbers.NUMBERS` by name; the rest is estimated.

        Raises:
            ValueError: an unknown name.
        """
        if unknown := sorted(numbers.keys() - set(NUMBERS)):
            raise ValueError(f"{', '.join(unknown)} is not one of {', '.join(NUMBERS)}")
        values = [numbers.get(name, torch.nan) for name in NUMBERS]
        self.told.copy_(torch.tensor(values).view_as(self.told))

    def numbers(self, lr: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "#b n 1 1"]:
        """What the blocks go by: the estimate from LR on 0..1, but for what was told."""
        estimate: Tensor = self.estimator(lr)
        return torch.where(self.told.isnan(), estimate, self.told)

    def forward(
        self, lr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR, both RGB on 0..1; the result is not clamped.

        Estimate and CARs pool over the whole of `lr`, so a crop's result is not the crop of the
        result.
        """
        numbers = self.numbers(lr)
        if self.training:
            numbers = numbers + _JITTER * torch.randn_like(numbers)
        return self.upscale(lr, numbers)

    def upscale(
        self, lr: Float[Tensor, "b 3 h w"], numbers: Float[Tensor, "#b n 1 1"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR that was made in a known way; see `forward`."""
        shallow: Tensor = self.head(self.pixels.centre(lr))
        features = shallow
        *blocks, last = self.body
        for block, changes in zip(blocks, self.adaptation(numbers), strict=True):
            features = features + _residual(block, features, changes)
        return self.pixels.restore(self.tail(shallow + last(features)))


@dataclass(frozen=True, kw_only=True)
class AdaptedLayers:
    """The layers of a CARB that an estimate changes.

    Attributes:
        middle: the convolution before the first ReLU.
        gate: the last convolution of the gate.
    """

    middle: nn.Conv2d
    gate: nn.Conv2d

    @classmethod
    def of(cls, model: Carn) -> "list[AdaptedLayers]":
        """Those of each block, in their order."""
        found = []
        for block in model.body:
            if isinstance(block, Carb):
                attention = block.residual[-1]
                assert isinstance(attention, ChannelAttentionRetention)
                middle, gate = block.residual[1], attention.gate[-2]
                assert isinstance(middle, nn.Conv2d)
                assert isinstance(gate, nn.Conv2d)
                found.append(cls(middle=middle, gate=gate))
        return found


def adapted(model: AdaptiveCarn) -> Carn:
    """A plain CARN with copies of an adaptive one's layers, which `adapt` adapts."""
    fields = {
        field.name: getattr(model.config, field.name) for field in dataclasses.fields(CarnConfig)
    }
    with torch.random.fork_rng(devices=[]):  # initial weights draw numbers that are the caller's
        plain = Carn(CarnConfig(**fields), scale=model.scale)
    for name in ("pixels", "head", "body", "tail"):
        setattr(plain, name, copy.deepcopy(getattr(model, name)))
    return plain.train(model.training)


def adapt(
    layers: Sequence[AdaptedLayers], model: AdaptiveCarn, numbers: Float[Tensor, "1 n 1 1"]
) -> None:
    """Make a plain CARN, in place, what an adaptive one is where LR was made in one known way.

    Args:
        layers: of the plain CARN, on whatever device and of whatever type.
        model: the adaptive one, which is not changed.
        numbers: as `AdaptiveCarn.numbers` gives them for one image.
    """
    with torch.no_grad():
        for layer, own, (factor, shift, gate_shift) in zip(
            layers, AdaptedLayers.of(model), model.adaptation(numbers), strict=True
        ):
            wide = 1 + factor.flatten()
            for conv, scale, offset in (
                ((layer.middle, own.middle), wide, shift),
                ((layer.gate, own.gate), torch.ones_like(wide), gate_shift),
            ):
                changed, source = conv
                assert changed.bias is not None
                assert source.bias is not None
                changed.weight.copy_(source.weight * scale[:, None, None, None])
                changed.bias.copy_(source.bias * scale + offset.flatten())


def _residual(block: nn.Module, features: Tensor, changes: tuple[Tensor, ...]) -> Tensor:
    """What a block adds to its features, changed as told."""
    assert isinstance(block, Carb)
    first, second, relu, third, fourth, _, attention = block.residual
    assert isinstance(attention, ChannelAttentionRetention)
    factor, shift, gate_shift = changes
    middle: Tensor = second(first(features))
    middle = relu(torch.addcmul(middle + shift.to(middle.dtype), middle, factor.to(middle.dtype)))
    last: Tensor = relu(fourth(third(middle)))
    *layers, sigmoid = attention.gate
    gate: Tensor = last
    for layer in layers:
        gate = layer(gate)
    result: Tensor = last * sigmoid(gate + gate_shift.to(gate.dtype))
    return result
