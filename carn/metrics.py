"""PSNR and SSIM of 8-bit images, by the definitions of the super-resolution literature.

Every number is worth only as much as its convention: `convention` puts it in words, to be printed
beside the numbers.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float, Float64, Shaped, UInt8
from torch import Tensor

Channel = Literal["rgb", "y"]

DATA_RANGE = 255
PSNR_CAP_DB = 100.0
"""What one image counts at most in a mean: equal images have an infinite PSNR."""

# Source: Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861 (window, K1, K2).
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03

# Y (16..235) of RGB in 0..255. Source: ITU-R BT.601 studio swing, by the numbers of MATLAB's
# rgb2ycbcr, https://mathworks.com/help/images/ref/rgb2ycbcr.html
_Y_WEIGHTS = (65.481 / 255, 128.553 / 255, 24.966 / 255)
_Y_OFFSET = 16.0


def gaussian_weights() -> tuple[float, ...]:
    """The 11 weights of SSIM's window along one axis, their sum one."""
    reach = SSIM_WINDOW_PX // 2
    squares = [(place - reach) ** 2 for place in range(SSIM_WINDOW_PX)]
    weights = [math.exp(-square / (2 * SSIM_SIGMA_PX**2)) for square in squares]
    return tuple(weight / sum(weights) for weight in weights)


def to_uint8(sr: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Images of range 0..1 as 0..255: clamped, then rounded half to even.

    Metrics are taken of these, as they are of images that went through a file.
    """
    return sr.float().clamp(0, 1).mul(DATA_RANGE).round_().to(torch.uint8)


def psnr(
    sr: UInt8[Tensor, "b 3 h w"],
    hr: UInt8[Tensor, "b 3 h w"],
    *,
    shave_px: int = 0,
    channel: Channel = "rgb",
) -> Float64[Tensor, " b"]:
    """PSNR of each image in dB, data range 255; infinite where the two are equal.

    The squared error is averaged over the pixels and, in RGB, over the channels of one image: in
    integers for RGB, so that it is exact. The defaults are what the CARN paper's numbers are.
    Source: https://doi.org/10.7717/peerj-cs.1196; the Y channel as in EDSR's evaluation,
    https://arxiv.org/abs/1707.02921.

    Args:
        sr: the results, 0..255.
        hr: what they should be.
        shave_px: border that is left out on each side.
        channel: all of RGB, or the unrounded Y of BT.601 (studio swing, 16..235).

    Raises:
        ValueError: shapes that differ, an unknown channel, or a shave that leaves no pixel.
    """
    _check(sr, hr, shave_px=shave_px, channel=channel, least_px=1)
    errors = []
    for one, other in zip(_shave(sr, shave_px), _shave(hr, shave_px), strict=True):
        if channel == "rgb":
            difference = one.to(torch.int32) - other.to(torch.int32)
            squares = difference.square_().sum(dtype=torch.int64)
            errors.append(squares.double() / difference.numel())
        else:
            errors.append((_luma(one) - _luma(other)).square_().mean(dtype=torch.float64))
    return 10 * torch.log10(DATA_RANGE**2 / torch.stack(errors))


def mean_psnr(per_image: Float64[Tensor, " b"] | Iterable[float]) -> float:
    """The mean PSNR over images in dB, an image counting 100 dB at most.

    Without a cap one image that equals its target, such as a blank tile, makes the mean infinite.
    The cap holds for finite values, too: what is closer than 100 dB counts as equal.

    Raises:
        ValueError: no image, or a PSNR that is not a number.
    """
    values = [float(value) for value in per_image]
    if not values:
        raise ValueError("the mean PSNR of no image is undefined")
    if any(math.isnan(value) for value in values):
        raise ValueError(f"PSNR of image {[math.isnan(v) for v in values].index(True)} is NaN")
    return math.fsum(min(value, PSNR_CAP_DB) for value in values) / len(values)


def ssim(
    sr: UInt8[Tensor, "b 3 h w"],
    hr: UInt8[Tensor, "b 3 h w"],
    *,
    shave_px: int = 0,
    channel: Channel = "rgb",
) -> Float64[Tensor, " b"]:
    """SSIM of each image, as MATLAB's reference code: -1..1, one where the two are equal.

    11 x 11 Gaussian window (sigma 1.5) at the positions where it fits (no padding), population
    covariance, K1 = .01, K2 = .03, data range 255, mean over positions and channels. Working
    memory is some 12 float64 copies of one image's plane, whatever the batch.
    Source: Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, equation 13.

    Args:
        sr: the results, 0..255.
        hr: what they should be.
        shave_px: border that is left out on each side.
        channel: the mean over R, G and B, or the unrounded Y of BT.601 (studio swing, 16..235).

    Raises:
        ValueError: shapes that differ, an unknown channel, or an image smaller than the window
            after the shave.
    """
    _check(sr, hr, shave_px=shave_px, channel=channel, least_px=SSIM_WINDOW_PX)
    pairs = zip(_shave(sr, shave_px), _shave(hr, shave_px), strict=True)
    return torch.stack([_ssim_of_image(one, other, channel) for one, other in pairs])


def convention(*, shave_px: int = 0, channel: Channel = "rgb") -> str:
    """How `psnr`, `mean_psnr` and `ssim` came to their numbers, in one sentence."""
    pixels = "RGB" if channel == "rgb" else "the Y channel (BT.601 studio swing, unrounded)"
    border = f"{shave_px} px of border cropped" if shave_px else "no border cropped"
    over_channels = ", channels" if channel == "rgb" else ""
    return (
        f"PSNR and SSIM of 8-bit images on {pixels}, data range {DATA_RANGE}, {border}; "
        f"SSIM by an {SSIM_WINDOW_PX} x {SSIM_WINDOW_PX} Gaussian window of sigma {SSIM_SIGMA_PX} "
        f"without padding (MATLAB's), mean over positions{over_channels}; "
        f"mean over images, an image's PSNR counting {PSNR_CAP_DB:g} dB at most."
    )


def _check(sr: Tensor, hr: Tensor, *, shave_px: int, channel: str, least_px: int) -> None:
    if sr.shape != hr.shape:
        raise ValueError(f"SR of shape {tuple(sr.shape)} against HR of shape {tuple(hr.shape)}")
    if sr.dtype != torch.uint8 or hr.dtype != torch.uint8:
        raise ValueError(f"SR is {sr.dtype} and HR {hr.dtype}: both must be uint8 (see to_uint8)")
    if channel not in ("rgb", "y"):
        raise ValueError(f"channel={channel!r} must be 'rgb' or 'y'")
    if shave_px < 0:
        raise ValueError(f"shave_px={shave_px} must be at least 0")
    height, width = sr.shape[-2:]
    if min(height, width) - 2 * shave_px < least_px:
        raise ValueError(
            f"an image of {width} x {height} px with shave_px={shave_px} leaves less than the "
            f"{least_px} x {least_px} px that the metric needs"
        )


def _shave(images: Shaped[Tensor, "b c h w"], shave_px: int) -> Shaped[Tensor, "b c h2 w2"]:
    height, width = images.shape[-2:]
    return images[..., shave_px : height - shave_px, shave_px : width - shave_px]


def _luma(image: UInt8[Tensor, "3 h w"]) -> Float64[Tensor, "h w"]:
    red, green, blue = _Y_WEIGHTS
    pixels = image.double()
    luma: Tensor = red * pixels[0] + green * pixels[1] + blue * pixels[2] + _Y_OFFSET
    return luma


def _ssim_of_image(
    one: UInt8[Tensor, "3 h w"], other: UInt8[Tensor, "3 h w"], channel: Channel
) -> Float64[Tensor, ""]:
    if channel == "y":
        return _ssim_of_plane(_luma(one), _luma(other))
    # One plane at a time bounds the memory, and stays longer in the processor's caches.
    pairs = zip(one, other, strict=True)
    return torch.stack([_ssim_of_plane(x.double(), y.double()) for x, y in pairs]).mean()


def _ssim_of_plane(x: Float64[Tensor, "h w"], y: Float64[Tensor, "h w"]) -> Float64[Tensor, ""]:
    # Float64, since a variance is a small difference of large squares: on white tissue float32
    # leaves errors in the fourth decimal.
    mean_x, mean_y = _blur(x), _blur(y)
    mean_xy, mean_xx_yy = mean_x * mean_y, mean_x.square().addcmul_(mean_y, mean_y)
    covariance = _blur(x * y) - mean_xy
    variance_sum = _blur(x.square().addcmul_(y, y)) - mean_xx_yy
    c1, c2 = (SSIM_K1 * DATA_RANGE) ** 2, (SSIM_K2 * DATA_RANGE) ** 2
    luminance = (2 * mean_xy + c1) / (mean_xx_yy + c1)
    structure = (2 * covariance + c2) / (variance_sum + c2)
    return (luminance * structure).mean()


def _blur(plane: Float64[Tensor, "h w"]) -> Float64[Tensor, "h2 w2"]:
    """Gaussian means at the positions where the window fits.

    Sums of shifted views: several times faster on a CPU than convolutions of one channel.
    """
    for axis in (-1, -2):
        num_fitting = plane.shape[axis] - SSIM_WINDOW_PX + 1
        first, *others = gaussian_weights()
        blurred = plane.narrow(axis, 0, num_fitting) * first
        for start, weight in enumerate(others, start=1):
            blurred.add_(plane.narrow(axis, start, num_fitting), alpha=weight)
        plane = blurred
    return plane
