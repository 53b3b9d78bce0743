"""What a degradation does to pixels, in a few numbers that networks can be told."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from carn.degradation.jpeg import quantisation_tables
from carn.degradation.scanner import Degradation

NUMBERS = (
    "contrast_at_half_nyquist",
    "contrast_at_nyquist",
    "contrast_beyond_nyquist",
    "noise",
    "luma_step",
    "chroma_step",
    "chroma_halving",
)
# The steps of a JPEG table that decide what it does to tissue: those of low frequencies.
_LOW_FREQUENCIES = tuple(8 * y + x for y in range(8) for x in range(8) if 0 < x + y <= 4)


def numbers_of(way: Degradation, *, scale: int) -> Float[NDArray[Any], " 7"]:
    """Describe a way by what it does to pixels, in numbers of about 0..1; NUMBERS names them.

    The share of HR's contrast that LR keeps along one axis at 1/4, 1/2 and 3/4 cycles/LR px (the
    last aliases); noise, as log2(1 + grey levels) / 2; the mean quantisation step of low
    frequencies of luma and chroma, as log2(1 + grey levels) / 6; halvings of chroma, over 2.
    """
    contrasts = [contrast_at(cycles, way, scale=scale) for cycles in (0.25, 0.5, 0.75)]
    steps, halvings = [0.0, 0.0], 0
    if way.jpeg_quality is not None:
        tables = quantisation_tables(way.jpeg_quality, tables=way.jpeg_tables)
        steps = [
            math.log2(1 + np.mean([table[at] for at in _LOW_FREQUENCIES])) / 6 for table in tables
        ]
        halvings = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}[way.jpeg_subsampling]
    noise = math.log2(1 + way.noise_levels) / 2
    return np.array([*contrasts, noise, *steps, halvings / 2], dtype=np.float32)


def contrast_at(cycles_per_lr_px: float, way: Degradation, *, scale: int) -> float:
    """Share of HR's contrast that LR keeps along one axis at a frequency (its modulation transfer).

    Beyond 1/2 it is that of the alias.
    """
    f = cycles_per_lr_px
    blur = math.exp(-2 * (math.pi * way.blur_px / scale * f) ** 2)
    mean = math.sin(math.pi * f) / (scale * math.sin(math.pi * f / scale))
    # The transfer of Keys' kernel stretched to LR px, by its taps at HR px.
    at = (np.arange(4 * scale) + 0.5) / scale - 2
    taps = _keys(np.abs(at))
    bicubic = float((taps * np.cos(2 * math.pi * f * at)).sum() / taps.sum())
    sampled = way.mean_weight * mean + (1 - way.mean_weight) * bicubic
    # Sharpening sees what has been sampled: beyond Nyquist, the alias.
    g = min(f, 1 - f)
    mask = math.exp(-2 * (math.pi * way.sharpen_px * g) ** 2)
    return blur * sampled * (1 + way.sharpen_amount * (1 - mask))


def _keys(x: NDArray[np.float64]) -> NDArray[np.float64]:
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
