"""Who is scored, on which tiles, and what the scores come to in the table."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carn.bcsr.dataset import open_dataset
from carn.errors import CheckpointError
from carn.evaluation.scoring import SCORES
from carn.evaluation.study import (
    Entrant,
    Measure,
    bicubic,
    find_entrants,
    read_scores,
    read_tiles,
    score_stretch,
    score_uri,
    stretches,
)
from carn.models.checkpoint import write_pointer
from carn.report.evaluation_summary import group_seeds, make_report, write_evaluation
from tests.evaluation.lab import write_run
from tests.jobs.train_lab import write_dataset

FACTS = {
    "dataset_uri": "/data",
    "dataset_digest": "d1",
    "code_version": "1",
    "seconds": 3.0,
    "machine": "here",
    "notes": [],
    "settings": {},
}


def measure_of(uri: str) -> Measure:
    return Measure(dataset=uri, split="test", protocol="aligned", max_tiles=None, lpips=None)


def table_of(psnrs: list[float], slides: list[str] | None = None) -> pa.Table:
    rows = [
        {
            "tile_id": f"t{n}",
            "slide": slides[n] if slides else f"s{n // 2}",
            "label": "tumor",
            "width_px": 64,
            "height_px": 64,
            "psnr_db": value,
            "ssim": 0.9,
            "psnr_y_db": value + 1,
            "ssim_y": 0.9,
            "lpips": None,
        }
        for n, value in enumerate(psnrs)
    ]
    return pa.Table.from_pylist(rows, schema=SCORES)


def test_folders_of_runs_and_checkpoints_are_entrants(tmp_path: Path) -> None:
    for seed in (1, 7):
        run = tmp_path / "runs" / f"carn-{seed}"
        write_run(str(run / "checkpoints" / "step-7"), seed=seed)
        write_pointer(str(run), name="best", checkpoint="checkpoints/step-7")
    write_run(str(tmp_path / "alone"), seed=3, loss="mse")
    found = find_entrants([str(tmp_path / "runs"), str(tmp_path / "alone")])
    assert [entrant.seed for entrant in found] == [1, 7, 3]
    assert [entrant.variant for entrant in found] == ["", "", "MSE"]
    assert found[0].recipe == found[1].recipe != found[2].recipe
    assert found[0].title == "CARN channels=8, num_blocks=1, reduction=4"
    assert (found[0].steps, found[0].trained_on) == (7, "d1")


def test_what_holds_no_run_or_one_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a checkpoint nor folders"):
        find_entrants([str(tmp_path / "empty")])
    run = write_run(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="same weights"):
        find_entrants([run, run])


def test_stretches_are_spread_over_the_split() -> None:
    parts = stretches(100, max_tiles=20)
    tiles = [tile for part in parts for tile in part.tiles]
    assert len(tiles) == 20
    assert (tiles[0], tiles[-1]) == (0, 99)
    assert [len(part.tiles) for part in parts] == [8, 8, 4]
    assert [t for part in stretches(5, max_tiles=None) for t in part.tiles] == [0, 1, 2, 3, 4]
    assert stretches(0, max_tiles=3) == []


def test_tiles_are_read_by_their_numbers(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "bcsr", num_tiles=(4, 2, 11)))
    whole = [(row["tile_id"], pixels) for row, pixels in dataset.tiles("test")]
    some = [(row["tile_id"], pixels) for row, pixels in read_tiles(dataset, "test", [0, 4, 10])]
    assert [name for name, _ in some] == [whole[n][0] for n in (0, 4, 10)]
    for (_, one), n in zip(some, (0, 4, 10), strict=True):
        np.testing.assert_array_equal(one, whole[n][1])


def test_slides_of_one_patient_are_one(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "bcsr", num_tiles=(4, 2, 3)))
    select = {"group_regex": "te"}
    patients = replace(dataset, manifest=dataset.manifest | {"config": {"select": select}})
    assert {row["slide"] for row, _ in read_tiles(dataset, "test", [0, 2])} == {"test0"}
    assert {row["slide"] for row, _ in read_tiles(patients, "test", [0, 2])} == {"te"}


def test_scores_are_kept_by_what_decides_them(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "bcsr", num_tiles=(4, 2, 3)))
    (entrant,) = find_entrants([write_run(str(tmp_path / "run"))])
    (part,) = stretches(3, max_tiles=None)
    measure = measure_of(dataset.uri)
    uri = score_uri(str(tmp_path / "out"), entrant, part, measure=measure.digest("a"))
    others = {
        score_uri(str(tmp_path / "out"), bicubic(2), part, measure=measure.digest("a")),
        score_uri(str(tmp_path / "out"), entrant, part, measure=measure.digest("b")),
        score_uri(
            str(tmp_path / "out"),
            entrant,
            stretches(2, max_tiles=None)[0],
            measure=measure.digest("a"),
        ),
    }
    assert uri not in others
    assert len(others) == 3
    assert read_scores(uri) is None
    content = score_stretch(entrant, dataset, part, measure=measure, device="cpu")
    Path(uri).parent.mkdir(parents=True)
    Path(uri).write_bytes(content)
    table = read_scores(uri)
    assert table is not None
    assert table["tile_id"].to_pylist() == [row["tile_id"] for row, _ in dataset.tiles("test")]
    Path(uri).write_bytes(content[: len(content) // 2])
    assert read_scores(uri) is None


@pytest.fixture
def entrants(tmp_path: Path) -> list[Entrant]:
    uris = [write_run(str(tmp_path / f"r{seed}"), seed=seed) for seed in (1, 7)]
    uris.append(write_run(str(tmp_path / "fast"), seed=5, learning_rate=1e-3))
    return [*find_entrants(uris), bicubic(2)]


def test_seeds_are_one_row_and_alike_names_are_told_apart(entrants: list[Entrant]) -> None:
    psnrs = ([30.0, 32, 31, 33], [32.0, 34, 33, 35], [29.0, 29, 29, 29], [28.0, 28, 28, 28])
    scored = group_seeds(list(zip(entrants, map(table_of, psnrs), strict=True)))
    starred = group_seeds([(entrants[0], table_of([20.0, 21, 22, 23]))], is_star=True)
    report = make_report(
        scored=scored + starred, timings=[], crops=[], facts=FACTS, failures=["edsr: broken"]
    )
    first, second, third, star = report.rows
    assert first.title == "bicubic"
    assert (first.num_seeds, first.paper_psnr_db) == (0, 35.247)
    assert second.title.endswith("learning_rate=0.0001")
    assert third.title.endswith("learning_rate=0.001")
    assert (second.psnr_db, second.seeds) == (32.5, (1, 7))
    assert second.psnr_std == pytest.approx(2**0.5)
    # A network that is not the paper's has no place in its table.
    assert second.paper_psnr_db is None
    assert (star.variant, star.psnr_db) == ("*", 21.5)
    assert [(c.a, c.b) for c in report.comparisons] == [
        (second.title, "bicubic"),
        (second.title, third.title),
    ]
    assert report.comparisons[0].difference_db == pytest.approx(4.5)
    assert any("edsr: broken" in note for note in report.notes)
    assert dict(report.spread)[f"x2 {third.title}"] == (1.0, 1.0, 1.0, 1.0)


def test_the_tables_are_written(entrants: list[Entrant], tmp_path: Path) -> None:
    tables = [table_of([30.0 + n, 31, 32]) for n in range(4)]
    scored = group_seeds(list(zip(entrants, tables, strict=True)))
    said = write_evaluation(
        str(tmp_path / "out"), scored=scored, timings=[], crops=[], facts=FACTS, failures=[]
    )
    assert "x2 bicubic" in said
    rows = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert len(rows) == 12
    assert {row["seed"] for row in rows} == {1, 7, 5, None}
    with (tmp_path / "out" / "table2.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["key"] for row in table] == ["bicubic", "carn", "carn"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"][0]["psnr_db"] == pytest.approx(32.0)
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
