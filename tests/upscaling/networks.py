"""Small networks whose gates depend on what they are shown, and tissue to show them."""

import numpy as np
import torch
from torch import nn

from carn.models import ModelConfig, ModelName, build_model
from carn.models.adaptive_carn import Adaptation, AdaptiveCarnConfig
from carn.models.bicubic import BicubicConfig
from carn.models.carn import Carb, CarnConfig
from carn.models.edsr import EdsrConfig
from carn.models.rcan import RcanConfig
from carn.models.rdn import RdnConfig
from carn.models.srcnn import SrcnnConfig
from carn.models.srgan import SrganConfig
from carn.models.swdnet import RCF, SwdNetConfig
from carn.slides.slide import Rgb

SMALL: dict[ModelName, ModelConfig] = {
    "bicubic": BicubicConfig(),
    "srcnn": SrcnnConfig(num_features=8, num_mapped=4),
    "srgan": SrganConfig(num_blocks=2, channels=8),
    "edsr": EdsrConfig(num_blocks=2, channels=16, residual_scale=0.5),
    "rdn": RdnConfig(num_blocks=2, num_layers=3, growth=8, channels=16),
    "rcan": RcanConfig(num_groups=2, num_blocks=2, channels=16, reduction=4),
    "swdnet": SwdNetConfig(channels=8, num_blocks=1, wavelet_channels=8),
    "carn": CarnConfig(num_blocks=2, channels=16, reduction=4),
    "adaptive-carn": AdaptiveCarnConfig(
        num_blocks=2, channels=16, reduction=4, estimator_channels=8, embedding=8
    ),
}
POOLING: tuple[ModelName, ...] = ("rcan", "swdnet", "carn", "adaptive-carn")
FOLDED: tuple[ModelName, ...] = ("edsr", "rdn", "rcan", "carn", "adaptive-carn")


def network(name: ModelName, *, scale: int = 2, seed: int = 0) -> nn.Module:
    """A small network in evaluation mode, its weights and statistics away from their start."""
    torch.manual_seed(seed)
    model = build_model(name, scale=scale, config=SMALL[name])
    for module in model.modules():
        gate = getattr(module, "gate", None)
        if isinstance(gate, nn.Sequential):
            _scale(gate, by=2)
        if isinstance(module, Carb):
            _scale(module.residual, by=2.5)
        if isinstance(module, Adaptation):
            for block in module.blocks:
                nn.init.normal_(block.weight, std=0.3)
                nn.init.normal_(block.bias, std=0.1)
        if isinstance(module, RCF):
            nn.init.normal_(module.context[-1].weight, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def _scale(layers: nn.Sequential, *, by: float) -> None:
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= by


def tissue(side_px: int = 512) -> Rgb:
    """(side, side, 3): stained colon, brown and blue on white."""
    from skimage.data import immunohistochemistry

    image: Rgb = immunohistochemistry()
    return image[:side_px, :side_px]


def window_of(image: Rgb, x: int, y: int, width: int, height: int, *, halo_px: int) -> Rgb:
    """A window with its halo, mirrored beyond the image."""
    padded = np.pad(image, ((halo_px, halo_px), (halo_px, halo_px), (0, 0)), mode="symmetric")
    return padded[y : y + height + 2 * halo_px, x : x + width + 2 * halo_px]


def batch_of(*windows: Rgb) -> torch.Tensor:
    """What a network takes."""
    return torch.from_numpy(np.stack(windows)).permute(0, 3, 1, 2).float() / 255
