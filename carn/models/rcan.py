"""RCAN: groups of residual blocks with channel attention."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from carn.models.checks import check_counts, check_pixels, check_reduction, check_scale
from carn.models.layers import (
    BCSR_MEAN,
    GlobalMean,
    PixelScaling,
    Upsampler,
    conv3x3,
    upsampler_reach_px,
)


@dataclass(frozen=True, kw_only=True)
class RcanConfig:
    """The size that the CARN paper compares with, unless said otherwise."""

    num_groups: int = 16
    """Residual groups in a row; 10 in RCAN's own paper."""
    num_blocks: int = 1
    """RCABs of a group; 20 in RCAN's own paper."""
    channels: int = 64
    """Feature channels."""
    reduction: int = 16
    """By how much the attention squeezes its channels."""
    mean: tuple[float, float, float] = BCSR_MEAN
    """Mean level (R, G, B) of the training set on 0..1, taken away from the input and given back to
    the output."""
    pixel_range: float = 255.0
    """Level that white has inside the network."""

    def __post_init__(self) -> None:
        check_counts(num_groups=self.num_groups, num_blocks=self.num_blocks)
        check_reduction(self.channels, reduction=self.reduction)
        check_pixels(pixel_range=self.pixel_range, mean=self.mean)


class ChannelAttention(nn.Module):
    """Each channel times a gate in 0..1 that is worked out from the means of all channels."""

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        squeezed = channels // reduction
        self.gate = nn.Sequential(
            GlobalMean(),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features, each channel times its gate."""
        gate: Tensor = self.gate(x)
        return x * gate


class Rcab(nn.Module):
    """RCAB: two 3x3 convolutions round a ReLU, then channel attention, beside a skip."""

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(channels, channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
            ChannelAttention(channels, reduction=reduction),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features with what the block adds to them."""
        residual: Tensor = self.residual(x)
        return x + residual


class ResidualGroup(nn.Module):
    """RCABs in a row and a 3x3 convolution, beside a skip."""

    def __init__(self, channels: int, *, num_blocks: int, reduction: int) -> None:
        super().__init__()
        blocks = [Rcab(channels, reduction=reduction) for _ in range(num_blocks)]
        self.residual = nn.Sequential(*blocks, conv3x3(channels, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features with what the group adds to them."""
        residual: Tensor = self.residual(x)
        return x + residual


class Rcan(nn.Module):
    """RCAN: LR pixels to SR pixels through residual groups, a long skip and a sub-pixel upsampler.

    Source: Zhang, Li, Li, Wang, Zhong, Fu, "Image super-resolution using very deep residual channel
    attention networks", https://arxiv.org/abs/1807.02758.
    """

    pools_globally = True

    def __init__(self, config: RcanConfig, *, scale: int) -> None:
        """The network with fresh weights.

        Raises:
            ValueError: the scale is not 2, 3, 4 or 8.
        """
        super().__init__()
        check_scale(scale)
        self.config = config
        self.scale = scale
        channels = config.channels
        self.pixels = PixelScaling(pixel_range=config.pixel_range, mean=config.mean)
        self.head = conv3x3(3, channels)
        groups = [
            ResidualGroup(channels, num_blocks=config.num_blocks, reduction=config.reduction)
            for _ in range(config.num_groups)
        ]
        self.body = nn.Sequential(*groups, conv3x3(channels, channels))
        self.tail = nn.Sequential(Upsampler(channels, scale=scale), conv3x3(channels, 3))

    @property
    def receptive_radius_px(self) -> int:
        """LR px that an output px depends on to each side, but for the attention's pooling."""
        groups = self.config.num_groups * (2 * self.config.num_blocks + 1)
        return groups + 2 + upsampler_reach_px(self.scale, tail_px=1)

    def forward(
        self, lr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR, both RGB on 0..1; the result is not clamped.

        Attention pools over the whole of `lr`, so a crop's result is not the crop of the result.
        """
        shallow: Tensor = self.head(self.pixels.centre(lr))
        deep: Tensor = self.body(shallow)
        return self.pixels.restore(self.tail(shallow + deep))
