"""The whole job on drawn slides, in every way it is run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from carn.bcsr.config import DrawConfig, FilterConfig, SelectConfig
from carn.bcsr.dataset import open_dataset
from carn.bcsr.stages import measure_unit
from carn.degradation.bicubic import degrade
from carn.degradation.jpeg import through_jpeg
from carn.errors import CoordinateError, DatasetError, MissingObjectError, StorageError
from carn.slides import open_slide
from carn.slides.pyramid import write_pyramid
from jobs import build_bcsr
from jobs.build_bcsr import BuildJob, RunConfig, main
from tests.jobs.lab import ROOT, TILE_PX, content_of, draw_slide, make_job

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


def test_dataset_holds_what_was_asked_for(built: Path, slides: Path) -> None:
    dataset = open_dataset(built)
    manifest = dataset.manifest
    assert manifest["counts"]["drawn"] == 100
    assert manifest["counts"]["listed"] == 144
    num_kept = sum(manifest["splits"].values())
    assert num_kept == 60
    assert num_kept + manifest["counts"]["white"] + manifest["counts"]["surplus"] == 100
    assert manifest["counts"]["white"] > 0
    selected = pq.read_table(built / "measured.parquet").to_pylist()
    sides: dict[str, set[str]] = {}
    for row in selected:
        if row["status"] in ("train", "validation", "test"):
            sides.setdefault(row["slide"], set()).add(row["status"])
            assert row["white_fraction"] <= 0.6
            assert row["rank"] < 60
        elif row["status"] == "surplus":
            assert row["rank"] >= 60
        else:
            assert row["status"] == "white"
            assert row["white_fraction"] > 0.6
    assert all(len(found) == 1 for found in sides.values()), "a slide on two sides"
    assert {s for found in sides.values() for s in found} == {"train", "validation", "test"}


def test_pixels_are_those_of_the_slide(built: Path) -> None:
    dataset = open_dataset(built)
    count, total, area = 0, np.zeros(3), 0
    for split in ("train", "validation", "test"):
        assert dataset.table(split).num_rows == dataset.num_tiles(split)
        for row, pixels in dataset.tiles(split):
            with open_slide(row["uri"]) as slide:
                expected = slide.read_region(row["x_l0"], row["y_l0"], TILE_PX, TILE_PX)
            np.testing.assert_array_equal(pixels, expected)
            assert row["split"] == split
            assert row["mpp_x"] == pytest.approx(0.25)
            np.testing.assert_allclose(
                [row["mean_r"], row["mean_g"], row["mean_b"]], pixels.mean(axis=(0, 1)), rtol=1e-12
            )
            if split == "train":
                total += pixels.sum(axis=(0, 1))
                area += pixels.shape[0] * pixels.shape[1]
            count += 1
    assert count == 60
    np.testing.assert_allclose(dataset.channel_means, total / area / 255, rtol=1e-12)


def test_report_and_tables_are_beside_it(built: Path) -> None:
    assert set(content_of(built)) >= {"manifest.json", "report.html", "measured.parquet"}
    assert pq.read_table(built / "failures.parquet").num_rows == 0
    assert "Case_000" in (built / "report.html").read_text()
    assert not (built / "_work").exists()


@pytest.mark.slow
def test_one_worker_and_other_chunks_give_the_same_bytes(
    built: Path, slides: Path, tmp_path: Path
) -> None:
    run = RunConfig(num_workers=1, tiles_per_task=3)
    assert main(make_job(slides, tmp_path / "again", run=run)) == 0
    assert content_of(tmp_path / "again") == content_of(built)


def test_another_seed_gives_another_dataset(built: Path, slides: Path, tmp_path: Path) -> None:
    assert main(make_job(slides, tmp_path / "other", seed=2)) == 0
    assert (
        content_of(tmp_path / "other")["measured.parquet"] != content_of(built)["measured.parquet"]
    )


def test_a_finished_dataset_is_left_alone(built: Path, slides: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert main(make_job(slides, built)) == 0
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_a_finished_dataset_is_not_replaced_unasked(
    built: Path, slides: Path, tmp_path: Path
) -> None:
    import shutil

    output = tmp_path / "copy"
    shutil.copytree(built, output)
    before = content_of(output)
    changed = make_job(slides, output, select=SelectConfig(keep=40, num_test=8, num_validation=4))
    with pytest.raises(DatasetError, match=r"other settings \(select\).*--overwrite"):
        main(changed)
    assert content_of(output) == before
    overwriting = make_job(
        slides,
        output,
        select=SelectConfig(keep=40, num_test=8, num_validation=4),
        run=RunConfig(overwrite=True),
    )
    assert main(overwriting) == 0
    dataset = open_dataset(output)
    assert sum(dataset.num_tiles(s) for s in ("train", "validation", "test")) == 40
    names = {shard["name"] for shard in dataset.manifest["shards"]}
    assert {path.name for path in (output / "tiles").iterdir()} == names


def test_another_spelling_of_the_same_is_the_same(
    built: Path, slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(slides)
    assert main(make_job(slides, built, slides=("slides/",))) == 0


def test_an_edited_list_is_noticed(slides: Path, tmp_path: Path, ray_here: None) -> None:
    import shutil

    lab = tmp_path / "lab"
    shutil.copytree(slides, lab)
    assert main(make_job(lab, tmp_path / "out")) == 0
    text = (lab / "tumor.txt").read_text()
    (lab / "tumor.txt").write_text(text.replace("Case_001", "Case_002", 1))  # of the same size
    with pytest.raises(DatasetError, match="changed since"):
        main(make_job(lab, tmp_path / "out"))


def test_replaced_slides_are_noticed(slides: Path, tmp_path: Path, ray_here: None) -> None:
    import shutil

    lab = tmp_path / "lab"
    shutil.copytree(slides, lab)
    assert main(make_job(lab, tmp_path / "out")) == 0
    # One that no list names is none of the dataset's business.
    draw_slide(lab / "slides" / "Case_099.tif", 99)
    assert main(make_job(lab, tmp_path / "out")) == 0
    draw_slide(lab / "slides" / "Case_001.tif", 99)
    with pytest.raises(DatasetError, match="changed since"):
        main(make_job(lab, tmp_path / "out"))


# --------------------------------------------------------------------------------- bad slides


@pytest.fixture
def damaged_lab(slides: Path, tmp_path: Path) -> Path:
    """The six slides, one damaged in one tile, one cut off, one no slide; one is missing."""
    import shutil

    lab = tmp_path / "lab"
    shutil.copytree(slides, lab)
    with open_slide(lab / "slides" / "Case_000.tif") as slide:
        level = slide._tiled_levels[0]  # type: ignore[attr-defined]
        start, length = int(level.offsets[0]), int(level.lengths[0])
    with (lab / "slides" / "Case_000.tif").open("r+b") as file:
        file.seek(start + length // 2)
        file.write(bytes(length // 2))
    os.truncate(lab / "slides" / "Case_001.tif", 5000)
    (lab / "slides" / "Case_002.tif").write_text("not a slide at all")
    (lab / "slides" / "Case_003.tif").unlink()
    with (lab / "tumor.txt").open("a") as file:
        file.write("Case_000,10,10\n")
    return lab


def test_bad_slides_become_rows_and_the_rest_a_dataset(
    damaged_lab: Path, tmp_path: Path, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    job = make_job(damaged_lab, output, draw=DrawConfig(per_class=None))
    assert main(job) == 1
    assert "Case_000: damaged tile on level 0" in capsys.readouterr().out
    failures = pq.read_table(output / "failures.parquet").to_pylist()
    by_slide: dict[str, list[dict[str, object]]] = {}
    for row in failures:
        by_slide.setdefault(str(row["slide"]), []).append(row)
    assert set(by_slide) == {"Case_000", "Case_001", "Case_002", "Case_003"}
    assert all(row["x_l0"] is not None for row in by_slide["Case_000"])
    assert "damaged tile on level 0" in (output / "report.html").read_text()
    for name in ("Case_001", "Case_002"):
        (row,) = by_slide[name]
        assert row["x_l0"] is None
        assert row["num_tiles"] == 24
    (missing,) = by_slide["Case_003"]
    assert missing["stage"] == "resolve"
    dataset = open_dataset(output)
    assert dataset.num_tiles("train") > 0
    slides_in = {row["slide"] for row, _ in dataset.tiles("train")}
    assert slides_in <= {"Case_000", "Case_004", "Case_005"}
    # The job has said so once; asked again, it says the same without doing anything.
    assert main(job) == 1
    skipping = make_job(
        damaged_lab,
        output,
        draw=DrawConfig(per_class=None),
        run=RunConfig(on_bad_slide="skip"),
    )
    assert main(skipping) == 0


def test_mended_slides_come_in_with_overwrite(
    damaged_lab: Path, slides: Path, tmp_path: Path, ray_here: None
) -> None:
    import shutil

    output = tmp_path / "out"
    assert main(make_job(damaged_lab, output)) == 1
    for name in ("Case_000", "Case_001", "Case_002", "Case_003"):
        shutil.copy(slides / "slides" / f"{name}.tif", damaged_lab / "slides")
    shutil.copy(slides / "tumor.txt", damaged_lab)
    assert main(make_job(damaged_lab, output, run=RunConfig(overwrite=True))) == 0
    clean = tmp_path / "clean"
    assert main(make_job(damaged_lab, clean)) == 0
    assert content_of(output) == content_of(clean)


@pytest.mark.slow
def test_a_slide_that_kills_its_reader_every_time(
    slides: Path, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(unit: dict[str, object], attempt: object) -> pa.Table:
        def attempt_and_die(key: str) -> object:
            from contextlib import contextmanager

            @contextmanager
            def inner():  # type: ignore[no-untyped-def]
                with attempt(key):  # type: ignore[operator]
                    os.kill(os.getpid(), signal.SIGKILL)
                    yield

            return inner()

        is_poison = unit["slide"] == "Case_004"
        return measure_unit(unit, attempt_and_die if is_poison else attempt)  # type: ignore[arg-type]

    monkeypatch.setattr(build_bcsr, "measure_unit", poisoned)
    output = tmp_path / "out"
    assert main(make_job(slides, output)) == 1
    failures = pq.read_table(output / "failures.parquet").to_pylist()
    assert {row["slide"] for row in failures} == {"Case_004"}
    assert all("took the process down 3 times" in row["reason"] for row in failures)
    read = {r["slide"] for r in open_dataset(output).manifest["inputs"] if r["reader"]}
    assert read == {f"Case_{n:03d}" for n in (0, 1, 2, 3, 5)}
    # Another day, the slide reads: its failure was not kept as if it were the slide's own.
    monkeypatch.undo()
    assert main(make_job(slides, output, run=RunConfig(overwrite=True))) == 0


def test_nothing_left_says_why(slides: Path, tmp_path: Path, ray_here: None) -> None:
    job = make_job(slides, tmp_path / "out", filter=FilterConfig(tile_px=64, grey_threshold=0))
    with pytest.raises(DatasetError, match=r"no tile is left to keep.*60% white"):
        main(job)


# ------------------------------------------------------------------------------- other sources


def test_grid_without_coordinates(
    slides: Path, tmp_path: Path, ray_here: None, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    lab = tmp_path / "lab"
    shutil.copytree(slides, lab)
    glass = np.full((512, 640, 3), 245, dtype=np.uint8)
    write_pyramid(lab / "slides" / "Glass.tif", glass, mpp_um=0.25)
    job = make_job(
        lab,
        tmp_path / "out",
        coordinates=(),
        draw=DrawConfig(per_class=None, min_tissue=0.5),
        select=SelectConfig(keep=None, num_test=30, num_validation=20),
    )
    assert main(job) == 0
    assert "1 slides offer no tile: Glass" in caplog.text
    assert open_dataset(tmp_path / "out").manifest["empty_slides"] == ["Glass"]
    assert "Glass" in (tmp_path / "out" / "report.html").read_text()
    table = pq.read_table(tmp_path / "out" / "measured.parquet").to_pylist()
    assert {row["label"] for row in table} == {"unlabeled"}
    assert all(row["x_l0"] % TILE_PX == 0 and row["y_l0"] % TILE_PX == 0 for row in table)
    # The right quarter is glass.
    assert max(row["x_l0"] for row in table) < 640 * 3 // 4
    assert len(table) > 200


def test_annotations(slides: Path, tmp_path: Path, ray_here: None) -> None:
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    square = [[100, 100], [300, 100], [300, 300], [100, 300]]
    for number in range(4):
        text = json.dumps({"positive": [{"name": "_0", "vertices": square}], "negative": []})
        (annotations / f"Case_{number:03d}.json").write_text(text)
    job = make_job(
        slides,
        tmp_path / "out",
        coordinates=(),
        annotations=str(annotations),
        draw=DrawConfig(points_per_slide=20),
    )
    assert main(job) == 0
    table = pq.read_table(tmp_path / "out" / "measured.parquet").to_pylist()
    assert {row["slide"] for row in table} == {f"Case_{n:03d}" for n in range(4)}
    for row in table:
        x, y = row["x_l0"] + TILE_PX // 2, row["y_l0"] + TILE_PX // 2
        if row["label"] == "tumor":
            assert 100 <= x <= 300
            assert 100 <= y <= 300
        else:
            assert row["label"] == "normal"
            overlaps = row["x_l0"] < 300 and row["x_l0"] + TILE_PX > 100
            assert not (overlaps and row["y_l0"] < 300 and row["y_l0"] + TILE_PX > 100)


def test_export_and_import_in_the_published_layout(
    built: Path, slides: Path, tmp_path: Path, ray_here: None
) -> None:
    import shutil

    output = tmp_path / "out"
    shutil.copytree(built, output)
    assert main(make_job(slides, output, export="edsr", export_scales=(2, 3))) == 0
    names = sorted(path.name for path in (output / "edsr" / "HR").iterdir())
    assert names == [f"{n:04d}.png" for n in range(1, 61)]
    dataset = open_dataset(output)
    tiles = [t for s in ("train", "validation", "test") for _, t in dataset.tiles(s)]
    for number in (1, 37, 60):
        hr = np.asarray(Image.open(output / "edsr" / "HR" / f"{number:04d}.png"))
        np.testing.assert_array_equal(hr, tiles[number - 1])
        for scale in (2, 3):
            path = output / "edsr" / "LR_bicubic" / f"X{scale}" / f"{number:04d}x{scale}.png"
            np.testing.assert_array_equal(np.asarray(Image.open(path)), degrade(hr, scale=scale))
    with pytest.raises(DatasetError, match="other scales"):
        main(make_job(slides, output, export="edsr", export_scales=(4,)))
    # A finished export of one condition is not taken for one of another.
    other: dict[str, object] = {"export": "edsr", "export_scales": (2, 3)}
    other |= {"export_conditions": ("jpeg80-420",)}
    with pytest.raises(DatasetError, match="other scales or conditions"):
        main(make_job(slides, output, **other))
    shutil.move(output / "edsr", tmp_path / "plain")
    assert main(make_job(slides, output, **other)) == 0
    folders = sorted(path.name for path in (output / "edsr").iterdir())
    assert folders == ["HR", "LR_jpeg80-420", "export.json"]
    marked = (output / "edsr" / "export.json").stat().st_mtime_ns
    assert main(make_job(slides, output, **other)) == 0  # it is there
    assert (output / "edsr" / "export.json").stat().st_mtime_ns == marked
    place = output / "edsr" / "LR_jpeg80-420" / "X2" / "0037x2.png"
    made = through_jpeg(degrade(tiles[36], scale=2), quality=80)
    np.testing.assert_array_equal(np.asarray(Image.open(place)), made)
    with pytest.raises(ValueError, match="condition 'jpeg80' is not one of"):
        main(make_job(slides, output, export="edsr", export_conditions=("jpeg80",)))
    shutil.rmtree(output / "edsr")
    shutil.move(tmp_path / "plain", output / "edsr")

    # Interrupted, by another selection: nothing of it may stay among the new images.
    (output / "edsr" / "export.json").rename(output / "edsr" / "export.begun.json")
    (output / "edsr" / "HR" / "0061.png").write_bytes(b"of the selection before")
    assert main(make_job(slides, output, export="edsr", export_scales=(2,))) == 0
    assert sorted(path.name for path in (output / "edsr" / "HR").iterdir()) == names
    assert not (output / "edsr" / "LR_bicubic" / "X3").exists()
    assert not (output / "edsr" / "export.begun.json").exists()

    imported = BuildJob(
        output=str(tmp_path / "imported"),
        images=str(output / "edsr"),
        select=SelectConfig(keep=60, num_test=10, num_validation=5, split="numbered"),
    )
    assert main(imported) == 0
    again = open_dataset(tmp_path / "imported")
    assert again.manifest["splits"] == {"train": 45, "validation": 5, "test": 10}
    numbered = {row["slide"]: pixels for row, pixels in again.tiles("test")}
    assert sorted(numbered) == [f"{n:04d}" for n in range(51, 61)]
    np.testing.assert_array_equal(numbered["0060"], tiles[59])


def test_a_folder_of_images_with_a_bad_one(tmp_path: Path, ray_here: None) -> None:
    rng = np.random.default_rng(5)
    for label in ("tumor", "normal"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 255, (40 + number, 50, 3), dtype=np.uint8)
            path = tmp_path / "images" / label / f"{label}_{number}.png"
            Image.fromarray(pixels).save(path)
    (tmp_path / "images" / "tumor" / "bad.jpg").write_bytes(
        simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8))[:150]
    )
    job = BuildJob(
        output=str(tmp_path / "out"),
        images=str(tmp_path / "images"),
        select=SelectConfig(keep=16, num_test=4, num_validation=2, split="paper"),
        run=RunConfig(on_bad_slide="skip"),
    )
    assert main(job) == 0
    dataset = open_dataset(tmp_path / "out")
    assert dataset.manifest["splits"] == {"train": 10, "validation": 2, "test": 4}
    rows = [row for split in ("train", "test") for row, _ in dataset.tiles(split)]
    assert {row["label"] for row in rows} == {"tumor", "normal"}
    (failure,) = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    assert failure["slide"] == "bad"


def test_on_object_storage(built: Path, slides: Path, ray_here_s3: str) -> None:
    from carn import storage

    bucket = ray_here_s3
    for path in (slides / "slides").iterdir():
        storage.write_bytes(f"{bucket}/lab/{path.name}", path.read_bytes())
    for name in ("tumor.txt", "normal.txt"):
        storage.write_bytes(f"{bucket}/lists/{name}", (slides / name).read_bytes())
    job = make_job(
        slides,
        f"{bucket}/out",
        slides=(f"{bucket}/lab",),
        coordinates=(f"{bucket}/lists/tumor.txt", f"{bucket}/lists/normal.txt"),
    )
    assert main(job) == 0
    here, there = open_dataset(built), open_dataset(f"{bucket}/out")
    assert here.manifest["splits"] == there.manifest["splits"]
    for split in ("train", "validation", "test"):
        for (row, pixels), (other, others) in zip(
            here.tiles(split), there.tiles(split), strict=True
        ):
            assert row["tile_id"] == other["tile_id"]
            np.testing.assert_array_equal(pixels, others)
    assert not [item for item in storage.list_objects(f"{bucket}/out") if "_work" in item.uri]


# --------------------------------------------------------------------- refusals before any work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slides": ()}, "either --slides or --images"),
        ({"images": "x"}, "either --slides or --images"),
        ({"annotations": "x"}, "not from both"),
        ({"csv_anchor": "corner"}, "none are given"),
        ({"coordinates": ("a.csv",)}, "--csv-anchor"),
        ({"export_scales": (2, 5)}, r"\[5\]"),
        ({"export_conditions": ()}, "export_conditions names none"),
        ({"seed": -1}, "seed=-1"),
        ({"slides": ("/lab/slides",), "output": "/lab/slides"}, "lies in /lab/slides"),
        ({"slides": ("/lab/slides",), "output": "/lab/slides/out"}, "lies in /lab/slides"),
        ({"slides": ("gs://bucket/x",)}, "'gs' is not supported"),
        ({"output": "s3:/lost"}, "lost a slash"),
    ],
)
def test_contradictions_are_refused(
    slides: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_job(slides, **({"output": tmp_path} | changes))


def test_wrong_places_are_named(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError, match="nowhere"):
        main(make_job(slides, tmp_path / "o", slides=(str(tmp_path / "nowhere"),)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").write_text("no slide")
    with pytest.raises(StorageError, match="no slides here"):
        main(make_job(slides, tmp_path / "o", slides=(str(tmp_path / "empty"),)))
    (tmp_path / "points.txt").write_text("Case_000,1,1\n")
    with pytest.raises(CoordinateError, match="begin with tumor or normal"):
        main(make_job(slides, tmp_path / "o", coordinates=(str(tmp_path / "points.txt"),)))
    (tmp_path / "tumor.txt").write_text("Elsewhere,1,1\n")
    with pytest.raises(CoordinateError, match="'Elsewhere'"):
        main(make_job(slides, tmp_path / "o", coordinates=(str(tmp_path / "tumor.txt"),)))
    assert not (tmp_path / "o").exists()


def test_what_cannot_end_well_ends_before_tiles_are_read(
    slides: Path, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_bcsr, "measure_unit", lambda *_: pytest.fail("a tile was read"))
    two = (str(slides / "slides" / "Case_000.tif"), str(slides / "slides" / "Case_001.tif"))
    with pytest.raises(DatasetError, match="need at least 3 slides"):
        main(make_job(slides, tmp_path / "o", slides=two, run=RunConfig(on_bad_slide="skip")))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="file"):
        main(make_job(slides, tmp_path / "file" / "o"))
    with pytest.raises(DatasetError, match="no tile of 2048 px was found on 6 slides"):
        main(make_job(slides, tmp_path / "o", coordinates=(), filter=FilterConfig(tile_px=2048)))


def test_help_and_errors_on_the_command_line(slides: Path, tmp_path: Path) -> None:
    script = str(ROOT / "jobs" / "build_bcsr.py")
    shown = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert "--max-white-fraction" in shown.stdout
    wrong = subprocess.run(
        [sys.executable, script, "--slides", str(tmp_path / "nowhere"), "--output", "x"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert wrong.returncode == 2
    assert "nowhere: no file here" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    value = subprocess.run(
        [sys.executable, script, "--slides", "x", "--output", "x", "--tile-px", "0"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert value.returncode == 2
    assert "tile_px=0" in value.stderr + value.stdout
    assert "Traceback" not in value.stderr
