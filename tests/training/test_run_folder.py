"""A run's folder: what it says it is, its checkpoints, its pointers, and what may be removed."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from carn import storage
from carn.errors import CheckpointError, RunError
from carn.models.carn import Carn, CarnConfig
from carn.models.checkpoint import load_model, read_checkpoint
from carn.training import run_folder
from carn.training.config import resolve
from carn.training.run_folder import (
    Progress,
    RunFolder,
    read_state,
    restore_rng,
    rng_tensors,
    state_bytes,
)
from tests.training.lab import tiny_config

CONFIG = resolve(tiny_config())
DATASET = {"uri": "/sets/a", "digest": "0123"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(uri=str(tmp_path / "run"), keep_checkpoints=2)


@pytest.fixture(scope="module")
def model() -> Carn:
    torch.manual_seed(1)
    return Carn(CarnConfig(num_blocks=1, channels=8, reduction=2), scale=2)


def save(folder: RunFolder, model: Carn, progress: Progress, **state: torch.Tensor) -> Any:
    return folder.save(progress, model=model, config=CONFIG, dataset=DATASET, loss=1.5, state=state)


def pointers(folder: RunFolder) -> dict[str, str]:
    found = {}
    for name in ("last", "best"):
        path = Path(folder.uri, f"{name}.json")
        if path.exists():
            found[name] = json.loads(path.read_text())["checkpoint"]
    return found


# ------------------------------------------------------------------------------------ begin


def test_a_run_says_what_it_is_before_it_begins(folder: RunFolder) -> None:
    assert folder.facts() is None
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    facts = folder.facts()
    assert facts is not None
    assert facts["config"] == CONFIG.to_dict()
    assert facts["dataset"] == DATASET
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)  # the same may go on
    moved = DATASET | {"uri": "s3://elsewhere/a"}
    folder.begin(CONFIG, dataset=moved, overwrite=False)  # the dataset may have moved


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (tiny_config(seed=2), "seed"),
        (tiny_config("edsr"), "network.model"),
        (tiny_config(scale=4), "network.scale"),
        (tiny_config(optimizer={"ema_decay": 0.5}), "optimizer.ema_decay"),
        (tiny_config(patches={"order": "windowed"}), "patches.order"),
        (tiny_config(patches={"batch_size": 3}), "patches.batch_size"),
        (tiny_config(validation={"validate_every": 2}), "validation.validate_every"),
        (tiny_config(optimizer={"schedule": "cosine"}, steps=7), "optimizer.schedule, steps"),
    ],
)
def test_other_settings_are_named(folder: RunFolder, changed: Any, name: str) -> None:
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    with pytest.raises(RunError, match=r"run with other settings .*--overwrite") as caught:
        folder.begin(resolve(changed), dataset=DATASET, overwrite=False)
    assert name in str(caught.value)
    facts = folder.facts()
    assert facts is not None
    assert facts["config"] == CONFIG.to_dict()


def test_only_what_changed_is_named(folder: RunFolder) -> None:
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    changed = dataclasses.replace(CONFIG, seed=3, steps=99)
    with pytest.raises(RunError, match=r"other settings \(seed\);"):
        folder.begin(changed, dataset=DATASET, overwrite=False)


def test_a_halving_run_may_be_made_longer_and_a_cosine_one_not(folder: RunFolder) -> None:
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    longer = dataclasses.replace(CONFIG, steps=50)
    folder.begin(longer, dataset=DATASET, overwrite=False)
    facts = folder.facts()
    assert facts is not None
    assert facts["config"]["steps"] == 50
    # Asked for less, it stays what it is.
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    assert folder.facts() == facts
    other = RunFolder(uri=folder.uri + "-cosine", keep_checkpoints=2)
    cosine = resolve(tiny_config(optimizer={"schedule": "cosine"}))
    other.begin(cosine, dataset=DATASET, overwrite=False)
    with pytest.raises(RunError, match=r"other settings \(steps\)"):
        other.begin(dataclasses.replace(cosine, steps=50), dataset=DATASET, overwrite=False)


def test_another_dataset_is_named(folder: RunFolder) -> None:
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    with pytest.raises(RunError, match=r"on another dataset \(/sets/a\)"):
        folder.begin(CONFIG, dataset=DATASET | {"digest": "4567"}, overwrite=False)


def test_another_version_of_the_code_is_warned_of(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    monkeypatch.setattr(run_folder, "code_version", lambda: "9.9.9")
    with caplog.at_level(logging.WARNING):
        folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    assert "this is 9.9.9: from here on its updates may differ" in caplog.text


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b'{"config": {}}', b"\xff"])
def test_a_foreign_config_is_not_overwritten(folder: RunFolder, content: bytes) -> None:
    path = Path(folder.uri, "config.json")
    path.parent.mkdir()
    path.write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is not of a training run; choose another --output"):
            folder.begin(CONFIG, dataset=DATASET, overwrite=overwrite)
    assert path.read_bytes() == content


def test_overwrite_removes_what_a_run_owns_and_nothing_else(folder: RunFolder, model: Carn) -> None:
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    save(folder, model, Progress(step=2).with_scores(2, 30.0, 0.9))
    theirs = ["notes.txt", "checkpoints.txt", "sub/model.safetensors", "best.json.bak"]
    ours = ["metrics.csv", "report.html", "tensorboard/events.1", "_ray/x/y"]
    for name in theirs + ours:
        storage.write_bytes(storage.join(folder.uri, name), b"x")
    folder.begin(CONFIG, dataset=DATASET, overwrite=True)
    left = {path.relative_to(folder.uri).as_posix() for path in Path(folder.uri).rglob("*.*")}
    assert left == {*theirs, "config.json"}
    assert folder.newest() is None


def test_overwrite_of_a_folder_without_a_run_removes_nothing(folder: RunFolder) -> None:
    storage.write_bytes(storage.join(folder.uri, "report.html"), b"somebody's")
    folder.begin(CONFIG, dataset=DATASET, overwrite=True)
    assert Path(folder.uri, "report.html").read_bytes() == b"somebody's"


# --------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_where_a_run_is(folder: RunFolder, model: Carn) -> None:
    progress = Progress(step=4).with_scores(4, 31.5, 0.91)
    written = save(folder, model, progress, b=torch.arange(3), a=torch.tensor(2.5))
    found = folder.newest()
    assert found is not None
    checkpoint, state = found
    assert checkpoint == written
    assert Progress.of(checkpoint) == progress
    assert checkpoint.metrics["loss"] == 1.5
    assert checkpoint.training == CONFIG.to_dict()
    assert torch.equal(state["b"], torch.arange(3))
    assert state["a"] == 2.5
    loaded = load_model(folder.uri, expect_name="carn", expect_scale=2)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_progress_without_scores_comes_back(folder: RunFolder, model: Carn) -> None:
    save(folder, model, Progress(step=4))
    found = folder.newest()
    assert found is not None
    assert Progress.of(found[0]) == Progress(step=4)
    # Nobody knows a better one.
    assert set(pointers(folder).items()) == {
        (name, "checkpoints/step-00000004") for name in ("last", "best")
    }


def test_the_best_is_the_highest_psnr_and_the_first_of_equals() -> None:
    progress = Progress()
    for step, psnr in ((1, 30.0), (2, 32.0), (3, 31.0), (4, 32.0)):
        progress = dataclasses.replace(progress.with_scores(step, psnr, psnr / 100), step=step)
    assert (progress.best_step, progress.best_psnr, progress.best_ssim) == (2, 32.0, 0.32)
    assert (progress.step, progress.psnr, progress.ssim) == (4, 32.0, 0.32)


def test_the_newest_and_the_best_stay(folder: RunFolder, model: Carn) -> None:
    progress = Progress()
    for step, psnr in ((1, 30.0), (2, 32.0), (3, 31.0), (4, 31.0), (5, 29.0)):
        progress = dataclasses.replace(progress.with_scores(step, psnr, 0.5), step=step)
        save(folder, model, progress)
        assert len(folder.steps()) <= 3
        best, last = progress.best_step, progress.step
        assert pointers(folder) == {
            "best": f"checkpoints/step-{best:08d}",
            "last": f"checkpoints/step-{last:08d}",
        }
    assert folder.steps() == [2, 4, 5]
    assert read_checkpoint(folder.uri).step == 2  # a run's folder stands for its best
    assert read_checkpoint(f"{folder.uri}/last.json").step == 5


def test_steps_are_whole_folders_names_alone(folder: RunFolder, model: Carn) -> None:
    save(folder, model, Progress(step=123_456_789))
    for name in ("step-1/x", "step-00000002.old/x", "other/x", "step-00000003"):
        storage.write_bytes(storage.join(folder.uri, "checkpoints", name), b"x")
    assert folder.steps() == [123_456_789]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("training.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("training.safetensors", lambda path: path.unlink()),
        ("training.safetensors", lambda path: path.write_bytes(b"")),
        ("checkpoint.json", lambda path: path.unlink()),
        ("checkpoint.json", lambda path: path.write_bytes(path.read_bytes()[:100])),
    ],
)
def test_a_torn_checkpoint_is_passed_over(
    folder: RunFolder, model: Carn, name: str, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4):
        save(folder, model, Progress(step=step), at=torch.tensor(step))
    damage(Path(folder.checkpoint_uri(4), name))
    found = folder.newest()
    assert found is not None
    assert found[0].step == 2
    assert found[1]["at"] == 2
    assert "step-00000004 is passed over" in caplog.text


def test_shipped_weights_have_no_state(folder: RunFolder, model: Carn) -> None:
    checkpoint = save(folder, model, Progress(step=2))
    with pytest.raises(CheckpointError, match=r"has no training.safetensors"):
        read_state(dataclasses.replace(checkpoint, files={}))


def test_pointers_follow_where_a_run_is_taken_up(folder: RunFolder, model: Carn) -> None:
    early = Progress(step=2).with_scores(2, 30.0, 0.9)
    late = dataclasses.replace(early.with_scores(4, 31.0, 0.9), step=4)
    save(folder, model, early)
    save(folder, model, late)
    assert folder.repair(early) == early
    assert set(pointers(folder).values()) == {"checkpoints/step-00000002"}


def test_a_best_checkpoint_that_is_gone_is_replaced(
    folder: RunFolder, model: Carn, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress(step=2).with_scores(2, 33.0, 0.9)
    save(folder, model, progress)
    progress = dataclasses.replace(progress.with_scores(4, 31.0, 0.8), step=4)
    save(folder, model, progress)
    storage.delete_below(folder.checkpoint_uri(2))
    repaired = folder.repair(progress)
    assert (repaired.best_step, repaired.best_psnr, repaired.best_ssim) == (4, 31.0, 0.8)
    assert read_checkpoint(folder.uri).step == 4
    assert "the best checkpoint, of update 2, is gone" in caplog.text


# --------------------------------------------------------------------------------------- state


def test_equal_state_is_equal_bytes() -> None:
    a, b = torch.rand(2, 3, 4, 5), torch.arange(4)
    one = state_bytes({"a": a, "b": b})
    assert one == state_bytes({"b": b, "a": a.to(memory_format=torch.channels_last)})
    assert one != state_bytes({"a": a + 1, "b": b})


def test_torch_s_generator_goes_back() -> None:
    torch.manual_seed(5)
    torch.rand(3)
    kept = rng_tensors()
    wanted = torch.rand(4)
    torch.rand(9)
    restore_rng(kept)
    assert torch.equal(torch.rand(4), wanted)


def test_a_run_on_an_object_store(s3: Any, model: Carn) -> None:
    folder = RunFolder(uri=s3.uri("runs/a"), keep_checkpoints=1)
    s3.put("runs/a/notes.txt", b"theirs")
    s3.put("runs/ab/config.json", b"another run's")
    folder.begin(CONFIG, dataset=DATASET, overwrite=False)
    for step in (1, 2, 3):
        save(folder, model, Progress(step=step), at=torch.tensor(step))
    assert folder.steps() == [3]
    found = folder.newest()
    assert found is not None
    assert found[1]["at"] == 3
    folder.begin(CONFIG, dataset=DATASET, overwrite=True)
    assert sorted(s3.list_keys()) == [
        "runs/a/config.json",
        "runs/a/notes.txt",
        "runs/ab/config.json",
    ]
