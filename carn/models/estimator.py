"""An estimate of how LR was made, from its pixels, for networks that adapt to it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carn.models.layers import GlobalMean, conv3x3

NUM_CONDITIONS = 7


class DegradationEstimator(nn.Module):
    """Estimate the numbers of `carn.degradation.condition` from LR.

    Four convolutions see what each px differs by from the mean of its neighbourhood, so that
    colour and brightness do not count; their means over the image decide.
    """

    def __init__(self, *, channels: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (3, channels, channels, channels):
            layers += [conv3x3(inputs, channels), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers, GlobalMean())
        self.head = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * channels, NUM_CONDITIONS, 1),
        )

    def forward(self, lr: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 7 1 1"]:
        """Estimate from LR on 0..1, pooled over all of it."""
        mean = functional.avg_pool2d(lr, 3, stride=1, padding=1, count_include_pad=False)
        features: Tensor = self.features((lr - mean) * 16)
        with torch.autocast(device_type=lr.device.type, enabled=False):
            estimate: Tensor = self.head(features.float())
        return estimate
