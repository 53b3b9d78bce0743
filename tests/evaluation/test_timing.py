"""Times of a model, by a clock that the model itself turns."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carn.errors import CarnError
from carn.evaluation import timing
from carn.evaluation.timing import device_name, paper_lr_px, time_model
from carn.models import build_model
from carn.models.carn import CarnConfig


class Slow(nn.Module):
    """Takes the given seconds, one after the other, and the last of them ever after."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.seconds = list(seconds)
        self.now = 1000.0
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, lr: Tensor) -> Tensor:
        if lr.device.type != "meta":  # counting FLOPs takes no time
            self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
            modes = torch.is_inference_mode_enabled(), self.training
            self.seen.append((tuple(lr.shape), lr.dtype, *modes))
        out: Tensor = self.layer(lr)
        return out


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    def keep(model: Slow) -> Slow:
        stub = SimpleNamespace(perf_counter=lambda: model.now)
        monkeypatch.setattr(timing, "time", stub)
        return model

    return keep


def test_median_and_quartiles_without_the_warm_up(clock: Any) -> None:
    model = clock(Slow(90, 80, 5.0, 1.0, 3.0, 2.0, 4.0))
    found = time_model(model, scale=2, lr_px=(6, 4), warmup=2, repeats=5, max_seconds=1e9)
    assert found.seconds_median == 3
    assert found.seconds_iqr == (2, 4)
    assert found.repeats == 5
    assert model.seen == [((1, 3, 4, 6), torch.float32, True, False)] * 7
    assert model.training  # as it was
    assert (found.scale, found.lr_px) == (2, (6, 4))
    assert found.params == 12
    assert found.flops == 2 * (3 + 1) * 3 * 24
    assert found.torch_version == torch.__version__
    assert found.threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("max_seconds", "num_repeats"), [(25.0, 3), (30.0, 3), (31.0, 4), (59.0, 6), (1000.0, 20)]
)
def test_no_repeat_begins_after_max_seconds(
    max_seconds: float, num_repeats: int, clock: Any
) -> None:
    model = clock(Slow(10))
    found = time_model(model, scale=2, lr_px=(4, 4), warmup=0, max_seconds=max_seconds)
    assert found.repeats == len(model.seen) == num_repeats


def test_never_less_than_three_and_little_warm_up_for_the_slow(clock: Any) -> None:
    model = clock(Slow(1000))
    found = time_model(model, scale=2, lr_px=(4, 4), warmup=5, max_seconds=60.0)
    assert found.repeats == 3
    assert len(model.seen) == 4


def test_a_real_model_by_the_real_clock() -> None:
    model = build_model("carn", scale=2, config=CarnConfig(num_blocks=1))
    small, large = (time_model(model, scale=2, lr_px=(side, side), repeats=5) for side in (8, 64))
    assert 0 < small.seconds_iqr[0] <= small.seconds_median <= small.seconds_iqr[1]
    assert large.seconds_median > 2 * small.seconds_median  # of 64 times the pixels
    assert large.params == small.params == 188_163 + 148_952
    assert large.flops > 60 * small.flops
    assert large.device == device_name("cpu")


def test_the_papers_condition() -> None:
    assert [paper_lr_px(scale) for scale in (2, 3, 4, 8)] == [
        (512, 512),
        (341, 341),
        (256, 256),
        (128, 128),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"lr_px": (0, 4)}, "lr_px"), ({"warmup": -1}, "warmup"), ({"repeats": 2}, "repeats=2")],
)
def test_impossible_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        time_model(Slow(1), scale=2, **options)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Slow(1)

    def fail(_lr: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(CarnError, match="Slow on 9 x 7 LR px; time a smaller image"):
        time_model(model, scale=2, lr_px=(9, 7))


def test_the_processors_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 1\nmodel name\t: AMD EPYC: 7\nmodel name\t: b\n")
    assert timing._cpu_name(cpuinfo) == "AMD EPYC: 7"
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")  # as ARM says it
    assert timing._cpu_name(cpuinfo) == timing._cpu_name(tmp_path / "none") != ""


@pytest.mark.gpu
def test_a_gpu_is_named_and_waited_for() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    model = build_model("carn", scale=2)
    found = time_model(model, scale=2, device="cuda", repeats=5)
    assert found.device == torch.cuda.get_device_name()
    # What no GPU does faster: 720 GFLOP at 100 TFLOP/s. Not waited for, it would take less.
    assert found.seconds_median > found.flops / 1e14
