"""CARN, the network of channel attention retention.

Not the cascading residual network of the same name (Ahn et al. 2018).
"""

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
class CarnConfig:
    """The paper's network unless said otherwise."""

    num_blocks: int = 8
    """CARBs in a row; the paper's N."""
    channels: int = 64
    """Feature channels; the paper's C."""
    reduction: int = 8
    """By how much the CAR squeezes its channels; the paper's r, best near sqrt(channels)."""
    mean: tuple[float, float, float] = BCSR_MEAN
    """Mean level (R, G, B) of the training set on 0..1, taken away from the input and given back to
    the output."""
    pixel_range: float = 255.0
    """Level that white has inside the network."""

    def __post_init__(self) -> None:
        check_counts(num_blocks=self.num_blocks)
        check_reduction(self.channels, reduction=self.reduction)
        check_pixels(pixel_range=self.pixel_range, mean=self.mean)


class ChannelAttentionRetention(nn.Module):
    """CAR: each channel times a gate in 0..1 that is worked out from the means of all channels.

    Between the squeezing and the widening 1x1 convolution of ordinary channel attention stand two
    more on the squeezed channels.

    Source: the paper that `Carn` names.
    """

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        squeezed = channels // reduction
        self.gate = nn.Sequential(
            GlobalMean(),
            nn.Conv2d(channels, squeezed, 1),
            nn.Conv2d(squeezed, squeezed, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, squeezed, 1),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features, each channel times its gate."""
        gate: Tensor = self.gate(x)
        return x * gate


class Carb(nn.Module):
    """CARB: twice two 3x3 convolutions and a ReLU, then the CAR, beside a skip.

    Source: the paper that `Carn` names.
    """

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(channels, channels),
            conv3x3(channels, channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
            conv3x3(channels, channels),
            nn.ReLU(inplace=True),
            ChannelAttentionRetention(channels, reduction=reduction),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features with what the block adds to them."""
        residual: Tensor = self.residual(x)
        return x + residual


class Carn(nn.Module):
    """CARN: LR pixels to SR pixels through CARBs, a long skip and a sub-pixel upsampler.

    Weights start as torch's convolutions do, which is what the paper trained from.

    Source: Jia, Tan, Wang, Jia, Chen, "A super-resolution network using channel attention retention
    for pathology images", PeerJ Computer Science 9:e1196, 2023,
    https://doi.org/10.7717/peerj-cs.1196.
    """

    pools_globally = True

    def __init__(self, config: CarnConfig, *, scale: int) -> None:
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
        blocks = [Carb(channels, reduction=config.reduction) for _ in range(config.num_blocks)]
        self.body = nn.Sequential(*blocks, conv3x3(channels, channels))
        self.tail = nn.Sequential(Upsampler(channels, scale=scale), conv3x3(channels, 3))

    @property
    def receptive_radius_px(self) -> int:
        """LR px that an output px depends on to each side, but for the CARs' pooling."""
        return 4 * self.config.num_blocks + 2 + upsampler_reach_px(self.scale, tail_px=1)

    def forward(
        self, lr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR, both RGB on 0..1; the result is not clamped.

        The CARs pool over the whole of `lr`, so a crop's result is not the crop of the result.
        """
        shallow: Tensor = self.head(self.pixels.centre(lr))
        deep: Tensor = self.body(shallow)
        return self.pixels.restore(self.tail(shallow + deep))
