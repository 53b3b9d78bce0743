"""What the models' configurations have to satisfy, in one wording."""

import math

from carn.degradation.bicubic import SCALES


def check_scale(scale: int) -> None:
    """Raise ValueError where `scale` is not one of the factors that the project trains for."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale} is not one of {', '.join(map(str, SCALES))}")


def check_counts(**counts: int) -> None:
    """Raise ValueError where a count is below 1, naming it."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")


def check_reduction(channels: int, *, reduction: int) -> None:
    """Raise ValueError where channels cannot be squeezed by `reduction` without a remainder."""
    check_counts(channels=channels, reduction=reduction)
    if channels % reduction:
        raise ValueError(f"reduction={reduction} does not divide channels={channels}")


def check_pixels(*, pixel_range: float, mean: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:
    """Raise ValueError where pixels cannot be scaled and shifted by these."""
    if not (math.isfinite(pixel_range) and pixel_range > 0):
        raise ValueError(f"pixel_range={pixel_range} must be above 0, such as 255.0 or 1.0")
    if len(mean) != 3 or not all(0 <= level <= 1 for level in mean):
        raise ValueError(f"mean={mean} must be three levels (R, G, B) between 0 and 1")
