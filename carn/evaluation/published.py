"""What the CARN paper reports: the numbers of its tables, to hold ours against.

The paper's data, tiles and training differ from whatever is measured here, so its numbers belong
beside ours and never in the same mean. Nothing in it is tighter than about 0.03 dB: the same
configuration (CARN, x2) has 40.358 dB in Table 2, 40.385 in Table 3 and 40.367 in Table 4.
Figures 5 and 6 (crops, and PSNR over epochs) are pictures without numbers.
Source: Jia et al. 2023, https://doi.org/10.7717/peerj-cs.1196 (CC BY 4.0).
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from carn.models.checkpoint import Checkpoint
from carn.models.table import MODELS, ModelName
from carn.training.config import OWN_OBJECTIVES, default_loss
from carn.training.loss import LossConfig

# Beside the keys of MODELS: CARN by mean squared error alone, and CARN*, tested on more tiles.
CARN_MSE = "carn-mse"
CARN_STAR = "carn-star"

SCALES = (2, 3, 4, 8)

# Of a network's config: not what it is, but what the dataset it is trained on looks like.
_OF_THE_DATASET = ("mean", "pixel_range")

TABLE_1: Mapping[str, float] = MappingProxyType(
    {
        "srcnn": 0.008,
        "srgan": 6.097,
        "edsr": 1.367,
        "rdn": 2.375,
        "rcan": 1.965,
        "swdnet": 3.158,
        "carn": 1.389,
    }
)
"""Table 1: millions of parameters by model, at x2 for most; SRGAN's with its discriminator.

CARN's is most likely a misprint of 1.379, which its described layers have and Table 3's FLOPs
imply.
"""

_PSNR_SSIM_BY_SCALE = {
    "bicubic": ((35.247, 0.9427), (27.763, 0.7655), (27.019, 0.6659), (22.475, 0.2776)),
    "srcnn": ((35.522, 0.9515), (28.021, 0.8117), (27.475, 0.7329), (22.489, 0.3624)),
    "srgan": ((35.998, 0.9731), (30.990, 0.8244), (28.606, 0.7719), (23.729, 0.5580)),
    "edsr": ((39.657, 0.9728), (31.095, 0.8773), (29.830, 0.8058), (24.366, 0.5715)),
    "rdn": ((40.058, 0.9762), (31.240, 0.8794), (29.913, 0.8074), (24.392, 0.5711)),
    "rcan": ((40.144, 0.9764), (31.284, 0.8812), (29.916, 0.8085), (24.404, 0.5749)),
    "swdnet": ((40.170, 0.9639), (31.186, 0.8610), (29.853, 0.8000), (24.465, 0.5755)),
    CARN_MSE: ((40.336, 0.9825), (31.265, 0.8986), (29.888, 0.8393), (24.452, 0.5739)),
    "carn": ((40.358, 0.9842), (31.302, 0.8995), (29.964, 0.8408), (24.479, 0.5763)),
    CARN_STAR: ((40.383, 0.9837), (31.297, 0.8974), (29.933, 0.8407), (24.484, 0.5748)),
}

TABLE_2: Mapping[tuple[str, int], tuple[float, float]] = MappingProxyType(
    {
        (model, scale): scores
        for model, by_scale in _PSNR_SSIM_BY_SCALE.items()
        for scale, scores in zip(SCALES, by_scale, strict=True)
    }
)
"""Table 2: (PSNR in dB, SSIM) on bcSR's test set by model and scale, RGB, mean of five seeds.

The paper does not say which SSIM it is. At x3 its LR is misaligned (see `scoring.Protocol`).
"""

TABLE_3: Mapping[int, float] = MappingProxyType(
    {2: 39.780, 4: 40.137, 8: 40.385, 12: 40.446, 16: 40.456, 20: 40.513}
)
"""Table 3: CARN's PSNR in dB at x2 by its number of blocks N."""

TABLE_4: Mapping[tuple[int, int], float] = MappingProxyType(
    {
        **{(64, 2): 40.270, (64, 4): 40.262, (64, 8): 40.367, (64, 16): 40.291, (64, 32): 40.247},
        **{(128, 4): 40.353, (128, 12): 40.421, (128, 16): 40.406},
        **{(128, 32): 40.271, (128, 64): 40.089},
    }
)
"""Table 4: CARN's PSNR in dB at x2 by (channels C, reduction r)."""

TABLE_5: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "gt": (91.83, 90.03),
        "lr": (62.89, 63.22),
        "bicubic": (79.53, 66.40),
        "srcnn": (77.76, 68.87),
        "srgan": (81.04, 70.35),
        "edsr": (85.61, 77.83),
        "rdn": (87.49, 80.24),
        "rcan": (87.31, 83.10),
        "swdnet": (89.47, 84.42),
        "carn": (91.09, 87.20),
    }
)
"""Table 5: accuracy of ResNet-50 in percent on (bcSR, PCam) at x2, by what it classifies.

`gt` is HR itself, `lr` the small image as it is, the others SR by a model.
"""

FIGURE_4: Mapping[int, float] = MappingProxyType({2: 0.0283, 4: 0.0342})
"""Figure 4: CARN's seconds an image (1024 px HR) by scale, on an RTX 3090."""


def row_of(checkpoint: Checkpoint) -> str | None:
    """The row of these tables that a trained network is, such as `edsr` or CARN_MSE.

    None for a network of another size, for one that was trained by another loss, and for weights
    that do not say how they were trained. How long and on what it was trained does not matter.
    """
    if checkpoint.training is None or architecture_changes(checkpoint):
        return None
    if loss_of(checkpoint) == "mse" and checkpoint.model_name == "carn":
        return CARN_MSE
    return None if loss_changes(checkpoint) else checkpoint.model_name


def architecture_changes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What tells a network from the one that the paper compares, such as `num_blocks=4`."""
    defaults = MODELS[cast(ModelName, checkpoint.model_name)].config()
    return tuple(
        f"{name}={value}"
        for name, value in checkpoint.model_config.items()
        if name not in _OF_THE_DATASET and value != getattr(defaults, name, value)
    )


def loss_changes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What tells the loss of a training from the network's in the paper, such as `loss=l1`."""
    own = _loss_of_the_paper(cast(ModelName, checkpoint.model_name))
    loss = loss_of(checkpoint)
    if loss is None or own is None:
        return ()
    if loss != own.loss:
        return (f"loss={loss}",)
    weights = _loss_settings(checkpoint)
    names = [field.name for field in dataclasses.fields(own) if field.name != "loss"]
    changed = [n for n in names if weights.get(n, getattr(own, n)) != getattr(own, n)]
    return tuple(f"{name}={weights[name]}" for name in changed)


def loss_of(checkpoint: Checkpoint) -> str | None:
    """The name of the loss that a network was trained by; None where it has its own, or none."""
    if checkpoint.training is None:
        return None
    name: str | None = _loss_settings(checkpoint).get("loss")
    own = _loss_of_the_paper(cast(ModelName, checkpoint.model_name))
    if name is None and own is not None:
        return own.loss
    return name


def _loss_of_the_paper(model: ModelName) -> LossConfig | None:
    return None if model in OWN_OBJECTIVES else default_loss(model)


def _loss_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return (checkpoint.training or {}).get("loss") or {}
