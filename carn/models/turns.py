"""The eight flips and turns of an image, and what a network makes of all of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

NUM_TURNS = 8


def mean_over_turns(
    upscale: Callable[[Tensor], Tensor], lr: Float[Tensor, "*b h w"]
) -> Float[Tensor, "*b h_sr w_sr"]:
    """Average a network's results for the eight flips and turns of an image, each turned back.

    Four of the eight are transposed: a network sees (w, h) there.

    Args:
        upscale: the network; is called eight times, one after another.
        lr: the image, as the network wants it.

    Returns:
        In the dtype that the network gives; neither clamped nor rounded.

    Source: B. Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution",
    CVPR Workshops 2017, https://arxiv.org/abs/1707.02921, section 3.4 (geometric self-ensemble).
    """
    (first, undo), *others = turns(lr)
    total = undo(upscale(first))
    for turned, undo in others:
        total = total + undo(upscale(turned))
    return total / NUM_TURNS


def turns(lr: Float[Tensor, "*b h w"]) -> Iterator[tuple[Tensor, "Undo"]]:
    """Give the eight flips and turns of an image, each with the way back."""
    for transpose in (False, True):
        for axes in ((), (-1,), (-2,), (-2, -1)):
            undo = Undo(axes=axes, transpose=transpose)
            turned = lr.transpose(-1, -2) if transpose else lr
            yield turned.flip(axes), undo


@dataclass(frozen=True, kw_only=True)
class Undo:
    """The way back from a flip or turn, for an image of any size.

    Attributes:
        axes: along which it is flipped, before it is transposed.
        transpose: whether rows become columns.
    """

    axes: tuple[int, ...]
    transpose: bool

    def __call__(self, sr: Float[Tensor, "*b h w"]) -> Tensor:
        """Turn an image back."""
        sr = sr.flip(self.axes)
        return sr.transpose(-1, -2) if self.transpose else sr
