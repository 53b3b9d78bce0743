"""A study from datasets to its page, without Ray: what it leaves, takes up, and refuses."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from carn import storage
from carn.bcsr.dataset import open_dataset
from carn.classification import pcam as pcam_module
from carn.classification import prediction as prediction_module
from carn.classification.bcsr_corpus import open_bcsr
from carn.classification.config import ClassifierConfig, CropConfig, StudyConfig
from carn.classification.examples import choose_examples
from carn.classification.kinds import Kind
from carn.classification.loop import predict
from carn.classification.resnet import ResNet
from carn.classification.study import begin, is_finished, make_plan, run_study
from carn.classification.summary import published_accuracy, write_summary
from carn.degradation.bicubic import degrade
from carn.errors import CheckpointError, DatasetError, RunError
from tests.classification.lab import (
    CROP_PX,
    CROPS_PER_TILE,
    PCAM_COUNTS,
    tiny_classifier,
    tiny_study,
    write_labelled,
    write_model,
)
from tests.evaluation.lab import checkpoint_of, write_run
from tests.training.lab import Killed

ONE_EPOCH = tiny_classifier(epochs=1)


def do(config: StudyConfig, *, overwrite: bool = False) -> str:
    plan = make_plan(config)
    begin(plan, overwrite=overwrite)
    if not is_finished(plan):
        run_study(config)
    return write_summary(plan, seconds=1.0, num_workers=1)


def rows_of(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "table.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("models")
    return tuple(write_model(root / name, name=name) for name in ("carn", "edsr"))


@pytest.fixture(scope="module")
def study(labelled: str, pcam: Path, models, tmp_path_factory: pytest.TempPathFactory):
    """A finished study of both datasets and one model."""
    root = tmp_path_factory.mktemp("study")
    config = tiny_study(
        root / "out", dataset=labelled, pcam=str(pcam), models=models[:1], classifier=ONE_EPOCH
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARN_CACHE_DIR", str(root / "cache"))
        torch.set_num_threads(1)
        said = do(config)
    return config, root / "out", said


# ------------------------------------------------------------------------------- what it leaves


def test_the_table_has_each_kind_on_each_dataset(study) -> None:
    _, output, said = study
    rows = rows_of(output)
    assert [(row["corpus"], row["pictures"]) for row in rows] == [
        (corpus, kind) for corpus in ("bcSR", "PCam") for kind in ("GT", "LR", "bicubic", "CARN")
    ]
    for row in rows:
        assert row["trained_on"] == "GT"
        accuracy, low, high = (float(row[f"accuracy{end}"]) for end in ("", "_low", "_high"))
        assert 0 <= low <= accuracy <= high <= 1
        assert 0 <= float(row["auc"]) <= 1
        assert (row["over_gt"] == "") == (row["pictures"] == "GT")
        assert (row["over_bicubic"] == "") == (row["pictures"] == "bicubic")
    counts = {row["corpus"]: (row["num_crops"], row["num_slides"]) for row in rows}
    assert counts == {"bcSR": (str(8 * CROPS_PER_TILE), "4"), "PCam": ("12", "3")}
    # The paper's Table 5 is of a ResNet-50, and this one is smaller.
    assert {row["paper_accuracy"] for row in rows} == {""}
    assert "bcSR, LR: accuracy" in said


def test_numbers_are_those_of_the_probabilities_that_are_kept(study, labelled: str) -> None:
    _, output, _ = study
    row = next(row for row in rows_of(output) if row["pictures"] == "LR")
    table = pq.read_table(output / "bcsr" / "predictions" / "gt" / "lr.parquet").to_pydict()
    right = [
        (p >= 0.5) == (t == "tumor")
        for p, t in zip(table["probability"], table["label"], strict=True)
    ]
    assert float(row["accuracy"]) == np.mean(right)
    assert table["kind"] == ["lr"] * len(right)
    tiles = {
        tile["tile_id"]: (tile, pixels) for tile, pixels in open_dataset(labelled).tiles("test")
    }
    # The first classified crop again, from the tile's pixels and the weights that were kept.
    tile, pixels = tiles[table["tile_id"][5]]
    assert (table["slide"][5], table["label"][5]) == (tile["slide"], tile["label"])
    x, y = table["x_px"][5] // 2, table["y_px"][5] // 2
    crop = degrade(pixels, scale=2)[y : y + 16, x : x + 16]
    model = ResNet(depth=18)
    (weights,) = (output / "bcsr" / "classifiers" / "gt").glob("epoch-*.safetensors")
    model.load_state_dict(safetensors.torch.load_file(weights))
    assert predict(model, crop[None], torch.device("cpu"))[0] == pytest.approx(
        table["probability"][5], abs=1e-5
    )


def test_the_summary_says_what_the_numbers_come_from(study, models) -> None:
    _, output, _ = study
    facts = json.loads((output / "summary.json").read_text())
    assert facts["config"]["classifier"]["depth"] == 18
    assert facts["config"]["classifier"]["seed"] == 1
    assert facts["code_version"].startswith("0.")
    (model,) = facts["models"].values()
    assert model["hash"].startswith("sha256:")
    bcsr = facts["corpora"]["bcsr"]
    assert bcsr["crops"]["train"] == {"normal": 24, "tumor": 24}
    assert len(bcsr["digest"]) == 32
    classifier = bcsr["classifiers"]["gt"]
    assert classifier["seconds"] > 0
    assert Path(classifier["weights"]).is_file()
    assert facts["corpora"]["pcam"]["crops"]["test"] == {"normal": 6, "tumor": 6}
    assert PCAM_COUNTS["test"] == 12


def test_the_page_holds_the_numbers_and_pictures(study) -> None:
    _, output, _ = study
    page = (output / "report.html").read_text()
    accuracy = float(rows_of(output)[0]["accuracy"])
    assert f"{100 * accuracy:.2f}" in page
    assert "91.83" not in page
    assert page.count('<svg class="plot"') == 6
    assert "3 slides only" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "data:image/png;base64," in page
    # Nobody knows what the model was trained on.
    assert page.count("CARN: trained to super-resolve on another dataset or an unknown one") == 2
    assert page.count("PCam is cut from CAMELYON16") == 1


def test_the_papers_accuracies_are_of_its_classifier_and_networks() -> None:
    def found(kind: Kind, **changes: Any) -> float | None:
        settings: dict[str, Any] = {"corpus": "bcsr", "crop_px": 128, "scale": 2, "depth": 50}
        return published_accuracy(kind, **(settings | changes))

    gt = Kind(key="gt", title="GT")
    assert found(gt) == 0.9183
    assert found(gt, corpus="pcam", crop_px=96) == 0.9003
    for change in ({"depth": 18}, {"crop_px": 64}, {"scale": 4}):
        assert found(gt, **change) is None
    assert found(Kind(key="bicubic", title="bicubic", model_name="bicubic")) == 0.7953
    size = {"num_blocks": 8, "channels": 64, "reduction": 8}

    def carn(config: dict[str, object], **training: object) -> Kind:
        checkpoint = checkpoint_of("carn", config, **training)
        return Kind(key="carn-1", title="CARN", model_name="carn", checkpoint=checkpoint)

    assert found(carn(size)) == 0.9109
    assert found(carn(size | {"num_blocks": 1})) is None
    assert found(carn(size, loss="l1")) is None
    assert found(carn(size, loss="mse")) is None


def test_a_model_trained_on_this_dataset_needs_no_warning(labelled: str, tmp_path: Path) -> None:
    digest = open_bcsr(labelled, crop_px=CROP_PX).digest
    model = write_run(str(tmp_path / "run"), digest=digest)
    other = write_run(str(tmp_path / "other"), digest="d2", seed=2)
    config = tiny_study(
        tmp_path / "out", dataset=labelled, models=(model, other), classifier=ONE_EPOCH
    )
    do(config)
    page = (tmp_path / "out" / "report.html").read_text()
    _, _, others = (kind.title for kind in make_plan(config).kinds[-3:])
    assert f"{others}: trained to super-resolve on another dataset" in page


# ------------------------------------------------------------------------------- what is taken up


def kept(output: Path) -> dict[str, int]:
    files = [path for path in (output / "bcsr").rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in files}


def test_a_finished_study_is_left_as_it_is(study, monkeypatch) -> None:
    config, output, said = study
    before, table = kept(output), (output / "table.csv").read_bytes()
    plan = make_plan(config)
    begin(plan, overwrite=False)
    assert is_finished(plan)
    assert write_summary(plan, seconds=1.0, num_workers=None) == said
    assert kept(output) == before
    assert (output / "table.csv").read_bytes() == table


def test_a_model_is_added_without_training_anew(labelled: str, models, tmp_path: Path) -> None:
    config = tiny_study(tmp_path / "out", dataset=labelled, models=models[:1], classifier=ONE_EPOCH)
    do(config)
    before = kept(tmp_path / "out")
    first = rows_of(tmp_path / "out")
    do(tiny_study(tmp_path / "out", dataset=labelled, models=models, classifier=ONE_EPOCH))
    after = kept(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    rows = rows_of(tmp_path / "out")
    assert rows[:4] == first
    assert [row["pictures"] for row in rows[4:]] == ["EDSR"]
    # Other pictures are other numbers.
    assert len({row["auc"] for row in rows}) > 2


def test_examples_are_part_of_a_study(labelled: str, models, tmp_path: Path) -> None:
    """A study that was killed before they were made, or lost a model, is not finished."""
    fields: dict[str, Any] = {"dataset": labelled, "classifier": ONE_EPOCH}
    both = tiny_study(tmp_path / "out", models=models, **fields)
    do(both)
    work = tmp_path / "out" / "bcsr" / "_work"
    (examples,) = work.glob("examples-*.parquet")
    assert is_finished(make_plan(both))
    examples.unlink()
    assert not is_finished(make_plan(both))
    with pytest.raises(DatasetError, match="run again, and the examples are made"):
        write_summary(make_plan(both), seconds=1.0, num_workers=None)
    do(both)
    assert examples.exists()
    fewer = tiny_study(tmp_path / "out", models=models[:1], **fields)
    assert not is_finished(make_plan(fewer))
    do(fewer)
    assert is_finished(make_plan(fewer))
    assert len(list(work.glob("examples-*.parquet"))) == 2


def test_a_study_on_an_object_store_is_that_on_a_disk(study, labelled: str, models, s3) -> None:
    uri = f"s3://{s3.name}/lab/out"
    config = tiny_study(uri, dataset=labelled, models=models[:1], classifier=ONE_EPOCH)
    do(config)
    plan = make_plan(config)
    assert is_finished(plan)
    text = storage.read_bytes(storage.join(uri, "table.csv")).decode()
    _, output, _ = study
    wanted = [row for row in rows_of(output) if row["corpus"] == "bcSR"]
    assert list(csv.DictReader(text.splitlines())) == wanted


def test_a_killed_test_goes_on_with_the_parts_there_are(
    study, labelled: str, models, tmp_path: Path, monkeypatch
) -> None:
    """Killed on the third kind; the parts written before are not made again."""
    config = tiny_study(tmp_path / "out", dataset=labelled, models=models[:1], classifier=ONE_EPOCH)
    original, made = prediction_module._predict_group, []

    def predict_group(source: Any, *arguments: Any) -> Any:
        made.append(source.kind.key)
        if made == ["gt", "lr", "bicubic"]:
            raise Killed
        return original(source, *arguments)

    monkeypatch.setattr(prediction_module, "_predict_group", predict_group)
    with pytest.raises(Killed):
        do(config)
    do(config)
    assert [key.partition("-")[0] for key in made] == ["gt", "lr", "bicubic", "bicubic", "carn"]
    _, output, _ = study
    wanted = [row for row in rows_of(output) if row["corpus"] == "bcSR"]
    assert rows_of(tmp_path / "out") == wanted


def test_a_kind_that_was_killed_halfway_goes_on_with_its_next_part(
    pcam: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(pcam_module, "IMAGES_PER_GROUP", 4)
    config = tiny_study(tmp_path / "out", pcam=str(pcam), classifier=ONE_EPOCH)
    original, made = prediction_module._predict_group, []

    def predict_group(source: Any, number: int, *arguments: Any) -> Any:
        made.append((source.kind.key, number))
        if made == [("gt", 0), ("gt", 1)]:
            raise Killed
        return original(source, number, *arguments)

    monkeypatch.setattr(prediction_module, "_predict_group", predict_group)
    with pytest.raises(Killed):
        do(config)
    do(config)
    assert made[2:5] == [("gt", 1), ("gt", 2), ("lr", 0)]
    table = pq.read_table(tmp_path / "out" / "pcam" / "predictions" / "gt" / "gt.parquet")
    assert table["tile_id"].to_pylist() == [f"test-{n:06d}" for n in range(12)]
    assert not list((tmp_path / "out" / "pcam" / "_work").rglob("part-*"))


def test_each_kind_has_its_own_classifier_when_asked_for(
    labelled: str, models, tmp_path: Path
) -> None:
    config = tiny_study(
        tmp_path / "out",
        dataset=labelled,
        models=models[:1],
        classifier=ONE_EPOCH,
        train_on="each",
        crops=CropConfig(crop_px=CROP_PX, max_crops=16),
    )
    do(config)
    rows = rows_of(tmp_path / "out")
    assert [row["trained_on"] for row in rows] == [row["pictures"] for row in rows]
    assert {row["num_crops"] for row in rows} == {"16"}
    folders = sorted((tmp_path / "out" / "bcsr" / "classifiers").iterdir())
    hashes = {json.loads((f / "classifier.json").read_text())["weights_sha256"] for f in folders}
    assert len(hashes) == len(folders) == 4


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classifier": tiny_classifier(epochs=1, seed=2)}, "seed"),
        ({"classifier": tiny_classifier(epochs=2)}, "epochs"),
        ({"crops": CropConfig(crop_px=16)}, "crop_px"),
    ],
)
def test_other_settings_at_the_same_output_are_refused(
    study, labelled: str, changes: dict[str, Any], named: str
) -> None:
    config, output, _ = study
    fields = {"dataset": labelled, "models": config.models, "classifier": ONE_EPOCH}
    plan = make_plan(tiny_study(output, **(fields | changes)))
    with pytest.raises(RunError, match=rf"other settings \({named}\).*--overwrite"):
        begin(plan, overwrite=False)


def test_another_dataset_at_the_same_output_is_refused_unless_overwritten(
    labelled: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    begin(make_plan(tiny_study(output, dataset=labelled)), overwrite=False)
    (output / "mine.txt").write_text("not of the study")
    other = write_labelled(tmp_path / "other", num_tiles=(8, 4, 8))
    plan = make_plan(tiny_study(output, dataset=other))
    with pytest.raises(RunError, match="of another dataset"):
        begin(plan, overwrite=False)
    begin(plan, overwrite=True)
    begin(plan, overwrite=False)
    assert (output / "mine.txt").exists()


def test_inputs_that_do_not_fit_are_refused_before_anything_is_written(
    labelled: str, pcam: Path, models, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    x4 = write_model(tmp_path / "x4", scale=4)
    with pytest.raises(CheckpointError, match="x4, and x2 is compared"):
        make_plan(tiny_study(output, dataset=labelled, models=(*models, x4)))
    with pytest.raises(ValueError, match="--dataset, --pcam, or both"):
        make_plan(tiny_study(output))
    unlabelled = write_labelled(tmp_path / "u", labels=("unlabeled",))
    with pytest.raises(DatasetError, match="labelled unlabeled"):
        make_plan(tiny_study(output, dataset=unlabelled))
    with pytest.raises(DatasetError, match="no crop in its train split"):
        make_plan(tiny_study(output, dataset=labelled, crops=CropConfig(crop_px=128)))
    one_class = write_labelled(tmp_path / "one", labels=("tumor",))
    with pytest.raises(DatasetError, match="no normal crop"):
        make_plan(tiny_study(output, dataset=one_class))
    with pytest.raises(RunError, match="cannot share a batch"):
        make_plan(tiny_study(output, dataset=labelled), num_workers=5)
    assert not output.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_px": 33}, "multiple of scale=2"),
        ({"crop_px": 8}, "at least 16"),
        ({"max_crops": 1}, "max_crops=1"),
        ({"group_regex": "("}, "group_regex"),
        ({"scale": 5}, "scale=5"),
    ],
)
def test_impossible_crops_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"seed": -1},
    ],
)
def test_impossible_training_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
        ClassifierConfig(**settings)


# ------------------------------------------------------------------------------------- examples


def test_examples_are_mistakes_by_spread_one_of_each_slide_first() -> None:
    label = np.array([1, 1, 1, 0, 0])
    gt = np.array([0.9, 0.9, 0.9, 0.1, 0.1])
    sr = np.array([0.1, 0.2, 0.8, 0.6, 0.2])
    chosen = choose_examples(np.stack([gt, sr]), label, ["a", "a", "b", "b", "c"])
    # 2 and 4 are right in all kinds; of slide a, 0 differs most and 1 has to wait for slide b.
    assert chosen == [0, 3, 1]
    assert choose_examples(np.stack([gt, gt]), label, ["a"] * 5) == []
