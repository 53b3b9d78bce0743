"""SRGAN: a residual generator, and the discriminator that it is trained against."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from carn.models.checks import check_counts, check_scale
from carn.models.layers import conv3x3, upsampler_reach_px, upsampling_steps


@dataclass(frozen=True, kw_only=True)
class SrganConfig:
    """The generator that the CARN paper compares with, unless said otherwise."""

    num_blocks: int = 5
    """Residual blocks in a row; 16 in the SRGAN paper."""
    channels: int = 64
    """Feature channels."""

    def __post_init__(self) -> None:
        check_counts(num_blocks=self.num_blocks, channels=self.channels)


class ResidualBlock(nn.Module):
    """Two normalized 3x3 convolutions round a PReLU with one slope, beside a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
            nn.PReLU(),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features with what the block adds to them."""
        residual: Tensor = self.residual(x)
        return x + residual


class Srgan(nn.Module):
    """The generator of SRGAN: LR pixels to SR pixels, which its last layer holds within 0..1.

    Batch normalization: while training, an image's result depends on its batch, and a batch needs
    more than one px a channel. Convolutions carry a bias, and each PReLU has one slope: that, with
    five blocks at x8 and the discriminator, is the parameter count in the CARN paper's Table 1.

    Trained on the mean squared error plus 1e-3 times the adversarial loss (plus, in the SRGAN
    paper, 6e-3 times one on VGG features).

    Source: Ledig et al., "Photo-realistic single image super-resolution using a generative
    adversarial network", https://arxiv.org/abs/1609.04802, figure 4.
    """

    pools_globally = False

    def __init__(self, config: SrganConfig, *, scale: int) -> None:
        """The network with fresh weights.

        Raises:
            ValueError: the scale is not 2, 3, 4 or 8.
        """
        super().__init__()
        check_scale(scale)
        self.config = config
        self.scale = scale
        channels = config.channels
        self.head = nn.Sequential(nn.Conv2d(3, channels, 9, padding=4), nn.PReLU())
        self.body = nn.Sequential(
            *(ResidualBlock(channels) for _ in range(config.num_blocks)),
            conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )
        # CARN's upsampler, but for the PReLU behind each step.
        upsampler: list[nn.Module] = []
        for step in upsampling_steps(scale):
            upsampler += [conv3x3(channels, channels * step**2), nn.PixelShuffle(step), nn.PReLU()]
        self.tail = nn.Sequential(*upsampler, nn.Conv2d(channels, 3, 9, padding=4))

    @property
    def receptive_radius_px(self) -> int:
        """LR px that an output px depends on to each side, in evaluation mode."""
        return 4 + 2 * self.config.num_blocks + 1 + upsampler_reach_px(self.scale, tail_px=4)

    def forward(
        self, lr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR, both RGB on 0..1; the result never leaves that range."""
        shallow: Tensor = self.head(lr)
        deep: Tensor = self.body(shallow)
        pixels: Tensor = self.tail(shallow + deep)
        # Under autocast these are half precision, which cannot hold 256 levels next to 1.
        return (torch.tanh(pixels.to(lr.dtype)) + 1) / 2


class SrganDiscriminator(nn.Module):
    """How much images look like real HR: eight convolutions that halve the sides four times.

    A global average pool stands where the SRGAN paper has a dense layer on 6 x 6 px, so that images
    of any size fit, one px and up (training wants a few dozen).

    Source: the paper that `Srgan` names, figure 4; pooled, as the CARN paper's count has it.
    """

    def __init__(self, *, channels: int = 64) -> None:
        """The network with fresh weights.

        Args:
            channels: width of the first layer; each pair of layers has twice that of the last.

        Raises:
            ValueError: `channels` is below 1.
        """
        super().__init__()
        check_counts(channels=channels)
        layers: list[nn.Module] = [conv3x3(3, channels), nn.LeakyReLU(0.2)]
        # (width in, width out, stride), in units of `channels`.
        sizes = [(1, 1, 2), (1, 2, 1), (2, 2, 2), (2, 4, 1), (4, 4, 2), (4, 8, 1), (8, 8, 2)]
        for width_in, width_out, stride in sizes:
            layers += [
                conv3x3(width_in * channels, width_out * channels, stride=stride),
                nn.BatchNorm2d(width_out * channels),
                nn.LeakyReLU(0.2),
            ]
        self.features = nn.Sequential(*layers)
        self.verdict = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(8 * channels, 16 * channels, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16 * channels, 1, 1),
        )

    def forward(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
        """A logit for each RGB image on 0..1: above 0 for real, below for generated."""
        verdict: Tensor = self.verdict(self.features(image))
        return verdict.flatten()
