"""From scores of tiles to what they say of models: means, spreads, differences, significance."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from carn.metrics import PSNR_CAP_DB, mean_psnr

Score = Literal["psnr_db", "ssim", "psnr_y_db", "ssim_y", "lpips"]
_PSNRS = ("psnr_db", "psnr_y_db")

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
FEW_SLIDES = 10
"""With fewer slides than this, percentiles over resamples of them say little."""

# Resamples drawn at once: bounds the memory, whatever the number of tiles.
_DRAWN_AT_ONCE = 500
# Differences that are smaller are roundings: equal gains average to unequal last digits.
_ROUNDED_TO_DIGITS = 9


@dataclass(frozen=True, kw_only=True)
class SeedSummary:
    """Scores of one model at one scale over the seeds it was trained with.

    Each is the mean over seeds of the mean over tiles, and each `_std` the standard deviation of
    the seeds' means (n - 1 in the denominator), None where there is one seed.

    Attributes:
        psnr_db, psnr_std: dB, RGB; a tile counts 100 dB at most.
        ssim, ssim_std: RGB.
        psnr_y_db, psnr_y_std: dB, Y channel; likewise.
        ssim_y, ssim_y_std: Y channel.
        lpips, lpips_std: None where a tile has none.
        num_tiles: tiles of each table.
        num_slides: slides that they are cut from.
        num_seeds: tables.
    """

    psnr_db: float
    psnr_std: float | None
    ssim: float
    ssim_std: float | None
    psnr_y_db: float
    psnr_y_std: float | None
    ssim_y: float
    ssim_y_std: float | None
    lpips: float | None
    lpips_std: float | None
    num_tiles: int
    num_slides: int
    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much higher the scores of model a are than those of model b, on the same tiles.

    Attributes:
        mean: over tiles, of a - b; in dB for a PSNR.
        low, high: ends of its 95 % bootstrap interval; None where there is one unit.
        p: of the Wilcoxon signed-rank test, two-sided; None where no unit differs.
        unit: what was resampled and tested: slides, or the tiles where all are of one slide.
        num_units: how many.
        num_tiles, num_slides: what was compared.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    unit: Literal["slide", "tile"]
    num_units: int
    num_tiles: int
    num_slides: int


def summarize_seeds(tables: Sequence[pa.Table]) -> SeedSummary:
    """Means and spreads of a model over seeds.

    Args:
        tables: of SCORES, one a seed, over the same tiles in any order.

    Raises:
        ValueError: no table, a table without tiles, with a tile twice or with a score that is not a
            number, or tables of different tiles.
    """
    tile_ids = _common_tiles(tables)
    psnr_db, psnr_std = _over_seeds(tables, "psnr_db")
    ssim, ssim_std = _over_seeds(tables, "ssim")
    psnr_y_db, psnr_y_std = _over_seeds(tables, "psnr_y_db")
    ssim_y, ssim_y_std = _over_seeds(tables, "ssim_y")
    has_lpips = all(table["lpips"].null_count == 0 for table in tables)
    lpips, lpips_std = _over_seeds(tables, "lpips") if has_lpips else (None, None)
    return SeedSummary(
        psnr_db=psnr_db,
        psnr_std=psnr_std,
        ssim=ssim,
        ssim_std=ssim_std,
        psnr_y_db=psnr_y_db,
        psnr_y_std=psnr_y_std,
        ssim_y=ssim_y,
        ssim_y_std=ssim_y_std,
        lpips=lpips,
        lpips_std=lpips_std,
        num_tiles=len(tile_ids),
        num_slides=len(set(tables[0]["slide"].to_pylist())),
        num_seeds=len(tables),
    )


def compare(
    a: Sequence[pa.Table],
    b: Sequence[pa.Table],
    *,
    score: Score = "psnr_db",
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The mean difference of two models on the same tiles, and how sure it is.

    Scores of a tile are averaged over each model's seeds first (a PSNR counting 100 dB at most), so
    what is judged is the difference on other tiles, not on other seeds.

    Tiles of one slide look alike: taken for independent they would make any interval too narrow
    and any p too small. So, where tiles come from several slides, whole slides are resampled with
    all their tiles (cluster bootstrap, the mean being over the tiles drawn), and the signed-rank
    test is made of the slides' mean differences. Where all tiles are of one slide, the tiles stand
    for themselves, and the result says nothing about other slides. With fewer than some ten slides
    the interval is still rather too narrow, and with fewer than six p is never below 0.05.

    Source: percentile interval, Efron & Tibshirani 1993, chapter 13; cluster bootstrap, Field &
    Welsh 2007, https://doi.org/10.1111/j.1467-9868.2007.00593.x; Wilcoxon 1945,
    https://doi.org/10.2307/3001968, units without a difference left out.

    Args:
        a, b: tables of SCORES, one a seed; all over the same tiles in any order.
        score: what is compared.
        num_resamples: of the bootstrap.
        seed: of the bootstrap; equal seeds give equal intervals.

    Raises:
        ValueError: as `summarize_seeds`; tiles that only one of the models was scored on.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples} must be at least 1")
    _common_tiles([*a, *b])
    tile_ids, slides, differences = _differences(a, b, score)
    names, unit_of = np.unique(slides, return_inverse=True)
    unit: Literal["slide", "tile"] = "slide"
    if len(names) == 1:
        unit, unit_of = "tile", np.arange(len(tile_ids))
    sums = np.bincount(unit_of, weights=differences).astype(np.float64)
    counts = np.bincount(unit_of)
    low, high = _interval(sums, counts, num_resamples=num_resamples, seed=seed)
    return Difference(
        mean=math.fsum(differences) / len(differences),
        low=low,
        high=high,
        p=_signed_rank_p(sums / counts),
        unit=unit,
        num_units=len(sums),
        num_tiles=len(tile_ids),
        num_slides=len(names),
    )


def holm(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """Each p corrected for testing all of them, in their order; None stays and does not count.

    The smallest is multiplied by their number, the next by one less, and so on; none falls below a
    smaller one's, and none exceeds 1.
    Source: Holm 1979, https://www.jstor.org/stable/4615733.

    Raises:
        ValueError: a p that is not within 0..1.
    """
    for p in p_values:
        if p is not None and not 0 <= p <= 1:
            raise ValueError(f"p={p} must be within 0..1")
    ranked = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(ranked):
        largest = max(largest, min(1.0, p * (len(ranked) - rank)))
        adjusted[index] = largest
    return tuple(adjusted)


def mean_scores(tables: Sequence[pa.Table], *, score: Score = "psnr_db") -> dict[str, float]:
    """A score of each tile by its id, averaged over seeds, a PSNR counting 100 dB at most.

    Args:
        tables: of SCORES, one a seed, over the same tiles in any order.
        score: which.

    Raises:
        ValueError: as `summarize_seeds`; a tile without the score.
    """
    tile_ids = _common_tiles(tables)
    by_table = [
        dict(zip(table["tile_id"].to_pylist(), _values(table, score), strict=True))
        for table in tables
    ]
    return {
        tile_id: math.fsum(values[tile_id] for values in by_table) / len(by_table)
        for tile_id in tile_ids
    }


def _differences(
    a: Sequence[pa.Table], b: Sequence[pa.Table], score: Score
) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Ids, slides and a - b of the tiles, in the order of their ids."""
    slide_of = dict(zip(a[0]["tile_id"].to_pylist(), a[0]["slide"].to_pylist(), strict=True))
    of_a, of_b = mean_scores(a, score=score), mean_scores(b, score=score)
    # By id: neither the interval nor p depends on the order that tiles were scored in.
    tile_ids = sorted(of_a)
    differences = np.array([of_a[tile_id] - of_b[tile_id] for tile_id in tile_ids])
    slides = [str(slide_of[tile_id]) for tile_id in tile_ids]
    return tile_ids, slides, differences


def _interval(
    sums: NDArray[np.float64], counts: NDArray[Any], *, num_resamples: int, seed: int
) -> tuple[float | None, float | None]:
    """Percentile interval of the mean over tiles when units are drawn with replacement."""
    if len(sums) < 2:
        return None, None
    rng = np.random.default_rng(seed)
    chances = np.full(len(sums), 1 / len(sums))
    means = []
    for start in range(0, num_resamples, _DRAWN_AT_ONCE):
        size = min(_DRAWN_AT_ONCE, num_resamples - start)
        drawn = rng.multinomial(len(sums), chances, size=size)  # how often each unit
        means.append((drawn @ sums) / (drawn @ counts))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _signed_rank_p(differences: NDArray[np.float64]) -> float | None:
    # Rounded, or ties that differ in their last digit would get ranks of their own.
    different = differences.round(_ROUNDED_TO_DIGITS)
    different = different[different != 0]
    if not len(different):
        return None
    from scipy.stats import wilcoxon

    return float(wilcoxon(different).pvalue)


def _over_seeds(tables: Sequence[pa.Table], score: Score) -> tuple[float, float | None]:
    """Mean and standard deviation of the tables' means."""
    means = [
        mean_psnr(values) if score in _PSNRS else math.fsum(values) / len(values)
        for values in (_values(table, score) for table in tables)
    ]
    return math.fsum(means) / len(means), statistics.stdev(means) if len(means) > 1 else None


def _values(table: pa.Table, score: Score) -> list[float]:
    values: list[float | None] = table[score].to_pylist()
    found = []
    for tile_id, value in zip(table["tile_id"].to_pylist(), values, strict=True):
        if value is None or math.isnan(value):
            raise ValueError(f"tile {tile_id} has no {score}; score it again, or compare another")
        found.append(min(value, PSNR_CAP_DB) if score in _PSNRS else value)
    return found


def _common_tiles(tables: Sequence[pa.Table]) -> list[str]:
    """The ids of the tiles that all tables have."""
    if not tables:
        raise ValueError("there are no scores: give one table a seed")
    first: list[str] = tables[0]["tile_id"].to_pylist()
    for number, table in enumerate(tables):
        tile_ids = table["tile_id"].to_pylist()
        if not tile_ids:
            raise ValueError(f"table {number} of the scores has no tile")
        if len(set(tile_ids)) < len(tile_ids):
            twice = next(one for one in tile_ids if tile_ids.count(one) > 1)
            raise ValueError(f"table {number} of the scores has tile {twice} twice")
        if different := set(tile_ids) ^ set(first):
            raise ValueError(
                f"tables 0 and {number} of the scores are not of the same tiles: {min(different)} "
                f"and {len(different) - 1} more are in one of them only; score both models on the "
                "same split"
            )
    return first
