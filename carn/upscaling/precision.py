"""Where a network may compute in bfloat16: most of its work, little of its accuracy.

bfloat16 keeps 8 bits of the mantissa. What the result is a sum of (head, long skip, tail) therefore
stays in float32, and only what is added to it is rounded. How far the results are from float32 is
in the table of `carn.upscaling.accuracy`; a network that loses more than that table allows has no
bfloat16 form at all.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from carn.models.adaptive_carn import AdaptiveCarn
from carn.models.carn import Carn
from carn.models.edsr import Edsr
from carn.models.edsr import ResidualBlock as EdsrBlock
from carn.models.rcan import Rcan
from carn.models.rdn import Rdb, Rdn
from carn.models.swdnet import SwdNet
from carn.processor import has_bf16
from carn.upscaling.folding import Skip

Precision = Literal["fp32", "bf16"]

# Those that stay within 70 dB of float32: a hundredth of the squared error of rounding to uint8.
_IN_BF16_UNASKED = (Carn, Edsr, Rdn, SwdNet)
# Those that stay within 60 dB.
_IN_BF16 = (*_IN_BF16_UNASKED, Rcan)


class InBf16(nn.Module):
    """A part of a network in bfloat16, between float32 features."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part.to(torch.bfloat16)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        """What the part makes of the features."""
        made: Tensor = self.part(x.to(torch.bfloat16))
        return made.float()


def choose_precision(
    model: nn.Module, *, wanted: Literal["auto", "fp32", "bf16"], device: torch.device
) -> Precision:
    """The precision to run a model in; `auto`: bf16 where it keeps 70 dB and the device has it.

    Raises:
        ValueError: bf16 was asked for, and has no form of this model that keeps 60 dB.
    """
    if wanted == "auto":
        is_fit = isinstance(model, _IN_BF16_UNASKED) and has_bf16(device)
        return "bf16" if is_fit else "fp32"
    if wanted == "bf16" and not offers_bf16(model):
        raise ValueError(
            f"{type(model).__name__} loses too much in bf16; choose the precision auto or fp32"
        )
    return wanted


def offers_bf16(model: nn.Module) -> bool:
    """Whether the model has a form for bfloat16 that keeps 60 dB."""
    return isinstance(model, _IN_BF16)


def to_bf16(network: nn.Module) -> None:
    """Bring a model of MODELS, folded or not, into the form for bfloat16, in place.

    Raises:
        ValueError: the model has none.
    """
    if isinstance(network, AdaptiveCarn):
        # With frozen poolings `fold` makes a plain CARN of it; before that, each window has weights
        # of its own, and float32 is fast enough for the few that calibrate.
        return
    if isinstance(network, (Carn, Rcan)):
        _wrap(network, "body")
    elif isinstance(network, (Edsr, Rdn)):
        # Their blocks add little at a time, so that the sum of them stays in float32, too: 5 dB of
        # EDSR, 1 dB of RDN, for a tenth of the time.
        for name, block in list(network.named_modules()):
            if isinstance(block, (EdsrBlock, Skip)):
                block.residual = InBf16(block.residual)
            elif isinstance(block, Rdb):
                _wrap(network, name)
        last = f"body.{len(network.body) - 1}" if isinstance(network, Edsr) else "fuse"
        _wrap(network, last)
        if isinstance(network, Rdn):
            _wrap(network, "head")
    elif isinstance(network, SwdNet):
        for number in range(len(network.spatial.modules_in_turn)):
            _wrap(network, f"spatial.modules_in_turn.{number}")
    else:
        raise ValueError(f"{type(network).__name__} has no form for bf16")


def _wrap(network: nn.Module, name: str) -> None:
    network.set_submodule(name, InBf16(network.get_submodule(name)))
