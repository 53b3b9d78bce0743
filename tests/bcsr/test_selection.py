"""The ranking and the splits, against the paper's rule, brute force and pixels."""

import itertools
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from carn.bcsr.schema import SELECTED
from carn.bcsr.selection import (
    channel_means,
    rank_tiles,
    scaled_counts,
    split_at_random,
    split_by_group,
    split_by_order,
    with_selection,
)
from carn.errors import DatasetError


def counts_of(names: np.ndarray) -> dict[str, int]:
    return {name: int((names == name).sum()) for name in ("train", "validation", "test")}


# --------------------------------------------------------------------------------------- ranking


def test_the_papers_rule_by_hand() -> None:
    means = np.array(
        [[100, 100, 100], [110, 100, 100], [100, 130, 100], [90, 100, 60], [100, 70, 140.0]]
    )
    ranking = rank_tiles(means)
    np.testing.assert_allclose(ranking.mean, [100, 100, 100])
    np.testing.assert_allclose(ranking.distance, [0, 10, 30, np.sqrt(1700), 50])
    assert ranking.rank.tolist() == [4, 3, 2, 1, 0]


def test_ties_go_by_row_order() -> None:
    ranking = rank_tiles(np.array([[10, 0, 0], [50, 0, 0], [90, 0, 0], [10, 0, 0.0]]))
    assert ranking.distance[0] == ranking.distance[3]
    assert ranking.rank.tolist() == [1, 3, 0, 2]
    even = rank_tiles(np.array([[0, 9, 0], [0, 1, 0], [0, 9, 0], [0, 1, 0.0]]))
    assert even.rank.tolist() == [0, 1, 2, 3]


def test_nothing_ranks_to_nothing() -> None:
    ranking = rank_tiles(np.empty((0, 3)))
    assert ranking.rank.shape == ranking.distance.shape == (0,)
    assert np.isnan(ranking.mean).all()


@given(
    means=arrays(np.float64, st.tuples(st.integers(1, 30), st.just(3)), elements=st.floats(0, 255)),
    seed=st.integers(0, 9),
)
def test_ranks_are_a_permutation_that_rows_order_does_not_decide(
    means: np.ndarray, seed: int
) -> None:
    ranking = rank_tiles(means)
    assert sorted(ranking.rank) == list(range(len(means)))
    by_rank = ranking.distance[np.argsort(ranking.rank)]
    assert (np.diff(by_rank) <= 0).all()
    order = np.random.default_rng(seed).permutation(len(means))
    again = rank_tiles(means[order])
    np.testing.assert_allclose(again.mean, ranking.mean)
    np.testing.assert_allclose(again.distance, ranking.distance[order], atol=1e-9)


# ---------------------------------------------------------------------------------------- splits


@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20), st.integers(0, 5))
def test_a_random_split_counts_exactly_and_repeats(
    num_train: int, num_test: int, num_validation: int, seed: int
) -> None:
    wish = {"num_test": num_test, "num_validation": num_validation, "seed": seed}
    num_tiles = num_train + num_test + num_validation
    names = split_at_random(num_tiles, **wish)
    assert counts_of(names) == {"train": num_train, "validation": num_validation, "test": num_test}
    np.testing.assert_array_equal(names, split_at_random(num_tiles, **wish))


def test_a_random_split_depends_on_its_seed_and_mixes() -> None:
    one, two = (
        split_at_random(1200, num_test=200, num_validation=100, seed=seed) for seed in (1, 2)
    )
    assert (one != two).any()
    # About a sixth of each half, not all from one end.
    assert 60 < (one[:600] == "test").sum() < 140


def test_a_split_by_order_is_the_published_one() -> None:
    names = split_by_order(1200, num_test=200, num_validation=100)
    assert set(names[:900]) == {"train"}
    assert set(names[900:1000]) == {"validation"}
    assert set(names[1000:]) == {"test"}
    assert set(split_by_order(1200, num_test=200, num_validation=0)[:1000]) == {"train"}


def test_a_split_by_order_of_too_few_tiles_tests_first() -> None:
    assert split_by_order(3, num_test=2, num_validation=5).tolist() == ["validation"] + ["test"] * 2
    assert split_by_order(2, num_test=3, num_validation=0).tolist() == ["test"] * 2


@pytest.mark.parametrize(
    ("num_kept", "expected"),
    [(1200, (200, 100)), (1300, (200, 100)), (600, (100, 50)), (12, (2, 1)), (1, (0, 0))],
)
def test_counts_shrink_in_proportion(num_kept: int, expected: tuple[int, int]) -> None:
    assert scaled_counts(num_kept, keep=1200, num_test=200, num_validation=100) == expected


group_lists = st.lists(st.integers(1, 9), min_size=1, max_size=8).flatmap(
    lambda sizes: st.permutations(
        [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    )
)


@given(group_lists, st.integers(0, 25), st.integers(0, 15), st.integers(0, 3))
def test_no_group_is_on_two_sides(
    groups: list[str], num_test: int, num_validation: int, seed: int
) -> None:
    wish = {"num_test": num_test, "num_validation": num_validation, "seed": seed}
    num_splits = 1 + (num_test > 0) + (num_validation > 0)
    if len(set(groups)) < num_splits:
        with pytest.raises(DatasetError, match=f"come from {len(set(groups))}; use --split"):
            split_by_group(groups, **wish)
        return
    names = split_by_group(groups, **wish)
    sides = {(group, name) for group, name in zip(groups, names, strict=True)}
    assert len(sides) == len(set(groups))
    found = counts_of(names)
    assert found["train"] > 0
    assert (found["test"] > 0) == (num_test > 0)
    assert (found["validation"] > 0) == (num_validation > 0)
    np.testing.assert_array_equal(names, split_by_group(groups, **wish))


def nearest_by_brute_force(sizes: list[int], wished: int, spare: int) -> int:
    """The least distance from `wished` of any sum of 1 to len(sizes) - spare sizes."""
    return min(
        abs(sum(chosen) - wished)
        for length in range(1, len(sizes) - spare + 1)
        for chosen in itertools.combinations(sizes, length)
    )


@settings(max_examples=400)
@given(
    st.lists(st.integers(1, 12), min_size=3, max_size=7),
    st.integers(1, 40),
    st.integers(0, 20),
    st.integers(0, 3),
)
# The first subset found of sum 2 (1 + 1) has no room for the 3; 2 + 3 is the answer.
@example([1, 1, 2, 3], 5, 2, 0)
@example([1, 1, 2, 3], 5, 2, 1)
@example([1, 1, 2, 3], 5, 2, 2)
@example([1, 1, 2, 3], 5, 2, 3)
def test_counts_are_as_near_as_whole_groups_can(
    sizes: list[int], num_test: int, num_validation: int, seed: int
) -> None:
    groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    names = split_by_group(groups, num_test=num_test, num_validation=num_validation, seed=seed)
    found = counts_of(names)
    spare = 1 + (num_validation > 0)
    assert abs(found["test"] - num_test) == nearest_by_brute_force(sizes, num_test, spare)
    if num_validation:
        in_test = {group for group, name in zip(groups, names, strict=True) if name == "test"}
        rest = [size for number, size in enumerate(sizes) if f"g{number}" not in in_test]
        expected = nearest_by_brute_force(rest, num_validation, 1)
        assert abs(found["validation"] - num_validation) == expected


def test_the_seed_decides_among_equal_groups() -> None:
    groups = [f"g{number:02d}" for number in range(30) for _ in range(5)]
    wish = {"num_test": 25, "num_validation": 15}
    chosen = set()
    for seed in range(8):
        names = split_by_group(groups, seed=seed, **wish)
        assert counts_of(names) == {"train": 110, "validation": 15, "test": 25}
        chosen.add(tuple(names))
    assert len(chosen) == 8


def test_a_split_by_group_of_the_papers_size_is_exact() -> None:
    rng = np.random.default_rng(3)
    groups = [f"slide_{number:03d}" for number in rng.integers(0, 250, 1200)]
    names = split_by_group(groups, num_test=200, num_validation=100, seed=1)
    assert counts_of(names) == {"train": 900, "validation": 100, "test": 200}
    # Not a few large slides: the test set is as mixed as the rest.
    in_test = {group for group, name in zip(groups, names, strict=True) if name == "test"}
    assert len(in_test) > 20


def test_too_few_groups_name_the_way_out() -> None:
    with pytest.raises(DatasetError, match=r"3 splits .* at least 3 slides .* from 2; use --split"):
        split_by_group(["a", "b", "a"], num_test=1, num_validation=1, seed=0)
    assert counts_of(split_by_group(["a", "b", "a"], num_test=1, num_validation=0, seed=0)) == {
        "train": 2,
        "validation": 0,
        "test": 1,
    }


# ---------------------------------------------------------------------------------------- tables


def test_unranked_rows_have_neither_distance_nor_rank(measured) -> None:
    table = measured([{"x_l0": 1, "mean_r": 10.0}, {"x_l0": 2}, {"x_l0": 3, "mean_r": 40.0}])
    ranking = rank_tiles(np.array([[10, 120, 160], [40, 120, 160.0]]))
    selected = with_selection(
        table,
        status=["train", "white", "surplus"],
        ranking=ranking,
        is_ranked=np.array([True, False, True]),
    )
    assert selected.schema == SELECTED
    assert selected["rank"].to_pylist() == [0, None, 1]
    assert selected["distance"].to_pylist() == [15.0, None, 15.0]
    assert selected["status"].to_pylist() == ["train", "white", "surplus"]


def test_channel_means_are_those_of_all_pixels(measured) -> None:
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 256, (h, w, 3)) for h, w in ((4, 8), (16, 3), (1, 1), (7, 7))]
    rows = [
        {
            **{"x_l0": number, "width_px": tile.shape[1], "height_px": tile.shape[0]},
            **dict(
                zip(("mean_r", "mean_g", "mean_b"), tile.reshape(-1, 3).mean(axis=0), strict=True)
            ),
        }
        for number, tile in enumerate(tiles)
    ]
    status = ["train", "train", "train", "test"]
    selected = measured(rows).append_column("status", pa.array(status))
    pixels = np.concatenate([tile.reshape(-1, 3) for tile in tiles[:3]])
    np.testing.assert_allclose(channel_means(selected), pixels.mean(axis=0) / 255)
    np.testing.assert_allclose(
        channel_means(selected, split="test"), tiles[3].reshape(-1, 3).mean(axis=0) / 255
    )
    assert channel_means(selected, split="validation") is None
    with pytest.raises(ValueError, match="'white' is no split"):
        channel_means(selected, split="white")


def test_the_module_imports_what_it_uses() -> None:
    # pyarrow.compute is no attribute of pyarrow until somebody imports it.
    code = (
        "import pyarrow as pa; from carn.bcsr.selection import channel_means; "
        "print(channel_means(pa.table({'status': pa.array([], pa.string())})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "None", done.stderr
