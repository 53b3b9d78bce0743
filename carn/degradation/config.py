"""Settings of how LR is made of HR."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from carn.degradation.jpeg import SUBSAMPLINGS, TABLES, Subsampling, Tables

Kind = Literal["bicubic", "scanner"]
Sampling = Literal["bicubic", "mean", "mixed"]


@dataclass(frozen=True, kw_only=True)
class DegradationConfig:
    """How LR is made of HR. Ranges are drawn from uniformly, anew for each variant of each tile.

    The defaults of `scanner` cover what slides are like: objectives of NA 0.4 to 0.95 at 0.25 um/px
    blur by 0 to 1.3 HR px, scanners store JPEG with chroma whole, halved or quartered.
    """

    degradation: Kind = "bicubic"
    """`bicubic`: antialiased bicubic interpolation, the paper's. `scanner`: blur, sampling, noise,
    sharpening and JPEG as below."""
    lr_variants: int = 1
    """LR images of each tile, from all of which patches are cut alike; more than one takes
    `scanner`."""
    lr_seed: int = 1
    """Of what is drawn for LR; apart from that of the run, so that runs can share tiles."""
    clean_share: float = 0.2
    """Share of LR images that are sampled and nothing else: levels that software made of sharper
    ones, and stored losslessly."""
    blur_px: tuple[float, float] = (0.0, 1.3)
    """Least and largest standard deviation of the blur, HR px."""
    blur_share: float = 0.5
    """Share of the others that are blurred."""
    sampling: Sampling = "mixed"
    """How LR px come of HR px: `bicubic`, `mean` of the LR px's area, `mixed` for a third each of
    these and of what lies between them."""
    noise_levels: tuple[float, float] = (0.0, 3.0)
    """Least and largest standard deviation of the noise at mid-grey, grey levels; 1.4 times that at
    black, 0.6 times at white."""
    noise_share: float = 0.4
    """Share of the others with noise."""
    sharpen_amount: tuple[float, float] = (0.2, 1.0)
    """Least and largest amount of the unsharp mask."""
    sharpen_px: tuple[float, float] = (0.6, 1.5)
    """Least and largest standard deviation of the unsharp mask's Gaussian, LR px."""
    sharpen_share: float = 0.2
    """Share of the others that are sharpened."""
    jpeg_quality: tuple[int, int] = (50, 97)
    """Least and largest JPEG quality, 1..100."""
    jpeg_share: float = 0.9
    """Share of the others that go through JPEG; the rest is lossless."""
    jpeg_subsampling: tuple[Subsampling, ...] = SUBSAMPLINGS
    """Chroma subsamplings to draw from, all alike."""
    jpeg_tables: tuple[Tables, ...] = ("ijg",)
    """Quantisation tables to draw from, all alike: `ijg` (the standard's), `flat`, `robidoux`."""

    def __post_init__(self) -> None:
        _check_choice("degradation", self.degradation, get_args(Kind))
        _check_choice("sampling", self.sampling, get_args(Sampling))
        for name in ("clean_share", "blur_share", "noise_share", "sharpen_share", "jpeg_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a share, 0..1")
        for name in ("blur_px", "noise_levels", "sharpen_amount", "sharpen_px"):
            _check_range(name, getattr(self, name), least=0.0, largest=math.inf)
        _check_range("jpeg_quality", self.jpeg_quality, least=1, largest=100)
        for name, known in (("jpeg_subsampling", SUBSAMPLINGS), ("jpeg_tables", TABLES)):
            if not getattr(self, name):
                raise ValueError(f"{name} names none; there are {', '.join(known)}")
            for value in getattr(self, name):
                _check_choice(name, value, known)
        for name, least in (("lr_variants", 1), ("lr_seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.degradation == "bicubic":
            for field in dataclasses.fields(self):
                if getattr(self, field.name) != field.default and field.name != "degradation":
                    raise ValueError(
                        f"{field.name}={getattr(self, field.name)} does nothing with "
                        "degradation='bicubic'; leave it out, or choose 'scanner'"
                    )


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, known))}")


def _check_range(name: str, span: tuple[float, float], *, least: float, largest: float) -> None:
    low, high = span
    if not (least <= low <= high <= largest and math.isfinite(high)):
        raise ValueError(f"{name}={span} is not a range: least, then largest, from {least:g} on")
