"""How a run is carried out on a machine. Nothing here is meant to change what is learnt."""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from carn.errors import RunError
from carn.processor import keep_freed_memory
from carn.training.config import check_at_least

logger = logging.getLogger(__name__)

DataPath = Literal["memory", "stream"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a run is carried out. Roundings may differ between settings, nothing else does."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    compile: bool = False
    """Let torch.compile make the network's kernels: some minutes first, faster steps then."""
    channels_last: bool = True
    """Keep pixels' channels together in memory, which convolutions prefer."""
    num_threads: int | None = None
    """CPU threads of one worker; None for what torch or Ray chose."""
    data: DataPath = "memory"
    """`memory`: tiles are decoded once per node (on a GPU, they are kept there). `stream`: patches
    are read as they are needed, for datasets larger than a node's disk; takes --order windowed."""
    log_every: int = 50
    """Updates between two rows of metrics."""
    checkpoint_every: int = 1000
    """Updates between two checkpoints; validations make one, too."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best."""
    overwrite: bool = False
    """Remove the run at the output and begin anew."""

    def __post_init__(self) -> None:
        for name in ("num_threads", "log_every", "checkpoint_every", "keep_checkpoints"):
            check_at_least(name, getattr(self, name), 1)


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to train on.

    Raises:
        RunError: a GPU was asked for, and this process sees none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError(
            "a GPU was asked for (--device cuda), but torch sees none here; use --device cpu, or "
            "look at nvidia-smi and at whether torch was built for CUDA"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def set_up(engine: EngineConfig, device: torch.device) -> None:
    """Settings of the process that make steps faster."""
    if engine.num_threads is not None:
        torch.set_num_threads(engine.num_threads)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True
        # TF32 keeps 10 bits of the mantissa: it would call itself fp32, and score as such.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def prepare(model: nn.Module, engine: EngineConfig) -> None:
    """Bring a network into the form that the engine runs, in place."""
    if engine.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if engine.compile:
        model.compile()
