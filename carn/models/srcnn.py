"""SRCNN: three convolutions that sharpen the luma of a bicubic enlargement."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from carn.models.bicubic import bicubic_reach_px, enlarge_bicubic
from carn.models.checks import check_counts, check_scale

# Weights of R, G and B in luma, full range. Source: ITU-R BT.601 as used by JFIF (ITU-T T.871).
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class SrcnnConfig:
    """The 9-1-5 network unless said otherwise."""

    num_features: int = 64
    """Channels of the first layer (9x9)."""
    num_mapped: int = 32
    """Channels of the second layer (1x1)."""

    def __post_init__(self) -> None:
        check_counts(num_features=self.num_features, num_mapped=self.num_mapped)


class Srcnn(nn.Module):
    """SRCNN 9-1-5 on luma; colour is the bicubic enlargement's.

    Borders are padded with zeros, where the original loses them. The original trains the last layer
    at a tenth of the learning rate: it is `reconstruct`.

    Source: Dong, Loy, He, Tang, "Image super-resolution using deep convolutional networks",
    https://arxiv.org/abs/1501.00092.
    """

    pools_globally = False

    def __init__(self, config: SrcnnConfig, *, scale: int) -> None:
        """The network with fresh weights.

        Raises:
            ValueError: the scale is not 2, 3, 4 or 8.
        """
        super().__init__()
        check_scale(scale)
        self.config = config
        self.scale = scale
        self.extract = nn.Conv2d(1, config.num_features, 9, padding=4)
        self.map = nn.Conv2d(config.num_features, config.num_mapped, 1)
        self.reconstruct = nn.Conv2d(config.num_mapped, 1, 5, padding=2)

    @property
    def receptive_radius_px(self) -> int:
        """LR px that an output px depends on to each side."""
        return bicubic_reach_px(self.scale, tail_px=4 + 2)

    def forward(
        self, lr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR, both RGB on 0..1; the result is not clamped."""
        enlarged = enlarge_bicubic(lr, scale=self.scale)
        red, green, blue = LUMA
        luma = red * enlarged[:, :1] + green * enlarged[:, 1:2] + blue * enlarged[:, 2:]
        features: Tensor = self.map(self.extract(luma).relu()).relu()
        sharpened: Tensor = self.reconstruct(features)
        # R, G and B are luma plus terms of Cb and Cr alone: with these kept, all three move as one.
        return enlarged + (sharpened - luma)
