"""The settings that decide what a bcSR dataset holds. All are stored in its manifest."""

import re
from dataclasses import dataclass
from typing import Literal

from carn.bcsr.annotations import EXCLUDED_GROUPS, TUMOR_GROUPS
from carn.bcsr.codec import Encoding
from carn.bcsr.selection import scaled_counts

SplitRule = Literal["by-slide", "paper", "numbered"]


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """Which positions are looked at."""

    per_class: int | None = 1000
    """Positions drawn of each label; None for all there are. The paper draws 1000 and 1000."""
    even_over_slides: bool = False
    """Let the slides take turns in the draw, so that no slide dominates."""
    allow_overlap: bool = True
    """Let drawn tiles of a slide overlap, as the paper's do."""
    points_per_slide: int = 200
    """With annotations: the most positions of each label that one slide proposes."""
    unannotated_slides: Literal["skip", "normal"] = "skip"
    """With annotations: slides that have none are left out, or are known to hold no tumour."""
    tumor_groups: tuple[str, ...] = TUMOR_GROUPS
    """With annotations: names of the ASAP groups that are tumour."""
    excluded_groups: tuple[str, ...] = EXCLUDED_GROUPS
    """With annotations: names of the ASAP groups that are cut out of tumour."""
    min_tissue: float = 0.5
    """Without coordinates: the least share (0..1) of tissue under a tile of the grid."""

    def __post_init__(self) -> None:
        _check_at_least("per_class", self.per_class, 1)
        _check_at_least("points_per_slide", self.points_per_slide, 1)
        _check_share("min_tissue", self.min_tissue)


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """How large tiles are, and when one is too white."""

    tile_px: int = 1024
    """Side of a tile in level-0 px."""
    grey_threshold: int = 224
    """The largest grey value (0..255) that is not white."""
    max_white_fraction: float = 0.6
    """A tile with a larger share (0..1) of white px is dropped."""

    def __post_init__(self) -> None:
        if not 16 <= self.tile_px <= 8192:
            raise ValueError(f"tile_px={self.tile_px} must be between 16 and 8192")
        if not 0 <= self.grey_threshold <= 255:
            raise ValueError(f"grey_threshold={self.grey_threshold} must be between 0 and 255")
        _check_share("max_white_fraction", self.max_white_fraction)


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """How many tiles are kept, and how they are split."""

    keep: int | None = 1200
    """Tiles kept, those farthest from the mean colour first; None for all that are not white."""
    num_test: int | None = None
    """Test tiles among `keep`; None for a sixth of them (the paper's 200 of 1200). In proportion
    when fewer tiles than `keep` are left."""
    num_validation: int | None = None
    """Validation tiles among `keep`, likewise; None for a twelfth."""
    split: SplitRule = "by-slide"
    """`by-slide`: no slide on two sides. `paper`: tiles at random, whatever slide they are from.
    `numbered`: the last ones by name are the test set, as in the published layout."""
    group_regex: str | None = None
    """With `by-slide`: what in a slide's name tells its patient, so that no patient is on two
    sides, such as `patient_\\d+` for CAMELYON17 or `TCGA-\\w\\w-\\w{4}` for TCGA."""

    def __post_init__(self) -> None:
        _check_at_least("keep", self.keep, 1)
        _check_at_least("num_test", self.num_test, 0)
        _check_at_least("num_validation", self.num_validation, 0)
        if self.keep is not None and sum(self.wished(self.keep)) >= self.keep:
            raise ValueError(
                f"num_test={self.num_test} and num_validation={self.num_validation} leave nothing "
                f"of keep={self.keep} to train on"
            )
        if self.group_regex is not None:
            if self.split != "by-slide":
                raise ValueError(f"group_regex does nothing with split={self.split!r}")
            try:
                re.compile(self.group_regex)
            except re.error as error:
                raise ValueError(f"group_regex={self.group_regex!r}: {error}") from error

    def wished(self, num_kept: int) -> tuple[int, int]:
        """Test and validation tiles among `num_kept`: as many as of `keep`, in proportion."""
        keep = num_kept if self.keep is None else self.keep
        num_test = round(keep / 6) if self.num_test is None else self.num_test
        num_validation = round(keep / 12) if self.num_validation is None else self.num_validation
        return scaled_counts(num_kept, keep=keep, num_test=num_test, num_validation=num_validation)


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How tiles are stored."""

    encoding: Encoding = "jxl"
    """Lossless encoding of a tile: JPEG XL, or PNG for readers without it."""
    tiles_per_shard: int = 64
    """Tiles of one Parquet shard; 64 of 1024 px are about 80 MB."""

    def __post_init__(self) -> None:
        _check_at_least("tiles_per_shard", self.tiles_per_shard, 1)


def _check_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:  # also false for NaN
        raise ValueError(f"{name}={value} must be a share between 0 and 1")
