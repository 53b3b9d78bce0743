"""A classifier learns, goes on where it was killed, and keeps the epoch that validated best."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from carn.classification.bcsr_corpus import open_bcsr
from carn.classification.classifier_folder import Epoch, Trained, best_epoch, load_classifier
from carn.classification.crop_store import CropStore, PictureSource
from carn.classification.kinds import find_kinds
from carn.classification.loop import (
    ClassifierDivergedError,
    check_batch,
    epoch_order,
    learning_rate,
    predict,
    score,
    train_classifier,
    turn,
)
from carn.classification.resnet import ResNet
from carn.errors import CheckpointError, RunError
from carn.training.group import WorkerGroup
from tests.classification.lab import CROP_PX, tiny_classifier
from tests.training.lab import Killed, run_workers

CPU = torch.device("cpu")


def store_of(uri: str, split: Any) -> CropStore:
    gt, *_ = find_kinds((), scale=2)
    corpus = open_bcsr(uri, crop_px=CROP_PX)
    index = corpus.index(split)
    source = PictureSource(
        corpus=corpus, split=split, index=index, kind=gt, model=None, scale=2, device=CPU
    )
    return CropStore(pixels=source.crops(0), index=index)


def run(uri: str, folder: str | Path, *, epochs: int = 3, **options: Any) -> Trained:
    changes = options.pop("changes", {})
    return train_classifier(
        tiny_classifier(epochs=epochs, **changes),
        crops=store_of(uri, "train"),
        validation=store_of(uri, "validation"),
        folder=str(folder),
        device=CPU,
        group=WorkerGroup.current(),
        **options,
    )


@pytest.fixture(scope="module")
def unbroken(labelled: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    folder = tmp_path_factory.mktemp("unbroken") / "gt"
    torch.set_num_threads(1)
    return folder, run(labelled, folder)


def test_it_learns_what_tells_the_classes_apart(unbroken, labelled: str) -> None:
    folder, trained = unbroken
    assert len(trained.history) == 3
    assert trained.history[-1].loss < 0.6 * trained.history[0].loss
    model = load_classifier(trained, tiny_classifier(), CPU)
    _, accuracy = score(model, store_of(labelled, "train"), CPU, group=WorkerGroup())
    assert accuracy > 0.9
    best = trained.history[trained.best - 1]
    assert best.validation_accuracy == max(row.validation_accuracy for row in trained.history)
    # Only what is of use stays.
    assert sorted(path.name for path in folder.iterdir()) == [
        "classifier.json",
        f"epoch-{trained.best:04d}.safetensors",
    ]
    # Anyone may load the weights by torchvision's names.
    state = safetensors.torch.load_file(trained.weights_uri)
    ResNet(depth=18).load_state_dict(state)


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_killed_run_ends_as_if_nothing_had_been(
    unbroken, labelled: str, tmp_path: Path, killed_after: int
) -> None:
    def kill(event: Any) -> None:
        if event["epoch"] == killed_after:
            raise Killed

    folder = tmp_path / "gt"
    with pytest.raises(Killed):
        run(labelled, folder, on_event=kill)
    seen: list[int] = []
    trained = run(labelled, folder, on_event=lambda event: seen.append(event["epoch"]))
    assert seen == list(range(killed_after + 1, 4))
    _, wanted = unbroken
    assert trained.weights_sha256 == wanted.weights_sha256
    assert [(row.loss, row.validation_loss) for row in trained.history] == [
        (row.loss, row.validation_loss) for row in wanted.history
    ]
    # And is left alone from then on.
    assert run(labelled, folder, on_event=lambda _: pytest.fail("trained again")) == trained


def test_a_kill_between_weights_and_state_loses_that_epoch_only(
    unbroken, labelled: str, tmp_path: Path
) -> None:
    folder = tmp_path / "gt"

    def kill(event: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(labelled, folder, on_event=kill)
    (folder / "epoch-0002.safetensors").write_bytes(b"half of an epoch")
    assert run(labelled, folder).weights_sha256 == unbroken[1].weights_sha256


def test_damaged_weights_are_noticed(unbroken, labelled: str, tmp_path: Path) -> None:
    folder = tmp_path / "gt"

    def kill(event: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(labelled, folder, on_event=kill)
    with (folder / "epoch-0001.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(CheckpointError, match=r"epoch-0001\.safetensors is damaged"):
        run(labelled, folder)
    (folder / "state.safetensors").write_bytes(b"\x08" + bytes(40))
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged"):
        run(labelled, folder)


def test_the_best_epoch_is_the_most_accurate_then_that_of_the_least_loss() -> None:
    def row(epoch: int, accuracy: float | None, loss: float | None) -> Epoch:
        scores = {"validation_accuracy": accuracy, "validation_loss": loss}
        return Epoch(epoch=epoch, loss=1, seconds=1, **scores)

    rows = [row(1, 0.7, 0.1), row(2, 0.8, 0.5), row(3, 0.8, 0.4), row(4, 0.8, 0.4)]
    assert best_epoch(rows) == 3
    assert best_epoch([row(1, None, None), row(2, None, None)]) == 2
    assert best_epoch([row(1, 0.8, float("nan")), row(2, 0.8, 3)]) == 2


def test_each_epoch_takes_each_crop_once_however_many_workers() -> None:
    config = tiny_classifier(batch_size=8)
    first, again, second = (epoch_order(32, config=config, epoch=n) for n in (1, 1, 2))
    rows = np.concatenate([rows for rows, _ in first])
    assert sorted(rows.tolist()) == list(range(32))
    assert (rows == np.concatenate([rows for rows, _ in again])).all()
    assert (rows != np.concatenate([rows for rows, _ in second])).any()
    # What fills no batch has its turn in another epoch; fewer crops than a batch are one.
    assert [len(rows) for rows, _ in epoch_order(21, config=config, epoch=1)] == [8, 8]
    assert [len(rows) for rows, _ in epoch_order(5, config=config, epoch=1)] == [5]
    assert set(np.concatenate([turns for _, turns in first]).tolist()) <= set(range(8))


def test_the_eight_turns_are_the_square_s() -> None:
    crop = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    turned = {turn(crop, code).tobytes() for code in range(8)}
    assert len(turned) == 8
    wanted = {
        np.ascontiguousarray(np.rot90(side, quarter)).tobytes()
        for side in (crop, crop[:, ::-1])
        for quarter in range(4)
    }
    assert turned == wanted
    assert (turn(crop, 0) == crop).all()


def test_the_rate_falls_from_what_was_said_to_nothing() -> None:
    config = tiny_classifier(learning_rate=0.01)
    rates = [learning_rate(step, num_steps=10, config=config) for step in range(11)]
    assert rates[0] == 0.01
    assert rates[5] == pytest.approx(0.005)
    assert rates[10] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_a_diverged_run_says_so(labelled: str, tmp_path: Path) -> None:
    with pytest.raises(ClassifierDivergedError, match=r"epoch 1 .*--learning-rate"):
        run(labelled, tmp_path, changes={"learning_rate": 1e30})
    assert not list(tmp_path.iterdir())


def test_bf16_learns_too_and_is_another_network(unbroken, labelled: str, tmp_path: Path) -> None:
    trained = run(labelled, tmp_path / "gt", epochs=2, changes={"precision": "bf16"})
    # Better than a coin, whose cross-entropy is log 2.
    assert trained.history[1].loss < 0.6
    state = safetensors.torch.load_file(trained.weights_uri)
    assert state["conv1.weight"].dtype == torch.float32
    assert trained.history[0].loss != unbroken[1].history[0].loss


def test_probabilities_do_not_depend_on_the_batch(labelled: str) -> None:
    torch.manual_seed(0)
    model, pixels = ResNet(depth=18).eval(), store_of(labelled, "test").pixels
    whole = predict(model, pixels, CPU)
    assert whole.shape == (len(pixels),)
    assert ((whole > 0) & (whole < 1)).all()
    np.testing.assert_allclose(predict(model, pixels[5:6], CPU), whole[5:6], rtol=1e-4)
    assert predict(model, pixels[:0], CPU).shape == (0,)


def test_more_workers_than_pairs_of_crops_are_refused() -> None:
    with pytest.raises(RunError, match="5 workers cannot share a batch of 8"):
        check_batch(tiny_classifier(), num_workers=5, num_crops=100)
    with pytest.raises(RunError, match="3 crops are too few"):
        check_batch(tiny_classifier(), num_workers=2, num_crops=3)


def work(uri: str, folder: str) -> tuple[Trained, str]:
    trained = run(uri, folder, epochs=2)
    model = load_classifier(trained, tiny_classifier(), CPU)
    scores = score(model, store_of(uri, "test"), CPU, group=WorkerGroup.current())
    return trained, json.dumps(scores)


@pytest.mark.slow
def test_two_workers_train_one_network(labelled: str, tmp_path: Path) -> None:
    one, two = run_workers(
        work, labelled, str(tmp_path / "gt"), num_workers=2, folder=tmp_path / "group"
    )
    assert one == two
    assert len(one[0].history) == 2
    # What chose the epoch is the score of the weights that were kept, not of another worker's.
    model = load_classifier(one[0], tiny_classifier(), CPU)
    loss, _ = score(model, store_of(labelled, "validation"), CPU, group=WorkerGroup())
    assert one[0].history[one[0].best - 1].validation_loss == pytest.approx(loss, rel=1e-6)
    # A worker alone scores as they do together, but for roundings: its batches are larger.
    alone = score(model, store_of(labelled, "test"), CPU, group=WorkerGroup())
    assert json.loads(one[1]) == pytest.approx(alone, rel=1e-6)
