"""The LR images of each tile: variants drawn from ranges, or one for each of some fixed conditions.

What is drawn is a pure function of seed, tile and variant, so that a run can resume to the bit and
any process makes the same pixels.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from carn.degradation.config import DegradationConfig
from carn.degradation.scanner import Degradation, apply
from carn.slides.slide import Rgb


@dataclass(frozen=True, kw_only=True)
class LrMaker:
    """How the LR images of a tile are made.

    Attributes:
        config: ranges that each variant is drawn from.
        conditions: fixed ways by name; where there are any, they are the variants, in this order,
            and of `config` the seed alone counts.
    """

    config: DegradationConfig = field(default_factory=DegradationConfig)
    conditions: Mapping[str, Degradation] = field(default_factory=dict)

    @property
    def num_variants(self) -> int:
        """LR images of each tile."""
        return len(self.conditions) or self.config.lr_variants

    def way(self, *, tile: str, variant: int) -> Degradation:
        """Say how a variant of a tile is made.

        Args:
            tile: its name.
            variant: counts from 0.
        """
        return self._drawn(tile, variant)[0]

    def make(self, hr: Rgb, *, scale: int, tile: str, variant: int) -> Rgb:
        """Make a variant of a tile: (H, W, 3) uint8 to (H // scale, W // scale, 3) uint8.

        Raises:
            ValueError: as `carn.degradation.scanner.apply`.
        """
        way, rng = self._drawn(tile, variant)
        return apply(hr, way, scale=scale, rng=rng)

    def facts(self) -> dict[str, Any]:
        """Everything that decides the pixels, as JSON values."""
        conditions = {name: asdict(way) for name, way in self.conditions.items()}
        return {"config": asdict(self.config), "conditions": conditions}

    def _drawn(self, tile: str, variant: int) -> tuple[Degradation, np.random.Generator]:
        rng = generator(self.config.lr_seed, tile=tile, variant=variant)
        if self.conditions:
            return list(self.conditions.values())[variant], rng
        return draw(self.config, rng), rng


def generator(seed: int, *, tile: str, variant: int) -> np.random.Generator:
    """Random numbers of one variant of one tile.

    Args:
        seed: see DegradationConfig.lr_seed.
        tile: its name.
        variant: counts from 0.
    """
    digest = hashlib.sha256(tile.encode("utf-8", "surrogateescape")).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little"), variant])


def draw(config: DegradationConfig, rng: np.random.Generator) -> Degradation:
    """Draw one way from HR to LR out of the ranges of a configuration.

    Takes as many random numbers whatever they turn out to be.
    """
    if config.degradation == "bicubic":
        return Degradation()
    shares = rng.random(5)
    within = rng.random(6)
    choices = rng.random(2)

    def uniform(span: tuple[float, float], place: float) -> float:
        return span[0] + (span[1] - span[0]) * float(place)

    # A third each: bicubic alone, the mean alone, in between.
    mixed = float(np.clip(3 * within[1] - 1, 0, 1))
    mean_weight = {"bicubic": 0.0, "mean": 1.0, "mixed": mixed}[config.sampling]
    if shares[4] < config.clean_share:
        return Degradation(mean_weight=mean_weight)
    low, high = config.jpeg_quality
    return Degradation(
        blur_px=uniform(config.blur_px, within[0]) if shares[0] < config.blur_share else 0.0,
        mean_weight=mean_weight,
        noise_levels=(
            uniform(config.noise_levels, within[2]) if shares[1] < config.noise_share else 0.0
        ),
        sharpen_amount=(
            uniform(config.sharpen_amount, within[3]) if shares[2] < config.sharpen_share else 0.0
        ),
        sharpen_px=uniform(config.sharpen_px, within[4]),
        jpeg_quality=(
            min(high, low + int((high - low + 1) * within[5]))
            if shares[3] < config.jpeg_share
            else None
        ),
        jpeg_subsampling=config.jpeg_subsampling[int(choices[0] * len(config.jpeg_subsampling))],
        jpeg_tables=config.jpeg_tables[int(choices[1] * len(config.jpeg_tables))],
    )
