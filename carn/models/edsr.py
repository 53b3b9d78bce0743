"""EDSR: residual blocks without normalization."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from carn.models.checks import check_counts, check_pixels, check_scale
from carn.models.layers import BCSR_MEAN, PixelScaling, Upsampler, conv3x3, upsampler_reach_px


@dataclass(frozen=True, kw_only=True)
class EdsrConfig:
    """EDSR-baseline, which the CARN paper compares with, unless said otherwise."""

    num_blocks: int = 16
    """Residual blocks in a row."""
    channels: int = 64
    """Feature channels."""
    residual_scale: float = 1.0
    """What a block's residual is multiplied with; 0.1 in the large EDSR (32 blocks, 256 wide)."""
    mean: tuple[float, float, float] = BCSR_MEAN
    """Mean level (R, G, B) of the training set on 0..1, taken away from the input and given back to
    the output."""
    pixel_range: float = 255.0
    """Level that white has inside the network."""

    def __post_init__(self) -> None:
        check_counts(num_blocks=self.num_blocks, channels=self.channels)
        check_pixels(pixel_range=self.pixel_range, mean=self.mean)
        if not 0 < self.residual_scale <= 1:
            raise ValueError(f"residual_scale={self.residual_scale} must be above 0, at most 1")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions round a ReLU, beside a skip."""

    def __init__(self, channels: int, *, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.residual = nn.Sequential(
            conv3x3(channels, channels), nn.ReLU(inplace=True), conv3x3(channels, channels)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features with what the block adds to them."""
        residual: Tensor = self.residual(x)
        return x + residual * self.residual_scale


class Edsr(nn.Module):
    """EDSR: LR pixels to SR pixels through residual blocks, a long skip and a sub-pixel upsampler.

    Source: Lim, Son, Kim, Nah, Lee, "Enhanced deep residual networks for single image
    super-resolution", https://arxiv.org/abs/1707.02921.
    """

    pools_globally = False

    def __init__(self, config: EdsrConfig, *, scale: int) -> None:
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
        blocks = [
            ResidualBlock(channels, residual_scale=config.residual_scale)
            for _ in range(config.num_blocks)
        ]
        self.body = nn.Sequential(*blocks, conv3x3(channels, channels))
        self.tail = nn.Sequential(Upsampler(channels, scale=scale), conv3x3(channels, 3))

    @property
    def receptive_radius_px(self) -> int:
        """LR px that an output px depends on to each side."""
        return 2 * self.config.num_blocks + 2 + upsampler_reach_px(self.scale, tail_px=1)

    def forward(
        self, lr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR, both RGB on 0..1; the result is not clamped."""
        shallow: Tensor = self.head(self.pixels.centre(lr))
        deep: Tensor = self.body(shallow)
        return self.pixels.restore(self.tail(shallow + deep))
