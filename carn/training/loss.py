"""The pixel losses that networks are trained with, on the scale 0..255."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pytorch_msssim import ssim
from torch import Tensor, nn
from torch.nn import functional

from carn.metrics import DATA_RANGE, SSIM_K1, SSIM_K2, SSIM_WINDOW_PX, gaussian_weights

Loss = Literal["combined", "released-code", "l1", "mse"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What a network's result is judged by while it is trained.

    The weights are those of pixels in 0..255: there the three terms count about alike.
    Source: https://doi.org/10.7717/peerj-cs.1196, section "Loss function".
    """

    loss: Loss | None = None
    """None: the network's own recipe, which is `combined` for CARN. `combined`: alpha L1 + beta MSE
    + gamma (1 - SSIM), the paper's equation. `released-code`: what the authors' program computes in
    its place, with gamma SSIM added, so that similarity is punished. `l1`, `mse`: that term
    alone."""
    alpha: float = 0.8
    """Weight of the mean absolute error, in grey levels."""
    beta: float = 0.1
    """Weight of the mean squared error, in grey levels squared."""
    gamma: float = 0.1
    """Weight of the SSIM term; at 0 SSIM is not computed."""

    def __post_init__(self) -> None:
        names = ("combined", "released-code", "l1", "mse")
        if self.loss not in (None, *names):
            raise ValueError(f"loss={self.loss!r} must be one of {', '.join(names)}")
        weights = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name}={weight} must be a finite number of at least 0")
        if not any(weights.values()):
            raise ValueError("alpha, beta and gamma are all 0: the loss would be 0 everywhere")
        if self.loss in ("l1", "mse"):
            for field in dataclasses.fields(self):
                if field.name in weights and weights[field.name] != field.default:
                    raise ValueError(
                        f"{field.name}={weights[field.name]} does nothing with loss={self.loss!r}: "
                        "leave it out, or choose 'combined'"
                    )

    @property
    def has_ssim(self) -> bool:
        """Whether SSIM is part of the loss."""
        return self.loss in ("combined", "released-code") and self.gamma > 0


class PixelLoss(nn.Module):
    """The loss of images against their targets, and the terms that it is made of.

    Computed in float32 whatever the autocast says: one step of bf16 is as large as a grey level.
    """

    window: Tensor

    def __init__(self, config: LossConfig) -> None:
        """The loss.

        Raises:
            ValueError: the config leaves it open which.
        """
        super().__init__()
        if config.loss is None:
            raise ValueError(f"say which loss: loss=None stands for a recipe's, see {__name__}")
        self.config = config
        # The constants of range 1 are 65,025 times smaller than those of range 255, and the
        # variances of flat tissue drown in float32's roundings beside them: SSIM came out above 2.
        self._ssim_dtype = torch.float64 if config.loss == "released-code" else torch.float32
        # A buffer, so that it is on the device before a step is captured in a CUDA graph.
        window = torch.tensor(gaussian_weights(), dtype=self._ssim_dtype)
        self.register_buffer("window", window.expand(3, 1, 1, -1).clone(), persistent=False)

    def forward(
        self, sr: Float[Tensor, "b 3 h w"], hr: Float[Tensor, "b 3 h w"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Means over the batch: `loss`, and the unweighted terms `l1`, `mse` and `ssim`.

        `l1` and `mse` are in grey levels and their squares, `ssim` is the similarity itself (with
        `released-code` by that code's constants). `ssim` is there only when it is part of the loss.
        The gradient runs through `loss` alone; the terms are for the log.

        Args:
            sr: the result, RGB on 0..1, not clamped.
            hr: what it should be, on 0..1.

        Raises:
            ValueError: shapes that differ, or images smaller than SSIM's window.
        """
        self._check(sr, hr)
        config = self.config
        with torch.autocast(device_type=sr.device.type, enabled=False):
            sr, hr = sr.float() * DATA_RANGE, hr.float() * DATA_RANGE
            terms = {"l1": functional.l1_loss(sr, hr), "mse": functional.mse_loss(sr, hr)}
            if config.has_ssim:
                terms["ssim"] = self._ssim(sr, hr)
            if config.loss in ("l1", "mse"):
                loss = terms[config.loss]
            else:
                loss = config.alpha * terms["l1"] + config.beta * terms["mse"]
            if config.has_ssim:
                is_equation = config.loss == "combined"
                loss = loss + config.gamma * (1 - terms["ssim"] if is_equation else terms["ssim"])
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def _check(self, sr: Tensor, hr: Tensor) -> None:
        check_same_shape(sr, hr)
        height, width = sr.shape[-2:]
        if self.config.has_ssim and min(height, width) < SSIM_WINDOW_PX:
            raise ValueError(
                f"HR patches of {width} x {height} px are smaller than SSIM's window of "
                f"{SSIM_WINDOW_PX} px: take larger ones, or gamma=0"
            )

    def _ssim(
        self, sr: Float[Tensor, "b 3 h w"], hr: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, ""]:
        is_released = self.config.loss == "released-code"
        if is_released:
            reach = SSIM_WINDOW_PX // 2
            sr, hr = (functional.pad(image, (reach,) * 4) for image in (sr, hr))
        sr, hr = sr.to(self._ssim_dtype), hr.to(self._ssim_dtype)
        # Depthwise convolutions on a CPU: float32 is 3 times faster channels-last, float64 3 times
        # slower. On a GPU channels-last goes to cuDNN, which may round the squares to TF32.
        is_channels_last = sr.device.type == "cpu" and sr.dtype == torch.float32
        memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
        similarity: Tensor = ssim(
            sr.contiguous(memory_format=memory_format),
            hr.contiguous(memory_format=memory_format),
            data_range=1 if is_released else DATA_RANGE,
            win=self.window,
            K=(SSIM_K1, SSIM_K2),
        )
        return similarity.float()


def check_same_shape(sr: Tensor, hr: Tensor) -> None:
    """Raise ValueError where two shapes differ: torch would stretch the one over the other."""
    if sr.shape != hr.shape:
        raise ValueError(f"SR of shape {tuple(sr.shape)} against HR of shape {tuple(hr.shape)}")
