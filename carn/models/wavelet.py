"""The orthonormal Haar transform of images and features, and its inverse."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def haar(
    image: Float[Tensor, "b c h w"], *, levels: int = 1
) -> Float[Tensor, "b c_out h_out w_out"]:
    """Haar coefficients: each level turns blocks of 2 x 2 px into four channels of half the size.

    A level gives the channels [low, horizontal, vertical, diagonal detail], C of each; the next one
    takes all of them, details too (a wavelet packet), so that L levels give 4^L * C channels.
    Orthonormal: the sum of squares stays, and the low channels of an image in 0..1 lie in 0..2^L.
    Source: A. Haar 1910, https://doi.org/10.1007/BF01456326; as packets, in this order, in SWD-Net
    (Chen et al., MICCAI 2020, pp. 184-193, equation 2).

    Args:
        image: any floating type, kept.
        levels: how often the sides are halved, 0 or more.

    Returns:
        (B, 4^levels * C, H / 2^levels, W / 2^levels).

    Raises:
        ValueError: a side that 2^levels does not divide; pad the image first.
    """
    height, width = image.shape[-2:]
    if height % 2**levels or width % 2**levels:
        raise ValueError(
            f"{levels} Haar levels need sides that {2**levels} divides, not {height} x {width}"
        )
    for _ in range(levels):
        image = _analyse(image)
    return image


def inverse_haar(
    coefficients: Float[Tensor, "b c h w"], *, levels: int = 1
) -> Float[Tensor, "b c_out h_out w_out"]:
    """The image that has these coefficients, `haar` undone but for roundings.

    Args:
        coefficients: (B, 4^levels * C, h, w) in the order that `haar` gives.
        levels: how often the sides are doubled, 0 or more.

    Returns:
        (B, C, 2^levels * h, 2^levels * w).

    Raises:
        ValueError: a number of channels that 4^levels does not divide.
    """
    if coefficients.shape[1] % 4**levels:
        raise ValueError(
            f"{levels} Haar levels make {4**levels} channels of each, which does not divide "
            f"{coefficients.shape[1]} channels"
        )
    for _ in range(levels):
        coefficients = _synthesise(coefficients)
    return coefficients


def _analyse(image: Tensor) -> Tensor:
    blocks = functional.pixel_unshuffle(image, 2)
    top_left, top_right, bottom_left, bottom_right = (blocks[:, part::4] for part in range(4))
    top, top_step = top_left + top_right, top_right - top_left
    bottom, bottom_step = bottom_left + bottom_right, bottom_right - bottom_left
    bands = [top + bottom, top_step + bottom_step, bottom - top, bottom_step - top_step]
    return torch.cat(bands, dim=1) / 2


def _synthesise(coefficients: Tensor) -> Tensor:
    low, horizontal, vertical, diagonal = coefficients.chunk(4, dim=1)
    top, top_step = low - vertical, horizontal - diagonal
    bottom, bottom_step = low + vertical, horizontal + diagonal
    pixels = [top - top_step, top + top_step, bottom - bottom_step, bottom + bottom_step]
    return functional.pixel_shuffle(torch.stack(pixels, dim=2).flatten(1, 2) / 2, 2)
