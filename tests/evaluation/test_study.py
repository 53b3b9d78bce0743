"""Who is scored, on which tiles, and what the scores come to in the table."""

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carn.bcsr.dataset import BcsrDataset, open_dataset
from carn.degradation.conditions import CONDITIONS
from carn.degradation.scanner import Degradation
from carn.errors import CheckpointError
from carn.evaluation.published import CARN_MSE, row_of
from carn.evaluation.scoring import SCORES
from carn.evaluation.study import (
    Entrant,
    Measure,
    bicubic,
    cut_crop,
    describe_unfinished,
    find_entrants,
    find_removed,
    judged,
    note_took,
    read_scores,
    read_tiles,
    read_took,
    score_stretch,
    score_uri,
    stretches,
    timing_uri,
)
from carn.evaluation.timing import Timing
from carn.models.checkpoint import write_pointer
from carn.models.table import build_model
from carn.report import evaluation_summary
from carn.report.evaluation_summary import group_seeds, make_report, write_evaluation
from tests.evaluation.lab import checkpoint_of, write_run, write_run_folder
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
    found, left_out = find_entrants([str(tmp_path / "runs"), str(tmp_path / "alone")])
    assert left_out == []
    assert [entrant.seed for entrant in found] == [1, 7, 3]
    assert [entrant.variant for entrant in found] == ["", "", "MSE"]
    assert found[0].recipe == found[1].recipe != found[2].recipe
    assert found[0].title == "CARN channels=8, num_blocks=1, reduction=4"
    # These runs do not say how far they went; the checkpoint that is named itself does.
    assert [entrant.steps for entrant in found] == [None, None, 7]
    assert (found[0].best_step, found[0].planned_steps, found[0].trained_on) == (7, 7, "d1")
    assert found[0].validation_psnr_db == 31


def test_a_run_is_as_long_as_its_last_checkpoint(tmp_path: Path) -> None:
    """Its best one may be of any update before."""
    for seed, best in ((1, 5), (7, 7), (11, 6)):
        write_run_folder(str(tmp_path / "runs" / str(seed)), best=best, last=7, seed=seed)
    found, left_out = find_entrants([str(tmp_path / "runs")])
    assert left_out == []
    assert [(e.seed, e.steps, e.best_step) for e in found] == [(1, 7, 5), (11, 7, 6), (7, 7, 7)]
    assert len({entrant.recipe for entrant in found}) == 1
    assert find_entrants([str(tmp_path / "runs" / "1" / "best.json")])[0] == found[:1]
    # As a row of the table.
    tables = [table_of([30.0, 31, 32])] * 3
    scored = group_seeds(list(zip(found, tables, strict=True)))
    (row,) = make_report(scored=scored, timings=[], crops=[], facts=FACTS, failures=[]).rows
    assert (row.num_seeds, row.steps, row.planned_steps, row.best_steps) == (3, 7, 7, (5, 6, 7))
    # A run that was made longer is as long as it was made, whatever its best checkpoint says.
    longer = tmp_path / "longer"
    write_run(str(longer / "checkpoints" / "step-00000006"), step=6, seed=2, steps=7)
    write_pointer(str(longer), name="best", checkpoint="checkpoints/step-00000006")
    write_run(str(longer / "checkpoints" / "step-00000009"), step=9, seed=2, steps=9)
    write_pointer(str(longer), name="last", checkpoint="checkpoints/step-00000009")
    ((entrant,), _) = find_entrants([str(longer)])
    assert (entrant.steps, entrant.planned_steps, entrant.best_step) == (9, 9, 6)


def test_unfinished_runs_are_left_out_unless_they_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seed, last in ((1, 7), (7, 7), (11, 5)):
        write_run_folder(str(tmp_path / "runs" / str(seed)), best=4, last=last, seed=seed)
    found, left_out = find_entrants([str(tmp_path / "runs")])
    assert [entrant.seed for entrant in found] == [1, 7]
    assert [describe_unfinished(e) for e in left_out] == [f"{tmp_path}/runs/11 (update 5 of 7)"]
    assert "runs/11 (update 5 of 7)" in caplog.text
    # Named, it is scored as it is, and never averaged with the others.
    both, none = find_entrants([str(tmp_path / "runs" / "1"), str(tmp_path / "runs" / "11")])
    assert none == []
    assert [entrant.is_unfinished for entrant in both] == [False, True]
    scored = group_seeds([(entrant, table_of([30.0, 31])) for entrant in both])
    report = make_report(scored=scored, timings=[], crops=[], facts=FACTS, failures=[])
    assert [row.title.partition("reduction=4")[2] for row in report.rows] == [
        ", updates_done=7",
        ", updates_done=5",
    ]
    for seed in ("1", "7"):
        write_run_folder(str(tmp_path / "runs" / seed), best=4, last=6, seed=int(seed))
    with pytest.raises(CheckpointError, match=r"no finished run \(3 are not\)"):
        find_entrants([str(tmp_path / "runs")])


def test_the_papers_numbers_are_of_its_networks_and_losses() -> None:
    carn = {"num_blocks": 8, "channels": 64, "reduction": 8, "mean": [0.1, 0.2, 0.3]}
    for model, config, values, wanted in (
        ("carn", carn, {}, "carn"),
        ("carn", carn, {"seed": 7, "steps": 600, "scale": 2}, "carn"),
        ("carn", carn, {"loss": "mse"}, CARN_MSE),
        ("carn", carn, {"loss": "l1"}, None),
        ("carn", carn, {"loss": "released-code"}, None),
        ("carn", carn, {"loss": "combined", "alpha": 0.7}, None),
        ("carn", carn | {"num_blocks": 4}, {}, None),
        ("edsr", {"num_blocks": 16, "channels": 64}, {}, "edsr"),
        ("edsr", {"num_blocks": 16, "channels": 64}, {"loss": "mse"}, None),
        ("edsr", {"num_blocks": 16, "channels": 64, "residual_scale": 0.1}, {}, None),
        ("rcan", {"num_groups": 10, "num_blocks": 1}, {}, None),
        ("srgan", {"num_blocks": 5}, {}, "srgan"),
        ("swdnet", {}, {}, "swdnet"),
    ):
        checkpoint = checkpoint_of(model, config, **values)  # type: ignore[arg-type]
        assert row_of(checkpoint) == wanted, (model, values)
    # Nobody knows what weights alone were trained by.
    assert row_of(replace(checkpoint_of("carn", carn), training=None)) is None


def test_another_loss_is_said(tmp_path: Path) -> None:
    found, _ = find_entrants([write_run(str(tmp_path / "l1"), loss="l1")])
    assert found[0].title.endswith("loss=l1")
    assert found[0].paper_row is None
    found, _ = find_entrants([write_run(str(tmp_path / "m"), loss="mse")])
    assert (found[0].variant, "loss" in found[0].title) == ("MSE", False)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entrants whose weights are nowhere have some to count."""
    model = build_model("bicubic", scale=2)
    monkeypatch.setattr(evaluation_summary, "model_of", lambda *_: model)


def entrant_of(key: str, name: str, **changes: object) -> Entrant:
    made = replace(bicubic(2), key=key, checkpoint=f"/{name}", checkpoint_hash=name, recipe=name)
    return replace(made, **{"settings": name, "paper_row": key, **changes})  # type: ignore[arg-type]


def test_the_best_is_compared_whoever_it_is(no_weights: None) -> None:
    """EDSR and RDN ahead of CARN: their difference is tested, too, and corrected for."""
    gains = {"bicubic": 0.0, "carn": 2.0, "rdn": 2.1, "edsr": 2.2}
    slides = [f"s{n // 2}" for n in range(16)]
    scored = group_seeds(
        [
            (
                bicubic(2) if key == "bicubic" else entrant_of(key, key),
                table_of([30 + gain * (1 + n / 99) for n in range(16)], slides),
            )
            for key, gain in gains.items()
        ]
    )
    report = make_report(scored=scored, timings=[], crops=[], facts=FACTS, failures=[])
    pairs = {(c.a.split()[0], c.b.split()[0]) for c in report.comparisons}
    assert pairs == {
        ("CARN", "bicubic"),
        ("CARN", "EDSR"),
        ("CARN", "RDN"),
        ("EDSR", "bicubic"),
        ("EDSR", "RDN"),
    }
    for found in report.comparisons:
        assert (found.unit, found.num_slides) == ("slide", 8)
        # The least that eight slides can say, five times.
        assert found.p == pytest.approx(2 / 2**8)
        assert found.p_holm == pytest.approx(5 * 2 / 2**8)
        assert found.ssim_difference == 0
        assert found.ssim_p is None
    one_slide = [
        (e, table_of([30.0 + n, 31 + n, 32], ["s"] * 3))
        for n, e in enumerate((bicubic(2), entrant_of("carn", "a")))
    ]
    alone = make_report(
        scored=group_seeds(one_slide), timings=[], crops=[], facts=FACTS, failures=[]
    )
    assert [c.unit for c in alone.comparisons] == ["tile"]


def test_which_carn_is_compared_is_not_for_the_test_to_say(no_weights: None) -> None:
    """The paper's own, or that of the best validation; never the one with the best test scores."""
    low, high = table_of([30.0, 31, 32, 33]), table_of([34.0, 35, 36, 37])
    other = (entrant_of("edsr", "e"), table_of([39.0, 39, 39, 39]))

    def reference(*entrants: Entrant) -> str:
        pairs = [*zip(entrants, (low, high), strict=True), other]
        report = make_report(
            scored=group_seeds(pairs), timings=[], crops=[], facts=FACTS, failures=[]
        )
        return report.comparisons[0].a

    papers = entrant_of("carn", "papers", validation_psnr_db=30.0)
    deep = entrant_of("carn", "deep", paper_row=None, validation_psnr_db=39.0)
    assert reference(papers, deep) == "CARN papers"
    worse = replace(deep, settings="worse", recipe="worse", validation_psnr_db=38.0)
    assert reference(deep, worse) == "CARN deep"
    unknown = [replace(entrant, validation_psnr_db=None) for entrant in (deep, worse)]
    assert reference(*unknown) == "CARN deep"


def test_the_papers_counts_stand_beside_ours(no_weights: None) -> None:
    entrants = [
        bicubic(2),
        entrant_of("edsr", "a"),
        entrant_of("carn", "b", paper_row=None),  # another loss has as many parameters
        entrant_of("rdn", "c", architecture="growth=16", paper_row=None),
        entrant_of("carn", "d", scale=4),
    ]
    scored = group_seeds([(e, table_of([30.0, 31])) for e in entrants])
    rows = make_report(scored=scored, timings=[], crops=[], facts=FACTS, failures=[]).rows
    assert [(row.key, row.scale, row.paper_params, row.paper_psnr_db) for row in rows] == [
        ("bicubic", 2, None, 35.247),
        ("edsr", 2, 1.367, 39.657),
        ("rdn", 2, None, None),
        ("carn", 2, 1.389, None),
        ("carn", 4, None, 29.964),
    ]
    starred = group_seeds([(e, table_of([30.0, 31])) for e in entrants[2:3]], is_star=True)
    (row,) = make_report(scored=starred, timings=[], crops=[], facts=FACTS, failures=[]).rows
    assert (row.variant, row.paper_psnr_db) == ("*", None)


def test_timings_say_of_what_they_are(no_weights: None, tmp_path: Path) -> None:
    timing = Timing(
        scale=2,
        lr_px=(512, 384),
        seconds_median=1.0,
        seconds_iqr=(0.9, 1.1),
        repeats=17,
        device="CPU X",
        threads=2,
        torch_version="2.9.1",
        params=12,
        flops=34,
    )
    entrant = entrant_of("carn", "a")
    scored = group_seeds([(e, table_of([30.0, 31])) for e in (bicubic(2), entrant)])
    write_evaluation(
        str(tmp_path),
        scored=scored,
        timings=[(entrant, timing)],
        crops=[],
        facts=FACTS,
        failures=[],
        left_out=["/runs/a (update 5 of 7)"],
    )
    (row,) = csv.DictReader((tmp_path / "timings.csv").read_text().splitlines())
    assert (row["lr_width_px"], row["lr_height_px"], row["repeats"]) == ("512", "384", "17")
    assert (row["torch_version"], row["flops"]) == ("2.9.1", "34")
    page = (tmp_path / "report.html").read_text()
    assert "512 × 384 px" in page
    assert "/runs/a (update 5 of 7)" in page
    assert json.loads((tmp_path / "summary.json").read_text())["left_out"]
    table = list(csv.DictReader((tmp_path / "table2.csv").read_text().splitlines()))
    assert {"psnr_y_std", "ssim_y_std", "lpips_std", "best_steps"} <= table[0].keys()


def test_a_quick_timing_does_not_stand_for_a_careful_one() -> None:
    asked = [(20, 60.0), (20, 3.0), (5, 60.0)]
    uris = {
        timing_uri("/out", bicubic(2), machine="m", repeats=repeats, max_seconds=seconds)
        for repeats, seconds in asked
    }
    assert len(uris) == 3


def test_what_it_took_is_kept(tmp_path: Path) -> None:
    assert read_took(str(tmp_path)) == (0.0, "")
    note_took(str(tmp_path), seconds=12.34, machine="here")
    assert read_took(str(tmp_path)) == (12.3, "here")
    (tmp_path / "took.json").write_text("{}")
    assert read_took(str(tmp_path)) == (0.0, "")


# ---------------------------------------------------------------------------------- removed tiles


@dataclass(frozen=True, kw_only=True)
class Tables(BcsrDataset):
    """A dataset of no pixels: (tile, slide) by split."""

    splits: dict[str, list[tuple[str, str]]]

    def table(self, split: str) -> pa.Table:
        rows = self.splits.get(split, [])
        columns = {"tile_id": [tile for tile, _ in rows], "slide": [slide for _, slide in rows]}
        return pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})


def removed_of(select: dict[str, str] | None, test: list[tuple[str, str]]) -> tuple[list[int], int]:
    splits = {
        "train": [("t1", "case1-a")],
        "validation": [("v1", "case2-a")],
        "test": [("s1", "case3-a")],
    }
    manifest = {"config": {"select": select}} if select else {}
    first = Tables(uri="/first", manifest=manifest, splits=splits)
    return find_removed(first, Tables(uri="/second", manifest={}, splits={"test": test}))


def test_removed_tiles_of_slides_that_were_trained_on_are_left_out() -> None:
    test = [
        ("x0", "case1-a"),  # of a training slide
        ("x1", "case1-b"),  # another slide of its patient
        ("x2", "case2-a"),  # of a validation slide
        ("x3", "case3-a"),  # of a test slide
        ("s1", "case3-a"),  # scored anyway
        ("x4", "case4-a"),
    ]
    assert removed_of(None, test) == ([1, 3, 5], 2)
    by_patient = {"split": "by-slide", "group_regex": r"case\d+"}
    assert removed_of(by_patient, test) == ([3, 5], 3)
    assert removed_of(None, test[:1]) == ([], 1)
    # There, test tiles are of such slides themselves.
    assert removed_of({"split": "paper"}, test) == ([0, 1, 2, 3, 5], 0)


# ----------------------------------------------------------------------------------------- crops


def test_networks_decide_which_crops_are_shown(entrants: list[Entrant], tmp_path: Path) -> None:
    """Bicubic differs most from all of them, and is shown without deciding."""
    names = {"bicubic": entrants[3], "a": entrants[0], "b": entrants[1]}
    assert judged(names) == ["a", "b"]
    assert judged({name: names[name] for name in ("bicubic", "a")}) == ["bicubic", "a"]
    dataset = open_dataset(write_dataset(tmp_path / "bcsr", num_tiles=(4, 2, 1), side_px=256))
    measure = measure_of(dataset.uri)
    shown = {
        key: json.loads(cut_crop(who, dataset, 0, measure=measure, device="cpu"))
        for key, who in {
            "all": names,
            "networks": {name: names[name] for name in ("a", "b")},
        }.items()
    }
    assert [name for name, *_ in shown["all"]["pictures"]] == ["HR", "LR", "bicubic", "a", "b"]
    places = {key: (strip["x"], strip["y"]) for key, strip in shown.items()}
    assert places["all"] == places["networks"]


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
    ((entrant,), _) = find_entrants([write_run(str(tmp_path / "run"))])
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


def test_each_condition_has_scores_of_its_own(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path / "bcsr", num_tiles=(4, 2, 3)))
    (part,) = stretches(3, max_tiles=None)
    plain = measure_of(dataset.uri)
    digests = {replace(plain, way=way).digest("a") for way in CONDITIONS.values()}
    assert len(digests) == len(CONDITIONS)
    assert plain.digest("a") == replace(plain, way=Degradation()).digest("a")
    noisier = replace(CONDITIONS["scanned-jpeg80"], noise_levels=1.6)
    assert replace(plain, way=noisier).digest("a") not in digests
    found = {
        name: score_stretch(
            bicubic(2), dataset, part, measure=replace(plain, way=way), device="cpu"
        )
        for name, way in CONDITIONS.items()
    }
    assert len(set(found.values())) == len(CONDITIONS)
    assert found["bicubic"] == score_stretch(bicubic(2), dataset, part, measure=plain, device="cpu")


@pytest.fixture
def entrants(tmp_path: Path) -> list[Entrant]:
    uris = [write_run(str(tmp_path / f"r{seed}"), seed=seed) for seed in (1, 7)]
    uris.append(write_run(str(tmp_path / "fast"), seed=3, learning_rate=1e-3))
    return [*find_entrants(uris)[0], bicubic(2)]


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
    assert {row["seed"] for row in rows} == {1, 7, 3, None}
    with (tmp_path / "out" / "table2.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["key"] for row in table] == ["bicubic", "carn", "carn"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rows"][0]["psnr_db"] == pytest.approx(32.0)
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


# ------------------------------------------------------------------------------------- conditions

TWO = {"bicubic": Degradation(), "hard": Degradation(jpeg_quality=30)}


@pytest.fixture
def under_two(entrants: list[Entrant], tmp_path: Path) -> tuple[str, Path]:
    """(what was said, where it was written) of two seeds, another training, and bicubic.

    Four tiles of two slides; the second seed has no scores under the second condition.
    """
    first = ([33.0, 32, 31, 33], [32.0, 34, 33, 35], [29.0, 29, 29, 29], [28.0, 28, 28, 28])
    second = ([27.0, 24, 26, 26], None, [25.0, 25, 25, 25], [25.0, 25, 25, 25])
    hard = {
        entrant: table_of(psnrs)
        for entrant, psnrs in zip(entrants, second, strict=True)
        if psnrs is not None
    }
    scored = group_seeds(
        list(zip(entrants, map(table_of, first), strict=True)), under={"hard": hard}
    )
    star = group_seeds([(entrants[0], table_of([20.0, 21, 22, 23]))], is_star=True)
    out = tmp_path / "out"
    said = write_evaluation(
        str(out),
        scored=scored + star,
        timings=[],
        crops=[],
        facts=FACTS,
        failures=[],
        conditions=TWO,
    )
    return said, out


def test_gains_are_over_interpolation_of_the_same_lr(under_two: tuple[str, Path]) -> None:
    said, out = under_two
    rows = list(csv.DictReader((out / "conditions.csv").read_text().splitlines()))
    assert [(row["key"], row["condition"], row["num_seeds"]) for row in rows] == [
        ("bicubic", "bicubic", "0"),
        ("bicubic", "hard", "0"),
        ("carn", "bicubic", "2"),
        ("carn", "hard", "1"),
        ("carn", "bicubic", "1"),
        ("carn", "hard", "1"),
    ]
    names = ("psnr_db", "gain_db", "ssim_gain", "least_gain_db", "least_slide_gain_db")
    numbers = [[row[name] and float(row[name]) for name in names] for row in rows]
    assert numbers[0] == [28.0, "", "", "", ""]
    assert numbers[1] == [25.0, "", "", "", ""]
    # Of both seeds: 32.5, 33, 32, 34 over 28.
    assert numbers[2] == [32.875, 4.875, 0.0, 4.0, 4.75]
    # 27, 24 of one slide and 26, 26 of the other, over 25.
    assert numbers[3] == [25.75, 0.75, 0.0, -1.0, 0.5]
    assert numbers[5] == [25.0, 0.0, 0.0, 0.0, 0.0]
    assert {(row["num_images"], row["num_slides"]) for row in rows} == {("4", "2")}
    assert {row["scale"] for row in rows} == {"2"}
    (line,) = (x for x in said.splitlines() if "learning_rate=0.0001" in x and "hard" in x)
    assert line.endswith("bicubic +4.88, hard +0.75")


def test_every_score_says_its_condition(under_two: tuple[str, Path]) -> None:
    _, out = under_two
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    assert [row["condition"] for row in rows].count("hard") == 3 * 4
    # Those of CARN* as well.
    assert [row["condition"] for row in rows].count("bicubic") == 5 * 4
    (one,) = {
        row["psnr_db"]
        for row in rows
        if (row["condition"], row["key"], row["tile_id"]) == ("hard", "bicubic", "t1")
    }
    assert one == 25.0
    summary = json.loads((out / "summary.json").read_text())
    assert [item["name"] for item in summary["conditions"]] == ["bicubic", "hard"]
    assert summary["conditions"][1]["jpeg_quality"] == 30
    assert summary["conditions"][1]["words"].endswith("JPEG quality 30, 4:2:0")
    assert [row["gain_db"] for row in summary["condition_rows"]] == [None, None, 4.875, 0.75, 1, 0]


def test_tables_are_of_the_first_condition(
    under_two: tuple[str, Path], entrants: list[Entrant], tmp_path: Path
) -> None:
    """And are what they are without any other."""
    said, out = under_two
    first = ([33.0, 32, 31, 33], [32.0, 34, 33, 35], [29.0, 29, 29, 29], [28.0, 28, 28, 28])
    scored = group_seeds(list(zip(entrants, map(table_of, first), strict=True)))
    star = group_seeds([(entrants[0], table_of([20.0, 21, 22, 23]))], is_star=True)
    alone = write_evaluation(
        str(tmp_path / "alone"),
        scored=scored + star,
        timings=[],
        crops=[],
        facts=FACTS,
        failures=[],
    )
    for name in ("table2.csv", "significance.csv", "timings.csv"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert "hard" in said
    assert "same LR" not in alone
    assert 'id="conditions"' in (out / "report.html").read_text()
    assert 'id="conditions"' not in (tmp_path / "alone" / "report.html").read_text()
    rows = csv.DictReader((tmp_path / "alone" / "conditions.csv").read_text().splitlines())
    assert [row["condition"] for row in rows] == ["bicubic"] * 3
