"""ResNet-18 and ResNet-50, with the names of torchvision's parameters.

Source: He et al. 2016, https://doi.org/10.1109/CVPR.2016.90 (Table 1). In a bottleneck the 3x3
convolution has the stride, as in torchvision ("v1.5") and in
https://ngc.nvidia.com/catalog/model-scripts/nvidia:resnet_50_v1_5_for_pytorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from carn import storage
from carn.errors import CheckpointError
from carn.models.pickled import MAX_WEIGHTS_BYTES, is_plain_tensor, load_pickled

Depth = Literal[18, 50]

NUM_CLASSES = 2
# What published weights were trained with: RGB of ImageNet, 0..1.
# Source: https://pytorch.org/vision/stable/models.html
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_WIDTHS = (64, 128, 256, 512)
_LAST_LAYER = ("fc.weight", "fc.bias")


@dataclass(frozen=True, kw_only=True)
class _Form:
    is_bottleneck: bool
    num_blocks: tuple[int, int, int, int]


_FORMS: Mapping[int, _Form] = MappingProxyType(
    {
        18: _Form(is_bottleneck=False, num_blocks=(2, 2, 2, 2)),
        50: _Form(is_bottleneck=True, num_blocks=(3, 4, 6, 3)),
    }
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions round which the input is added."""

    expansion = 1

    def __init__(self, num_in: int, width: int, *, stride: int) -> None:
        """The block, its output `width` channels, 1 / stride as wide and high."""
        super().__init__()
        self.conv1 = _conv(num_in, width, side=3, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, side=3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(num_in, width, stride=stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Features of features."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions round which the input is added."""

    expansion = 4

    def __init__(self, num_in: int, width: int, *, stride: int) -> None:
        """The block, its output `4 * width` channels, 1 / stride as wide and high."""
        super().__init__()
        num_out = width * self.expansion
        self.conv1 = _conv(num_in, width, side=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, side=3, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, num_out, side=1)
        self.bn3 = nn.BatchNorm2d(num_out)
        self.downsample = _shortcut(num_in, num_out, stride=stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        """Features of features."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Scores of classes for RGB pictures of any size; about 1/32 of it is left before the mean."""

    mean: Tensor
    std: Tensor

    def __init__(self, *, depth: Depth, num_classes: int = NUM_CLASSES) -> None:
        """The network with fresh weights, drawn from torch's generator.

        Convolutions are drawn by He et al. 2015, https://doi.org/10.1109/ICCV.2015.123 (fan-out).

        Raises:
            ValueError: a depth other than 18 or 50.
        """
        super().__init__()
        if depth not in _FORMS:
            raise ValueError(f"depth={depth} is not one of {', '.join(map(str, _FORMS))}")
        self.depth = depth
        form = _FORMS[depth]
        block: type[BasicBlock | Bottleneck] = Bottleneck if form.is_bottleneck else BasicBlock
        # Not part of the state: torchvision's files have no such tensors.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        num_in = 64
        for number, (width, count) in enumerate(zip(_WIDTHS, form.num_blocks, strict=True), 1):
            blocks = []
            for place in range(count):
                stride = 2 if place == 0 and number > 1 else 1
                blocks.append(block(num_in, width, stride=stride))
                num_in = width * block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(num_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b classes"]:
        """Logits of pictures on 0..1, which are brought to ImageNet's mean and deviation first."""
        x = (rgb - self.mean) / self.std
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for number in range(1, len(_WIDTHS) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return self.fc(x.mean((-2, -1)))  # type: ignore[no-any-return]


def load_weights(model: ResNet, uri: str) -> None:
    """Give a network the weights of a file of torchvision's names, all but the last layer's.

    Args:
        model: its last layer keeps what it has, for the classes are others.
        uri: a state dict, .safetensors or .pth; of the latter only tensors are unpickled.

    Raises:
        CheckpointError: the file is neither, or is of another network.
        MissingObjectError, AccessDeniedError, StorageError: it cannot be read.
    """
    uri = storage.normalize(uri)
    found = _read_state(uri)
    kept = {name: tensor for name, tensor in found.items() if name not in _LAST_LAYER}
    own = {name: tensor for name, tensor in model.state_dict().items() if name in _LAST_LAYER}
    try:
        model.load_state_dict(kept | own)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        raise CheckpointError(
            f"{uri} holds no weights of a ResNet-{model.depth} by torchvision's names ({what}); "
            "give --weights a state dict of this --depth"
        ) from error


def _read_state(uri: str) -> dict[str, Tensor]:
    content = storage.read_bytes(uri, max_bytes=MAX_WEIGHTS_BYTES)
    way_out = "give --weights a state dict, .safetensors or .pth"
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(content)
        found = load_pickled(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{uri} is no file of tensors ({error}); {way_out}") from error
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and is_plain_tensor(tensor) for name, tensor in found.items()
    ):
        raise CheckpointError(f"{uri} holds something else than tensors by name; {way_out}")
    return dict(found)


def _conv(num_in: int, num_out: int, *, side: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        num_in, num_out, kernel_size=side, stride=stride, padding=side // 2, bias=False
    )


def _shortcut(num_in: int, num_out: int, *, stride: int) -> nn.Sequential | None:
    """What brings the input to the block's output's shape, where that is another."""
    if stride == 1 and num_in == num_out:
        return None
    conv = _conv(num_in, num_out, side=1, stride=stride)
    return nn.Sequential(conv, nn.BatchNorm2d(num_out))
