"""Means, spreads, intervals and tests, against counting by hand and enumeration."""

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.evaluation.statistics import Difference, compare, holm, mean_scores, summarize_seeds

Scores = Callable[..., pa.Table]


# ------------------------------------------------------------------------------------------ seeds


def test_means_over_seeds(scores: Scores) -> None:
    seeds = [
        scores({1: 30.0, 2: 40.0}, lpips={1: 0.1, 2: 0.3}),
        scores({2: 43.0, 1: 31.0}, lpips={1: 0.2, 2: 0.4}),  # the order is no matter
        scores({1: 33.0, 2: 33.0}, lpips={1: 0.0, 2: 0.3}),
    ]
    found = summarize_seeds(seeds)
    assert found.psnr_db == pytest.approx(35)  # of 35, 37 and 33
    assert found.psnr_std == pytest.approx(2)  # n - 1: sqrt((0 + 4 + 4) / 2)
    assert found.ssim == pytest.approx(0.35)
    assert found.ssim_std == pytest.approx(0.02)
    assert found.psnr_y_db == pytest.approx(36)
    assert found.psnr_y_std == pytest.approx(2)
    assert found.ssim_y == pytest.approx(0.7)
    assert found.lpips == pytest.approx((0.2 + 0.3 + 0.15) / 3)
    assert found.lpips_std == pytest.approx(statistics.stdev([0.2, 0.3, 0.15]))
    assert (found.num_tiles, found.num_slides, found.num_seeds) == (2, 1, 3)


def test_one_seed_has_no_spread_and_lpips_may_be_missing(scores: Scores) -> None:
    found = summarize_seeds([scores({("a", 1): 30.0, ("b", 1): 32.0})])
    assert found.psnr_db == 31
    assert (found.psnr_std, found.ssim_std, found.ssim_y_std) == (None, None, None)
    assert (found.lpips, found.lpips_std) == (None, None)
    assert (found.num_slides, found.num_seeds) == (2, 1)


def test_equal_images_count_100_db(scores: Scores) -> None:
    found = summarize_seeds([scores({1: math.inf, 2: 40.0}, ssim={1: 1.0, 2: 0.9})])
    assert found.psnr_db == 70
    assert found.psnr_y_db == (100 + 41) / 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda scores: [], "no scores"),
        (lambda scores: [scores({})], "table 0 .* no tile"),
        (lambda scores: [scores({1: 3.0}), scores({2: 3.0})], "tables 0 and 1 .* s_1 and 1 more"),
        (lambda scores: [scores({1: 3.0, 2: 3.0}), scores({1: 3.0})], "s_2 and 0 more"),
        (lambda scores: [scores({1: math.nan})], "tile s_1 has no psnr_db"),
        (lambda scores: [pa.concat_tables([scores({1: 3.0, 2: 1.0})] * 2)], "tile s_1 twice"),
    ],
)
def test_tables_that_do_not_belong_together(make: Any, said: str, scores: Scores) -> None:
    with pytest.raises(ValueError, match=said):
        summarize_seeds(make(scores))


def test_scores_of_a_tile_are_means_over_seeds(scores: Scores) -> None:
    found = mean_scores([scores({1: 30.0, 2: math.inf}), scores({2: 50.0, 1: 31.0})])
    assert found == {"s_1": 30.5, "s_2": 75.0}


# --------------------------------------------------------------------------------------- interval


def test_mean_difference_over_tiles_and_seeds(scores: Scores) -> None:
    a = [scores({1: 30.0, 2: 40.0, 3: 35.0}), scores({1: 32.0, 2: 42.0, 3: 35.0})]
    b = [scores({3: 34.0, 1: 30.0, 2: 40.0})]
    found = compare(a, b)
    assert found.mean == pytest.approx((1 + 1 + 1) / 3)
    assert (found.low, found.high) == (1, 1)
    assert (found.unit, found.num_units, found.num_tiles, found.num_slides) == ("tile", 3, 3, 1)
    back = compare(b, a)
    assert back.mean == -found.mean
    assert compare(a, b, score="ssim").mean == pytest.approx(0.01)


def test_of_two_slides_the_interval_is_one_slide_or_the_other(scores: Scores) -> None:
    """A quarter of the resamples each is twice the one and twice the other slide."""
    b = {("x", 1): 30.0, ("x", 2): 30.0, ("x", 3): 30.0, ("y", 1): 30.0}
    a = {("x", 1): 31.0, ("x", 2): 32.0, ("x", 3): 33.0, ("y", 1): 37.0}
    found = compare([scores(a)], [scores(b)])
    assert found.mean == pytest.approx((1 + 2 + 3 + 7) / 4)
    assert (found.low, found.high) == pytest.approx((2, 7))
    assert (found.unit, found.num_units, found.num_slides) == ("slide", 2, 2)


def test_of_three_slides_all_resamples_by_their_weight(scores: Scores) -> None:
    gains = {"x": [1.0, 2.0], "y": [5.0], "z": [0.0, 0.5, 4.0, 9.0]}
    a = {(s, n): 30 + gain for s, gained in gains.items() for n, gain in enumerate(gained)}
    resamples = []
    for drawn in itertools.product(gains, repeat=3):
        tiles = [gain for slide in drawn for gain in gains[slide]]
        resamples.append(sum(tiles) / len(tiles))
    # The extremes are 1 of 27 each, more than 2.5 %: the interval reaches from end to end.
    found = compare([scores(a)], [scores(dict.fromkeys(a, 30.0))])
    assert (found.low, found.high) == pytest.approx((min(resamples), max(resamples)))


def test_slides_weigh_as_many_tiles_as_they_have(scores: Scores) -> None:
    gains = {"x": [0.0] * 30, "y": [4.0], "z": [2.0, 3.0], "u": [-1.0] * 4, "v": [1.0] * 7}
    a = {(s, n): 30 + gain for s, gained in gains.items() for n, gain in enumerate(gained)}
    means, means_of_means = [], []
    for drawn in itertools.product(gains, repeat=5):
        tiles = [gain for slide in drawn for gain in gains[slide]]
        means.append(statistics.fmean(tiles))
        means_of_means.append(statistics.fmean(statistics.fmean(gains[one]) for one in drawn))
    found = compare([scores(a)], [scores(dict.fromkeys(a, 30.0))])
    wanted, wrong = (np.quantile(values, [0.025, 0.975]) for values in (means, means_of_means))
    assert (found.low, found.high) == pytest.approx(tuple(wanted), abs=0.1)
    assert np.abs(wanted - wrong).max() > 0.9


def test_the_interval_of_many_tiles_is_the_normal_one(scores: Scores) -> None:
    rng = np.random.default_rng(1)
    gains = rng.normal(0.2, 0.5, 300)
    b = dict.fromkeys(range(300), 30.0)
    found = compare([scores({n: 30 + gain for n, gain in enumerate(gains)})], [scores(b)])
    half = 1.96 * gains.std() / math.sqrt(300)
    assert found.low == pytest.approx(gains.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(gains.mean() + half, abs=0.1 * half)


def test_tiles_of_one_slide_are_not_more_evidence(scores: Scores) -> None:
    """A slide's tiles that all say the same give the interval and the p that one of them gives."""
    rng = np.random.default_rng(2)
    gains = rng.normal(0.2, 0.5, 12)

    def found(tiles_of_a_slide: int) -> Difference:
        keys = [(f"s{slide:02}", n) for slide in range(12) for n in range(tiles_of_a_slide)]
        a = {key: 30 + gains[int(key[0][1:])] for key in keys}
        return compare([scores(a)], [scores(dict.fromkeys(a, 30.0))])

    once, often = found(1), found(20)
    assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=1e-9)
    assert often.p == once.p
    assert (once.num_tiles, often.num_tiles, often.num_units) == (12, 240, 12)


def test_the_interval_covers_the_truth(scores: Scores) -> None:
    """Of 150 made-up studies of 15 slides with 6 alike tiles each, about 95 % cover no gain."""
    rng = np.random.default_rng(3)
    keys = [(f"s{slide}", n) for slide in range(15) for n in range(6)]
    b = [scores(dict.fromkeys(keys, 30.0))]
    covered, num_significant = 0, 0
    for study in range(150):
        gains = rng.normal(0, 0.3, 15)[:, None] + rng.normal(0, 0.1, (15, 6))
        a = [scores(dict(zip(keys, 30 + gains.ravel(), strict=True)))]
        found = compare(a, b, num_resamples=400, seed=study)
        assert found.low is not None
        assert found.high is not None
        assert found.p is not None
        covered += found.low <= 0 <= found.high
        num_significant += found.p < 0.05
    assert 0.86 <= covered / 150 <= 0.99  # tile by tile it would be about 0.6
    assert num_significant <= 15


def test_the_interval_depends_on_seed_and_tiles_alone(scores: Scores) -> None:
    rng = np.random.default_rng(4)
    a = {(f"s{n % 7}", n): 30 + gain for n, gain in enumerate(rng.normal(0, 1, 40))}
    b = dict.fromkeys(a, 30.0)
    backwards = dict(reversed(a.items()))
    found = compare([scores(a)], [scores(b)], seed=5)
    assert found == compare([scores(backwards)], [scores(b)], seed=5)
    assert found != compare([scores(a)], [scores(b)], seed=6)
    # More resamples begin with the same ones, however they are shared out.
    assert found.low == pytest.approx(compare([scores(a)], [scores(b)], seed=6).low, abs=0.05)


def test_one_tile_has_no_interval(scores: Scores) -> None:
    found = compare([scores({1: 31.0})], [scores({1: 30.0})])
    assert (found.mean, found.low, found.high, found.p) == (1, None, None, 1)


def test_models_on_different_tiles_do_not_compare(scores: Scores) -> None:
    with pytest.raises(ValueError, match="s_2 and 1 more are in one of them only"):
        compare([scores({1: 3.0, 2: 3.0})], [scores({1: 3.0, 3: 3.0})])
    with pytest.raises(ValueError, match="num_resamples=0"):
        compare([scores({1: 3.0})], [scores({1: 3.0})], num_resamples=0)
    with pytest.raises(ValueError, match="tile s_1 has no lpips"):
        compare([scores({1: 3.0})], [scores({1: 3.0})], score="lpips")


# ---------------------------------------------------------------------------------------- p values


def enumerated_p(differences: list[float]) -> float:
    """Wilcoxon's p by all ways to give the ranks signs."""
    ranks = [
        statistics.mean(
            place + 1
            for place, size in enumerate(sorted(map(abs, differences)))
            if size == abs(one)
        )
        for one in differences
    ]
    middle = sum(ranks) / 2
    off = abs(sum(r for r, d in zip(ranks, differences, strict=True) if d > 0) - middle)
    ways = [
        abs(sum(itertools.compress(ranks, signs)) - middle) >= off - 1e-9
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    return sum(ways) / len(ways)


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9))
def test_signed_rank_p_by_enumeration(scores: Scores, steps: list[int]) -> None:
    a = {n: 30 + 0.1 * step for n, step in enumerate(steps)}
    found = compare([scores(a)], [scores(dict.fromkeys(a, 30.0))], num_resamples=10)
    moved = [float(step) for step in steps if step]
    if not moved:
        assert found.p is None
    else:
        assert found.p == pytest.approx(enumerated_p(moved), abs=1e-9)


def test_signed_ranks_are_of_the_means_of_slides(scores: Scores) -> None:
    gains = {
        **{"x": [0.1, 0.2, 0.3], "y": [-0.2], "z": [0.2]},  # equal sizes but for the last digits
        **{"t": [0.35] * 9, "u": [0.7], "v": [0.6], "w": [-0.5, -0.4]},
    }
    a = {(s, n): 30 + gain for s, gained in gains.items() for n, gain in enumerate(gained)}
    found = compare([scores(a)], [scores(dict.fromkeys(a, 30.0))])
    means = [round(statistics.fmean(gained), 9) for gained in gains.values()]
    assert found.p == pytest.approx(enumerated_p(means), abs=1e-9)


def test_equal_models_have_no_p(scores: Scores) -> None:
    # Means over seeds that are equal but for the last digit.
    a = [scores({1: 0.1, 2: 30.0}), scores({1: 0.2, 2: 30.0}), scores({1: 0.3, 2: 30.0})]
    found = compare(a, a[::-1])
    assert found.p is None
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_many_tiles(scores: Scores) -> None:
    rng = np.random.default_rng(0)
    a = {(f"s{n % 90}", n): 30.05 + gain for n, gain in enumerate(rng.normal(0, 0.05, 1000))}
    found = compare([scores(a)], [scores(dict.fromkeys(a, 30.0))])
    assert found.p is not None
    assert found.p < 1e-10
    assert found.num_units == 90


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.01, None, 0.04]) == (0.02, None, 0.04)
    assert holm([0.6, 0.9]) == (1.0, 1.0)
    assert holm([]) == ()
    with pytest.raises(ValueError, match=r"p=1\.2"):
        holm([0.1, 1.2])


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_rejects_what_the_stepwise_procedure_does(p_values: list[float]) -> None:
    """Smallest first, each against level / number left, until the first that fails."""
    level = 0.05
    rejected, ranked = set(), sorted(range(len(p_values)), key=lambda n: p_values[n])
    for rank, index in enumerate(ranked):
        if p_values[index] * (len(p_values) - rank) > level:
            break
        rejected.add(index)
    assert {n for n, p in enumerate(holm(p_values)) if p is not None and p <= level} == rejected
