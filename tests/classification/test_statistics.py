"""Accuracy, AUC and their intervals against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.classification import statistics
from carn.classification.statistics import (
    accuracy,
    accuracy_estimate,
    auc,
    auc_estimate,
    difference_estimate,
    draw_slides,
    roc_curve,
)


def brute_auc(probability: np.ndarray, label: np.ndarray) -> float:
    pairs = itertools.product(probability[label == 1], probability[label == 0])
    return float(np.mean([1.0 if t > n else 0.5 if t == n else 0.0 for t, n in pairs]))


# Few different values, so that ties are the rule.
ROWS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40)


@given(ROWS)
def test_auc_is_the_share_of_pairs_in_order_with_ties_a_half(rows) -> None:
    probability = np.array([value / 5 for value, _ in rows])
    label = np.array([int(is_tumor) for _, is_tumor in rows])
    if label.min() == label.max():
        with pytest.raises(ValueError, match="undefined"):
            auc(probability, label)
        return
    assert auc(probability, label) == pytest.approx(brute_auc(probability, label))
    false, true = roc_curve(probability, label)
    assert float(np.trapezoid(true, false)) == pytest.approx(auc(probability, label))
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()


def test_accuracy_counts_a_half_as_tumour() -> None:
    assert accuracy(np.array([0.5, 0.49, 0.9, 0.1]), np.array([1, 0, 0, 1])) == 0.5
    with pytest.raises(ValueError, match="no crop"):
        accuracy(np.empty(0), np.empty(0, np.int64))


def _cases(num_slides: int, crops_per_slide: int, *, seed: int = 0):
    """Crops whose rights and wrongs hang on their slide alone."""
    rng = np.random.default_rng(seed)
    is_right = np.repeat(rng.random(num_slides) < 0.7, crops_per_slide)
    label = np.tile([0, 1], len(is_right))[: len(is_right)]
    probability = np.where(is_right, label, 1 - label) * 0.8 + 0.1
    slides = [f"s{n}" for n in np.repeat(np.arange(num_slides), crops_per_slide)]
    return probability, label, slides


def test_intervals_are_drawn_over_slides_and_not_over_crops() -> None:
    probability, label, slides = _cases(30, 40)
    by_slide = accuracy_estimate(probability, label, slides)
    by_crop = accuracy_estimate(probability, label, [str(n) for n in range(len(label))])
    assert by_slide.value == by_crop.value == accuracy(probability, label)
    width = np.ptp([by_slide.low, by_slide.high]), np.ptp([by_crop.low, by_crop.high])
    # Forty crops of one slide tell as much as one: the interval is sqrt(40) times as wide.
    assert width[0] / width[1] == pytest.approx(40**0.5, rel=0.25)
    share = by_slide.value
    assert width[0] == pytest.approx(2 * 1.96 * (share * (1 - share) / 30) ** 0.5, rel=0.15)


def test_resamples_of_auc_are_those_of_the_crops_themselves(monkeypatch) -> None:
    """A resample by weights equals the AUC of the crops that were drawn, one by one."""
    rng = np.random.default_rng(5)
    slides = [f"s{n}" for n in rng.integers(0, 6, 60)]
    label = rng.integers(0, 2, 60)
    probability = rng.integers(0, 8, 60) / 7
    seen = {}
    monkeypatch.setattr(
        statistics, "_interval", lambda value, found: seen.setdefault("found", (value, found))
    )
    auc_estimate(probability, label, slides)
    drawn = draw_slides(slides)
    assert drawn is not None
    counts, number = drawn
    value, found = seen["found"]
    assert value == pytest.approx(brute_auc(probability, label))
    assert counts.sum(1).tolist() == [6] * len(counts)
    for resample, got in list(zip(counts, found, strict=True))[:20]:
        rows = np.repeat(np.arange(60), resample[number].astype(int))
        assert got == pytest.approx(auc(probability[rows], label[rows]))


def test_resamples_of_one_class_are_passed_over() -> None:
    probability, label = np.array([0.2, 0.4, 0.6, 0.9]), np.array([0, 0, 1, 1])
    found = auc_estimate(probability, label, ["a", "a", "b", "b"])
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_equal_kinds_differ_by_nothing_and_better_ones_by_what_they_gain() -> None:
    probability, label, slides = _cases(20, 5)
    same = difference_estimate(probability, probability, label, slides)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    perfect = label * 0.9
    gain = difference_estimate(perfect, probability, label, slides)
    assert gain.value == pytest.approx(1 - accuracy(probability, label))
    assert gain.low is not None
    assert gain.low > 0


def test_one_slide_has_no_interval() -> None:
    probability, label, _ = _cases(4, 5)
    for estimate in (
        accuracy_estimate(probability, label, ["a"] * 20),
        auc_estimate(probability, label, ["a"] * 20),
    ):
        assert (estimate.low, estimate.high) == (None, None)


def test_the_same_crops_give_the_same_interval() -> None:
    cases = _cases(12, 7)
    assert accuracy_estimate(*cases) == accuracy_estimate(*cases)
