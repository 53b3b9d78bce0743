"""Models as files that run without this package: ONNX, and torch's exported programs (.pt2).

Input `lr` and output `sr` are as a model's `forward` has them: float32 RGB on 0..1, (B, 3, h, w)
and (B, 3, scale * h, scale * w), not clamped. Each file is run on images before it is written, and
written only when it computes what the model does.

Examples:
  python -m carn.models.export runs/carn_x2 --format onnx --output carn_x2.onnx
  python -m carn.models.export runs/carn_x2 --format pt2 --output s3://bucket/carn_x2.pt2
"""

import copy
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, cast

import numpy as np
import onnxruntime
import torch
import tyro
from torch import Tensor, nn
from torch.export import Dim

from carn import storage
from carn.errors import CarnError, CheckpointError
from carn.models.adaptive_carn import AdaptiveCarn
from carn.models.checkpoint import checkpoint_hash, load_model, read_checkpoint
from carn.models.table import MODELS
from carn.models.weights import architecture_of, to_json, unwrapped

# Where a file holds what it is: in ONNX a metadata property, in .pt2 an extra file.
METADATA_KEY = "carn"
# The most a pixel on 0..1 may be off: a 40th of a grey level. float32 in another order of
# summation is within a tenth of that.
TOLERANCE = 1e-4
# (batch, height, width) of LR while tracing: all different, none of them 1, since a length of 1 is
# traced as a constant.
TRACED = (2, 24, 20)
# Tried where any size is to work: odd and even, narrow and wide, another batch.
TRIED = ((1, 19, 32), (3, 30, 17))
# An adaptive network pads what holds no two whole JPEG blocks beside its kernels, and traced
# programs do not branch.
TRACED_ADAPTIVE = (2, 40, 36)
TRIED_ADAPTIVE = ((1, 29, 48), (3, 46, 27))
STATIC_SIDE_PX = 64


def export_onnx(
    model: nn.Module,
    path: str,
    *,
    dynamic: bool = True,
    side_px: int = STATIC_SIDE_PX,
    source: str | None = None,
) -> float:
    """Write a model as ONNX; returns by how much its pixels (0..1) were off at most when tried.

    Args:
        model: a model of MODELS.
        path: the file, local or on an object store.
        dynamic: take any batch and any LR of at least 4 px a side (24 for an adaptive network);
            otherwise one square LR.
        side_px: side of that LR in px.
        source: what the file says it was made from, such as `checkpoint_hash`.

    Raises:
        CheckpointError: the file computes something else than the model, and is not written.
        ValueError: no model of MODELS.
        AccessDeniedError, StorageError: the location cannot be written.
    """
    model, facts = _prepared(model, source=source)
    traced, tried = _shapes(model)
    shape = traced if dynamic else (1, side_px, side_px)
    axes = {"lr": {0: "batch", 2: "height", 3: "width"}}
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (_images(shape, seed=0),),
            input_names=["lr"],
            output_names=["sr"],
            dynamic_shapes=axes if dynamic else None,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: they name folders of this machine
    program.model.metadata_props[METADATA_KEY] = facts
    content = cast(bytes, program.model_proto.SerializeToString())
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(lr: Tensor) -> Tensor:
        (sr,) = session.run(["sr"], {"lr": lr.numpy()})
        return torch.from_numpy(np.asarray(sr))

    difference = _difference(model, run, tried=tried if dynamic else (shape, shape), path=path)
    storage.write_bytes(storage.normalize(path), content)
    return difference


def export_program(model: nn.Module, path: str, *, source: str | None = None) -> float:
    """Write a model as an exported program; returns by how much its pixels (0..1) were off at most.

    `torch.export.load(path).module()` runs it, for any batch and any LR of at least 4 px a side
    (24 for an adaptive network).

    Args:
        model: a model of MODELS.
        path: the file, local or on an object store; torch wants it to end on .pt2.
        source: what the file says it was made from, such as `checkpoint_hash`.

    Raises:
        CheckpointError: the file computes something else than the model, and is not written.
        ValueError: no model of MODELS.
        AccessDeniedError, StorageError: the location cannot be written.
    """
    model, facts = _prepared(model, source=source)
    axes = {"lr": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    buffer = io.BytesIO()
    traced, tried = _shapes(model)
    with _quiet_exporter(), torch.no_grad():
        program = torch.export.export(model, (_images(traced, seed=0),), dynamic_shapes=axes)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names folders of this machine
        torch.export.save(program, buffer, extra_files={METADATA_KEY: facts})
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
    difference = _difference(model, loaded, tried=tried, path=path)
    storage.write_bytes(storage.normalize(path), buffer.getvalue())
    return difference


def _prepared(model: nn.Module, *, source: str | None) -> tuple[nn.Module, str]:
    """A copy to export, so that the caller's stays as it is, and what the file is to say of it."""
    model = unwrapped(model)
    names = [name for name, entry in MODELS.items() if type(model) is entry.model]
    if not names:
        raise ValueError(f"a {type(model).__name__} is none of {', '.join(MODELS)}")
    facts = {**asdict(architecture_of(model, model_name=names[0])), "source": source}
    return copy.deepcopy(model).to("cpu", torch.float32).eval(), to_json(facts)


def _shapes(
    model: nn.Module,
) -> tuple[tuple[int, int, int], tuple[tuple[int, int, int], ...]]:
    """What a model is traced with, and what the program is tried with."""
    if isinstance(model, AdaptiveCarn):
        return TRACED_ADAPTIVE, TRIED_ADAPTIVE
    return TRACED, TRIED


def _images(shape: tuple[int, int, int], *, seed: int) -> Tensor:
    batch, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator)


def _difference(
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    *,
    tried: tuple[tuple[int, int, int], ...],
    path: str,
) -> float:
    largest = 0.0
    for seed, shape in enumerate(tried, start=1):
        lr = _images(shape, seed=seed)
        with torch.no_grad():
            expected, found = model(lr), run(lr)
        if found.shape != expected.shape:
            raise CheckpointError(
                f"{path} is not written: it makes {tuple(found.shape)} of {tuple(lr.shape)}, the "
                f"model {tuple(expected.shape)}"
            )
        off = float((found - expected).abs().max())
        if not off <= TOLERANCE:  # also true for NaN
            raise CheckpointError(
                f"{path} is not written: on {tuple(lr.shape)} its pixels (0..1) are off by up to "
                f"{off:.2g}, {TOLERANCE:g} is allowed"
            )
        largest = max(largest, off)
    return largest


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep back what torch's exporter says of its own insides."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # that torchvision's operators are not there
    try:
        with warnings.catch_warnings():
            # Raised where the exporter copies a program.
            warnings.filterwarnings(
                "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
            )
            yield
    finally:
        registration.setLevel(level)


# ------------------------------------------------------------------------------- the command line


@dataclass(frozen=True, kw_only=True)
class ExportModel:
    """Which checkpoint becomes which file."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, a training run (its best checkpoint) or a weights file, local or s3://."""
    format: Literal["onnx", "pt2"]
    """ONNX, or torch's exported program."""
    output: str
    """The file to write, local or s3://."""
    side_px: int | None = None
    """ONNX only: take one square LR of this side, for runtimes that want fixed sizes; None: any."""
    overwrite: bool = False
    """Replace a file that is there."""

    def __post_init__(self) -> None:
        if self.side_px is not None and (self.format != "onnx" or self.side_px < 4):
            raise ValueError(f"side_px={self.side_px} must be at least 4, and is for onnx only")


def main(job: ExportModel) -> None:
    """Export the checkpoint's model.

    Raises:
        CheckpointError, ValueError, StorageError: as `load_model`, `export_onnx` and
            `export_program`; or the file is there.
    """
    if not job.overwrite and storage.is_file(storage.normalize(job.output)):
        raise CheckpointError(f"{job.output} is there already; --overwrite replaces it")
    checkpoint = read_checkpoint(job.checkpoint)
    model, source = load_model(checkpoint), checkpoint_hash(checkpoint)
    if job.format == "pt2":
        off = export_program(model, job.output, source=source)
    else:
        off = export_onnx(
            model,
            job.output,
            dynamic=job.side_px is None,
            side_px=job.side_px or STATIC_SIDE_PX,
            source=source,
        )
    sys.stdout.write(
        f"{job.output}: {checkpoint.model_name} x{checkpoint.scale} as {job.format}; pixels (0..1) "
        f"within {off:.1g} of the model's\n"
    )


def cli() -> int:
    """Parse the command line, run, and turn expected errors into one line each."""
    try:
        main(tyro.cli(ExportModel, description=__doc__))
    except (CarnError, ValueError) as error:
        sys.stderr.write(f"export: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
