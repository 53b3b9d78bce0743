"""Make LR by clean antialiased bicubic interpolation, as the paper and the field do."""

from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch.nn import functional

from carn.slides.slide import Rgb

SCALES = (2, 3, 4, 8)

# In words, for whoever gets the images.
BICUBIC = "bicubic, a = -0.5, antialiased, weights renormalized at the border (torch)"

# What happens at the image's border. `renormalized`: the kernel's part inside the image, its
# weights scaled to sum to one (Pillow, torch). `symmetric`: the image is mirrored (MATLAB's
# imresize, by which the published LR sets of the EDSR family were made).
Border = Literal["renormalized", "symmetric"]


def crop_to_multiple(hr: Rgb, scale: int) -> Rgb:
    """The top-left part of an image whose sides are multiples of `scale`: (H, W, C) -> a view."""
    height, width = hr.shape[:2]
    return hr[: height - height % scale, : width - width % scale]


def degrade(hr: Rgb, *, scale: int, border: Border = "renormalized") -> Rgb:
    """LR of an HR image: antialiased bicubic (a = -0.5), HR cropped to a multiple of the scale.

    Computed by torch's antialiased bicubic interpolation in float32 and rounded. Pillow's BICUBIC
    is the same kernel in fixed point: on tissue it differs by at most one grey level, on black and
    white by more, for it clips what overshoots between its two passes. With `border="symmetric"` it
    equals MATLAB's imresize(hr, 1 / scale, "bicubic") but for roundings.
    Source: R. Keys 1981, https://doi.org/10.1109/TASSP.1981.1163711, stretched by the scale.

    Args:
        hr: (H, W, C) uint8.
        scale: 2, 3, 4 or 8.
        border: see Border; it matters within 2 LR px of the edge only.

    Returns:
        (H // scale, W // scale, C) uint8.

    Raises:
        ValueError: another scale, or an image smaller than one LR px.
    """
    if scale not in SCALES:
        raise ValueError(f"scale {scale} is not one of {', '.join(map(str, SCALES))}")
    hr = crop_to_multiple(hr, scale)
    if 0 in hr.shape:
        raise ValueError(f"an image of {hr.shape[1]} x {hr.shape[0]} px has no LR at scale {scale}")
    # The kernel reaches 2 LR px; a multiple of the scale keeps LR and HR grids aligned.
    margin = 0
    if border == "symmetric":
        margin = 4
        hr = np.pad(hr, ((margin * scale,) * 2, (margin * scale,) * 2, (0, 0)), mode="symmetric")
    lr = to_uint8(downsample(hr, scale=scale))
    return np.ascontiguousarray(lr[margin : lr.shape[0] - margin, margin : lr.shape[1] - margin])


def downsample(
    hr: UInt8[NDArray[Any], "H W c"] | Float[NDArray[Any], "H W c"], *, scale: int
) -> Float[NDArray[Any], "h w c"]:
    """Make an image smaller by antialiased bicubic interpolation, without rounding.

    Args:
        hr: sides are multiples of `scale`.
        scale: the factor.

    Returns:
        float32 on the scale of `hr`, which it may overshoot.
    """
    # Into an image 1 px wide, torch 2.13 writes its first row over and over (floats on the CPU,
    # whatever their strides); into one 1 px high it does not.
    is_turned = hr.shape[1] == scale
    if is_turned:
        hr = hr.transpose(1, 0, 2)
    # A copy: torch takes no read-only arrays, and callers may well have one.
    pixels = torch.from_numpy(np.array(hr, dtype=np.float32)).permute(2, 0, 1)[None]
    size = (hr.shape[0] // scale, hr.shape[1] // scale)
    small = functional.interpolate(
        pixels, size=size, mode="bicubic", align_corners=False, antialias=True
    )
    lr = small[0].permute(1, 2, 0).numpy()
    return lr.transpose(1, 0, 2) if is_turned else lr


def to_uint8(pixels: Float[NDArray[Any], "h w c"]) -> UInt8[NDArray[Any], "h w c"]:
    """Round grey levels half to even and clip them to 0..255."""
    rounded: UInt8[NDArray[Any], "h w c"] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return rounded
