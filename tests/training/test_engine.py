"""How a run is carried out changes no more of what is learnt than roundings."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from carn.errors import RunError
from carn.models.checkpoint import load_model
from carn.processor import keep_freed_memory
from carn.training import engine as engine_module
from carn.training.engine import (
    EngineConfig,
    choose_device,
    prepare,
    set_up,
)
from carn.training.recording import read_metrics
from tests.training.lab import NETWORKS, run, tiny_config, tiny_engine


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(RunError, match=r"--device cuda\), but torch sees none .*--device cpu"):
        choose_device("cuda")


@pytest.mark.usefixtures("no_gpu")
def test_a_run_for_a_gpu_that_is_not_there_leaves_nothing(dataset_uri: str, output: str) -> None:
    with pytest.raises(RunError, match="torch sees none"):
        run(tiny_config(), dataset_uri, output, engine=EngineConfig(device="cuda"))
    assert not Path(output).exists()


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_cpu_trains() -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_with_a_gpu_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 3)
    assert choose_device("cpu") == torch.device("cpu")


def test_threads_are_set_where_a_number_is_given() -> None:
    set_up(EngineConfig(num_threads=1), torch.device("cpu"))
    assert torch.get_num_threads() == 1
    set_up(EngineConfig(num_threads=2), torch.device("cpu"))
    assert torch.get_num_threads() == 2
    set_up(EngineConfig(), torch.device("cpu"))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize("is_on", [True, False])
def test_channels_stay_together_where_they_should(is_on: bool) -> None:
    network = nn.Conv2d(3, 4, 3)
    prepare(network, EngineConfig(channels_last=is_on))
    assert network.weight.is_contiguous(memory_format=torch.channels_last) is is_on


@pytest.mark.parametrize("is_on", [True, False])
def test_a_network_is_compiled_in_place_where_it_should(
    is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place, or its weights would have other names. The compiler itself takes seconds to load.
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))  # noqa: PLW0108
    network = nn.Conv2d(3, 4, 3)
    prepare(network, EngineConfig(compile=is_on))
    assert compiled == ([network] if is_on else [])


@pytest.mark.parametrize("model", ["carn", "srcnn"])
def test_memory_order_changes_roundings_alone(dataset_uri: str, tmp_path: Path, model: str) -> None:
    found = []
    for is_on in (True, False):
        output = str(tmp_path / str(is_on))
        engine = tiny_engine(channels_last=is_on)
        run(tiny_config(model, steps=3), dataset_uri, output, engine=engine)
        found.append([row["loss"] for row in read_metrics(output)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("model", ["carn", "srgan", "swdnet"])
def test_bf16_keeps_weights_and_loss_in_float32(
    dataset_uri: str, tmp_path: Path, model: str
) -> None:
    found = []
    for precision in ("fp32", "bf16"):
        output = str(tmp_path / precision)
        config = tiny_config(
            model,
            steps=2,
            optimizer={"precision": precision, "learning_rate": 1e-5},
            validation={"max_validation_tiles": 1},
        )
        run(config, dataset_uri, output)
        found.append([row["loss"] for row in read_metrics(output)])
        dtypes = {value.dtype for value in load_model(output).state_dict().values()}
        assert dtypes <= {torch.float32, torch.int64}
    assert found[0] != found[1]
    assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_where_it_is_slower_is_said(
    dataset_uri: str, output: str, monkeypatch: pytest.MonkeyPatch, caplog, has_bf16: bool
) -> None:
    monkeypatch.setattr("carn.training.loop.has_bf16", lambda _device: has_bf16)
    config = tiny_config(optimizer={"precision": "bf16"}, steps=1)
    run(config, dataset_uri, output)
    assert ("fp32 is faster here" in caplog.text) != has_bf16


def test_freed_memory_is_kept_where_glibc_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    monkeypatch.setattr(sys, "platform", "linux")
    keep_freed_memory()
    assert sorted(calls) == [(-3, 2**31 - 1), (-1, 2**31 - 1)]


def _raise(_: Any) -> Any:
    raise OSError("no such library")


@pytest.mark.parametrize(
    ("platform", "library"), [("darwin", None), ("linux", _raise), ("linux", lambda _: object())]
)
def test_elsewhere_memory_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, platform: str, library: Any
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", library)
    keep_freed_memory()


def test_only_cpus_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(engine_module, "keep_freed_memory", lambda: called.append(True))
    set_up(EngineConfig(), torch.device("cpu"))
    assert called == [True]


@pytest.mark.gpu
@pytest.mark.parametrize("model", NETWORKS)
def test_a_gpu_trains_what_a_cpu_does(dataset_uri: str, tmp_path: Path, model: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = []
    for device in ("cpu", "cuda"):
        output = str(tmp_path / device)
        config = tiny_config(model, steps=3, optimizer={"learning_rate": 1e-5})
        run(config, dataset_uri, output, engine=tiny_engine(device=device))
        found.append([row["loss"] for row in read_metrics(output)])
    assert found[0] == pytest.approx(found[1], rel=1e-2)
