"""What a model costs: parameters, and the arithmetic of one forward pass."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module, *, weights_only: bool = False) -> int:
    """Trainable numbers of a model.

    Args:
        model: any module.
        weights_only: leave out whatever is not the kernel of a convolution or the matrix of a
            linear layer: biases, normalization, the slopes of PReLU.
    """
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if parameter.requires_grad and not (weights_only and parameter.ndim < 2)
    )


def count_flops(
    model: nn.Module, *, lr_px: tuple[int, int] = (64, 64), with_biases: bool = True
) -> int:
    """Floating-point operations of one forward pass: two for each multiplication and addition.

    Convolutions and linear layers are counted, and nothing else: activations, pooling, sums and
    interpolation are small beside them. No pixel is computed, and the model is not changed.

    Args:
        model: takes (1, 3, height, width).
        lr_px: (width, height) of the LR image.
        with_biases: take a bias for one more multiplication and addition of each output, as if it
            were a weight on an input of one. That is how parameters turn to FLOPs where papers
            multiply them by pixels, so the two compare. Without, the count is torch's own.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    state = {name: tensor.detach().to("meta") for name, tensor in tensors}
    lr = torch.empty(1, 3, lr_px[1], lr_px[0], device="meta")
    formulas = {_CONVOLUTION: _convolution_flops, _LINEAR: _linear_flops} if with_biases else {}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), counter:
        functional_call(model, state, (lr,))
    return int(counter.get_total_flops())


# What the two kinds of layers are to torch once they run.
_CONVOLUTION = torch.ops.aten.convolution
_LINEAR = torch.ops.aten.addmm


def _convolution_flops(
    x: Sequence[int],
    kernel: Sequence[int],
    bias: Sequence[int] | None,
    _stride: object,
    _padding: object,
    _dilation: object,
    is_transposed: bool,
    *_others: object,
    out_shape: Sequence[int],
    **_options: object,
) -> int:
    """Of a convolution by the shapes of what goes in and out."""
    # Kernels are (out, in / groups, height, width), transposed ones (in, out / groups, ...).
    multiplied = math.prod(x if is_transposed else out_shape) * math.prod(kernel[1:])
    return 2 * (multiplied + (0 if bias is None else math.prod(out_shape)))


def _linear_flops(
    _bias: Sequence[int],
    x: Sequence[int],
    matrix: Sequence[int],
    *_others: object,
    out_shape: Sequence[int],
    **_options: object,
) -> int:
    """Of a linear layer with a bias, likewise."""
    return 2 * math.prod(out_shape) * (x[1] + 1)
