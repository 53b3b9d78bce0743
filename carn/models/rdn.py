"""RDN: densely connected convolutions, fused in each block and over all blocks."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from carn.models.checks import check_counts, check_pixels, check_scale
from carn.models.layers import PixelScaling, Upsampler, conv3x3, upsampler_reach_px


@dataclass(frozen=True, kw_only=True)
class RdnConfig:
    """The size that the CARN paper compares with, unless said otherwise."""

    num_blocks: int = 5
    """Residual dense blocks; RDN's D."""
    num_layers: int = 8
    """Convolutions of a block; RDN's C."""
    growth: int = 32
    """Channels that each of them adds; RDN's G."""
    channels: int = 64
    """Channels between the blocks; RDN's G0."""
    pixel_range: float = 255.0
    """Level that white has inside the network, which takes no mean away."""

    def __post_init__(self) -> None:
        check_counts(
            num_blocks=self.num_blocks,
            num_layers=self.num_layers,
            growth=self.growth,
            channels=self.channels,
        )
        check_pixels(pixel_range=self.pixel_range)


class Rdb(nn.Module):
    """RDB: 3x3 convolutions that each see all before them, fused by a 1x1, beside a skip."""

    def __init__(self, channels: int, *, num_layers: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            conv3x3(channels + number * growth, growth) for number in range(num_layers)
        )
        self.fuse = nn.Conv2d(channels + num_layers * growth, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The features with what the block adds to them."""
        seen = x
        for layer in self.layers:
            seen = torch.cat([seen, layer(seen).relu()], dim=1)
        residual: Tensor = self.fuse(seen)
        return x + residual


class Rdn(nn.Module):
    """RDN: LR pixels to SR pixels through residual dense blocks that are all fused at the end.

    The upsampler is CARN's, which keeps the channels; with it the parameters are the CARN paper's.

    Source: Zhang, Tian, Kong, Zhong, Fu, "Residual dense network for image super-resolution",
    https://arxiv.org/abs/1802.08797.
    """

    pools_globally = False

    def __init__(self, config: RdnConfig, *, scale: int) -> None:
        """The network with fresh weights.

        Raises:
            ValueError: the scale is not 2, 3, 4 or 8.
        """
        super().__init__()
        check_scale(scale)
        self.config = config
        self.scale = scale
        channels = config.channels
        self.pixels = PixelScaling(pixel_range=config.pixel_range)
        self.shallow = conv3x3(3, channels)
        self.head = conv3x3(channels, channels)
        self.blocks = nn.ModuleList(
            Rdb(channels, num_layers=config.num_layers, growth=config.growth)
            for _ in range(config.num_blocks)
        )
        self.fuse = nn.Sequential(
            nn.Conv2d(config.num_blocks * channels, channels, 1), conv3x3(channels, channels)
        )
        self.tail = nn.Sequential(Upsampler(channels, scale=scale), conv3x3(channels, 3))

    @property
    def receptive_radius_px(self) -> int:
        """LR px that an output px depends on to each side."""
        blocks = self.config.num_blocks * self.config.num_layers
        return blocks + 3 + upsampler_reach_px(self.scale, tail_px=1)

    def forward(
        self, lr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR, both RGB on 0..1; the result is not clamped."""
        shallow: Tensor = self.shallow(self.pixels.centre(lr))
        deep: Tensor = self.head(shallow)
        outputs = []
        for block in self.blocks:
            deep = block(deep)
            outputs.append(deep)
        fused: Tensor = self.fuse(torch.cat(outputs, dim=1))
        return self.pixels.restore(self.tail(shallow + fused))
