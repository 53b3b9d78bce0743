"""Bicubic enlargement: the comparison that learns nothing."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carn.models.checks import check_scale


@dataclass(frozen=True, kw_only=True)
class BicubicConfig:
    """There is nothing to choose."""


def enlarge_bicubic(
    lr: Float[Tensor, "b c h w"], *, scale: int
) -> Float[Tensor, "b c {scale}*h {scale}*w"]:
    """Pixels enlarged by cubic convolution with a = -0.5, weights renormalized at the border.

    The kernel that LR is made with (`carn.degradation`), and that of Pillow's BICUBIC and of
    MATLAB's imresize (which mirrors the border).
    Source: R. Keys 1981, https://doi.org/10.1109/TASSP.1981.1163711.
    """
    # Only with `antialias` does torch take a = -0.5; without, it takes -0.75. Where an image grows
    # there is nothing else to antialiasing.
    size = (lr.shape[-2] * scale, lr.shape[-1] * scale)
    return functional.interpolate(
        lr, size=size, mode="bicubic", align_corners=False, antialias=True
    )


def bicubic_reach_px(scale: int, *, tail_px: int = 0) -> int:
    """LR px that an output px depends on to each side, with layers behind that reach `tail_px`."""
    # Output px p lies at LR (p + 1/2) / scale - 1/2; the first of its four LR px is one below.
    firsts = [(2 * (place - tail_px) + 1 - scale) // (2 * scale) - 1 for place in range(scale)]
    return -min(firsts)


class Bicubic(nn.Module):
    """Bicubic enlargement as a model without parameters; see `enlarge_bicubic`."""

    pools_globally = False

    def __init__(self, config: BicubicConfig, *, scale: int) -> None:
        """The model.

        Raises:
            ValueError: the scale is not 2, 3, 4 or 8.
        """
        super().__init__()
        check_scale(scale)
        self.config = config
        self.scale = scale

    @property
    def receptive_radius_px(self) -> int:
        """LR px that an output px depends on to each side."""
        return bicubic_reach_px(self.scale)

    def forward(
        self, lr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 {self.scale}*h {self.scale}*w"]:
        """SR of LR, both RGB on 0..1; it may overshoot and is not clamped."""
        return enlarge_bicubic(lr, scale=self.scale)
