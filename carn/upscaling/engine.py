"""Windows of LR pixels to SR pixels, as fast as the machine can without being seen to differ.

A window is cut with `halo_px` of real (or mirrored) context to each side, which is inferred along
and cropped away. With frozen poolings (`Engine.set_pooling`) a px then never depends on where the
window was cut, as long as windows start at multiples of 4 px.

Self-ensemble averages what a network makes of the eight flips and turns of a window. The frozen
means are those of the window as it lies, for all eight: pooling over each turned window would
differ from that only by the network's own lack of symmetry.
"""

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from carn.errors import CarnError
from carn.models.table import MODELS
from carn.models.turns import mean_over_turns
from carn.processor import has_bf16, keep_freed_memory
from carn.slides.slide import Rgb
from carn.upscaling.folding import can_fold, fold, refold
from carn.upscaling.pooling import Pooling, check_pooling, frozen, has_pooling
from carn.upscaling.precision import Precision, choose_precision, to_bf16

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Value = TypeVar("Value", np.uint8, np.float32)

# Windows start at multiples of this many LR px: halves and Haar levels then have one grid, also at
# x3. Halos are multiples of it for the same reason.
GRID_PX = 4
DEFAULT_WINDOW_PX = 1024
MIN_WINDOW_PX = 64
# Sides of windows that a GPU has captured programs for; smaller windows are padded.
FIXED_SIDES_PX = (256, 512, 1024)
# Windows on their way through a GPU: one going up, one computed, one coming down.
NUM_IN_FLIGHT = 3


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a model is run. Settings differ in roundings alone, but for `self_ensemble`."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 where the device multiplies it natively and the model stays within 70 dB of
    fp32."""
    compile: bool = False
    """Let torch.compile make the kernels: a minute first; needs a C++ compiler on a CPU."""
    cuda_graph: bool = True
    """On a GPU, replay captured programs instead of launching kernels, unless compiled."""
    fold: bool = True
    """Fold channel gates and the upsampler into convolutions, where the model allows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    window_px: int | None = None
    """Side of the largest LR window (without halo) that is inferred at once; None: 1024."""
    num_threads: int | None = None
    """CPU threads of the process; None for what torch chose."""
    self_ensemble: bool = False
    """Average over the eight flips and turns of each window: eight times the time for 0.04 dB of
    PSNR on clean LR and 0.01 dB on JPEG 80."""

    def __post_init__(self) -> None:
        if self.window_px is not None and self.window_px < MIN_WINDOW_PX:
            raise ValueError(f"window_px={self.window_px} must be at least {MIN_WINDOW_PX}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads={self.num_threads} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Form:
    """How an engine runs a network."""

    device: torch.device
    precision: Precision
    is_channels_last: bool
    is_folded: bool
    is_compiled: bool
    is_captured: bool
    self_ensemble: bool


class Engine:
    """A model ready to super-resolve windows; one thread at a time may use it.

    Attributes:
        scale: SR px per LR px.
        halo_px: LR px of context that windows have to each side; a multiple of 4.
        window_px: side of the largest window (without halo) inferred at once; larger ones are cut.
            It halves when memory does not suffice.
        device: where it computes.
        self_ensemble: whether results are means over eight flips and turns.
        description: the settings in words.
    """

    def __init__(self, model: nn.Module, form: Form, *, window_px: int) -> None:
        """See `make_engine`."""
        facts: Any = model
        self.scale: int = facts.scale
        self.halo_px: int = math.ceil(facts.receptive_radius_px / GRID_PX) * GRID_PX
        self.window_px = window_px // GRID_PX * GRID_PX
        self.device = form.device
        self.self_ensemble = form.self_ensemble
        self._model = model
        self._form = form
        self._pools = has_pooling(model)
        self._has_gpu = form.device.type == "cuda"
        self._is_frozen = False
        # With live and with frozen poolings; each is made when it is first needed.
        self._programs: dict[bool, nn.Module] = {}
        self._graphs: dict[tuple[int, int], _Captured] = {}

    @property
    def description(self) -> str:
        """Precision, memory format, rewriting and processor."""
        form = self._form
        words = [form.precision, "channels_last" if form.is_channels_last else "NCHW"]
        words += ["folded"] if form.is_folded else []
        words += ["compiled"] if form.is_compiled else []
        words += ["CUDA graphs"] if form.is_captured else []
        words += ["self-ensemble"] if form.self_ensemble else []
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            words += [f"{threads} thread" + "s" * (threads > 1)]
        else:
            words += [torch.cuda.get_device_name(self.device)]
        return ", ".join(words)

    def set_pooling(self, pooling: Pooling | None) -> None:
        """Freeze the global poolings at these means; None lets each window pool for itself.

        None is the default, and then windows pool over all they are given, halos included: their
        seams show. Setting other means rewrites weights in place: nothing is compiled or captured
        again.

        Raises:
            ValueError: the means are another model's.
        """
        if pooling is None or not self._pools:
            if pooling is not None:
                check_pooling(self._model, pooling)
            self._is_frozen = False
            return
        check_pooling(self._model, pooling)
        if True in self._programs:
            refold(self._programs[True], pooling)
        else:
            self._programs[True] = self._made(pooling)
        self._is_frozen = True

    def upscale(self, window: Rgb) -> Rgb:
        """SR of a window.

        Args:
            window: (h + 2 * halo_px, w + 2 * halo_px, 3); h and w at least 1.

        Returns:
            (h * scale, w * scale, 3), clamped to 0..255 and rounded half to even.

        Raises:
            ValueError: the window is no RGB, or has nothing within the halo.
            CarnError: memory does not suffice for the smallest windows.
        """
        return self._in_parts(window, self._pixels_of)

    def upscale_many(self, windows: Iterable[Rgb]) -> Iterator[Rgb]:
        """SR of windows in their order, as `upscale` gives it.

        Windows are taken as they are needed. On a GPU a window's copies run beside the computation
        of its neighbours, so up to three more have been taken than were given back.

        Raises:
            ValueError, CarnError: as `upscale`.
        """
        if not self._has_gpu:
            for window in windows:
                yield self.upscale(window)
            return
        assemblies: deque[_Assembly[np.uint8]] = deque()

        def pieces() -> Iterator[Rgb]:
            for window in windows:
                height, width = self._interior(window)
                boxes = _boxes(height, width, side_px=self.window_px)
                assemblies.append(_Assembly(height, width, boxes=boxes, scale=self.scale))
                for box in boxes:
                    yield box.cut(window, halo_px=self.halo_px)

        for sr in self._piped(pieces()):
            assemblies[0].put(sr)
            if assemblies[0].is_whole:
                yield assemblies.popleft().sr

    def upscale_float(self, window: Rgb) -> NDArray[np.float32]:
        """SR of a window on 0..1 before it is clamped and rounded.

        For measuring; see `carn.upscaling.accuracy`.

        Raises:
            ValueError, CarnError: as `upscale`.
        """
        return self._in_parts(window, self._floats_of)

    # ------------------------------------------------------------------------------- computing

    def _made(self, pooling: Pooling | None) -> nn.Module:
        """The network in the engine's form."""
        form = self._form
        if form.is_folded:
            network = fold(self._model, pooling)
        else:
            network = (
                copy.deepcopy(self._model) if pooling is None else frozen(self._model, pooling)
            )
            network.requires_grad_(requires_grad=False)
        if form.precision == "bf16":
            to_bf16(network)
        network.to(form.device)
        if form.is_channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if form.is_compiled:
            network.compile()
        return network

    def _program(self) -> nn.Module:
        if self._is_frozen not in self._programs:
            self._programs[self._is_frozen] = self._made(None)
        return self._programs[self._is_frozen]

    def _sr(
        self, program: nn.Module, pixels: UInt8[Tensor, "h w 3"]
    ) -> Float[Tensor, "3 h_sr w_sr"]:
        """SR on 0..1 of what lies within the halo."""
        # Channels lie together in this memory already.
        lr = pixels.permute(2, 0, 1)[None].to(torch.float32) / 255
        is_last = self._form.is_channels_last
        order = torch.channels_last if is_last else torch.contiguous_format

        def upscaled(lr: Tensor) -> Tensor:
            sr: Tensor = program(lr.contiguous(memory_format=order))
            return sr

        is_turned = self.self_ensemble
        sr = mean_over_turns(upscaled, self._on_grid(lr)) if is_turned else upscaled(lr)
        height, width = pixels.shape[:2]
        crop, bottom, right = (
            side_px * self.scale
            for side_px in (self.halo_px, height - self.halo_px, width - self.halo_px)
        )
        return sr[0, :, crop:bottom, crop:right]

    def _on_grid(self, lr: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Pad a window to sides that are multiples of GRID_PX: its flips then lie on the same grid.

        A flipped window begins at the far end. No px within the halo depends on what is added
        there, unless the network pools over it: then nothing is added.
        """
        if self._pools and not self._is_frozen:
            return lr
        right, bottom = (-lr.shape[axis] % GRID_PX for axis in (-1, -2))
        return nn.functional.pad(lr, (0, right, 0, bottom), mode="replicate")

    def _sr_levels(
        self, program: nn.Module, pixels: UInt8[Tensor, "h w 3"]
    ) -> UInt8[Tensor, "h_sr w_sr 3"]:
        """SR of what lies within the halo, as pixels."""
        levels = self._sr(program, pixels).clamp(0, 1).mul_(255).round_().to(torch.uint8)
        return levels.permute(1, 2, 0).contiguous()

    def _computed(self, pixels: UInt8[Tensor, "h w 3"]) -> UInt8[Tensor, "h_sr w_sr 3"]:
        """The same for pixels on the device, in memory that nothing else uses."""
        program = self._program()
        with torch.inference_mode(), self._convolutions():
            # What is pooled for itself must not see padding.
            is_padded = self._has_gpu and (self._is_frozen or not self._pools)
            if not is_padded:
                return self._sr_levels(program, pixels)
            height, width = pixels.shape[0], pixels.shape[1]
            key = (self._fixed(height), self._fixed(width))
            if key not in self._graphs:
                self._graphs[key] = self._captured(program, *key)
            captured = self._graphs[key]
            # Beyond the window lies what was there before: no px within the halo depends on it.
            captured.pixels[:height, :width].copy_(pixels)
            rows, columns = ((side - 2 * self.halo_px) * self.scale for side in (height, width))
            return captured.run()[:rows, :columns].clone()

    def _fixed(self, side_px: int) -> int:
        """The side with halo that a GPU pads a window's side to."""
        inner = side_px - 2 * self.halo_px
        sides = [side for side in (*FIXED_SIDES_PX, self.window_px) if side >= inner]
        return min(sides, default=inner) + 2 * self.halo_px

    def _captured(self, program: nn.Module, height: int, width: int) -> "_Captured":
        """The program for windows of one size, as a CUDA graph where the form has them."""
        pixels = torch.zeros(height, width, 3, dtype=torch.uint8, device=self.device)
        if not self._form.is_captured:
            return _Captured(pixels=pixels, run=lambda: self._sr_levels(program, pixels))
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # lets cuDNN choose its kernels, which cannot be captured
                self._sr_levels(program, pixels)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sr = self._sr_levels(program, pixels)

        def run() -> Tensor:
            graph.replay()
            return sr

        return _Captured(pixels=pixels, run=run)

    def _convolutions(self) -> AbstractContextManager[Any]:
        """What cuDNN may do with float32: TF32 (10 bits) is for the ends of a bf16 network only."""
        if self.device.type == "cpu":
            return nullcontext()
        is_bf16 = self._form.precision == "bf16"
        flags = torch.backends.cudnn.flags
        return flags(enabled=True, benchmark=True, allow_tf32=is_bf16)

    # --------------------------------------------------------------------------------- windows

    def _interior(self, window: Rgb) -> tuple[int, int]:
        """Height and width of what lies within the halo."""
        if window.dtype != np.uint8 or window.ndim != 3 or window.shape[2] != 3:
            raise ValueError(f"a window must be (H, W, 3) uint8, not {window.shape} {window.dtype}")
        height, width = window.shape[0] - 2 * self.halo_px, window.shape[1] - 2 * self.halo_px
        if min(height, width) < 1:
            raise ValueError(
                f"a window of {window.shape[1]} x {window.shape[0]} px has nothing within its halo "
                f"of {self.halo_px} px to each side; cut it larger"
            )
        return height, width

    def _in_parts(self, window: Rgb, infer: Callable[[Rgb], NDArray[Value]]) -> NDArray[Value]:
        """SR by a function that infers at once, of parts as large as memory allows."""
        height, width = self._interior(window)
        boxes = _boxes(height, width, side_px=self.window_px)
        if len(boxes) == 1:
            sr = if_memory_suffices(lambda: infer(window))
            if sr is not None:
                return sr
            self._shrink(max(height, width))
            return self._in_parts(window, infer)
        assembly = _Assembly[Value](height, width, boxes=boxes, scale=self.scale)
        for box in boxes:
            assembly.put(self._in_parts(box.cut(window, halo_px=self.halo_px), infer))
        return assembly.sr

    def _pixels_of(self, window: Rgb) -> Rgb:
        """SR as pixels, inferred at once."""
        sr: Rgb = self._computed(_as_tensor(window).to(self.device)).cpu().numpy()
        return sr

    def _floats_of(self, window: Rgb) -> NDArray[np.float32]:
        """SR on 0..1, not clamped, inferred at once."""
        with torch.inference_mode(), self._convolutions():
            sr = self._sr(self._program(), _as_tensor(window).to(self.device))
        pixels: NDArray[np.float32] = sr.permute(1, 2, 0).contiguous().cpu().numpy()
        return pixels

    def _shrink(self, side_px: int) -> None:
        """Infer less at once from now on, after windows of `side_px` did not fit."""
        tried_px = min(self.window_px, side_px)
        if tried_px <= MIN_WINDOW_PX:
            raise CarnError(
                f"memory does not suffice for windows of {tried_px} + 2 x {self.halo_px} px on "
                f"{self.device}; give the process more memory, run fewer of them beside each "
                "other, or choose a smaller model"
            )
        halved = tried_px // 2 // GRID_PX * GRID_PX
        self.window_px = max(MIN_WINDOW_PX, halved)
        self._graphs.clear()
        free_memory(self.device)
        logger.warning(
            "out of memory on %s with windows of %d px: going on with %d px",
            self.device,
            tried_px,
            self.window_px,
        )

    def _piped(self, pieces: Iterable[Rgb]) -> Iterator[Rgb]:
        """SR of windows that fit at once, on a GPU; copies beside computing."""
        flights: deque[_Flight] = deque()
        for piece in pieces:
            side_px = max(self._interior(piece))
            # It was cut before memory ran out for the piece before it.
            is_too_large = side_px > self.window_px
            flight = None if is_too_large else self._launched(piece)
            if flight is None:  # what is under way first, then this one in smaller parts
                while flights:
                    yield flights.popleft().landed()
                if not is_too_large:
                    self._shrink(side_px)
                yield self.upscale(piece)
                continue
            flights.append(flight)
            if len(flights) == NUM_IN_FLIGHT:
                yield flights.popleft().landed()
        while flights:
            yield flights.popleft().landed()

    def _launched(self, piece: Rgb) -> "_Flight | None":
        """A window handed to the GPU; None where its memory did not suffice."""
        compute = torch.cuda.current_stream(self.device)
        up, down = self._copy_streams
        try:
            host = _as_tensor(piece).pin_memory()
            with torch.cuda.stream(up):
                pixels = host.to(self.device, non_blocking=True)
            compute.wait_stream(up)
            # The allocators must not give memory out again that another stream still works on.
            pixels.record_stream(compute)
            sr = self._computed(pixels)
            down.wait_stream(compute)
            with torch.cuda.stream(down):
                landing = torch.empty(sr.shape, dtype=torch.uint8, pin_memory=True)
                landing.copy_(sr, non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(down)
            sr.record_stream(down)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return _Flight(sr=landing, done=done)

    @cached_property
    def _copy_streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """Up and down: on one stream the next window would wait for the last one's result."""
        up, down = (torch.cuda.Stream(self.device) for _ in range(2))  # type: ignore[no-untyped-call]
        return up, down


def make_engine(model: nn.Module, config: EngineConfig) -> Engine:
    """A model as an engine; the model itself stays as it is.

    On a CPU the process keeps freed memory from now on, for otherwise every layer faults its
    activations in again.

    Args:
        model: a model of MODELS in evaluation mode, float32.
        config: how to run it.

    Raises:
        ValueError: no such model, one in training mode, or a precision that it loses too much in.
        CarnError: a GPU was asked for, and torch sees none.
    """
    _check_model(model)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = _device(config.device)
    precision = choose_precision(model, wanted=config.precision, device=device)
    if precision == "bf16" and not has_bf16(device):
        logger.warning("%s has no bf16 multiplication: fp32 is faster here", device)
    if device.type == "cpu":
        keep_freed_memory()
    form = Form(
        device=device,
        precision=precision,
        is_channels_last=True,
        is_folded=config.fold and can_fold(model),
        is_compiled=config.compile,
        is_captured=device.type == "cuda" and config.cuda_graph and not config.compile,
        self_ensemble=config.self_ensemble,
    )
    return Engine(model, form, window_px=config.window_px or DEFAULT_WINDOW_PX)


def reference_engine(model: nn.Module, *, self_ensemble: bool = False) -> Engine:
    """What engines are measured against: fp32, NCHW, eager, nothing folded, where the model lies.

    Args:
        model: a model of MODELS in evaluation mode, float32.
        self_ensemble: of the engine that is measured: it is part of what is right.

    Raises:
        ValueError: no model of MODELS, or one in training mode.
    """
    _check_model(model)
    tensor = next(model.parameters(), torch.empty(0))
    form = Form(
        device=tensor.device,
        precision="fp32",
        is_channels_last=False,
        is_folded=False,
        is_compiled=False,
        is_captured=False,
        self_ensemble=self_ensemble,
    )
    return Engine(model, form, window_px=DEFAULT_WINDOW_PX)


def if_memory_suffices(call: Callable[[], Result]) -> Result | None:
    """What a call returns; None where memory did not suffice for it."""
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def free_memory(device: torch.device) -> None:
    """Give back what torch keeps of a GPU's memory without using it; others may want it whole."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, on a GPU or a CPU."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    cause: BaseException | None = error
    while cause is not None:  # a capture that ends early raises an error of its own over it
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(cause, RuntimeError) and any(part in str(cause) for part in words):
            return True
        cause = cause.__context__
    return False


def _check_model(model: nn.Module) -> None:
    if not any(isinstance(model, entry.model) for entry in MODELS.values()):
        raise ValueError(f"{type(model).__name__} is no model of {', '.join(MODELS)}")
    if model.training:
        raise ValueError("the model is in training mode; call its eval() first")


def _device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise CarnError(
            "a GPU was asked for, but torch sees none here; use the device cpu, or look at "
            "nvidia-smi and at whether torch was built for CUDA"
        )
    if wanted == "cpu" or not has_gpu:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _as_tensor(window: Rgb) -> UInt8[Tensor, "h w 3"]:
    # torch takes no memory that it may not write to.
    return torch.from_numpy(np.require(window, requirements=["C", "W"]))


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """A program for windows of one size: where they go, and what makes SR of them."""

    pixels: Tensor
    run: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A window on its way through a GPU."""

    sr: Tensor  # in pinned memory, not to be read before
    done: torch.cuda.Event

    def landed(self) -> Rgb:
        self.done.synchronize()
        sr: Rgb = self.sr.numpy()
        return sr


@dataclass(frozen=True, kw_only=True)
class _Box:
    """A part of a window's interior in LR px: [x0, x1) x [y0, y1)."""

    x0: int
    y0: int
    x1: int
    y1: int

    def cut(self, window: Rgb, *, halo_px: int) -> Rgb:
        """The part with its halo."""
        return window[self.y0 : self.y1 + 2 * halo_px, self.x0 : self.x1 + 2 * halo_px]


def _boxes(height: int, width: int, *, side_px: int) -> list[_Box]:
    """An interior in parts that an engine infers at once, row by row."""
    return [
        _Box(x0=x, y0=y, x1=min(x + side_px, width), y1=min(y + side_px, height))
        for y in range(0, height, side_px)
        for x in range(0, width, side_px)
    ]


class _Assembly(Generic[Value]):
    """The SR of a window that is put together from parts, in their order."""

    sr: NDArray[Value]

    def __init__(self, height: int, width: int, *, boxes: list[_Box], scale: int) -> None:
        self._boxes = deque(boxes)
        self._scale = scale
        self._shape = (height * scale, width * scale, 3)

    @property
    def is_whole(self) -> bool:
        return not self._boxes

    def put(self, sr: NDArray[Value]) -> None:
        box, scale = self._boxes.popleft(), self._scale
        if sr.shape == self._shape:
            self.sr = sr
        else:
            if not hasattr(self, "sr"):
                self.sr = np.empty(self._shape, dtype=sr.dtype)
            self.sr[box.y0 * scale : box.y1 * scale, box.x0 * scale : box.x1 * scale] = sr
