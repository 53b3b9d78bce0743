"""LR as a scanner makes it: each step does what it says, and what is drawn is the seed's alone."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.degradation.bicubic import SCALES, crop_to_multiple, degrade
from carn.degradation.conditions import CONDITIONS, read_conditions
from carn.degradation.config import DegradationConfig
from carn.degradation.jpeg import through_jpeg
from carn.degradation.numbers import NUMBERS, contrast_at, numbers_of
from carn.degradation.scanner import Degradation, apply
from carn.degradation.variants import LrMaker, draw, generator
from tests.upscaling.networks import tissue

SCANNER = DegradationConfig(degradation="scanner", jpeg_tables=("ijg", "flat", "robidoux"))


def made(hr: np.ndarray, *, scale: int = 2, seed: int = 0, **way: Any) -> np.ndarray:
    lr: np.ndarray = apply(hr, Degradation(**way), scale=scale, rng=np.random.default_rng(seed))
    return lr


def wave(period_px: float, *, side_px: int = 240) -> np.ndarray:
    """Vertical stripes with a cosine's profile, 60 levels high."""
    levels = 128 + 60 * np.cos(2 * np.pi * (np.arange(side_px) + 0.5) / period_px)
    return np.broadcast_to(np.rint(levels)[None, :, None], (side_px, side_px, 3)).astype(np.uint8)


def height_of(lr: np.ndarray, cycles_per_px: float) -> float:
    """Height of a cosine of some frequency in the middle rows of an image, in grey levels."""
    row = lr[lr.shape[0] // 2, 20:-20, 0].astype(float)
    phases = np.exp(-2j * np.pi * cycles_per_px * np.arange(len(row)))
    return float(2 * np.abs((row - row.mean()) @ phases) / len(row))


# ------------------------------------------------------------------------------------ the steps


@pytest.mark.parametrize("scale", SCALES)
def test_nothing_done_is_bicubic_to_the_bit(scale: int) -> None:
    hr = tissue(101)
    np.testing.assert_array_equal(made(hr, scale=scale), degrade(hr, scale=scale))
    lr = LrMaker().make(hr, scale=scale, tile="any", variant=0)
    np.testing.assert_array_equal(lr, degrade(hr, scale=scale))


@pytest.mark.parametrize("scale", SCALES)
def test_the_mean_is_that_of_each_lr_px(scale: int) -> None:
    hr = crop_to_multiple(tissue(97), scale)
    height, width = hr.shape[0] // scale, hr.shape[1] // scale
    blocks = hr.reshape(height, scale, width, scale, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(made(hr, scale=scale, mean_weight=1.0) - blocks).max() <= 0.5


def test_sampling_lies_in_between() -> None:
    hr = tissue(96)
    ends = [made(hr, mean_weight=weight).astype(float) for weight in (0.0, 1.0)]
    middle = made(hr, mean_weight=0.5)
    assert np.abs(middle - (ends[0] + ends[1]) / 2).max() <= 1.0
    assert np.abs(ends[0] - ends[1]).max() > 5


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"mean_weight": 1.0},
        {"blur_px": 0.8, "mean_weight": 1.0},
        {"blur_px": 1.3},
        {"mean_weight": 0.5, "sharpen_amount": 0.6, "sharpen_px": 1.0},
    ],
)
@pytest.mark.parametrize("cycles", [0.1, 0.25, 0.45])
def test_contrast_falls_as_predicted(way: dict[str, float], cycles: float, scale: int) -> None:
    """Cosines through the whole of it, against what is worked out from its parts."""
    hr = wave(scale / cycles)
    found = height_of(made(hr, scale=scale, **way), cycles) / height_of(hr, cycles / scale)
    assert found == pytest.approx(contrast_at(cycles, Degradation(**way), scale=scale), abs=0.03)


def test_numbers_say_what_contrast_is_left() -> None:
    way = Degradation(blur_px=0.8, mean_weight=1.0)
    wanted = [contrast_at(cycles, way, scale=2) for cycles in (0.25, 0.5, 0.75)]
    assert numbers_of(way, scale=2)[:3] == pytest.approx(wanted)


def test_noise_has_the_deviation_that_is_asked_for_and_more_in_the_dark() -> None:
    deviations = {}
    for level in (20, 128, 235):
        flat = np.full((400, 400, 3), level, np.uint8)
        deviations[level] = float(made(flat, noise_levels=2.0).astype(float).std())
    # Rounding to whole levels adds 1/12.
    assert deviations[128] == pytest.approx(math.sqrt(4 + 1 / 12), rel=0.03)
    assert deviations[20] > 1.25 * deviations[128] > 1.5 * deviations[235]


def test_sharpening_overshoots_at_edges() -> None:
    hr = np.full((80, 80, 3), 80, np.uint8)
    hr[:, 40:] = 160
    plain, sharp = made(hr, mean_weight=1.0), made(hr, mean_weight=1.0, sharpen_amount=0.6)
    assert int(plain.max()) == 160
    assert int(sharp.max()) > 165
    assert int(sharp.min()) < 75


def test_jpeg_comes_last() -> None:
    hr = tissue(128)
    way = {"blur_px": 0.8, "mean_weight": 1.0, "noise_levels": 1.5}
    lossless = made(hr, seed=5, **way)
    stored = made(hr, seed=5, **way, jpeg_quality=80, jpeg_subsampling="4:2:2", jpeg_tables="flat")
    expected = through_jpeg(lossless, quality=80, subsampling="4:2:2", tables="flat")
    np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("extent", [(8, 8), (9, 23)])
def test_every_condition_makes_lr_of_any_tile(
    name: str, scale: int, extent: tuple[int, int]
) -> None:
    hr = tissue(64)[: extent[0], : extent[1]]
    lr = apply(hr, CONDITIONS[name], scale=scale, rng=np.random.default_rng(0))
    assert lr.shape == (extent[0] // scale, extent[1] // scale, 3)
    assert lr.dtype == np.uint8


def test_a_tile_smaller_than_one_lr_px_is_refused() -> None:
    with pytest.raises(ValueError, match="an image of 1 x 8 px has no LR at scale 2"):
        made(tissue(64)[:8, :1], mean_weight=1.0)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ({"blur_px": -1.0}, "blur_px=-1.0 must be a number from 0 on"),
        ({"noise_levels": math.nan}, "noise_levels=nan"),
        ({"mean_weight": 1.5}, "mean_weight=1.5 is not in 0..1"),
        ({"jpeg_quality": 0}, "quality 0"),
        ({"jpeg_subsampling": "4:1:1"}, "jpeg_subsampling='4:1:1' is not one of"),
    ],
)
def test_impossible_ways_are_refused(way: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Degradation(**way)


# ------------------------------------------------------------------------------------- drawing


@given(seed=st.integers(0, 99), variant=st.integers(0, 99), tile=st.text(max_size=8))
def test_a_variant_is_a_function_of_seed_tile_and_number(
    seed: int, variant: int, tile: str
) -> None:
    config = dataclasses.replace(SCANNER, lr_seed=seed)
    way = LrMaker(config=config).way(tile=tile, variant=variant)
    assert way == draw(config, generator(seed, tile=tile, variant=variant))
    assert way == LrMaker(config=config).way(tile=tile, variant=variant)


def test_variants_tiles_and_seeds_differ() -> None:
    hr = tissue(64)
    config = dataclasses.replace(SCANNER, clean_share=0.0, noise_levels=(1.0, 3.0), noise_share=1.0)
    pixels = [
        LrMaker(config=dataclasses.replace(config, lr_seed=seed))
        .make(hr, scale=2, tile=tile, variant=variant)
        .tobytes()
        for seed, tile, variant in ((1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0))
    ]
    assert len(set(pixels)) == 4


def test_what_is_drawn_lies_in_its_range_and_is_as_frequent_as_it_should_be() -> None:
    config = dataclasses.replace(
        SCANNER, clean_share=0.25, blur_share=0.5, noise_share=0.4, sharpen_share=0.2
    )
    ways = [draw(config, generator(1, tile="t", variant=number)) for number in range(4000)]
    clean = [way for way in ways if way == Degradation(mean_weight=way.mean_weight)]
    others = [way for way in ways if way not in clean]
    shares = {
        "blur_px": config.blur_share,
        "noise_levels": config.noise_share,
        "sharpen_amount": config.sharpen_share,
    }
    for name, share in shares.items():
        drawn = [value for way in others if (value := getattr(way, name)) > 0]
        low, high = getattr(config, name)
        assert len(drawn) / len(others) == pytest.approx(share, abs=0.04)
        assert low <= min(drawn) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(drawn) <= high
    qualities = [way.jpeg_quality for way in others if way.jpeg_quality is not None]
    assert set(qualities) == set(range(config.jpeg_quality[0], config.jpeg_quality[1] + 1))
    assert {way.jpeg_subsampling for way in others} == set(config.jpeg_subsampling)
    assert {way.jpeg_tables for way in others} == set(config.jpeg_tables)
    assert len(clean) / len(ways) == pytest.approx(0.25, abs=0.05)
    weights = np.array([way.mean_weight for way in ways])
    for share in ((weights == 0).mean(), (weights == 1).mean()):
        assert share == pytest.approx(1 / 3, abs=0.03)


def test_another_range_moves_nothing_else() -> None:
    """So that a sweep over one setting compares like with like."""
    other = dataclasses.replace(SCANNER, blur_px=(0.0, 0.1), jpeg_quality=(90, 95))
    for number in range(50):
        one, two = (draw(c, generator(1, tile="t", variant=number)) for c in (SCANNER, other))
        assert (one.noise_levels, one.mean_weight) == (two.noise_levels, two.mean_weight)
        assert (one.jpeg_quality is None) == (two.jpeg_quality is None)
        assert (one.blur_px > 0) == (two.blur_px > 0)


def test_fixed_conditions_are_the_variants() -> None:
    maker, hr = LrMaker(conditions=CONDITIONS), tissue(64)
    assert maker.num_variants == len(CONDITIONS)
    for number, way in enumerate(CONDITIONS.values()):
        assert maker.way(tile="t", variant=number) == way
    first = maker.make(hr, scale=2, tile="t", variant=0)
    np.testing.assert_array_equal(first, degrade(hr, scale=2))


def test_numbers_are_of_about_one() -> None:
    ways = [draw(SCANNER, generator(1, tile="t", variant=number)) for number in range(500)]
    table = np.stack([numbers_of(way, scale=2) for way in ways])
    assert table.shape == (500, len(NUMBERS))
    assert table.min() >= 0
    assert table.max() < 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_variants": 0}, "lr_variants=0 must be at least 1"),
        ({"lr_seed": -1}, "lr_seed=-1 must be at least 0"),
        ({"blur_share": 1.5}, "blur_share=1.5 is not a share"),
        ({"blur_px": (1.0, 0.5)}, r"blur_px=\(1.0, 0.5\) is not a range"),
        ({"jpeg_quality": (0, 50)}, "jpeg_quality=.* is not a range"),
        ({"jpeg_subsampling": ()}, "jpeg_subsampling names none; there are 4:4:4"),
        ({"jpeg_tables": ("kodak",)}, "jpeg_tables='kodak' is not one of ijg"),
        ({"sampling": "nearest"}, "sampling='nearest' is not one of bicubic, mean, mixed"),
        ({"degradation": "blind"}, "degradation='blind' is not one of bicubic, scanner"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DegradationConfig(**{"degradation": "scanner"} | changes)


def test_settings_that_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blur_share=0\.1 does nothing with"):
        DegradationConfig(blur_share=0.1)


def test_conditions_are_read_by_name() -> None:
    assert read_conditions(["mean", "bicubic"]) == {
        "mean": CONDITIONS["mean"],
        "bicubic": Degradation(),
    }
    with pytest.raises(ValueError, match="condition 'jpeg' is not one of bicubic, mean"):
        read_conditions(["jpeg"])
