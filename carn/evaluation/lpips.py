"""LPIPS: how different two images look, by the features of a trained AlexNet.

Its weights are trained and published by others; they are read from files and never downloaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor
from torch.nn import functional

from carn import storage
from carn.errors import MissingObjectError
from carn.models.pickled import MAX_WEIGHTS_BYTES, load_pickled

# (index in torchvision's `features`, out channels, in channels, kernel, stride, padding, whether a
# 3 x 3 pooling of stride 2 comes before).
# Source: Krizhevsky 2014, https://arxiv.org/abs/1404.5997, as torchvision.models.alexnet has it.
_CONVOLUTIONS = (
    (0, 64, 3, 11, 4, 2, False),
    (3, 192, 64, 5, 1, 2, True),
    (6, 384, 192, 3, 1, 1, True),
    (8, 256, 384, 3, 1, 1, False),
    (10, 256, 256, 3, 1, 1, False),
)
MIN_SIDE_PX = 31
"""What the second pooling needs at least."""

# Normalization of images on -1..1 (R, G, B): ImageNet's mean and deviation on 0..1, by
# 2 * mean - 1 and 2 * deviation, rounded as v0.1 has them.
# Source: https://github.com/richzhang/PerceptualSimilarity, lpips/lpips.py, `ScalingLayer`.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# Keeps features that are all zero from dividing by zero. Source: ibid., `normalize_tensor`.
_EPSILON = 1e-10


@dataclass(frozen=True, kw_only=True)
class Lpips:
    """AlexNet's five convolutions and the weight of each of their channels.

    Attributes:
        kernels: (out, in, k, k) of each convolution.
        biases: (out,) of each.
        linear: (out,) of each, not negative: how much a channel counts.
    """

    kernels: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    linear: tuple[Tensor, ...]

    def to(self, device: torch.device) -> "Lpips":
        """The same on a device; itself where it is there already."""
        if self.kernels[0].device == device:
            return self
        moved = [
            tuple(tensor.to(device) for tensor in tensors)
            for tensors in (self.kernels, self.biases, self.linear)
        ]
        return Lpips(kernels=moved[0], biases=moved[1], linear=moved[2])

    def distance(
        self, sr: UInt8[Tensor, "b 3 h w"], hr: UInt8[Tensor, "b 3 h w"]
    ) -> Float64[Tensor, " b"]:
        """LPIPS of each pair of images: 0 where they are equal, larger the more they differ.

        Features after each of the five ReLUs, scaled to unit length over the channels; squared
        differences, weighted and summed over the channels, averaged over the places, and summed
        over the five. No border is cropped.
        Source: Zhang et al. 2018, https://arxiv.org/abs/1801.03924, equation 1, with AlexNet and
        the weights `lin` of version 0.1.

        Raises:
            ValueError: shapes that differ, or images smaller than MIN_SIDE_PX.
        """
        if sr.shape != hr.shape:
            raise ValueError(f"SR of shape {tuple(sr.shape)} against HR of {tuple(hr.shape)}")
        if min(sr.shape[-2:]) < MIN_SIDE_PX:
            raise ValueError(
                f"an image of {sr.shape[-1]} x {sr.shape[-2]} px is too small for LPIPS, which "
                f"needs {MIN_SIDE_PX} px to each side; leave it out"
            )
        total = torch.zeros(len(sr), dtype=torch.float64, device=sr.device)
        with torch.inference_mode():
            pairs = zip(self._features(sr), self._features(hr), self.linear, strict=True)
            for one, other, weights in pairs:
                squares = (_unit(one) - _unit(other)).square_()
                weighted = torch.einsum("bchw,c->bhw", squares, weights)
                total += weighted.mean(dim=(1, 2), dtype=torch.float64)
        return total

    def _features(self, images: UInt8[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c h2 w2"]]:
        """What comes out of each ReLU."""
        shift, scale = (
            torch.tensor(values, device=images.device)[:, None, None] for values in (SHIFT, SCALE)
        )
        x = (images.float().div(127.5).sub(1) - shift) / scale
        features = []
        for layer, kernel, bias in zip(_CONVOLUTIONS, self.kernels, self.biases, strict=True):
            *_, stride, padding, is_after_pooling = layer
            if is_after_pooling:
                x = functional.max_pool2d(x, kernel_size=3, stride=2)
            x = functional.conv2d(x, kernel, bias, stride=stride, padding=padding).relu_()
            features.append(x)
        return features


def load_lpips(*, alexnet: str | Path, linear: str | Path) -> Lpips:
    """LPIPS by weights in two files, which are read without executing anything in them.

    Args:
        alexnet: local path or s3:// URI of a state dict of torchvision's AlexNet trained on
            ImageNet, with `features.0.weight`, ... (published as alexnet-owt-<hash>.pth); its
            classifier is not used.
        linear: likewise, the weights of version 0.1 for AlexNet, with `lin0.model.1.weight`, ...
            (published as lpips/weights/v0.1/alex.pth in
            https://github.com/richzhang/PerceptualSimilarity).

    Raises:
        ValueError: a file is missing, is no state dict, or one of other layers.
        AccessDeniedError, StorageError: storage does not let one be read.
    """
    features, lins = _state_dict(alexnet), _state_dict(linear)
    kernels, biases, weights = [], [], []
    for number, (index, out, into, kernel, *_) in enumerate(_CONVOLUTIONS):
        shape = (out, into, kernel, kernel)
        kernels.append(_tensor(features, f"features.{index}.weight", shape, path=alexnet))
        biases.append(_tensor(features, f"features.{index}.bias", (out,), path=alexnet))
        name = f"lin{number}.model.1.weight"
        weights.append(_tensor(lins, name, (1, out, 1, 1), path=linear).flatten())
        if bool((weights[-1] < 0).any()):
            raise ValueError(f"{linear}: {name} has negative weights, which LPIPS has not")
    return Lpips(kernels=tuple(kernels), biases=tuple(biases), linear=tuple(weights))


def _state_dict(path: str | Path) -> Mapping[object, object]:
    try:
        packed = storage.read_bytes(storage.normalize(path), max_bytes=MAX_WEIGHTS_BYTES)
        content = load_pickled(packed)
    except MissingObjectError as error:
        raise ValueError(f"{path} cannot be read ({error}); give a file that is there") from error
    except ValueError as error:
        raise ValueError(
            f"{path} is no state dict that torch.load(weights_only=True) reads"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _tensor(
    state: Mapping[object, object], name: str, shape: Sequence[int], *, path: str | Path
) -> Tensor:
    tensor = state.get(name)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path} has no {name}: it is not the file that LPIPS needs here")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{path}: {name} is of shape {tuple(tensor.shape)}, not {tuple(shape)}; give the "
            "weights for AlexNet"
        )
    return tensor.detach().float()


def _unit(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    length = features.square().sum(dim=1, keepdim=True).sqrt_()
    return features / (length + _EPSILON)
