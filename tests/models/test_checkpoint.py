"""Checkpoints: what comes back, what is refused, and what a damaged one says."""

import dataclasses
import itertools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from carn import storage
from carn.errors import CheckpointError
from carn.models.carn import Carn, CarnConfig
from carn.models.checkpoint import (
    Checkpoint,
    checkpoint_hash,
    load_model,
    read_checkpoint,
    read_file,
    write_checkpoint,
    write_pointer,
)
from carn.models.edsr import Edsr, EdsrConfig
from carn.models.srgan import Srgan, SrganConfig
from carn.models.table import MODELS, ModelName, build_model
from tests.conftest import Bucket, StubS3

SMALL = CarnConfig(num_blocks=1, channels=8, reduction=2, mean=(0.7, 0.4, 0.6))
EXTRA = {"optimizer.safetensors": b"moments", "loop.json": b"{}"}


def small_carn(*, seed: int = 0, scale: int = 2) -> Carn:
    torch.manual_seed(seed)
    return Carn(SMALL, scale=scale)


def write(uri: str, model: torch.nn.Module | None = None, **changes: Any) -> Checkpoint:
    arguments: dict[str, Any] = {
        "model": small_carn() if model is None else model,
        "model_name": "carn",
        "training": {"batch_size": 16, "weights": (0.8, 0.1, 0.1)},
        "step": 1000,
        "dataset": {"uri": "s3://bucket/bcsr", "manifest": "sha256:12"},
        "metrics": {"psnr": 35.25, "ssim": 0.943},
    }
    return write_checkpoint(uri, **{**arguments, **changes})


def edit_facts(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "checkpoint.json"
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(json.dumps(facts))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------------------------ round trip


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    model = small_carn()
    written = write(str(tmp_path / "c"), model, extra_files=EXTRA)
    found = read_checkpoint(str(tmp_path / "c"))
    assert found == written
    assert (found.model_name, found.scale, found.step) == ("carn", 2, 1000)
    assert found.model_config["mean"] == [0.7, 0.4, 0.6]
    assert found.training == {"batch_size": 16, "weights": [0.8, 0.1, 0.1]}
    assert found.dataset == {"uri": "s3://bucket/bcsr", "manifest": "sha256:12"}
    assert found.metrics == {"psnr": 35.25, "ssim": 0.943}
    assert {name: read_file(found, name=name) for name in found.files} == EXTRA
    assert checkpoint_hash(found) == checkpoint_hash(str(tmp_path / "c"))

    loaded = load_model(found, expect_name="carn", expect_scale=2)
    assert isinstance(loaded, Carn)
    assert loaded.config == SMALL
    assert not loaded.training
    lr = torch.rand(2, 3, 7, 5)
    assert torch.equal(loaded(lr), model(lr))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_comes_back(tmp_path: Path, name: ModelName) -> None:
    model = build_model(name, scale=3)
    write(str(tmp_path), model, model_name=name)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    state, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_running_statistics_of_batch_norm_come_back(tmp_path: Path) -> None:
    model = Srgan(SrganConfig(), scale=2)
    model.train()(torch.rand(2, 3, 8, 8))
    write(str(tmp_path), model, model_name="srgan")
    lr = torch.rand(1, 3, 6, 6)
    assert torch.equal(load_model(str(tmp_path))(lr), model.eval()(lr))


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    for number in range(4):
        write(str(tmp_path / str(number)), step=number, metrics={"psnr": float(number)})
    files = {(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(4)}
    assert len(files) == 1
    facts = (tmp_path / "0/checkpoint.json").read_bytes()
    write(str(tmp_path / "0"), step=0, metrics={"psnr": 0.0})
    assert (tmp_path / "0/checkpoint.json").read_bytes() == facts


def test_the_hash_is_of_weights_and_architecture(tmp_path: Path) -> None:
    variants = [
        small_carn(),
        small_carn(seed=1),
        Carn(dataclasses.replace(SMALL, mean=(0.1, 0.2, 0.3)), scale=2),
        Carn(dataclasses.replace(SMALL, pixel_range=1.0), scale=2),
    ]
    state = variants[0].state_dict()
    for model in variants[2:]:
        model.load_state_dict(state)
    hashes = [
        checkpoint_hash(write(str(tmp_path / str(number)), model))
        for number, model in enumerate(variants)
    ]
    assert len(set(hashes)) == 4
    assert hashes[0] == checkpoint_hash(write(str(tmp_path / "later"), variants[0], step=2000))


def test_weights_are_stored_as_contiguous_float32(tmp_path: Path) -> None:
    model = small_carn().to(torch.bfloat16).to(memory_format=torch.channels_last)
    write(str(tmp_path), model)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(stored[name], tensor.float())


def test_wrapped_models_are_stored_under_their_own_names(tmp_path: Path) -> None:
    model = small_carn()
    for number, wrapped in enumerate([torch.compile(model), torch.nn.DataParallel(model)]):
        assert isinstance(wrapped, torch.nn.Module)
        write(str(tmp_path / str(number)), wrapped)
    write(str(tmp_path / "bare"), model)
    hashes = {checkpoint_hash(str(tmp_path / name)) for name in ("0", "1", "bare")}
    assert len(hashes) == 1


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    write(str(tmp_path))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    load_model(str(tmp_path))
    assert torch.equal(torch.rand(3), expected)


@given(place=st.integers(min_value=0), seed=st.integers(0, 3))
def test_a_flipped_bit_anywhere_in_the_weights_is_found(
    tmp_path_factory: pytest.TempPathFactory, place: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("c")
    write(str(folder), small_carn(seed=seed))
    path = folder / "model.safetensors"
    flip(path, place % path.stat().st_size)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_model(str(folder))


# ---------------------------------------------------------------------------------------- naming


def test_folder_and_files_name_the_same_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    written = write(str(folder))
    for name in (f"{folder}/", f"{folder}/checkpoint.json", f"{folder}/model.safetensors"):
        assert read_checkpoint(name) == written
    assert read_checkpoint(f"file://{folder}") == written


def test_a_relative_name_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert write("c") == read_checkpoint("c/model.safetensors")
    assert read_checkpoint("c").uri == str(tmp_path / "c")


def test_a_weights_file_alone_says_what_it_is(tmp_path: Path) -> None:
    model = small_carn(scale=4)
    written = write(str(tmp_path / "c"), model)
    for name in ("model.safetensors", "carn_x4.safetensors"):
        alone = tmp_path / "alone" / name
        alone.parent.mkdir(exist_ok=True)
        alone.write_bytes((tmp_path / "c/model.safetensors").read_bytes())
        found = read_checkpoint(str(alone))
        assert found.architecture == written.architecture
        assert found.weights_sha256 == written.weights_sha256
        assert (found.training, found.step, found.dataset, found.metrics) == (None, None, None, {})
        lr = torch.rand(1, 3, 5, 5)
        assert torch.equal(load_model(str(alone), expect_scale=4)(lr), model(lr))


def test_a_run_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    first = write(f"{run}/checkpoints/step-00001000")
    second = write(f"{run}/checkpoints/step-00002000", small_carn(seed=1), step=2000)
    write_pointer(run, name="best", checkpoint="checkpoints/step-00001000")
    write_pointer(run, name="last", checkpoint="checkpoints/step-00002000")
    assert read_checkpoint(run) == read_checkpoint(f"{run}/best.json") == first
    assert read_checkpoint(f"{run}/last.json") == second


@pytest.mark.parametrize("target", ["../other", "/etc", "", "a//b", "a/./b", "a/../../b"])
def test_a_pointer_does_not_lead_out_of_its_run(tmp_path: Path, target: str) -> None:
    write(str(tmp_path / "other"))
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="below the run"):
        write_pointer(str(run), name="best", checkpoint=target)
    run.mkdir()
    (run / "best.json").write_text(json.dumps({"checkpoint": target}))
    with pytest.raises(CheckpointError, match=r"best\.json points to"):
        read_checkpoint(str(run))


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json"])
def test_a_pointer_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"best\.json does not point"):
        read_checkpoint(str(tmp_path))


# --------------------------------------------------------------------------- damage and mismatch


def test_another_architecture_or_scale_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path))
    with pytest.raises(CheckpointError, match="is a carn checkpoint; edsr was asked for"):
        load_model(str(tmp_path), expect_name="edsr")
    with pytest.raises(CheckpointError, match="super-resolves x2; x4 was asked for"):
        load_model(str(tmp_path), expect_scale=4)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    write(str(tmp_path / "c"))
    path = tmp_path / "c/model.safetensors"
    content = path.read_bytes()
    alone = tmp_path / "alone.safetensors"
    for length in (0, 4, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="SHA-256"):
            load_model(str(tmp_path / "c"))
        alone.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"alone\.safetensors is damaged"):
            read_checkpoint(str(alone))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint\.json"):
        read_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no other\.safetensors"):
        read_checkpoint(str(tmp_path / "other.safetensors"))
    write(str(tmp_path), extra_files=EXTRA)
    checkpoint = read_checkpoint(str(tmp_path))
    (tmp_path / "loop.json").unlink()
    with pytest.raises(CheckpointError, match=r"no loop\.json"):
        read_file(checkpoint, name="loop.json")
    with pytest.raises(CheckpointError, match=r"has no state\.json; it has loop\.json, optim"):
        read_file(checkpoint, name="state.json")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_model(str(tmp_path))
    write(str(tmp_path))
    (tmp_path / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint\.json"):
        load_model(str(tmp_path))


def test_a_checkpoint_mixed_of_two_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path / "a"), extra_files={"state": b"a"})
    write(str(tmp_path / "b"), small_carn(seed=1), extra_files={"state": b"b"})
    for name in ("model.safetensors", "state"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(CheckpointError, match="of another checkpoint"):
        load_model(str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="of another checkpoint"):
        read_file(read_checkpoint(str(tmp_path / "a")), name="state")


def test_a_writer_that_dies_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = storage.write_bytes
    num_files = 2 + len(EXTRA)
    for alive in range(num_files):
        left = itertools.count(alive, -1)

        def dying(uri: str, content: bytes, *, left: Any = left) -> None:
            if next(left) == 0:
                raise KeyboardInterrupt
            write_bytes(uri, content)

        fresh, over = str(tmp_path / f"fresh-{alive}"), str(tmp_path / f"over-{alive}")
        before = write(over, extra_files=EXTRA)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", dying)
            with pytest.raises(KeyboardInterrupt):
                write(fresh, extra_files=EXTRA)
        with pytest.raises(CheckpointError, match=r"no checkpoint\.json"):
            read_checkpoint(fresh)

        left = itertools.count(alive, -1)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", lambda u, c, left=left: dying(u, c, left=left))
            with pytest.raises(KeyboardInterrupt):
                write(over, small_carn(seed=1), extra_files=EXTRA)
        # Over an old one: the old one whole, or an error; never the new weights as the old ones.
        assert read_checkpoint(over) == before
        if alive <= len(EXTRA):
            load_model(over)
        else:
            with pytest.raises(CheckpointError, match="of another checkpoint"):
                load_model(over)


@pytest.mark.parametrize(
    ("key", "value"),
    [("pixel_range", 1.0), ("mean", [0.0, 0.0, 0.0])],
)
def test_an_altered_config_does_not_pass_under_the_same_hash(
    tmp_path: Path, key: str, value: object
) -> None:
    write(str(tmp_path))
    edit_facts(tmp_path, lambda facts: facts["model"]["config"].update({key: value}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json was altered"):
        load_model(str(tmp_path))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path))
    edit_facts(tmp_path, lambda facts: facts.update(format_version=2))
    with pytest.raises(CheckpointError, match="of format version 2; this version of carn reads"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json", '{"format": "bcsr"}', "3"])
def test_other_json_is_no_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not of a carn checkpoint"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize("value", [1.5, [], True, {"name": 3}])
@pytest.mark.parametrize("key", ["model", "training", "step", "weights_sha256", "files"])
def test_facts_of_the_wrong_type_are_refused(tmp_path: Path, key: str, value: object) -> None:
    if key == "training" and isinstance(value, dict):
        value = "no dict"
    write(str(tmp_path))
    edit_facts(tmp_path, lambda facts: facts.update({key: value}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is not whole"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize("key", ["model", "step", "training", "dataset", "metrics", "files"])
def test_missing_facts_are_named(tmp_path: Path, key: str) -> None:
    write(str(tmp_path))
    edit_facts(tmp_path, lambda facts: facts.pop(key))
    with pytest.raises(CheckpointError, match=f"is not whole: KeyError.*{key}"):
        read_checkpoint(str(tmp_path))


def repacked(path: Path, *, edit: Callable[[dict[str, torch.Tensor]], object], said: Any) -> None:
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    metadata = {"carn": json.dumps(said)}
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    write(str(tmp_path))
    path.write_bytes((tmp_path / "model.safetensors").read_bytes())
    facts = json.loads((tmp_path / "checkpoint.json").read_text())
    said = {key: facts[key] for key in ("format", "format_version", "model")}

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["head.bias"]
        tensors["stray"] = torch.zeros(1)
        tensors["tail.1.bias"] = torch.zeros(4)

    repacked(path, edit=edit, said=said)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(path))
    for words in ("missing: head.bias", "unexpected: stray", "tail.1.bias (4,), not (3,)"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model: model.update(name="resnet"), "'resnet'"),
        (lambda model: model.update(scale=5), "5"),
        (lambda model: model["config"].update(width=3), "width"),
        (lambda model: model["config"].pop("mean"), "mean"),
        (lambda model: model["config"].update(reduction=3), "reduction"),
    ],
)
def test_a_model_this_version_does_not_have_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "c.safetensors"
    write(str(tmp_path))
    path.write_bytes((tmp_path / "model.safetensors").read_bytes())
    facts = json.loads((tmp_path / "checkpoint.json").read_text())
    said = {key: facts[key] for key in ("format", "format_version", "model")}
    edit(said["model"])
    repacked(path, edit=lambda tensors: None, said=said)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(path))


def test_foreign_weights_are_pointed_to_the_importer(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"carn\.models\.foreign"):
        load_model(str(path))


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    path, trace = tmp_path / "model.safetensors", tmp_path / "trace"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_model(str(path))
    assert not trace.exists()


# --------------------------------------------------------------------------- what is not written


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, value: float) -> None:
    model = small_carn()
    with torch.no_grad():
        model.head.bias[3] = value
    with pytest.raises(CheckpointError, match=r"not finite.*head\.bias"):
        write(str(tmp_path / "c"), model)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "edsr"}, "model_name='edsr' is not the name of a Carn"),
        ({"model_name": "resnet"}, "model_name='resnet'"),
        ({"model": torch.nn.Linear(1, 1)}, "of a Linear"),
        ({"metrics": {"psnr": float("nan")}}, "finite"),
        ({"training": {"path": Path()}}, "JSON"),
        ({"extra_files": {"model.safetensors": b""}}, "plain file name"),
        ({"extra_files": {"checkpoint.json": b""}}, "plain file name"),
        ({"extra_files": {"../up": b""}}, "plain file name"),
        ({"extra_files": {".hidden": b""}}, "plain file name"),
    ],
)
def test_what_cannot_be_a_checkpoint_is_not_begun(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(str(tmp_path / "c"), changes.pop("model", None), **changes)
    assert not (tmp_path / "c").exists()


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("c: damaged")))
    assert isinstance(error, CheckpointError)
    assert str(error) == "c: damaged"


# --------------------------------------------------------------------------------- object stores


def test_s3_round_trip(s3: Bucket) -> None:
    model = Edsr(EdsrConfig(num_blocks=1, channels=4), scale=3)
    run = s3.uri("runs/one")
    written = write(f"{run}/checkpoints/step-1", model, model_name="edsr", extra_files=EXTRA)
    write_pointer(run, name="best", checkpoint="checkpoints/step-1")
    folder = "runs/one/checkpoints/step-1"
    assert sorted(s3.list_keys()) == [
        "runs/one/best.json",
        *(f"{folder}/{name}" for name in ("checkpoint.json", "loop.json", "model.safetensors")),
        f"{folder}/optimizer.safetensors",
    ]
    for name in (run, f"{run}/", f"{run}/best.json", s3.uri(f"{folder}/model.safetensors")):
        assert read_checkpoint(name) == written
    assert read_file(written, name="loop.json") == b"{}"
    lr = torch.rand(1, 3, 4, 4)
    assert torch.equal(load_model(run, expect_name="edsr", expect_scale=3)(lr), model(lr))
    alone = s3.put("weights/edsr.safetensors", s3.get(f"{folder}/model.safetensors"))
    assert torch.equal(load_model(alone)(lr), model(lr))

    content = bytearray(s3.get(f"{folder}/model.safetensors"))
    content[-1] ^= 1
    s3.put(f"{folder}/model.safetensors", bytes(content))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_model(run)
    with pytest.raises(CheckpointError, match=r"no checkpoint\.json"):
        read_checkpoint(s3.uri("runs/none"))


def test_reading_the_facts_does_not_fetch_the_weights(tmp_path: Path, stub_s3: StubS3) -> None:
    write(str(tmp_path))
    for path in tmp_path.iterdir():
        stub_s3.objects[f"bucket/c/{path.name}"] = path.read_bytes()
    assert read_checkpoint("s3://bucket/c").step == 1000
    assert stub_s3.body_bytes == (tmp_path / "checkpoint.json").stat().st_size


def test_a_connection_that_breaks_under_the_weights_is_taken_up_again(
    tmp_path: Path, stub_s3: StubS3
) -> None:
    write(str(tmp_path))
    for path in tmp_path.iterdir():
        stub_s3.objects[f"bucket/c/{path.name}"] = path.read_bytes()
    checkpoint = read_checkpoint("s3://bucket/c")
    stub_s3.num_cuts = 1
    assert isinstance(load_model(checkpoint), Carn)


def test_access_denied_is_not_taken_for_a_missing_checkpoint(stub_s3: StubS3) -> None:
    stub_s3.refuse_all = True
    with pytest.raises(storage.AccessDeniedError):
        read_checkpoint("s3://bucket/c")
