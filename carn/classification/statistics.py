"""Accuracy, AUC and ROC of a classifier, with intervals that know which crops belong together.

Crops of one slide are cut from one tissue, stained once: they are not independent. Intervals are
therefore drawn over slides (cluster bootstrap, Field and Welsh 2007,
https://doi.org/10.1111/j.1467-9868.2007.00593.x): as many slides as there are, with replacement,
each with all its crops. With a handful of slides such an interval is rough, with one there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# A crop counts as tumour from this probability on.
THRESHOLD = 0.5
NUM_RESAMPLES = 2000
LEVEL = 0.95
SEED = 20230117


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval; the interval is None where there is one slide.

    Attributes:
        value: of all crops as they are.
        low, high: percentiles 2.5 and 97.5 over resamples of the slides.
    """

    value: float
    low: float | None
    high: float | None


def accuracy(probability: Floats, label: Ints) -> float:
    """Share of crops on the right side of THRESHOLD, 0..1.

    Raises:
        ValueError: no crop.
    """
    return float(is_right(probability, label).mean()) if len(label) else _fail_empty()


def is_right(probability: Floats, label: Ints) -> npt.NDArray[np.bool_]:
    """(n,) whether each crop is on the right side of THRESHOLD."""
    return np.asarray((probability >= THRESHOLD) == (label == 1))


def auc(probability: Floats, label: Ints) -> float:
    """Area under the ROC curve, 0..1: the chance that tumour is rated above normal, ties a half.

    Source: Hanley and McNeil 1982, https://doi.org/10.1148/radiology.143.1.7063747.

    Raises:
        ValueError: crops of one class only.
    """
    num_tumor = int((label == 1).sum())
    num_normal = len(label) - num_tumor
    if not num_tumor or not num_normal:
        raise ValueError(f"AUC of {num_tumor} tumour and {num_normal} normal crops is undefined")
    ranks = stats.rankdata(probability)
    above = ranks[label == 1].sum() - num_tumor * (num_tumor + 1) / 2
    return float(above / (num_tumor * num_normal))


def roc_curve(probability: Floats, label: Ints) -> tuple[Floats, Floats]:
    """False and true positive rates, 0..1, over falling thresholds, from (0, 0) to (1, 1).

    Raises:
        ValueError: crops of one class only.
    """
    auc(probability, label)
    order = np.argsort(-probability, kind="stable")
    is_tumor = label[order] == 1
    # Equal probabilities pass a threshold together.
    ends = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)
    true = np.cumsum(is_tumor)[ends] / is_tumor.sum()
    false = np.cumsum(~is_tumor)[ends] / (~is_tumor).sum()
    return np.concatenate([[0.0], false]), np.concatenate([[0.0], true])


def draw_slides(
    slides: Sequence[str], *, num_resamples: int = NUM_RESAMPLES, seed: int = SEED
) -> tuple[npt.NDArray[np.float64], Ints] | None:
    """How often each slide is in each resample, and the number of the slide of each crop.

    Equal slides give equal resamples, so that kinds are compared on the same ones.

    Returns:
        (num_resamples, num_slides) and (n,); None where there is one slide.
    """
    names, number = np.unique(np.asarray(slides), return_inverse=True)
    if len(names) < 2:
        return None
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), num_resamples)
    return counts.astype(np.float64), number.reshape(-1)


def mean_estimate(values: Floats, slides: Sequence[str]) -> Estimate:
    """The mean of a value of each crop; with rights and wrongs as 1 and 0, the accuracy."""
    drawn = draw_slides(slides)
    value = float(values.mean())
    if drawn is None:
        return Estimate(value=value, low=None, high=None)
    counts, number = drawn
    sums = np.bincount(number, values, minlength=counts.shape[1])
    sizes = np.bincount(number, minlength=counts.shape[1])
    return _interval(value, (counts @ sums) / (counts @ sizes))


def accuracy_estimate(probability: Floats, label: Ints, slides: Sequence[str]) -> Estimate:
    """Accuracy with its interval over slides."""
    return mean_estimate(is_right(probability, label).astype(np.float64), slides)


def difference_estimate(
    probability: Floats, other: Floats, label: Ints, slides: Sequence[str]
) -> Estimate:
    """Accuracy of one kind less that of another on the same crops, -1..1 (paired bootstrap).

    McNemar's test would take crops for independent, which those of one slide are not.
    """
    gain = is_right(probability, label).astype(np.float64) - is_right(other, label)
    return mean_estimate(gain, slides)


def auc_estimate(probability: Floats, label: Ints, slides: Sequence[str]) -> Estimate:
    """AUC with its interval over slides; resamples of one class only are passed over."""
    value = auc(probability, label)
    drawn = draw_slides(slides)
    if drawn is None:
        return Estimate(value=value, low=None, high=None)
    counts, number = drawn
    order = np.argsort(probability, kind="stable")
    starts = np.flatnonzero(np.diff(probability[order], prepend=-np.inf))
    is_tumor = (label[order] == 1).astype(np.float64)
    number = number[order]
    found = []
    for resample in counts:
        weight = resample[number]
        tumor = np.add.reduceat(weight * is_tumor, starts)
        normal = np.add.reduceat(weight * (1 - is_tumor), starts)
        pairs = tumor.sum() * normal.sum()
        if pairs:
            found.append(float((tumor * (np.cumsum(normal) - normal / 2)).sum() / pairs))
    return _interval(value, np.asarray(found))


def _interval(value: float, resampled: Floats) -> Estimate:
    if not len(resampled):
        return Estimate(value=value, low=None, high=None)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=value, low=float(low), high=float(high))


def _fail_empty() -> float:
    raise ValueError("the accuracy of no crop is undefined")
