"""Make LR as a slide scanner does: blur, sampling, noise, sharpening, JPEG.

HR -> Gaussian blur (the objective) -> sampling (the mean over the sensor's area, antialiased
bicubic interpolation, or in between) -> noise -> unsharp mask -> 8 bits -> JPEG of the whole tile.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carn.degradation.bicubic import SCALES, crop_to_multiple, degrade, downsample, to_uint8
from carn.degradation.jpeg import (
    SUBSAMPLINGS,
    Subsampling,
    Tables,
    quantisation_tables,
    through_jpeg,
)
from carn.slides.slide import Rgb

# Noise at black and at white relative to that at mid-grey: photon noise after a gamma curve.
_NOISE_AT_BLACK, _NOISE_AT_WHITE = 1.4, 0.6


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """One way from HR to LR.

    Attributes:
        blur_px: standard deviation of the Gaussian, HR px.
        mean_weight: weight of the mean over an LR px, 0..1; the rest is bicubic interpolation's.
        noise_levels: standard deviation at mid-grey, grey levels of LR.
        sharpen_amount: of the unsharp mask; 0 for none.
        sharpen_px: standard deviation of the unsharp mask's Gaussian, LR px.
        jpeg_quality: 1..100; None for lossless.
        jpeg_subsampling: of chroma.
        jpeg_tables: whose quantisation tables.
    """

    blur_px: float = 0.0
    mean_weight: float = 0.0
    noise_levels: float = 0.0
    sharpen_amount: float = 0.0
    sharpen_px: float = 1.0
    jpeg_quality: int | None = None
    jpeg_subsampling: Subsampling = "4:2:0"
    jpeg_tables: Tables = "ijg"

    def __post_init__(self) -> None:
        for name in ("blur_px", "noise_levels", "sharpen_amount", "sharpen_px"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number from 0 on")
        if not 0 <= self.mean_weight <= 1:
            raise ValueError(f"mean_weight={self.mean_weight} is not in 0..1")
        if self.jpeg_quality is not None:
            quantisation_tables(self.jpeg_quality, tables=self.jpeg_tables)
        if self.jpeg_subsampling not in SUBSAMPLINGS:
            raise ValueError(
                f"jpeg_subsampling={self.jpeg_subsampling!r} is not one of "
                f"{', '.join(SUBSAMPLINGS)}"
            )


# The paper's: antialiased bicubic interpolation, lossless.
BICUBIC = Degradation()


def apply(hr: Rgb, way: Degradation, *, scale: int, rng: np.random.Generator) -> Rgb:
    """Make LR of an HR image, HR cropped to a multiple of the scale.

    The image is mirrored at its border for blur and sharpening.

    Args:
        hr: (H, W, 3) uint8.
        way: how.
        scale: 2, 3, 4 or 8.
        rng: of the noise.

    Returns:
        (H // scale, W // scale, 3) uint8.

    Raises:
        ValueError: as `degrade`.
    """
    if way == Degradation():
        return degrade(hr, scale=scale)
    if scale not in SCALES:
        raise ValueError(f"scale {scale} is not one of {', '.join(map(str, SCALES))}")
    if min(hr.shape[:2]) < scale:
        raise ValueError(f"an image of {hr.shape[1]} x {hr.shape[0]} px has no LR at scale {scale}")
    hr = crop_to_multiple(hr, scale)
    pixels: NDArray[np.float32] = hr.astype(np.float32)
    if way.blur_px > 0:
        pixels = _blurred(pixels, way.blur_px)
    lr = _sampled(pixels, way.mean_weight, scale=scale)
    if way.noise_levels > 0:
        noise: NDArray[np.float32] = rng.standard_normal(lr.shape, dtype=np.float32)
        slope = _NOISE_AT_WHITE - _NOISE_AT_BLACK
        lr += way.noise_levels * (_NOISE_AT_BLACK + slope * np.clip(lr, 0, 255) / 255) * noise
    if way.sharpen_amount > 0:
        lr = lr + way.sharpen_amount * (lr - _blurred(lr, way.sharpen_px))
    small = to_uint8(lr)
    if way.jpeg_quality is None:
        return small
    return through_jpeg(
        small,
        quality=way.jpeg_quality,
        subsampling=way.jpeg_subsampling,
        tables=way.jpeg_tables,
    )


def _blurred(pixels: NDArray[np.float32], sigma_px: float) -> NDArray[np.float32]:
    # Here, for a bare GPU machine has no scipy and degrades bicubically at the most.
    from scipy import ndimage

    blurred: NDArray[np.float32] = ndimage.gaussian_filter(
        pixels, (sigma_px, sigma_px, 0), mode="reflect"
    )
    return blurred


def _sampled(pixels: NDArray[np.float32], mean_weight: float, *, scale: int) -> NDArray[np.float32]:
    height, width = (side // scale for side in pixels.shape[:2])
    lr: NDArray[np.float32] = np.zeros((height, width, pixels.shape[2]), dtype=np.float32)
    if mean_weight > 0:
        blocks = pixels.reshape(height, scale, width, scale, -1)
        lr += np.float32(mean_weight) * blocks.mean(axis=(1, 3))
    if mean_weight < 1:
        lr += np.float32(1 - mean_weight) * downsample(pixels, scale=scale)
    return lr
