"""Each refusal of a setting names the setting and its value."""

import dataclasses
import re
from typing import Any

import pytest

from carn.bcsr.config import DrawConfig, FilterConfig, SelectConfig, StoreConfig


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        (DrawConfig, {"per_class": 0}, "per_class=0 "),
        (DrawConfig, {"points_per_slide": 0}, "points_per_slide=0 "),
        (DrawConfig, {"min_tissue": 1.01}, "min_tissue=1.01 "),
        (DrawConfig, {"min_tissue": -0.01}, "min_tissue=-0.01 "),
        (DrawConfig, {"min_tissue": float("nan")}, "min_tissue=nan "),
        (FilterConfig, {"tile_px": 15}, "tile_px=15 "),
        (FilterConfig, {"tile_px": 8193}, "tile_px=8193 "),
        (FilterConfig, {"grey_threshold": -1}, "grey_threshold=-1 "),
        (FilterConfig, {"grey_threshold": 256}, "grey_threshold=256 "),
        (FilterConfig, {"max_white_fraction": 60.0}, "max_white_fraction=60.0 "),
        (SelectConfig, {"keep": 0}, "keep=0 "),
        (SelectConfig, {"num_test": -1}, "num_test=-1 "),
        (SelectConfig, {"num_validation": -1}, "num_validation=-1 "),
        (SelectConfig, {"keep": 300, "num_test": 275}, "keep=300 "),
        (SelectConfig, {"group_regex": "a", "split": "paper"}, "split='paper'"),
        (SelectConfig, {"group_regex": "(a"}, "group_regex='(a'"),
        (StoreConfig, {"tiles_per_shard": 0}, "tiles_per_shard=0 "),
    ],
)
def test_a_refusal_names_the_setting_and_its_value(
    config: Any, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        config(**settings)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (DrawConfig, {"per_class": 1, "points_per_slide": 1, "min_tissue": 0.0}),
        (DrawConfig, {"per_class": None, "min_tissue": 1.0}),
        (FilterConfig, {"tile_px": 16, "grey_threshold": 0, "max_white_fraction": 0.0}),
        (FilterConfig, {"tile_px": 8192, "grey_threshold": 255, "max_white_fraction": 1.0}),
        (SelectConfig, {"keep": 301}),
        (SelectConfig, {"keep": 1, "num_test": 0, "num_validation": 0}),
        (SelectConfig, {"keep": None, "num_test": 10**6}),
        (SelectConfig, {"group_regex": r"patient_\d+"}),
        (StoreConfig, {"tiles_per_shard": 1}),
    ],
)
def test_limits_themselves_are_allowed(config: Any, settings: dict[str, Any]) -> None:
    made = config(**settings)
    assert {name: getattr(made, name) for name in settings} == settings


def test_the_defaults_are_the_papers() -> None:
    assert DrawConfig().per_class == 1000
    white = FilterConfig()
    assert (white.tile_px, white.grey_threshold, white.max_white_fraction) == (1024, 224, 0.6)
    select = SelectConfig()
    assert select.keep == 1200
    # 200 to test, and 100 of the paper's 1000 training tiles to validate.
    assert select.wished(1200) == (200, 100)


def test_splits_follow_what_is_kept() -> None:
    assert SelectConfig(keep=60).wished(60) == (10, 5)
    assert SelectConfig().wished(600) == (100, 50)
    assert SelectConfig(keep=None).wished(24) == (4, 2)
    assert SelectConfig(keep=100, num_test=30, num_validation=0).wished(50) == (15, 0)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FilterConfig().tile_px = 512  # type: ignore[misc]
