"""How long a model takes for an image, and on what machine."""

import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from carn.errors import CarnError
from carn.evaluation.scoring import full_precision
from carn.models.cost import count_flops, count_parameters
from carn.upscaling.engine import is_out_of_memory

MIN_REPEATS = 3
"""However slow a model is: fewer have no median that says anything."""

PAPER_HR_PX = 1024
"""Figure 4 of the paper is of one image of 1024 x 1024 HR px, i.e. 1024 / scale LR px a side."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one forward pass of a model.

    Attributes:
        scale: SR factor.
        lr_px: (width, height) of the LR image.
        seconds_median: of the repeats.
        seconds_iqr: their first and third quartile.
        repeats: how many were timed.
        device: the processor's or GPU's name.
        threads: of torch on the CPU.
        torch_version: it has much to do with it.
        params: trainable parameters.
        flops: of the pass, see `count_flops`.
    """

    scale: int
    lr_px: tuple[int, int]
    seconds_median: float
    seconds_iqr: tuple[float, float]
    repeats: int
    device: str
    threads: int
    torch_version: str
    params: int
    flops: int


def paper_lr_px(scale: int) -> tuple[int, int]:
    """(width, height) of the LR image that Figure 4 of the paper is of, rounded down."""
    return PAPER_HR_PX // scale, PAPER_HR_PX // scale


def time_model(
    model: nn.Module,
    *,
    scale: int,
    lr_px: tuple[int, int] = (512, 512),
    device: torch.device | str = "cpu",
    warmup: int = 2,
    repeats: int = 20,
    max_seconds: float = 60.0,
) -> Timing:
    """Time a model's forward pass on one image (batch 1), in float32, as scores are computed.

    The pass alone: pixels are on the device before, SR stays there, and the device is waited for
    before and after each repeat. cuDNN may try its algorithms while warming up; TF32 is off. The
    paper's condition (Figure 4 of https://doi.org/10.7717/peerj-cs.1196) is one image of 1024 px
    HR: `lr_px=paper_lr_px(scale)`, at x2 the default. Whether its GPU used TF32 it does not say.

    Args:
        model: takes LR (1, 3, h, w); moved to the device and left there, in the mode it was in.
        scale: the model's.
        lr_px: (width, height) of the LR image.
        device: where to compute.
        warmup: passes before the first that is timed; fewer when they take max_seconds already.
        repeats: passes that are timed, at least 3.
        max_seconds: no repeat begins after that long, once there are 3.

    Raises:
        ValueError: a size, warmup or repeats that cannot be.
        CarnError: memory does not suffice for the image.
    """
    if min(lr_px) < 1 or warmup < 0 or repeats < MIN_REPEATS:
        raise ValueError(
            f"lr_px={lr_px} must be at least 1, warmup={warmup} at least 0, and repeats={repeats} "
            f"at least {MIN_REPEATS}"
        )
    device = torch.device(device)
    width, height = lr_px
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    was_training = model.training
    model.eval().to(device)
    try:
        with torch.inference_mode(), full_precision(device, benchmark=True):
            _timed(model, pixels, count=warmup, least=0, max_seconds=max_seconds)
            seconds = _timed(
                model, pixels, count=repeats, least=MIN_REPEATS, max_seconds=max_seconds
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CarnError(
            f"the memory of {device_name(device)} does not suffice for {type(model).__name__} on "
            f"{width} x {height} LR px; time a smaller image (lr_px), or on another device"
        ) from error
    finally:
        model.train(was_training)
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(
        scale=scale,
        lr_px=lr_px,
        seconds_median=median,
        seconds_iqr=(first, third),
        repeats=len(seconds),
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        params=count_parameters(model),
        flops=count_flops(model, lr_px=lr_px),
    )


def device_name(device: torch.device | str) -> str:
    """The name of the processor or GPU, such as `AMD EPYC 7763 64-Core Processor`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} of {platform.node()}"
    return _cpu_name(Path("/proc/cpuinfo"))


def _cpu_name(cpuinfo: Path) -> str:
    """The model that Linux names in /proc/cpuinfo (not on ARM), or what Python knows."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def _timed(
    model: nn.Module, pixels: Tensor, *, count: int, least: int, max_seconds: float
) -> list[float]:
    """Seconds of each of up to `count` passes."""
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) < count and (
        len(seconds) < least or time.perf_counter() - start < max_seconds
    ):
        _synchronize(pixels.device)
        begin = time.perf_counter()
        # Past torch.compile, as scores are.
        model.forward(pixels)
        _synchronize(pixels.device)
        seconds.append(time.perf_counter() - begin)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
