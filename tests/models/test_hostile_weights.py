"""Weights from outside: nothing of them runs, and what they cost is what they hold."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from carn.classification.resnet import ResNet, load_weights
from carn.errors import CheckpointError, StorageError
from carn.evaluation.lpips import _state_dict
from carn.models import checkpoint as checkpoint_module
from carn.models.carn import Carn, CarnConfig
from carn.models.checkpoint import load_model, read_checkpoint, write_checkpoint
from carn.models.foreign import read_tensors
from carn.models.pickled import is_plain_tensor, load_pickled
from tests.fuzzing import only_own_errors

SMALL = CarnConfig(num_blocks=1, channels=8, reduction=2)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_torch", [False, True])
def test_pickles_do_not_run(tmp_path: Path, is_torch: bool) -> None:
    path, touched = tmp_path / "a.pth", tmp_path / "touched"
    content = {"conv1.weight": torch.zeros(1), "evil": Evil(touched)}
    if is_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="not executed"):
        read_tensors(str(path))
    with pytest.raises(CheckpointError, match="no file of tensors"):
        load_weights(ResNet(depth=18), str(path))
    with pytest.raises(ValueError, match="no state dict"):
        _state_dict(path)
    assert not touched.exists()


def test_an_archive_that_unpacks_to_more_is_not_unpacked(tmp_path: Path) -> None:
    plain, packed = io.BytesIO(), tmp_path / "a.pth"
    torch.save({"a": torch.zeros(1_000_000)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    assert packed.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="unpacks to more than its size"):
        read_tensors(str(packed))
    assert isinstance(load_pickled(plain.getvalue()), dict)


def test_a_tensor_whose_elements_are_repeated_is_none(tmp_path: Path) -> None:
    # 4 bytes that pass for 4 TB as soon as somebody copies them.
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_tensors(str(tmp_path / "a.pth"))
    with pytest.raises(CheckpointError, match="something else than tensors"):
        load_weights(ResNet(depth=18), str(tmp_path / "a.pth"))
    assert is_plain_tensor(torch.zeros(3, 4).T)
    assert is_plain_tensor(torch.zeros(10)[2:5])
    assert not is_plain_tensor(torch.zeros(3).to_sparse())
    assert not is_plain_tensor("a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": 10**9, "reduction": 1}, "channels=1000000000 is more than 4096"),
        ({"num_blocks": 10**9}, "num_blocks=1000000000 is more than 4096"),
        ({"num_blocks": 4000}, "not those of 4000 blocks"),
        # 4 GB of weights, were they made.
        ({"channels": 4096, "reduction": 1}, "misshapen"),
    ],
)
def test_a_header_does_not_say_what_memory_is_taken(
    tmp_path: Path, change: dict[str, int], words: str
) -> None:
    write_checkpoint(
        str(tmp_path / "c"),
        model=Carn(SMALL, scale=2),
        model_name="carn",
        training=None,
        step=1,
        dataset=None,
        metrics={},
    )
    weights = tmp_path / "c" / "model.safetensors"
    content = weights.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    said = json.loads(header["__metadata__"]["carn"])
    said["model"]["config"] |= change
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(
        safetensors.torch.save(safetensors.torch.load(content), metadata={"carn": json.dumps(said)})
    )
    with pytest.raises(CheckpointError, match=words):
        load_model(str(alone))
    with only_own_errors():
        load_model(str(alone))


def test_facts_that_are_nested_or_too_large_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("checkpoint.json", "best.json"):
        folder = tmp_path / name[:4]
        folder.mkdir()
        (folder / name).write_text("[" * 100_000)
        with pytest.raises(CheckpointError):
            read_checkpoint(str(folder))
    monkeypatch.setattr(checkpoint_module, "MAX_WEIGHTS_BYTES", 10)
    with pytest.raises(StorageError, match="at most 10"):
        read_checkpoint(str(tmp_path / "chec"))
