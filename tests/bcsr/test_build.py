"""What a build decides of measured tiles: the selection, failures, overlaps, the manifest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.bcsr.build import (
    PAPER_CHANNEL_MEANS,
    doubts_about_magnification,
    failures_table,
    group_of,
    make_manifest,
    mark_failed,
    measured_failures,
    overlap_report,
    select_tiles,
    write_table,
)
from carn.bcsr.config import FilterConfig, SelectConfig
from carn.bcsr.schema import FAILURES, MEASURED, SELECTED, SPLITS
from carn.bcsr.selection import channel_means
from carn.bcsr.shards import plan_shards
from carn.errors import DatasetError

NUMBERS = ("inside_fraction", "white_fraction", "mean_r", "mean_g", "mean_b")
ALL_TRAIN = SelectConfig(keep=None, num_test=0, num_validation=0)


def tiles(num_slides: int = 6, num_each: int = 10, *, seed: int = 0) -> list[dict[str, Any]]:
    """Tiles of some slides, of all colours, at places that hardly overlap."""
    rng = np.random.default_rng(seed)
    return [
        {"slide": f"slide_{slide:02d}", "x_l0": 1100 * number, "y_l0": 2000}
        | dict(zip(("mean_r", "mean_g", "mean_b"), rng.uniform(60, 240, 3), strict=True))
        | {"white_fraction": float(rng.uniform(0, 0.5))}
        for slide in range(num_slides)
        for number in range(num_each)
    ]


def select(
    table: pa.Table, config: SelectConfig = ALL_TRAIN, *, seed: int = 1, **white: Any
) -> pa.Table:
    return select_tiles(table, white=FilterConfig(**white), select=config, seed=seed)


def status_counts(selected: pa.Table) -> dict[str, int]:
    status = selected["status"].to_pylist()
    return {name: status.count(name) for name in sorted(set(status))}


# ------------------------------------------------------------------------------------- selection


def test_the_white_filter_drops_what_is_above_its_limit_only(measured) -> None:
    fractions = [0.0, 0.6, float(np.nextafter(0.6, 1)), 1.0, 0.59]
    rows = [{"x_l0": x, "white_fraction": value} for x, value in enumerate(fractions)]
    selected = select(measured(rows))
    assert selected.schema == SELECTED
    assert selected["status"].to_pylist() == ["train", "train", "white", "white", "train"]
    assert [rank is None for rank in selected["rank"].to_pylist()] == [
        *(False, False, True, True),
        False,
    ]


def test_a_limit_of_one_drops_nothing(measured) -> None:
    selected = select(measured([{"white_fraction": 1.0}]), max_white_fraction=1.0)
    assert selected["status"].to_pylist() == ["train"]


def test_failed_tiles_are_neither_ranked_nor_counted_in_the_mean(measured) -> None:
    rows = [
        {"x_l0": 0, "mean_r": 100.0},
        {"x_l0": 1, "reason": "damaged"},
        {"x_l0": 2, "mean_r": 110.0},
        {"x_l0": 3, "white_fraction": 0.9, "mean_r": 255.0},
    ]
    selected = select(measured(rows))
    assert selected["status"].to_pylist() == ["train", "failed", "train", "white"]
    assert selected["distance"].to_pylist() == [5.0, None, 5.0, None]
    assert selected["rank"].to_pylist() == [0, None, 1, None]


def test_the_farthest_are_kept(measured) -> None:
    table = measured(tiles())
    selected = select(table, SelectConfig(keep=25, num_test=5, num_validation=3, split="paper"))
    assert status_counts(selected) == {"surplus": 35, "test": 5, "train": 17, "validation": 3}
    rows = selected.to_pylist()
    means = np.array([[row[f"mean_{c}"] for c in "rgb"] for row in rows])
    distance = np.linalg.norm(means - means.mean(axis=0), axis=1)
    np.testing.assert_allclose([row["distance"] for row in rows], distance)
    kept = {number for number, row in enumerate(rows) if row["status"] in SPLITS}
    assert kept == set(np.argsort(-distance)[:25])


@given(seed=st.integers(0, 20), split=st.sampled_from(["by-slide", "paper", "numbered"]))
def test_the_order_of_the_rows_decides_nothing(measured, seed: int, split: Any) -> None:
    # Equal colours: ties must go by place, not by the order in which tasks came back.
    rows = tiles(4, 6)
    for row in rows[::2]:
        row |= {"mean_r": 100.0, "mean_g": 100.0, "mean_b": 100.0}
    rows[5] |= {"reason": "damaged"}
    table = measured(rows)
    config = SelectConfig(keep=14, num_test=4, num_validation=2, split=split)
    order = np.random.default_rng(seed).permutation(len(table))
    assert select(table.take(pa.array(order)), config).equals(select(table, config))


def test_the_seed_decides_the_split_and_not_the_choice(measured) -> None:
    table = measured(tiles())
    config = SelectConfig(keep=40, num_test=10, num_validation=5, split="paper")
    one, two = select(table, config, seed=1), select(table, config, seed=2)
    assert one["rank"].equals(two["rank"])
    assert not one["status"].equals(two["status"])


def test_a_split_by_slide_keeps_slides_together(measured) -> None:
    selected = select(measured(tiles()), SelectConfig(keep=60, num_test=20, num_validation=10))
    assert status_counts(selected) == {"test": 20, "train": 30, "validation": 10}
    sides = set(zip(selected["slide"].to_pylist(), selected["status"].to_pylist(), strict=True))
    assert len(sides) == 6


def test_a_split_by_patient_keeps_all_slides_of_one_together(measured) -> None:
    rows = []
    for patient in range(8):
        for node in range(2):
            for row in tiles(1, 4, seed=patient * 2 + node):
                rows.append(row | {"slide": f"patient_{patient:03d}_node_{node}"})
    config = SelectConfig(
        keep=64, num_test=16, num_validation=8, split="by-slide", group_regex=r"patient_\d+"
    )
    for seed in range(5):
        selected = select(measured(rows), config, seed=seed)
        assert status_counts(selected) == {"test": 16, "train": 40, "validation": 8}
        sides = {
            (name[:11], status)
            for name, status in zip(
                selected["slide"].to_pylist(), selected["status"].to_pylist(), strict=True
            )
        }
        assert len(sides) == 8


def test_the_group_of_a_slide() -> None:
    assert group_of("patient_001_node_2", r"patient_\d+") == "patient_001"
    assert group_of("centre_1/patient_001_node_2", r"patient_\d+") == "patient_001"
    assert group_of("TCGA-A1-A0SB-01Z", r"TCGA-\w\w-\w{4}") == "TCGA-A1-A0SB"
    assert group_of("tumor_001", r"patient_\d+") == "tumor_001"
    assert group_of("tumor_001", None) == "tumor_001"


def test_a_numbered_split_tests_on_the_last_by_name(measured) -> None:
    rows = [{"slide": f"{number:04d}"} for number in range(1, 1201)]
    config = SelectConfig(split="numbered")
    selected = select(measured(rows[::-1]), config)
    status = dict(zip(selected["slide"].to_pylist(), selected["status"].to_pylist(), strict=True))
    assert {status[f"{number:04d}"] for number in range(1, 901)} == {"train"}
    assert {status[f"{number:04d}"] for number in range(901, 1001)} == {"validation"}
    assert {status[f"{number:04d}"] for number in range(1001, 1201)} == {"test"}


def test_fewer_tiles_than_wished_are_split_in_proportion(measured) -> None:
    selected = select(measured(tiles(20, 6)), SelectConfig(split="paper"))
    assert status_counts(selected) == {"test": 20, "train": 90, "validation": 10}


def test_nothing_left_names_the_numbers(measured) -> None:
    rows = [
        {"x_l0": 0, "white_fraction": 0.7},
        {"x_l0": 1, "white_fraction": 0.9},
        {"x_l0": 2, "slide": "z", "reason": "cut off"},
    ]
    match = (
        r"of 3, 1 could not be read and 2 are more than 60% white; the first failure: z: cut off"
    )
    with pytest.raises(DatasetError, match=match):
        select(measured(rows))
    with pytest.raises(DatasetError, match=r"of 2, 0 could .* 2 are more than 60% white$"):
        select(measured(rows[:2]))
    with pytest.raises(DatasetError, match="of 0, 0 could"):
        select(measured([]))
    with pytest.raises(DatasetError, match="of 1, 1 could"):
        select(measured(rows[2:]))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(measured) -> None:
    config = SelectConfig(keep=None, num_test=8, num_validation=2, split="paper")
    with pytest.raises(DatasetError, match=r"10 tiles .* 8 for testing, 2 for validation"):
        select(measured(tiles(2, 5)), config)
    assert status_counts(select(measured(tiles(1, 11)), config))["train"] == 1


# -------------------------------------------------------------------------------------- failures


def test_failures_are_one_a_slide_or_one_a_tile(measured) -> None:
    slide = {"slide": "gone", "reason": "no such file", "failed_scope": "slide"}
    tile = {"slide": "bad", "reason": "damaged", "failed_scope": "tile"}
    rows = [
        slide | {"x_l0": 1},
        tile | {"x_l0": 8},
        slide | {"x_l0": 2},
        tile | {"x_l0": 7},
        {"slide": "good"},
        slide | {"x_l0": 3, "reason": "storage does not answer"},
    ]
    found = measured_failures(measured(rows))
    kept = ("slide", "x_l0", "num_tiles", "stage", "reason")
    assert [tuple(row[name] for name in kept) for row in found] == [
        ("bad", 7, 1, "measure", "damaged"),
        ("bad", 8, 1, "measure", "damaged"),
        ("gone", None, 2, "measure", "no such file"),
        ("gone", None, 1, "measure", "storage does not answer"),
    ]
    assert {row["stage"] for row in measured_failures(measured(rows), stage="write")} == {"write"}
    assert measured_failures(measured(rows[4:5])) == []


def test_tiles_that_stopped_reading_lose_their_numbers(measured) -> None:
    table = measured([{"x_l0": 1}, {"x_l0": 2}, {"slide": "t", "x_l0": 1}])
    marked = mark_failed(table, [("s", "/slides/s.tif", 1, 0, "no longer there")])
    assert marked.schema == MEASURED
    one, *others = marked.to_pylist()
    assert (one["reason"], one["failed_scope"]) == ("no longer there", "tile")
    assert one["is_transient"] is True
    assert [one[name] for name in NUMBERS] == [None] * 5
    assert others == table.to_pylist()[1:]
    assert select(marked)["status"].to_pylist() == ["failed", "train", "train"]


def failure(**changes: Any) -> dict[str, Any]:
    row = {"slide": "a", "uri": "/a.tif", "x_l0": None, "y_l0": None, "num_tiles": 1}
    return row | {"stage": "measure", "reason": "r"} | changes


def test_failures_are_ordered_by_slide_stage_and_place() -> None:
    ordered = [
        failure(stage="locate"),
        failure(),
        failure(x_l0=5, y_l0=-1),
        failure(x_l0=-3, y_l0=0),
        failure(x_l0=0, y_l0=0, reason="q"),
        failure(x_l0=0, y_l0=0),
        failure(x_l0=2, y_l0=0),
        failure(x_l0=0, y_l0=1),
        failure(x_l0=0, y_l0=0, stage="write"),
        failure(slide="b", uri=None, stage="resolve"),
    ]
    rng = np.random.default_rng(0)
    for _ in range(5):
        shuffled = [ordered[i] for i in rng.permutation(len(ordered))]
        table = failures_table(shuffled)
        assert table.schema == FAILURES
        assert table.to_pylist() == ordered
    assert failures_table([]).schema == FAILURES


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    table = failures_table([failure(), failure(slide="b")])
    parts = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    write_table(str(tmp_path / "one"), table)
    write_table(str(tmp_path / "two"), parts)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert pq.read_table(tmp_path / "one").equals(table)


# -------------------------------------------------------------------------------------- overlaps


def test_overlaps_are_counted_within_and_between_splits(measured) -> None:
    # (slide, x, split): tiles of 100 px in one row.
    made = [
        ("a", 0, "train"),
        ("a", 40, "train"),  # 60 px of the first
        ("a", 130, "test"),  # 10 px of the second
        ("a", 140, "test"),  # 90 px of the one before; touches the second
        ("a", 160, "white"),  # not kept: counts nowhere
        ("b", 0, "validation"),  # another slide
        ("b", 51, "train"),  # 49 px of it
    ]
    table = measured(
        [{"slide": s, "x_l0": x, "width_px": 100, "height_px": 100} for s, x, _ in made]
    )
    selected = table.append_column("status", pa.array([split for *_, split in made]))
    rows = {
        row["splits"]: (row["num_pairs"], row["num_tiles"], row["num_tiles_over_half"])
        for row in overlap_report(selected, tile_px=100)
    }
    assert rows == {
        "train / train": (1, 2, 2),
        "train / validation": (1, 2, 0),
        "train / test": (1, 2, 0),
        "validation / validation": (0, 0, 0),
        "validation / test": (0, 0, 0),
        "test / test": (1, 2, 2),
    }


def test_a_tile_in_two_pairs_counts_once(measured) -> None:
    table = measured([{"x_l0": x} for x in (0, 30, 60)])
    selected = table.append_column("status", pa.array(["train", "test", "train"]))
    rows = {row["splits"]: row for row in overlap_report(selected, tile_px=100)}
    assert rows["train / test"]["num_pairs"] == 2
    assert rows["train / test"]["num_tiles"] == 3
    assert rows["train / train"]["num_pairs"] == 1
    assert rows["train / train"]["num_tiles_over_half"] == 0
    assert rows["train / test"]["num_tiles_over_half"] == 3


def test_a_split_by_slide_does_not_leak_and_a_random_one_does(measured) -> None:
    rows = [row | {"x_l0": row["x_l0"] // 3} for row in tiles()]
    wish: dict[str, Any] = {"keep": 60, "num_test": 20, "num_validation": 10}
    leaks = {}
    for split in ("by-slide", "paper"):
        selected = select(measured(rows), SelectConfig(split=split, **wish))
        found = {row["splits"]: row["num_pairs"] for row in overlap_report(selected, tile_px=1024)}
        leaks[split] = sum(found[f"{one} / test"] for one in ("train", "validation"))
    assert leaks["by-slide"] == 0
    assert leaks["paper"] > 5


# -------------------------------------------------------------------------------------- manifest


def manifest_of(selected: pa.Table) -> dict[str, Any]:
    plans = plan_shards(selected, encoding="jxl", tiles_per_shard=16)
    return make_manifest(
        selected,
        config={"seed": 1},
        source_digest="digest",
        empty_slides=[],
        lists={"/lists/tumor.txt": "sha256:1"},
        num_listed=99,
        num_missing=7,
        plans=plans,
        shard_bytes={plan.name: 1000 + number for number, plan in enumerate(plans)},
        num_failures=3,
        overlaps=[{"splits": "train / test", "num_pairs": 0}],
    )


def test_a_manifest_counts_everything(measured) -> None:
    rows = tiles()
    rows[0] |= {"white_fraction": 0.9}
    rows[1] |= {"reason": "damaged"}
    for row in rows[50:]:  # all of the last slide
        row |= {"reason": "no such file", "failed_scope": "slide", "reader": None, "mpp_x": None}
    config = SelectConfig(keep=40, num_test=8, num_validation=4, split="paper")
    selected = select(measured(rows), config)
    manifest = manifest_of(selected)
    assert manifest["counts"] == {
        **{"listed": 99, "listed_on_missing_slides": 7, "drawn": 60, "failures": 3},
        **{"train": 28, "validation": 4, "test": 8, "white": 1, "surplus": 8, "failed": 11},
    }
    assert manifest["splits"] == {"train": 28, "validation": 4, "test": 8}
    assert manifest["channel_means"] == channel_means(selected)
    assert manifest["paper_channel_means"] == PAPER_CHANNEL_MEANS
    assert [shard["num_tiles"] for shard in manifest["shards"]] == [16, 12, 4, 8]
    assert [shard["num_bytes"] for shard in manifest["shards"]] == [1000, 1001, 1002, 1003]
    # Slides that were read, each once, with what they said of themselves.
    assert [entry["slide"] for entry in manifest["inputs"]] == [f"slide_0{n}" for n in range(5)]
    for entry in manifest["inputs"]:
        assert entry["uri"] == f"/slides/{entry['slide']}.tif"
        assert (entry["slide_identity"], entry["reader"]) == ("etag:1", "tiled-tiff")


def test_a_manifest_is_json_and_the_same_for_rows_in_any_order(measured) -> None:
    table = measured(tiles())
    config = SelectConfig(keep=40, num_test=8, num_validation=4)
    order = np.random.default_rng(3).permutation(len(table))
    texts = [
        json.dumps(manifest_of(select(each, config)), allow_nan=False)
        for each in (table, table.take(pa.array(order)))
    ]
    assert texts[0] == texts[1]


def test_numbered_images_keep_their_sides_when_some_do_not_read(measured) -> None:
    rows = [{"slide": f"{number:04d}", "mean_r": float(number)} for number in range(1, 13)]
    rows[2]["reason"] = "damaged"
    rows[11]["reason"] = "damaged"
    selected = select_tiles(
        measured(rows),
        white=FilterConfig(),
        select=SelectConfig(keep=6, num_test=3, num_validation=2, split="numbered"),
        seed=1,
    )
    found = {row["slide"]: row["status"] for row in selected.to_pylist()}
    assert found["0003"] == found["0012"] == "failed"
    assert {name for name, status in found.items() if status == "test"} == {"0010", "0011"}
    assert {name for name, status in found.items() if status == "validation"} == {"0008", "0009"}
    # None is dropped by rank, whatever `keep` says.
    assert list(found.values()).count("train") == 6


# ------------------------------------------------------------------------------- magnification


def test_slides_of_one_magnification_raise_no_doubts() -> None:
    inputs = [{"slide": f"s{mpp}", "mpp_x": mpp} for mpp in (0.2201, 0.243, 0.2525)]
    assert doubts_about_magnification(inputs) == []
    assert doubts_about_magnification([]) == []


def test_what_speaks_against_training_is_said() -> None:
    inputs = [
        {"slide": "Fine", "mpp_x": 0.25},
        {"slide": "Coarse", "mpp_x": 0.5},
        {"slide": "Plain", "mpp_x": None},
    ]
    unknown, mixed = doubts_about_magnification(inputs)
    assert unknown.startswith("1 of 3 slides do not say their um per px")
    assert "0.25 (Fine) to 0.5 um/px (Coarse)" in mixed
    assert len(doubts_about_magnification(inputs[2:])) == 1
