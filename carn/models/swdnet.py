"""SWD-Net: a spatial stage that enlarges, and a wavelet stage that corrects its result."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carn.models.checks import check_scale
from carn.models.layers import GlobalMean, Upsampler, conv3x3, upsampler_reach_px
from carn.models.wavelet import haar, inverse_haar

_NUM_MODULES = 2
_NUM_STAGES = 3
_NUM_PAIRS = 3
# Haar channels of an RGB image, one and two levels deep.
_LEVEL_1, _LEVEL_2 = 12, 48


@dataclass(frozen=True, kw_only=True)
class SwdNetConfig:
    """The published network, which the CARN paper compares with, unless said otherwise."""

    channels: int = 32
    """Feature channels of each stream of the spatial stage; even."""
    num_blocks: int = 4
    """Residual blocks of each stream in each of the three stages of a dual-stream module."""
    wavelet_channels: int = 24
    """Feature channels of the first Haar level; the second has four times as many; even."""

    def __post_init__(self) -> None:
        for name in ("channels", "wavelet_channels"):
            count = getattr(self, name)
            if count < 2 or count % 2:
                raise ValueError(f"{name}={count} must be even and at least 2: it is halved inside")
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks={self.num_blocks} must be at least 1")


class SwdStages(NamedTuple):
    """What the losses of SWD-Net are computed from; RGB on 0..1, not clamped.

    Source of the losses: the paper that `SwdNet` names, equation 4, with the weights of its
    published code. First the spatial stage alone: sum of |spatial - hr|. Then all of it: .1 of
    that, .1 of the sum of |sr - hr| and 1 of the sum of |coefficients - haar(hr)|.
    """

    spatial: Float[Tensor, "b 3 H W"]
    """The spatial stage's SR."""
    sr: Float[Tensor, "b 3 H W"]
    """The final SR."""
    coefficients: Float[Tensor, "b 12 H_half W_half"]
    """The final SR before the inverse transform, in the order of `haar(hr)`. Where H or W is odd
    (an odd LR at x3 only), the last ones reach one px beyond `sr`."""


class ResBlock(nn.Module):
    """Two 3x3 convolutions round a PReLU, beside a skip, and a PReLU on the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(channels, channels), nn.PReLU(channels), conv3x3(channels, channels)
        )
        self.activation = nn.PReLU(channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features with what the block adds to them."""
        out: Tensor = self.activation(x + self.residual(x))
        return out


class ChannelGate(nn.Module):
    """Each channel times a gate worked out from the means of all channels, halved in between."""

    def __init__(self, channels: int, *, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            GlobalMean(),
            nn.Conv2d(channels, channels // 2, 1),
            activation,
            nn.Conv2d(channels // 2, channels, 1),
            gate,
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features, each channel times its gate."""
        gate: Tensor = self.gate(x)
        return x * gate


class WeightedMean(nn.Module):
    """Mean of each channel over all places, weighted by the softmax of their scores."""

    def forward(
        self, x: Float[Tensor, "b c h w"], *, scores: Float[Tensor, "b 1 h w"]
    ) -> Float[Tensor, "b c 1 1"]:
        """The means."""
        weights = scores.flatten(1).softmax(dim=1)
        means = torch.einsum("bcp,bp->bc", x.flatten(2), weights.to(x.dtype))
        return means[:, :, None, None]


class WFA(ChannelGate):
    """Wavelet feature adaptation: coefficients, each channel times a gate in -1..1."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, activation=nn.PReLU(channels // 2), gate=nn.Tanh())


class RCF(nn.Module):
    """Context fusion: a stream, gated by itself, plus what the other stream says of the whole.

    The other stream is averaged with weights that this stream chooses (a softmax over all px), and
    reaches this one as one number a channel. Squeeze and excitation is the gate.

    The published code computes that number and then drops it, so that the streams never meet and
    three quarters of the weights stay as they were drawn; here it counts.

    Source: the paper that `SwdNet` names, equation 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.excite = ChannelGate(channels, activation=nn.ReLU(inplace=True), gate=nn.Sigmoid())
        self.mask = nn.Conv2d(channels, 1, 1)
        self.pool = WeightedMean()
        last = nn.Conv2d(channels // 2, channels, 1)
        self.context = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1), nn.ReLU(inplace=True), last
        )
        nn.init.kaiming_normal_(self.mask.weight)
        # Zero, so that training starts from two separate streams. What lies before this layer
        # learns once it has moved; where one fusion feeds another, that takes two updates.
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)

    def forward(
        self, stream: Float[Tensor, "b c h w"], *, bypass: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b c h w"]:
        """The stream with what `bypass`, the other one on its grid, adds to it."""
        context: Tensor = self.pool(bypass, scores=self.mask(stream))
        excited: Tensor = self.excite(stream)
        fused: Tensor = excited + self.context(context)
        return fused


class DualStreamStage(nn.Module):
    """Residual blocks on a full and on a half resolution stream, which then exchange context."""

    def __init__(self, channels: int, *, num_blocks: int, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self.full_blocks = nn.Sequential(*(ResBlock(channels) for _ in range(num_blocks)))
        self.half_blocks = nn.Sequential(*(ResBlock(channels) for _ in range(num_blocks)))
        self.to_full = nn.Conv2d(channels, channels, 1)
        # The published network has no convolution from full to half in its last stage, yet counts
        # an RCF of the half stream there and leaves it idle. So that all counted weights work, the
        # last half stream is fused with averages of the full one, before it goes up.
        self.to_half = (
            nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
            if is_last
            else conv3x3(channels, channels, stride=2)
        )
        self.fuse_full = RCF(channels)
        self.fuse_half = RCF(channels)
        self.activation = nn.LeakyReLU(0.1)

    def forward(
        self, full: Float[Tensor, "b c h w"], half: Float[Tensor, "b c h_half w_half"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h_half w_half"]]:
        """Both streams, each with the other's context."""
        full, half = self.full_blocks(full), self.half_blocks(half)
        fused_half = self.fuse_half(half, bypass=self.to_half(full))
        rising = self.to_full(fused_half if self.is_last else half)
        rising = functional.interpolate(rising, size=full.shape[-2:], mode="nearest")
        fused_full = self.fuse_full(full, bypass=rising)
        return self.activation(fused_full), self.activation(fused_half)


class DualStreamModule(nn.Module):
    """Three dual-stream stages beside a skip; the half resolution stream starts and ends inside."""

    def __init__(self, channels: int, *, num_blocks: int) -> None:
        super().__init__()
        self.to_half = nn.Sequential(conv3x3(channels, channels, stride=2), nn.PReLU(channels))
        self.stages = nn.ModuleList(
            DualStreamStage(channels, num_blocks=num_blocks, is_last=number == _NUM_STAGES - 1)
            for number in range(_NUM_STAGES)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features with what the module adds to them; h and w are even."""
        full, half = x, self.to_half(x)
        for stage in self.stages:
            full, half = stage(full, half)
        return full + x


class SpatialStage(nn.Module):
    """LR pixels to SR pixels through two dual-stream modules and a sub-pixel upsampler."""

    def __init__(self, channels: int, *, num_blocks: int, scale: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            conv3x3(3, 2 * channels),
            nn.PReLU(2 * channels),
            ResBlock(2 * channels),
            conv3x3(2 * channels, channels),
            nn.PReLU(channels),
            ResBlock(channels),
        )
        self.modules_in_turn = nn.ModuleList(
            DualStreamModule(channels, num_blocks=num_blocks) for _ in range(_NUM_MODULES)
        )
        self.tail = nn.Sequential(
            conv3x3(_NUM_MODULES * channels, channels),
            nn.PReLU(channels),
            # The published network is for x2, where this is its conv3x3 and PixelShuffle 2. For the
            # other scales the CARN paper put its own upsampler there.
            Upsampler(channels, scale=scale),
            conv3x3(channels, channels),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 1),
            nn.PReLU(channels),
            conv3x3(channels, 3),
        )

    def forward(self, lr: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 H W"]:
        """SR of an LR with even sides."""
        features = self.head(lr)
        outputs = []
        for module in self.modules_in_turn:
            features = module(features)
            outputs.append(features)
        residual: Tensor = self.tail(torch.cat(outputs, dim=1))
        return residual + functional.interpolate(lr, size=residual.shape[-2:], mode="nearest")


class WAC(nn.Module):
    """Wavelet-aware convolution: one path for each band of the transform, summed.

    Square for the low band, along x, along y, and square twice for the diagonal one.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        paths: list[list[tuple[int, int]]] = [[(3, 3)], [(1, 3)] * 2, [(3, 1)] * 2, [(3, 3)] * 2]
        self.paths = nn.ModuleList()
        for kernels in paths:
            layers: list[nn.Module] = []
            width = in_channels
            for kernel in kernels:
                layers += [nn.Conv2d(width, out_channels, kernel, padding="same")]
                layers += [nn.PReLU(out_channels)]
                width = out_channels
            self.paths.append(nn.Sequential(*layers))

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h w"]:
        """The sum of the four paths."""
        low, horizontal, vertical, diagonal = (path(x) for path in self.paths)
        total: Tensor = low + horizontal + vertical + diagonal
        return total


def _wac_pairs(outer_channels: int, *, inner_channels: int) -> nn.ModuleList:
    widths = [outer_channels, *[inner_channels] * (2 * _NUM_PAIRS - 1), outer_channels]
    return nn.ModuleList(
        nn.Sequential(
            WAC(widths[2 * pair], widths[2 * pair + 1]),
            WAC(widths[2 * pair + 1], widths[2 * pair + 2]),
        )
        for pair in range(_NUM_PAIRS)
    )


class WaveletStage(nn.Module):
    """SR pixels to corrected Haar coefficients of the first level, with the help of the second."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.adapt_1 = WFA(_LEVEL_1)
        self.adapt_2 = WFA(_LEVEL_2)
        self.pairs_1 = _wac_pairs(_LEVEL_1, inner_channels=channels)
        self.pairs_2 = _wac_pairs(_LEVEL_2, inner_channels=4 * channels)
        self.fuse_1 = nn.ModuleList(RCF(width) for width in (channels, channels, _LEVEL_1))
        # None after the last pair: what level 2 finds ends in level 1.
        self.fuse_2 = nn.ModuleList(RCF(4 * channels) for _ in range(_NUM_PAIRS - 1))
        self.conv = conv3x3(_LEVEL_1, _LEVEL_1)
        # The published network counts a third adaptation, for the way back, and leaves it idle. On
        # the correction it can do no harm: on the sum it would start by wiping the image out.
        self.adapt_back = WFA(_LEVEL_1)

    def forward(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 12 H_half W_half"]:
        """Coefficients of the final SR; H and W are multiples of 4."""
        coefficients_1 = haar(image)
        coefficients_2 = haar(coefficients_1)
        level_1, level_2 = self.adapt_1(coefficients_1), self.adapt_2(coefficients_2)
        for number in range(_NUM_PAIRS):
            found_1, found_2 = self.pairs_1[number](level_1), self.pairs_2[number](level_2)
            level_1 = self.fuse_1[number](found_1, bypass=inverse_haar(found_2))
            if number < _NUM_PAIRS - 1:
                level_2 = self.fuse_2[number](found_2, bypass=haar(found_1))
        correction: Tensor = self.adapt_back(self.conv(level_1))
        return coefficients_1 + correction


class SwdNet(nn.Module):
    """SWD-Net: LR pixels to SR pixels in space, then a correction of their Haar coefficients.

    Works on 0..1 as it is, without a mean to take away. Sides that the streams of half resolution
    and the two Haar levels do not divide are continued by mirrored px at the right and at the
    bottom, and the result is cropped.

    Source: Chen, Guo, Yang, Ibragimov, Yuan, "Joint spatial-wavelet dual-stream network for
    super-resolution", MICCAI 2020, pp. 184-193; layer sizes as its published code has them,
    https://github.com/franciszchen/SWD-Net.
    """

    pools_globally = True

    def __init__(self, config: SwdNetConfig, *, scale: int) -> None:
        """The network with fresh weights.

        Raises:
            ValueError: the scale is not 2, 3, 4 or 8.
        """
        super().__init__()
        check_scale(scale)
        self.config = config
        self.scale = scale
        self.spatial = SpatialStage(config.channels, num_blocks=config.num_blocks, scale=scale)
        self.wavelet = WaveletStage(config.wavelet_channels)

    @property
    def receptive_radius_px(self) -> int:
        """LR px that an output px depends on to each side at most, but for what pools over all px.

        The streams of half resolution and the second Haar level do not count: all that they find
        passes through the RCFs' pooling. Blocks of 2 x 2 SR px stand on a grid that starts at the
        first px, so at x3 a crop should start at an even LR px.
        """
        head_px, merge_px = 6, 1
        streams_px = _NUM_MODULES * _NUM_STAGES * 2 * self.config.num_blocks
        # Each WAC reaches 2 coefficients, the last convolution 1, and a block ends 1 px later.
        wavelet_px = 2 * (2 * 2 * _NUM_PAIRS + 1) + 1
        tail_px = 2 + wavelet_px
        return head_px + streams_px + merge_px + upsampler_reach_px(self.scale, tail_px=tail_px)

    def forward(
        self, lr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR, both RGB on 0..1; the result is not clamped.

        Gates and fusions pool over the whole of `lr`, so a crop's result is not the crop of the
        result.
        """
        return self.forward_stages(lr).sr

    def forward_stages(self, lr: Float[Tensor, "b 3 h w"]) -> SwdStages:
        """The results of both stages of LR (RGB on 0..1), for a loss that looks at each."""
        height, width = self.scale * lr.shape[-2], self.scale * lr.shape[-1]
        spatial = self.spatial(mirrored_to_multiple(lr, 2))
        # An even scale times an even side divides by 4 already.
        whole = mirrored_to_multiple(spatial, 4) if self.scale % 2 else spatial
        coefficients = self.wavelet(whole)
        return SwdStages(
            spatial=_top_left(spatial, height=height, width=width),
            sr=_top_left(inverse_haar(coefficients), height=height, width=width),
            coefficients=_top_left(coefficients, height=(height + 1) // 2, width=(width + 1) // 2),
        )


def _top_left(image: Tensor, *, height: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
    # Not a slice: torch.export takes each one for a promise that sides are even.
    rows = torch.arange(height, device=image.device)  # type: ignore[arg-type]
    columns = torch.arange(width, device=image.device)  # type: ignore[arg-type]
    return image.index_select(2, rows).index_select(3, columns)


def mirrored_to_multiple(
    image: Float[Tensor, "b c h w"], multiple: int
) -> Float[Tensor, "b c h_whole w_whole"]:
    """The image, continued at the right and the bottom until `multiple` divides its sides.

    By reflection that does not repeat the last px; where the image is too small for it (one px),
    its first px is repeated.
    """
    for axis in (2, 3):
        side = image.shape[axis]
        whole = (side + multiple - 1) // multiple * multiple
        places = torch.arange(whole, device=image.device)
        last = side - 1
        image = image.index_select(axis, (last - (places - last).abs()).clamp(min=0))
    return image
