"""What more than one architecture is made of."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from carn.models.checks import check_scale

# Mean level (R, G, B) of the bcSR training set on 0..1.
# Source: the CARN paper, https://doi.org/10.7717/peerj-cs.1196.
BCSR_MEAN = (0.7204, 0.4298, 0.6397)


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with bias that keeps the size (zero padding), or divides it by `stride`."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)


class GlobalMean(nn.Module):
    """Mean of each channel over all places: `nn.AdaptiveAvgPool2d(1)`, faster backwards.

    There torch makes the mean's gradient with channels apart, and adds it to one with channels
    together an element at a time: more than half of the time of channel attention in training.
    """

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
        """The means."""
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None]


def upsampling_steps(scale: int) -> tuple[int, ...]:
    """The factors by which `Upsampler` enlarges, in turn: 2 as often as it takes, or 3 at once.

    Raises:
        ValueError: the scale is not 2, 3, 4 or 8.
    """
    check_scale(scale)
    return (3,) if scale == 3 else (2,) * (scale.bit_length() - 1)


class Upsampler(nn.Sequential):
    """Sub-pixel enlargement: conv3x3 C -> 4C and PixelShuffle 2, log2(scale) times; x3 at once.

    Source: Shi et al. 2016, https://arxiv.org/abs/1609.05158;
    laid out as in EDSR, https://arxiv.org/abs/1707.02921, and the CARN paper.
    """

    def __init__(self, channels: int, *, scale: int) -> None:
        layers: list[nn.Module] = []
        for step in upsampling_steps(scale):
            layers += [conv3x3(channels, channels * step**2), nn.PixelShuffle(step)]
        super().__init__(*layers)


def upsampler_reach_px(scale: int, *, tail_px: int) -> int:
    """LR px that an output px depends on to each side, through an `Upsampler` and what follows it.

    Args:
        scale: 2, 3, 4 or 8.
        tail_px: how far the layers behind the upsampler reach, in px of their own (the output's).
    """
    reach = 0
    for place in range(scale):  # of an output px within the LR px (number 0) that it lies in
        first = place - tail_px
        for step in reversed(upsampling_steps(scale)):
            first = first // step - 1
        reach = max(reach, -first)
    return reach


class PixelScaling(nn.Module):
    """Pixels as a network wants them, there and back: 0..1 <-> 0..pixel_range without their mean.

    The mean is part of the configuration and neither trained nor stored with the weights.
    """

    mean: Tensor

    def __init__(
        self, *, pixel_range: float, mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ) -> None:
        super().__init__()
        self.pixel_range = pixel_range
        shift = torch.tensor([level * pixel_range for level in mean], dtype=torch.float32)
        self.register_buffer("mean", shift.view(1, 3, 1, 1), persistent=False)

    def centre(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Pixels on 0..1 as the network's input."""
        return rgb * self.pixel_range - self.mean

    def restore(self, output: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The network's output as pixels on 0..1, not clamped."""
        return (output + self.mean) / self.pixel_range
