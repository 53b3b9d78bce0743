"""The stages: results are kept and used again, and whatever fails becomes rows."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from carn.bcsr import stages
from carn.bcsr.build import select_tiles
from carn.bcsr.config import FilterConfig, SelectConfig
from carn.bcsr.pictures import SLIDE_PICTURE_PX, TILE_PICTURE_PX
from carn.bcsr.schema import MEASURED
from carn.bcsr.shards import plan_shards, shard_uri
from carn.bcsr.stages import (
    EXPORT_RESULT,
    LOCATE_RESULT,
    PICTURE_RESULT,
    WRITE_RESULT,
    export_unit,
    locate_unit,
    measure_unit,
    picture_unit,
    write_unit,
)
from carn.errors import CarnError, StorageError
from carn.slides import opening

Attempt = Callable[[str], AbstractContextManager[None]]


def refuse(_key: str) -> AbstractContextManager[None]:
    raise CarnError("it took the process down")


def kept(work: Path) -> list[str]:
    return sorted(path.name for path in work.rglob("*.parquet"))


@pytest.fixture
def slide(write_slide) -> Path:
    return write_slide()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "_work"


@pytest.fixture
def measuring(slide: Path, work: Path) -> dict[str, Any]:
    return {
        "slide": "name",
        "uri": str(slide),
        "places": [[0, 0, 64, 64, "tumor"], [300, 200, 64, 64, "normal"]],
        "grey_threshold": 224,
        "work_uri": str(work),
    }


# ----------------------------------------------------------------------------------------- measure


def test_a_measured_unit_is_not_read_again(
    measuring: dict[str, Any], attempt: Attempt, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure_unit(measuring, attempt)
    assert first.schema == MEASURED
    assert first["reason"].to_pylist() == [None, None]
    assert first["label"].to_pylist() == ["tumor", "normal"]
    assert len(kept(work)) == 1
    monkeypatch.setattr(stages, "measure_slide", lambda *_, **__: pytest.fail("it was read"))
    # Not even a unit that had taken its process down is begun again.
    assert measure_unit(measuring, refuse).equals(first)
    # As after its way through JSON to a worker.
    assert measure_unit(json.loads(json.dumps(measuring)), refuse).equals(first)


@pytest.mark.parametrize(
    "change",
    [
        {"grey_threshold": 100},
        {"slide": "another name"},
        {"places": [[0, 0, 64, 64, "tumor"]]},
        {"places": [[0, 0, 64, 64, "normal"], [300, 200, 64, 64, "normal"]]},
    ],
)
def test_another_wish_is_measured_anew(
    measuring: dict[str, Any], attempt: Attempt, work: Path, change: dict[str, Any]
) -> None:
    first = measure_unit(measuring, attempt)
    second = measure_unit(measuring | change, attempt)
    assert not second.equals(first)
    assert len(kept(work)) == 2


def test_another_version_measures_anew(
    measuring: dict[str, Any], attempt: Attempt, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_unit(measuring, attempt)
    monkeypatch.setattr(stages, "code_version", lambda: "0.1.0+src.another")
    measure_unit(measuring, attempt)
    assert len(kept(work)) == 2


def test_what_cannot_be_kept_is_measured_all_the_same(
    measuring: dict[str, Any], attempt: Attempt, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure_unit(measuring, attempt)
    (name,) = kept(work)
    path = work / name
    path.write_bytes(b"PAR1 damaged")
    assert measure_unit(measuring, attempt).equals(expected)
    assert path.read_bytes() != b"PAR1 damaged"

    def full(uri: str, _: bytes) -> None:
        raise StorageError(uri, "no space left on device")

    path.unlink()
    monkeypatch.setattr(stages.storage, "write_bytes", full)
    assert measure_unit(measuring, attempt).equals(expected)


def test_where_results_are_kept_does_not_name_them(
    measuring: dict[str, Any], attempt: Attempt, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        measure_unit(measuring | {"work_uri": str(tmp_path / folder)}, attempt)
    assert kept(tmp_path / "one") == kept(tmp_path / "two") != []


def test_a_replaced_slide_is_measured_anew(
    measuring: dict[str, Any], attempt: Attempt, write_slide, slide: Path, work: Path
) -> None:
    first = measure_unit(measuring, attempt)
    other = write_slide("other.tif", seed=9)
    other.replace(slide)
    opening._cached.cache_clear()  # another run, another process
    second = measure_unit(measuring, attempt)
    assert second["mean_r"].to_pylist() != first["mean_r"].to_pylist()
    assert second["slide_identity"].to_pylist() != first["slide_identity"].to_pylist()
    assert len(kept(work)) == 2


def test_damage_is_kept_and_transient_failures_are_not(
    measuring: dict[str, Any],
    attempt: Attempt,
    slide: Path,
    work: Path,
    damage_tile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def withhold(*_: Any, **__: Any) -> Any:
        raise StorageError(str(slide), "does not answer")

    with monkeypatch.context() as patch:
        patch.setattr("carn.bcsr.measure.cached_slide", withhold)
        failed = measure_unit(measuring, attempt)
    assert failed["reason"].to_pylist() == ["does not answer"] * 2
    assert failed["is_transient"].to_pylist() == [True, True]
    assert kept(work) == []

    damage_tile(slide, 0)
    damaged = measure_unit(measuring, attempt)
    assert [reason is None for reason in damaged["reason"].to_pylist()] == [False, True]
    assert len(kept(work)) == 1
    monkeypatch.setattr(stages, "measure_slide", lambda *_, **__: pytest.fail("it was read"))
    assert measure_unit(measuring, refuse).equals(damaged)


def test_a_slide_that_is_gone_is_rows(
    measuring: dict[str, Any], attempt: Attempt, slide: Path, work: Path
) -> None:
    slide.unlink()
    table = measure_unit(measuring, attempt)
    assert table.schema == MEASURED
    assert table["reason"].to_pylist() == ["no such file"] * 2
    assert table["failed_scope"].to_pylist() == ["slide"] * 2
    assert table["is_transient"].to_pylist() == [True, True]
    assert table["x_l0"].to_pylist() == [0, 300]
    assert not work.exists()


def test_a_unit_that_may_not_be_attempted_is_rows_and_is_not_kept(
    measuring: dict[str, Any], work: Path
) -> None:
    table = measure_unit(measuring, refuse)
    assert table["reason"].to_pylist() == ["it took the process down"] * 2
    assert table["slide_identity"].to_pylist()[0].startswith("sha256")
    assert kept(work) == []


def test_an_unexpected_error_is_rows_and_is_logged(
    measuring: dict[str, Any],
    attempt: Attempt,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("carn.bcsr.measure.measure_pixels", lambda *_, **__: 1 / 0)
    table = measure_unit(measuring, attempt)
    assert table["reason"].to_pylist() == ["unexpected ZeroDivisionError: division by zero"] * 2
    assert table["is_transient"].to_pylist() == [True, True]
    assert kept(work) == []
    (record,) = caplog.records
    assert record.exc_info
    assert measuring["uri"] in record.getMessage()


def test_the_guard_is_entered_once_with_the_slide_and_its_first_place(
    measuring: dict[str, Any],
) -> None:
    keys = []

    @contextmanager
    def attempt(key: str) -> Iterator[None]:
        keys.append(key)
        yield

    measure_unit(measuring, attempt)
    measure_unit(measuring | {"places": measuring["places"][1:]}, attempt)
    # Two units of one slide must not be counted as one that died twice.
    assert len(set(keys)) == 2
    assert all(key.startswith(measuring["uri"]) for key in keys)


def test_an_image_is_measured_whole(tmp_path: Path, attempt: Attempt, work: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (50, 30), (10, 20, 30)).save(path)
    unit = {"slide": "n", "uri": str(path), "places": None, "label": "x", "grey_threshold": 224}
    unit["work_uri"] = str(work)
    (row,) = measure_unit(unit, attempt).to_pylist()
    assert (row["width_px"], row["height_px"], row["label"]) == (50, 30, "x")
    assert (row["mean_r"], row["white_fraction"]) == (10.0, 0.0)
    path.write_bytes(b"no image")
    (row,) = measure_unit(unit, attempt).to_pylist()
    assert (row["label"], row["failed_scope"]) == ("x", "slide")
    assert "not an image" in row["reason"]
    path.unlink()
    (row,) = measure_unit(unit, attempt).to_pylist()
    assert (row["label"], row["reason"]) == ("x", "no such file")


# ------------------------------------------------------------------------------------------ locate


@pytest.fixture
def island(write_slide) -> Path:
    pixels = np.full((512, 512, 3), 243, dtype=np.uint8)
    pixels[128:384, 128:384] = (180, 60, 140)
    return write_slide("island.tif", pixels=pixels, subsampling="444")


def test_a_located_unit_is_kept(
    island: Path, attempt: Attempt, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = {"slide": "n", "uri": str(island), "tile_px": 128, "min_tissue": 0.9}
    unit["work_uri"] = str(work)
    table = locate_unit(unit, attempt)
    assert table.schema.equals(LOCATE_RESULT)
    assert table["x_l0"].to_pylist() == [128, 256, 128, 256]
    assert table["reason"].null_count == 4
    assert len(kept(work)) == 1
    monkeypatch.setattr(stages, "locate_grid", lambda *_, **__: pytest.fail("it was read"))
    assert locate_unit(unit, refuse).equals(table)
    monkeypatch.undo()
    assert len(locate_unit(unit | {"tile_px": 64}, attempt)) == 16


def test_a_changed_annotation_is_located_anew(
    island: Path, attempt: Attempt, work: Path, tmp_path: Path
) -> None:
    annotation = tmp_path / "island.json"

    def write(x: int) -> None:
        outline = [[x, 150], [x + 60, 150], [x + 60, 210], [x, 210]]
        tumor = {"name": "t", "vertices": outline}
        annotation.write_text(json.dumps({"positive": [tumor], "negative": []}))

    unit = {"slide": "n", "uri": str(island), "tile_px": 32, "work_uri": str(work), "seed": 1}
    unit |= {"annotation_uri": str(annotation), "annotation_identity": "1", "points_per_label": 4}
    unit |= {"tumor_groups": ["_0"], "excluded_groups": ["_2"]}
    write(150)
    first = locate_unit(unit, attempt)
    assert first["label"].to_pylist().count("tumor") == 4
    write(250)
    assert locate_unit(unit, attempt).equals(first)
    second = locate_unit(unit | {"annotation_identity": "2"}, attempt)
    tumor = [row["x_l0"] for row in second.to_pylist() if row["label"] == "tumor"]
    assert min(tumor) + 16 >= 250


def test_what_cannot_be_located_is_a_row(
    island: Path, attempt: Attempt, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = {"slide": "n", "uri": str(island), "tile_px": 128, "min_tissue": 0.9}
    unit["work_uri"] = str(work)

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("oops")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "locate_grid", fail)
        reasons = [locate_unit(unit, attempt), locate_unit(unit, refuse)]
    island.unlink()
    reasons.append(locate_unit(unit, attempt))
    for table, reason in zip(
        reasons,
        ("unexpected KeyError: 'oops'", "it took the process down", "no such file"),
        strict=True,
    ):
        assert table.schema == LOCATE_RESULT
        (row,) = table.to_pylist()
        assert (row["slide"], row["uri"], row["reason"]) == ("n", str(island), reason)
        assert row["x_l0"] is None
    assert kept(work) == []


# ------------------------------------------------------------------------- write, picture, export


@pytest.fixture
def writing(measuring: dict[str, Any], attempt: Attempt, tmp_path: Path) -> dict[str, Any]:
    selected = select_tiles(
        measure_unit(measuring, attempt),
        white=FilterConfig(tile_px=64),
        select=SelectConfig(keep=None, num_test=0, num_validation=0),
        seed=1,
    )
    (plan,) = plan_shards(selected, encoding="png", tiles_per_shard=8)
    unit = {"name": plan.name, "split": plan.split, "rows": plan.rows}
    return json.loads(json.dumps(unit | {"output": str(tmp_path / "bcsr")}))


def test_a_written_unit_says_how_large_it_is(writing: dict[str, Any], attempt: Attempt) -> None:
    table = write_unit(writing, attempt)
    assert table.schema == WRITE_RESULT
    path = Path(shard_uri(writing["output"], writing["name"]))
    assert table.to_pylist() == [
        {"name": writing["name"], "num_bytes": path.stat().st_size, "failures": "[]"}
    ]
    assert write_unit(writing, refuse).equals(table)  # it is there


def test_tiles_that_no_longer_read_are_listed(
    writing: dict[str, Any], attempt: Attempt, slide: Path
) -> None:
    slide.unlink()
    opening._cached.cache_clear()
    (row,) = write_unit(writing, attempt).to_pylist()
    assert row["num_bytes"] == 0
    assert json.loads(row["failures"]) == [
        ["name", str(slide), x, y, "no such file"] for x, y in ((0, 0), (300, 200))
    ]


def test_a_shard_that_cannot_be_stored_blames_no_tile(
    writing: dict[str, Any], attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(writing["output"]).write_text("a file where the folder should be")
    (row,) = write_unit(writing, attempt).to_pylist()
    assert row["num_bytes"] == -1
    assert isinstance(json.loads(row["failures"]), str)
    monkeypatch.setattr(stages, "write_shard", lambda *_, **__: 1 / 0)
    (row,) = write_unit(writing, attempt).to_pylist()
    assert row["num_bytes"] == -1
    assert "unexpected ZeroDivisionError" in row["failures"]


def picture_size(jpeg: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        return image.size


def test_pictures_of_a_slide_and_its_tiles(slide: Path, attempt: Attempt) -> None:
    unit = {"uri": str(slide), "is_image": False, "has_thumbnail": True}
    unit["places"] = [[0, 0, 320, 160], [5, 5, 32, 32]]
    table = picture_unit(unit, attempt)
    assert table.schema == PICTURE_RESULT
    sizes = {(row["x_l0"], row["y_l0"]): picture_size(row["jpeg"]) for row in table.to_pylist()}
    assert sizes == {
        (None, None): (SLIDE_PICTURE_PX, 457),
        (0, 0): (TILE_PICTURE_PX, 80),
        (5, 5): (32, 32),
    }
    assert set(table["uri"].to_pylist()) == {str(slide)}


def test_pictures_that_cannot_be_taken_are_left_out(
    slide: Path, attempt: Attempt, damage_tile, caplog: pytest.LogCaptureFixture
) -> None:
    damage_tile(slide, 0)
    unit = {"uri": str(slide), "is_image": False, "has_thumbnail": True}
    unit["places"] = [[300, 200, 64, 64]]
    # The finest level serves the thumbnail of so small a slide, and is damaged.
    table = picture_unit(unit, attempt)
    assert [(row["x_l0"], row["y_l0"]) for row in table.to_pylist()] == [(300, 200)]
    assert str(slide) in caplog.text
    for bad in (unit | {"uri": "/gone.tif"}, unit | {"uri": "/gone.png", "is_image": True}):
        assert picture_unit(bad, attempt).equals(PICTURE_RESULT.empty_table())
    assert len(picture_unit(unit, refuse)) == 0


def test_an_exported_unit_counts_its_tiles_or_says_why_not(
    writing: dict[str, Any], attempt: Attempt, tmp_path: Path
) -> None:
    write_unit(writing, attempt)
    unit = {
        "output": writing["output"],
        "name": writing["name"],
        "first_number": 7,
        "num_digits": 4,
    }
    unit |= {"export_uri": str(tmp_path / "edsr"), "scales": [2]}
    unit |= {"conditions": {"bicubic": {}, "rough": {"jpeg_quality": 20}}}
    table = export_unit(unit, attempt)
    assert table.schema == EXPORT_RESULT
    assert table.to_pylist() == [{"num_tiles": 2, "reason": None}]
    assert (tmp_path / "edsr" / "HR" / "0008.png").is_file()
    assert (tmp_path / "edsr" / "LR_bicubic" / "X2" / "0008x2.png").is_file()
    assert (tmp_path / "edsr" / "LR_rough" / "X2" / "0008x2.png").is_file()
    (row,) = export_unit(unit, refuse).to_pylist()
    assert row == {"num_tiles": 0, "reason": "it took the process down"}
    Path(shard_uri(writing["output"], writing["name"])).unlink()
    (row,) = export_unit(unit, attempt).to_pylist()
    assert row == {"num_tiles": 0, "reason": "no such file"}
    (row,) = export_unit(unit | {"scales": ["two"]}, attempt).to_pylist()
    assert row["reason"]


def test_kept_results_are_plain_parquet(
    measuring: dict[str, Any], attempt: Attempt, work: Path
) -> None:
    table = measure_unit(measuring, attempt)
    (name,) = kept(work)
    assert isinstance(table, pa.Table)
    assert pq.read_table(work / name).equals(table)
