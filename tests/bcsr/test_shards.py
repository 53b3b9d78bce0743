"""Shards: what is planned is decided by content alone, and is written whole or not at all."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from carn import storage
from carn.bcsr import shards
from carn.bcsr.build import select_tiles
from carn.bcsr.codec import decode
from carn.bcsr.config import FilterConfig, SelectConfig
from carn.bcsr.schema import SELECTED, TILES
from carn.bcsr.shards import ROWS_PER_GROUP, ShardPlan, plan_shards, shard_uri, write_shard
from carn.errors import CarnError, StorageError
from carn.slides import open_slide


@pytest.fixture
def selected(measured) -> Callable[..., pa.Table]:
    """Make a SELECTED table of (slide, x, y, status), and of changes to a row by its number."""

    def make(
        places: list[tuple[str, int, int, str]], changes: dict[int, dict[str, Any]] | None = None
    ) -> pa.Table:
        rows = [{"slide": slide, "x_l0": x, "y_l0": y} for slide, x, y, _ in places]
        for number, change in (changes or {}).items():
            rows[number] |= change
        status = [place[3] for place in places]
        return pa.Table.from_pylist(
            [
                row | {"status": status[number], "distance": float(number), "rank": number}
                for number, row in enumerate(measured(rows).to_pylist())
            ],
            schema=SELECTED,
        )

    return make


PLACES = [
    ("b", 5, 0, "train"),
    ("a", 9, 7, "test"),
    ("a", 3, 7, "train"),
    ("a", 8, 2, "train"),
    ("c", 0, 0, "white"),
    ("c", 0, 1, "surplus"),
    ("c", 0, 2, "failed"),
    ("b", 4, 0, "validation"),
    ("b", -6, 0, "train"),
]


def plan(table: pa.Table, *, encoding: Any = "jxl", tiles_per_shard: int = 64) -> list[ShardPlan]:
    return plan_shards(table, encoding=encoding, tiles_per_shard=tiles_per_shard)


# ------------------------------------------------------------------------------------------ plans


def test_plans_go_split_by_split_slide_by_slide_and_hold_kept_tiles_only(selected) -> None:
    plans = plan(selected(PLACES), tiles_per_shard=3)
    assert [p.split for p in plans] == ["train", "train", "validation", "test"]
    assert [[row["tile_id"] for row in p.rows] for p in plans] == [
        ["a_8_2", "a_3_7", "b_-6_0"],
        ["b_5_0"],
        ["b_4_0"],
        ["a_9_7"],
    ]
    for found in plans:
        for row in found.rows:
            assert set(TILES.names) - {"image"} <= set(row)
            assert (row["split"], row["encoding"]) == (found.split, "jxl")


def test_names_number_the_shards_of_a_split(selected) -> None:
    names = [p.name for p in plan(selected(PLACES), tiles_per_shard=1)]
    assert [re.sub("-[0-9a-f]{12}", "", name) for name in names] == [
        *(f"train-0000{number}.parquet" for number in range(4)),
        "validation-00000.parquet",
        "test-00000.parquet",
    ]
    assert len(set(names)) == 6


def test_equal_rows_in_any_order_give_equal_plans(selected) -> None:
    table = selected(PLACES)
    order = np.random.default_rng(1).permutation(len(table))
    assert plan(table.take(pa.array(order))) == plan(table)


@pytest.mark.parametrize(
    "change",
    [
        {"slide_identity": "etag:2"},
        {"uri": "/elsewhere/b.tif"},
        {"x_l0": 6},
        {"width_px": 512},
        {"label": "normal"},
        {"mean_r": 200.5},
        {"mpp_x": None},
        {"reader": "openslide"},
    ],
)
def test_a_name_changes_with_each_input_of_its_own_rows_only(selected, change: Any) -> None:
    before = {p.split: p.name for p in plan(selected(PLACES))}
    after = {p.split: p.name for p in plan(selected(PLACES, {0: change}))}
    assert after["train"] != before["train"]
    assert (after["test"], after["validation"]) == (before["test"], before["validation"])


def test_a_name_changes_with_encoding_and_version(selected, monkeypatch) -> None:
    table = selected(PLACES)
    names = {p.name for p in plan(table)}
    assert names.isdisjoint(p.name for p in plan(table, encoding="png"))
    monkeypatch.setattr(shards, "code_version", lambda: "0.1.0+src.another")
    assert names.isdisjoint(p.name for p in plan(table))


def test_a_plan_travels_as_json(selected) -> None:
    for found in plan(selected(PLACES)):
        assert json.loads(json.dumps(found.rows)) == found.rows


def test_nothing_kept_is_nothing_planned(selected) -> None:
    assert plan(selected([("c", 0, 0, "white")])) == []


# ---------------------------------------------------------------------------------------- writing


@pytest.fixture
def slides(write_slide) -> list[Path]:
    return [write_slide(f"{name}.tif", seed=seed) for seed, name in enumerate("ab")]


def selected_of(paths: list[Path], measured: Any, *, num_each: int = 5) -> pa.Table:
    rows = [
        {"slide": path.stem, "uri": str(path), "width_px": 64, "height_px": 64}
        | {"x_l0": 70 * number - 10, "y_l0": 300, "mean_r": float(number)}
        for path in paths
        for number in range(num_each)
    ]
    return select_tiles(
        measured(rows),
        white=FilterConfig(tile_px=64),
        select=SelectConfig(keep=None, num_test=0, num_validation=0),
        seed=1,
    )


@pytest.fixture
def shard(slides, measured) -> ShardPlan:
    (found,) = plan(selected_of(slides, measured))
    return found


def columns_but_image(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in TILES.names if name != "image"}


@pytest.mark.parametrize("encoding", ["jxl", "png"])
def test_what_is_written_is_what_the_slide_holds(
    slides, measured, attempt, tmp_path: Path, encoding
) -> None:
    (found,) = plan(selected_of(slides, measured), encoding=encoding)
    result = write_shard(str(tmp_path / "out"), found, attempt=attempt)
    path = tmp_path / "out" / "tiles" / found.name
    assert shard_uri(str(tmp_path / "out"), found.name) == str(path)
    assert (result.name, result.num_bytes, result.failures) == (
        found.name,
        path.stat().st_size,
        [],
    )
    table = pq.read_table(path)
    assert table.schema == TILES
    assert len(table) == 10
    for row, planned in zip(table.to_pylist(), found.rows, strict=True):
        assert columns_but_image(row) == columns_but_image(planned | {"image": None})
        with open_slide(row["uri"]) as slide:
            pixels = slide.read_region(row["x_l0"], row["y_l0"], 64, 64)
        np.testing.assert_array_equal(
            decode(row["image"], encoding, extent=pixels.shape[1::-1]), pixels
        )


def test_a_shard_is_read_without_carn(slides, measured, attempt, tmp_path: Path) -> None:
    (found,) = plan(selected_of(slides, measured), encoding="png")
    write_shard(str(tmp_path), found, attempt=attempt)
    code = (
        "import io, sys, pyarrow.parquet as pq; from PIL import Image\n"
        "rows = pq.read_table(sys.argv[1]).to_pylist()\n"
        "images = [Image.open(io.BytesIO(row['image'])) for row in rows]\n"
        "print(len(rows), {image.size for image in images}, 'carn' in sys.modules)"
    )
    path = shard_uri(str(tmp_path), found.name)
    command = [sys.executable, "-I", "-c", code, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "10 {(64, 64)} False", done.stderr


def test_a_shard_that_is_there_is_not_read_again(
    shard, slides, attempt, tmp_path: Path, monkeypatch
) -> None:
    first = write_shard(str(tmp_path), shard, attempt=attempt)
    path = Path(shard_uri(str(tmp_path), shard.name))
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(shards, "cached_slide", lambda *_, **__: pytest.fail("a slide was opened"))

    def no_attempt(key: str) -> Any:
        pytest.fail(f"{key} was attempted")

    assert write_shard(str(tmp_path), shard, attempt=no_attempt) == first
    assert path.stat().st_mtime_ns == written


def test_the_same_plan_gives_the_same_bytes(shard, attempt, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_shard(str(tmp_path / folder), shard, attempt=attempt)
    one, two = (
        storage.read_bytes(shard_uri(str(tmp_path / folder), shard.name))
        for folder in ("one", "two")
    )
    assert one == two


def test_tiles_that_do_not_read_are_listed_and_nothing_is_written(
    shard, slides, attempt, tmp_path: Path, damage_tile
) -> None:
    damage_tile(slides[1], 2 * 6 + 1)  # x 128..255, y 256..383
    for row in shard.rows:  # damaged before it was measured, but for these tiles
        row["slide_identity"] = storage.identity(row["uri"])
    result = write_shard(str(tmp_path / "out"), shard, attempt=attempt)
    assert result.num_bytes == 0
    assert {failure[:4] for failure in result.failures} == {
        ("b", str(slides[1]), 130, 300),
        ("b", str(slides[1]), 200, 300),
    }
    assert all("JPEG" in failure[4] for failure in result.failures)
    assert not (tmp_path / "out").exists()


def test_a_slide_that_is_gone_fails_all_its_tiles(shard, slides, attempt, tmp_path: Path) -> None:
    slides[0].unlink()
    result = write_shard(str(tmp_path / "out"), shard, attempt=attempt)
    assert [failure[:2] for failure in result.failures] == [("a", str(slides[0]))] * 5
    assert {failure[4] for failure in result.failures} == {"no such file"}
    assert not (tmp_path / "out").exists()


def test_a_slide_that_may_not_be_attempted_fails_all_its_tiles(
    shard, slides, tmp_path: Path
) -> None:
    attempted = []

    @contextmanager
    def attempt(key: str) -> Iterator[None]:
        attempted.append(key)
        if key.endswith(str(slides[1])):
            raise CarnError("it took the process down")
        yield

    result = write_shard(str(tmp_path / "out"), shard, attempt=attempt)
    # Per shard: those that are written at the same time do not count as one that fails.
    assert attempted == [f"{shard.name}|{path}" for path in slides]
    assert [failure[0] for failure in result.failures] == ["b"] * 5
    assert {failure[4] for failure in result.failures} == {"it took the process down"}


def test_a_shard_that_cannot_be_stored_is_an_error(shard, attempt, tmp_path: Path) -> None:
    (tmp_path / "tiles").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="tiles"):
        write_shard(str(tmp_path), shard, attempt=attempt)


def test_plain_images_are_tiles_too(measured, attempt, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    row = {"uri": str(path), "reader": "image", "width_px": 50, "height_px": 30, "mpp_x": None}
    table = select_tiles(
        measured([row]),
        white=FilterConfig(),
        select=SelectConfig(keep=None, num_test=0, num_validation=0, split="numbered"),
        seed=1,
    )
    (found,) = plan(table)
    write_shard(str(tmp_path), found, attempt=attempt)
    (stored,) = pq.read_table(shard_uri(str(tmp_path), found.name)).to_pylist()
    np.testing.assert_array_equal(
        decode(stored["image"], "jxl", extent=pixels.shape[1::-1]), pixels
    )
    assert stored["mpp_x"] is None


def test_row_groups_are_small(shard) -> None:
    rows = [shard.rows[0]] * (ROWS_PER_GROUP * 2 + 1)
    content = shards.shard_bytes(rows, [b"image"] * len(rows))
    file = pq.ParquetFile(io.BytesIO(content))
    assert [file.metadata.row_group(number).num_rows for number in range(3)] == [16, 16, 1]


def test_a_slide_that_was_replaced_since_it_was_measured_is_not_stored(
    tmp_path: Path, write_slide, selected, attempt
) -> None:
    path = write_slide("b.tif", seed=1)
    table = selected(
        [("b", 0, 0, "train")], {0: {"uri": str(path), "width_px": 64, "height_px": 64}}
    )
    write_slide("b.tif", seed=2)
    result = write_shard(str(tmp_path / "out"), plan(table)[0], attempt=attempt)
    ((slide, _, _, _, reason),) = result.failures
    assert slide == "b"
    assert "replaced" in reason
    assert not (tmp_path / "out").exists()
