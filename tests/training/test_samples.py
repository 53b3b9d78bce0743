"""What a step samples depends on the seed and the step alone, and is fair to tiles and workers."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.degradation.bicubic import SCALES
from carn.training.samples import Sampler, Samples, share

FIELDS = ("tile", "top", "left", "flip_x", "flip_y", "transpose")
EXTENTS = [(40 + 3 * n, 60 - 2 * n) for n in range(7)]


def make(**changes: Any) -> Sampler:
    settings: dict[str, Any] = {"scale": 2, "patch_px": 16, "batch_size": 5, "seed": 1}
    return Sampler(changes.pop("extents_px", EXTENTS), **settings | changes)


def make_windowed(**changes: Any) -> Sampler:
    groups = [(0, 3), (3, 3), (6, 1)]
    settings = {"order": "windowed", "groups": groups, "samples_per_tile": 4}
    return make(**settings | changes)


def listed(samples: Samples) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(samples, name).tolist() for name in FIELDS), strict=True))


# ------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize("maker", [make, make_windowed])
def test_a_step_is_the_same_whoever_asks_and_in_whatever_order(maker: Any) -> None:
    forwards, backwards = maker(), maker()
    wanted = [listed(forwards.step(step)) for step in range(40)]
    assert [listed(backwards.step(step)) for step in reversed(range(40))] == wanted[::-1]
    assert listed(forwards.step(7)) == wanted[7]
    assert len({tuple(step) for step in wanted}) == 40


@pytest.mark.parametrize("maker", [make, make_windowed])
def test_another_seed_gives_other_samples(maker: Any) -> None:
    assert listed(maker(seed=1).step(0)) != listed(maker(seed=2).step(0))


@pytest.mark.parametrize("maker", [make, make_windowed])
def test_asking_leaves_numpy_s_global_generator_alone(maker: Any) -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    maker().step(5)
    assert np.random.get_state()[1].tolist() == before


# --------------------------------------------------------------------------------- every tile


@given(num_tiles=st.integers(1, 12), batch_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_tile_comes_once_an_epoch(num_tiles: int, batch_size: int, seed: int) -> None:
    sampler = make(extents_px=[(32, 32)] * num_tiles, batch_size=batch_size, seed=seed)
    num_epochs = 3
    steps = range(-(-num_epochs * num_tiles // batch_size))
    visits = np.concatenate([sampler.step(step).tile for step in steps])
    epochs = visits[: num_epochs * num_tiles].reshape(num_epochs, num_tiles)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(num_tiles))
    if num_tiles > 6:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


@given(
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 8),
    is_windowed=st.booleans(),
    step=st.integers(0, 30),
)
def test_workers_shares_are_disjoint_and_make_the_batch(
    batch_size: int, world_size: int, is_windowed: bool, step: int
) -> None:
    sampler = (make_windowed if is_windowed else make)(batch_size=batch_size)
    batch = listed(sampler.step(step))
    shares = [
        listed(share(sampler.step(step), rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1
    joined: list[Any] = [None] * batch_size
    for rank, part in enumerate(shares):
        joined[rank::world_size] = part
    assert joined == batch


# ----------------------------------------------------------------------------------- places


@given(
    data=st.data(),
    scale=st.sampled_from(SCALES),
    is_windowed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_patches_lie_within_their_tiles(
    data: Any, scale: int, is_windowed: bool, seed: int
) -> None:
    patch_px = scale * data.draw(st.integers(1, 6))
    side = st.integers(patch_px, patch_px + 3 * scale)
    extents = data.draw(st.lists(st.tuples(side, side), min_size=1, max_size=5))
    windowed = {"order": "windowed", "groups": [(0, len(extents))]} if is_windowed else {}
    sampler = make(
        extents_px=extents, scale=scale, patch_px=patch_px, batch_size=40, seed=seed, **windowed
    )
    samples = sampler.step(data.draw(st.integers(0, 50)))
    width, height = np.array(extents)[samples.tile].T // scale
    assert (samples.top >= 0).all()
    assert (samples.left >= 0).all()
    assert (samples.top + patch_px // scale <= height).all()
    assert (samples.left + patch_px // scale <= width).all()


def test_every_corner_and_every_turn_is_met() -> None:
    sampler = make(extents_px=[(22, 20)], batch_size=50)
    samples = [row for step in range(40) for row in listed(sampler.step(step))]
    # 22 x 20 px at x2 have room for 8 px patches at 4 columns and 3 rows; 8 turns each.
    assert len(samples) == 2000
    assert len(set(samples)) == 4 * 3 * 8
    assert max(top for _, top, *_ in samples) == 2
    assert max(left for _, _, left, *_ in samples) == 3


@pytest.mark.parametrize("maker", [make, make_windowed])
def test_without_augmentation_nothing_is_turned_and_places_stay(maker: Any) -> None:
    turned, straight = maker(), maker(augment=False)
    assert any(row[3:] != (0, 0, 0) for row in listed(turned.step(0)))
    for step in range(20):
        rows = listed(straight.step(step))
        assert all(row[3:] == (0, 0, 0) for row in rows)
        if maker is make:
            assert [row[:3] for row in rows] == [row[:3] for row in listed(turned.step(step))]


# --------------------------------------------------------------------------------- windowed


@pytest.mark.parametrize("slot", range(5))
def test_a_slot_s_windows_tile_the_steps(slot: int) -> None:
    sampler = make_windowed()
    end = 0
    for number in range(9):
        window = sampler.window(slot, end)
        assert (window.slot, window.number, window.first_step) == (slot, number, end)
        # Four samples of each of the group's tiles.
        assert window.num_steps == 4 * [3, 3, 1][window.group]
        end = window.first_step + window.num_steps
        assert sampler.window(slot, end - 1) == window
    # Asked for out of order, of a sampler that knows nothing yet.
    assert make_windowed().window(slot, 11) == sampler.window(slot, 11)


def test_a_window_holds_each_tile_of_its_group_as_often_as_it_is_told() -> None:
    sampler = make_windowed()
    for slot in range(5):
        window = sampler.window(slot, 0)
        first, count = [(0, 3), (3, 3), (6, 1)][window.group]
        tiles = [int(sampler.step(step).tile[slot]) for step in range(window.num_steps)]
        assert Counter(tiles) == dict.fromkeys(range(first, first + count), 4)
        if count > 1:
            assert tiles != sorted(tiles)
        assert sampler.window_samples(window).tile.tolist() == tiles


def test_windows_go_through_all_groups_in_turn() -> None:
    sampler = make_windowed()
    visits: dict[int, int] = {}
    for slot in range(5):
        for number in range(6):
            step = sum(sampler._windows[slot][n].num_steps for n in range(number)) if number else 0
            visits[number * 5 + slot] = sampler.window(slot, step).group
    order = [visits[n] for n in range(30)]
    for epoch in range(10):
        assert sorted(order[3 * epoch : 3 * epoch + 3]) == [0, 1, 2]


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"extents_px": []}, "no tiles"),
        ({"patch_px": 15}, "patch_px=15 is not a multiple of scale=2"),
        ({"patch_px": 0}, "patch_px=0 is not"),
        (
            {"extents_px": [(90, 90), (30, 33), (50, 50)], "patch_px": 32},
            "patch_px=32 is larger than tile 1 of 30 x 33 px; choose at most 30",
        ),
        # 33 px at x2 are 32.
        ({"extents_px": [(33, 90)], "patch_px": 34}, "choose at most 32"),
        ({"order": "windowed", "groups": [(0, 6)]}, "do not hold the 7 tiles"),
    ],
)
def test_what_cannot_be_sampled_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(**changes)


def test_a_patch_may_fill_its_tile() -> None:
    samples = make(extents_px=[(17, 16)]).step(0)
    assert samples.top.tolist() == samples.left.tolist() == [0] * 5
