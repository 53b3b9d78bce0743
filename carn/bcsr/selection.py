"""From measured tiles to a dataset: the white filter, the ranking, the splits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from carn.bcsr.schema import SELECTED, SPLITS
from carn.errors import DatasetError


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Tiles by their distance from the mean colour.

    Attributes:
        mean: (3,) mean RGB over all tiles, 0..255.
        distance: (n,) Euclidean RGB distance of each tile's mean from it, 0..255 scale.
        rank: (n,) place of each tile, 0 for the farthest; ties go by row order.
    """

    mean: NDArray[np.float64]
    distance: NDArray[np.float64]
    rank: NDArray[np.int64]


def rank_tiles(means: NDArray[np.float64]) -> Ranking:
    """Rank tiles by how far their mean RGB lies from the mean of all of them, farthest first.

    Source: paper section "Dataset"; it does not name the distance, Euclidean is used.

    Args:
        means: (n, 3) mean RGB of each tile, 0..255.
    """
    if not len(means):
        empty = np.empty(0)
        return Ranking(mean=np.full(3, np.nan), distance=empty, rank=empty.astype(np.int64))
    centre = means.mean(axis=0)
    distance = np.sqrt(((means - centre) ** 2).sum(axis=1))
    order = np.argsort(-distance, kind="stable")
    rank = np.empty(len(means), dtype=np.int64)
    rank[order] = np.arange(len(means))
    return Ranking(mean=centre, distance=distance, rank=rank)


def split_at_random(
    num_tiles: int, *, num_test: int, num_validation: int, seed: int
) -> NDArray[np.str_]:
    """The paper's kind of split: tiles drawn at random, whatever slide they are from.

    Tiles of one slide land on both sides and may overlap there: see the overlap report.

    Returns:
        (n,) names of SPLITS.
    """
    order = np.random.default_rng([seed, 1]).permutation(num_tiles)
    names = np.full(num_tiles, "train", dtype="<U10")
    names[order[:num_test]] = "test"
    names[order[num_test : num_test + num_validation]] = "validation"
    return names


def check_groups(num_groups: int, *, num_test: int, num_validation: int) -> int:
    """How many splits are asked for.

    Raises:
        DatasetError: there are fewer groups than splits.
    """
    num_splits = 1 + (num_test > 0) + (num_validation > 0)
    if num_groups < num_splits:
        raise DatasetError(
            f"{num_splits} splits of which no slide is in two need at least {num_splits} slides "
            f"(or patients), but the tiles come from {num_groups}; use --split paper, fewer "
            "splits (--num-validation 0), or more slides"
        )
    return num_splits


def split_by_group(
    groups: Sequence[str], *, num_test: int, num_validation: int, seed: int
) -> NDArray[np.str_]:
    """A split in which no group (slide, patient) is on two sides.

    The test groups are chosen, in seeded order, so that their tiles count as near to `num_test` as
    whole groups can; then the validation groups from the rest.

    Args:
        groups: the group of each tile.
        num_test, num_validation: wished numbers of tiles.
        seed: of the order in which groups are considered.

    Returns:
        (n,) names of SPLITS.

    Raises:
        DatasetError: there are not enough groups to fill every split that is asked for.
    """
    names, counts = np.unique(np.asarray(groups, dtype=str), return_counts=True)
    num_splits = check_groups(len(names), num_test=num_test, num_validation=num_validation)
    order = np.random.default_rng([seed, 2]).permutation(len(names))
    sizes = {str(names[i]): int(counts[i]) for i in order}
    test = _subset_near(sizes, num_test, spare=num_splits - 1) if num_test else set()
    rest = {name: size for name, size in sizes.items() if name not in test}
    validation = _subset_near(rest, num_validation, spare=1) if num_validation else set()
    return np.asarray(
        ["test" if g in test else "validation" if g in validation else "train" for g in groups],
        dtype="<U10",
    )


def _subset_near(sizes: dict[str, int], wished: int, *, spare: int) -> set[str]:
    """A subset of names, `spare` left over, whose sizes sum as near to `wished` as possible."""
    limit = 2 * wished + max(sizes.values())
    most = len(sizes) - spare
    # The first subset found of a sum stays, which makes the seeded order decide among equals. It
    # may be too long to grow by a name that a shorter one of the same sum has room for: then the
    # shortest of each sum, of which none nearer can be missed, may come nearer.
    candidates = [
        names
        for prefer_short in (False, True)
        for total, names in _reachable(sizes, limit, most, prefer_short=prefer_short).items()
        if total
    ]
    sums = [sum(sizes[name] for name in names) for names in candidates]
    best = min(range(len(sums)), key=lambda i: (abs(sums[i] - wished), sums[i]))
    return set(candidates[best])


def _reachable(
    sizes: dict[str, int], limit: int, most: int, *, prefer_short: bool
) -> dict[int, tuple[str, ...]]:
    """By each sum of sizes up to `limit`, one subset of at most `most` names that has it."""
    reached: dict[int, tuple[str, ...]] = {0: ()}
    for name, size in sizes.items():
        for total, names in list(reached.items()):
            if total + size > limit or len(names) == most:
                continue
            known = reached.get(total + size)
            if known is None or (prefer_short and len(names) + 1 < len(known)):
                reached[total + size] = (*names, name)
    return reached


def split_by_order(num_tiles: int, *, num_test: int, num_validation: int) -> NDArray[np.str_]:
    """The split of the published layout: the last `num_test` tiles by order are the test set.

    Validation tiles are the last ones before them.

    Returns:
        (n,) names of SPLITS.
    """
    names = np.full(num_tiles, "train", dtype="<U10")
    num_train = num_tiles - num_test - num_validation
    names[max(num_train, 0) :] = "validation"
    names[max(num_tiles - num_test, 0) :] = "test"
    return names


def scaled_counts(
    num_kept: int, *, keep: int, num_test: int, num_validation: int
) -> tuple[int, int]:
    """Test and validation counts for `num_kept` tiles, in the proportions wished for `keep`."""
    share = min(1.0, num_kept / keep)
    return round(num_test * share), round(num_validation * share)


def with_selection(
    measured: pa.Table, *, status: Sequence[str], ranking: Ranking, is_ranked: NDArray[np.bool_]
) -> pa.Table:
    """MEASURED rows with their status, distance and rank: the columns of SELECTED.

    Args:
        measured: n rows.
        status: of each row.
        ranking: of the rows where `is_ranked`, in their order.
        is_ranked: (n,) which rows were ranked.
    """
    distance = np.full(len(measured), np.nan)
    rank = np.full(len(measured), -1, dtype=np.int64)
    distance[is_ranked], rank[is_ranked] = ranking.distance, ranking.rank
    missing = ~is_ranked
    return (
        measured.append_column("status", pa.array(list(status), pa.string()))
        .append_column("distance", pa.array(distance, mask=missing))
        .append_column("rank", pa.array(rank.astype(np.int32), mask=missing))
        .cast(SELECTED)
    )


def channel_means(selected: pa.Table, *, split: str = "train") -> tuple[float, float, float] | None:
    """Mean RGB (0..1) over the tiles of a split, each tile counting by its area; None if empty.

    Source: the paper states (.7204, .4298, .6397) for its training set.
    """
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split; there are {', '.join(SPLITS)}")
    rows = selected.filter(pc.equal(selected["status"], split))
    if not len(rows):
        return None
    area = rows["width_px"].to_numpy().astype(np.float64) * rows["height_px"].to_numpy()
    red, green, blue = (
        float((rows[name].to_numpy() * area).sum() / area.sum() / 255.0)
        for name in ("mean_r", "mean_g", "mean_b")
    )
    return red, green, blue
