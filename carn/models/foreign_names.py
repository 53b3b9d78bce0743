"""How other code bases name the tensors of the models they share with this one.

One function a family for the sizes, read off the tensors' shapes, and one for the names: pairs of
our module and theirs, in words that can be held against the other code base.

Sources: module names of https://github.com/sanghyun-son/EDSR-PyTorch (EDSR, RCAN, RDN),
https://github.com/XPixelGroup/BasicSR (EDSR, RCAN) and of the code that the CARN paper released,
https://github.com/MoyangSensei/CARN-Pytorch.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

ForeignName = Literal["edsr", "rdn", "rcan", "carn"]
Tensors = Mapping[str, Tensor]
Sizes = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one code base names the tensors of one model.

    Attributes:
        title: the code base.
        first: the module that the input enters; its presence tells the family.
        sizes: the fields of our config that shapes tell; KeyError names a tensor that is missing.
        modules: (our module, theirs) for all but upsampler and last convolution.
        upsampler: the sequence of their upsampler.
        last: their last convolution; None where it ends the upsampler's sequence.
        has_mean: whether its models take a mean away, kept as tensors or not.
    """

    title: str
    first: str
    sizes: Callable[[Tensors], Sizes]
    modules: Callable[[Sizes], Iterator[tuple[str, str]]]
    upsampler: str
    last: str | None
    has_mean: bool = True


def _width(tensors: Tensors, name: str) -> int:
    """Output channels of a convolution's weight; KeyError where there is none of this name."""
    if name not in tensors or tensors[name].ndim != 4 or 0 in tensors[name].shape:
        raise KeyError(name)
    return tensors[name].shape[0]


def _count(tensors: Tensors, pattern: str) -> int:
    """How many tensors have a name like this; KeyError where none has."""
    found = sum(re.fullmatch(pattern, name) is not None for name in tensors)
    if not found:
        raise KeyError(pattern)
    return found


def _carn_sizes(tensors: Tensors) -> Sizes:
    channels = _width(tensors, "head.0.weight")
    squeezed = _width(tensors, "body.0.body.6.down_and_up.0.weight")
    return {
        "num_blocks": _count(tensors, r"body\.(\d+)\.body\.0\.weight"),
        "channels": channels,
        "reduction": channels // squeezed,
    }


def _carn_modules(sizes: Sizes) -> Iterator[tuple[str, str]]:
    yield "head", "head.0"
    for block in range(sizes["num_blocks"]):
        for layer in (0, 1, 3, 4):
            yield f"body.{block}.residual.{layer}", f"body.{block}.body.{layer}"
        gate = f"body.{block}.body.6.down_and_up"
        for layer in (0, 1, 3, 4):  # the pooling is ours to count, not theirs
            yield f"body.{block}.residual.6.gate.{layer + 1}", f"{gate}.{layer}"
    yield f"body.{sizes['num_blocks']}", f"body.{sizes['num_blocks']}"


def _edsr_sizes(tensors: Tensors) -> Sizes:
    return {
        "num_blocks": _count(tensors, r"body\.(\d+)\.body\.0\.weight"),
        "channels": _width(tensors, "head.0.weight"),
    }


def _edsr_modules(sizes: Sizes) -> Iterator[tuple[str, str]]:
    yield "head", "head.0"
    for block in range(sizes["num_blocks"]):
        for layer in (0, 2):
            yield f"body.{block}.residual.{layer}", f"body.{block}.body.{layer}"
    yield f"body.{sizes['num_blocks']}", f"body.{sizes['num_blocks']}"


def _rcan_sizes(tensors: Tensors) -> Sizes:
    channels = _width(tensors, "head.0.weight")
    squeezed = _width(tensors, "body.0.body.0.body.3.conv_du.0.weight")
    return {
        "num_groups": _count(tensors, r"body\.(\d+)\.body\.0\.body\.0\.weight"),
        "num_blocks": _count(tensors, r"body\.0\.body\.(\d+)\.body\.0\.weight"),
        "channels": channels,
        "reduction": channels // squeezed,
    }


def _rcan_modules(sizes: Sizes) -> Iterator[tuple[str, str]]:
    yield "head", "head.0"
    for group in range(sizes["num_groups"]):
        for block in range(sizes["num_blocks"]):
            ours = f"body.{group}.residual.{block}.residual"
            theirs = f"body.{group}.body.{block}.body"
            for layer in (0, 2):
                yield f"{ours}.{layer}", f"{theirs}.{layer}"
                yield f"{ours}.3.gate.{layer + 1}", f"{theirs}.3.conv_du.{layer}"
        end = sizes["num_blocks"]
        yield f"body.{group}.residual.{end}", f"body.{group}.body.{end}"
    yield f"body.{sizes['num_groups']}", f"body.{sizes['num_groups']}"


def _rdn_sizes(tensors: Tensors) -> Sizes:
    return {
        "num_blocks": _count(tensors, r"RDBs\.(\d+)\.LFF\.weight"),
        "num_layers": _count(tensors, r"RDBs\.0\.convs\.(\d+)\.conv\.0\.weight"),
        "growth": _width(tensors, "RDBs.0.convs.0.conv.0.weight"),
        "channels": _width(tensors, "SFENet1.weight"),
    }


def _rdn_modules(sizes: Sizes) -> Iterator[tuple[str, str]]:
    yield "shallow", "SFENet1"
    yield "head", "SFENet2"
    for block in range(sizes["num_blocks"]):
        for layer in range(sizes["num_layers"]):
            yield f"blocks.{block}.layers.{layer}", f"RDBs.{block}.convs.{layer}.conv.0"
        yield f"blocks.{block}.fuse", f"RDBs.{block}.LFF"
    for layer in (0, 1):
        yield f"fuse.{layer}", f"GFF.{layer}"


def _basicsr_edsr_sizes(tensors: Tensors) -> Sizes:
    return {
        "num_blocks": _count(tensors, r"body\.(\d+)\.conv1\.weight"),
        "channels": _width(tensors, "conv_first.weight"),
    }


def _basicsr_edsr_modules(sizes: Sizes) -> Iterator[tuple[str, str]]:
    yield "head", "conv_first"
    for block in range(sizes["num_blocks"]):
        yield f"body.{block}.residual.0", f"body.{block}.conv1"
        yield f"body.{block}.residual.2", f"body.{block}.conv2"
    yield f"body.{sizes['num_blocks']}", "conv_after_body"


def _basicsr_rcan_sizes(tensors: Tensors) -> Sizes:
    channels = _width(tensors, "conv_first.weight")
    squeezed = _width(tensors, "body.0.residual_group.0.rcab.3.attention.1.weight")
    return {
        "num_groups": _count(tensors, r"body\.(\d+)\.conv\.weight"),
        "num_blocks": _count(tensors, r"body\.0\.residual_group\.(\d+)\.rcab\.0\.weight"),
        "channels": channels,
        "reduction": channels // squeezed,
    }


def _basicsr_rcan_modules(sizes: Sizes) -> Iterator[tuple[str, str]]:
    yield "head", "conv_first"
    for group in range(sizes["num_groups"]):
        for block in range(sizes["num_blocks"]):
            ours = f"body.{group}.residual.{block}.residual"
            theirs = f"body.{group}.residual_group.{block}.rcab"
            for layer in (0, 2):
                yield f"{ours}.{layer}", f"{theirs}.{layer}"
                yield f"{ours}.3.gate.{layer + 1}", f"{theirs}.3.attention.{layer + 1}"
        yield f"body.{group}.residual.{sizes['num_blocks']}", f"body.{group}.conv"
    yield f"body.{sizes['num_groups']}", "conv_after_body"


_EDSR_PYTORCH: Any = {"first": "head.0", "upsampler": "tail.0", "last": "tail.1"}
_BASICSR: Any = {"first": "conv_first", "upsampler": "upsample", "last": "conv_last"}
FAMILIES: Mapping[ForeignName, tuple[Family, ...]] = {
    "edsr": (
        Family(title="EDSR-PyTorch", sizes=_edsr_sizes, modules=_edsr_modules, **_EDSR_PYTORCH),
        Family(
            title="BasicSR", sizes=_basicsr_edsr_sizes, modules=_basicsr_edsr_modules, **_BASICSR
        ),
    ),
    "rdn": (
        Family(
            title="EDSR-PyTorch",
            first="SFENet1",
            sizes=_rdn_sizes,
            modules=_rdn_modules,
            upsampler="UPNet",
            last=None,
            has_mean=False,
        ),
    ),
    "rcan": (
        Family(title="EDSR-PyTorch", sizes=_rcan_sizes, modules=_rcan_modules, **_EDSR_PYTORCH),
        Family(
            title="BasicSR", sizes=_basicsr_rcan_sizes, modules=_basicsr_rcan_modules, **_BASICSR
        ),
    ),
    "carn": (
        Family(title="CARN-Pytorch", sizes=_carn_sizes, modules=_carn_modules, **_EDSR_PYTORCH),
    ),
}
