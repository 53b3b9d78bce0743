r"""Weights from other code bases as models of this one.

Read are safetensors files and, by torch's restricted unpickler alone, dicts of tensors in .pt and
.pth files. Names are mapped by explicit rules (`foreign_names`); what they do not name is an error.
Sizes come from the tensors' shapes.

Examples:
  python -m carn.models.foreign edsr_baseline_x2.pt --name edsr --scale 2 --output weights/edsr_x2
  python -m carn.models.foreign RCAN_x4.pth --name rcan --scale 4 --output s3://bucket/rcan_x4 \
      --mean 0.4488 0.4371 0.4040
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import safetensors
import safetensors.torch
import torch
import tyro
from torch import Tensor, nn

from carn import storage
from carn.errors import CarnError, CheckpointError
from carn.models.checkpoint import CHECKPOINT, write_checkpoint
from carn.models.foreign_names import FAMILIES, Family, ForeignName, Sizes, Tensors
from carn.models.layers import upsampling_steps
from carn.models.pickled import MAX_WEIGHTS_BYTES, is_plain_tensor, load_pickled
from carn.models.table import MODELS, build_model, config_from_dict, config_to_dict
from carn.models.weights import listed, load_tensors

# Where files hold their tensors when not at the top, first choice first: of BasicSR's two sets, the
# averaged one is the published one.
NESTS = ("params_ema", "params", "state_dict", "model")
MEAN_TENSORS = ("sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias")
# How far apart two means may be to count as equal: roundings of four printed digits.
MEAN_TOLERANCE = 1e-4
# What shapes do not tell: the large EDSR scales its residuals.
# Source: EDSR, https://arxiv.org/abs/1707.02921, section 3.2 and table 1.
LARGE_EDSR: Sizes = {"num_blocks": 32, "channels": 256}
LARGE_EDSR_RESIDUAL_SCALE = 0.1


def import_state_dict(
    path: str,
    *,
    name: str,
    scale: int,
    config: Mapping[str, object] | None = None,
    mean: tuple[float, float, float] | None = None,
) -> nn.Module:
    """A model of ours with published weights, on the CPU, in evaluation mode, float32.

    Args:
        path: a .safetensors, .pt or .pth file, local or on an object store.
        name: "edsr", "rdn", "rcan" or "carn".
        scale: SR factor the weights are made for.
        config: fields of the model's config that shapes do not tell (`pixel_range`: 255 unless the
            mean tensors are of 0..1; `residual_scale` of EDSR: 1, and 0.1 for the large one), or
            that they have to confirm.
        mean: (R, G, B) on 0..1 where the file holds no mean tensors (BasicSR; its default is
            DIV2K's, 0.4488 0.4371 0.4040).

    Raises:
        CheckpointError: the file is damaged or holds something else than tensors; a tensor is
            missing, left over or misshapen; scale, mean or config are not those of the file.
        ValueError: an unknown name, config field or file name extension, or a mean for a model
            that takes none away.
        MissingObjectError, AccessDeniedError, StorageError: storage does not let it be read.
    """
    if name not in FAMILIES:
        raise ValueError(f"name={name!r} must be one of {', '.join(FAMILIES)}")
    name = cast(ForeignName, name)
    tensors = read_tensors(path)
    family, sizes = _recognized(tensors, name=name, path=path)
    _check_scale(tensors, family=family, scale=scale, path=path)
    values = _config_values(
        tensors, name=name, sizes=sizes, config=config or {}, mean=mean, path=path
    )
    try:
        built_config = config_from_dict(name, values)
    except ValueError as error:
        raise CheckpointError(f"{path} is no {name} that this code base has: {error}") from error
    with torch.random.fork_rng(devices=[]):
        model = build_model(name, scale=scale, config=built_config)
    renamed = _renamed(tensors, family=family, sizes=sizes, scale=scale, path=path)
    load_tensors(model, renamed, uri=path)
    return model.eval()


def read_tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, floating ones as float32.

    Raises:
        CheckpointError: the file is damaged, or holds something else than a dict of tensors.
        ValueError: the name ends on none of .safetensors, .pt, .pth.
        MissingObjectError, AccessDeniedError, StorageError: storage does not let it be read.
    """
    if not path.endswith((".safetensors", ".pt", ".pth")):
        raise ValueError(f"{path!r} must be a .safetensors, .pt or .pth file")
    content = storage.read_bytes(storage.normalize(path), max_bytes=MAX_WEIGHTS_BYTES)
    found: object
    if path.endswith(".safetensors"):
        try:
            found = safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    else:
        try:
            found = load_pickled(content)
        except ValueError as error:
            raise CheckpointError(
                f"{path} is damaged, or a pickle of more than tensors, which is not executed "
                f"({error}); save model.state_dict() where it comes from"
            ) from error
    for nest in NESTS:
        if isinstance(found, dict) and isinstance(found.get(nest), dict):
            found = found[nest]
            break
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a dict of tensors")
    odd = [str(key) for key, value in found.items() if not _is_tensor(key, value)]
    if odd:
        raise CheckpointError(f"{path} holds more than tensors by name: {listed(odd)}")
    # What data parallelism puts before every name.
    prefix = "module." if all(key.startswith("module.") for key in found) else ""
    return {
        key.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for key, value in found.items()
    }


def _is_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and is_plain_tensor(value)


# ---------------------------------------------------------------------------- from theirs to ours


def _recognized(tensors: Tensors, *, name: ForeignName, path: str) -> tuple[Family, Sizes]:
    for family in FAMILIES[name]:
        if f"{family.first}.weight" in tensors:
            try:
                return family, family.sizes(tensors)
            except KeyError as error:
                raise CheckpointError(
                    f"{path} is no {name} of {family.title}: it has no {error.args[0]}, but "
                    f"{listed(tensors)}"
                ) from error
    known = " or ".join(f"{family.first}.weight ({family.title})" for family in FAMILIES[name])
    raise CheckpointError(f"{path} is no {name}: it has no {known}, but {listed(tensors)}")


def _check_scale(tensors: Tensors, *, family: Family, scale: int, path: str) -> None:
    pattern = re.compile(re.escape(family.upsampler) + r"\.\d+\.weight")
    shapes = [
        tensor.shape
        for name, tensor in tensors.items()
        # The convolution to RGB may be of the same sequence.
        if pattern.fullmatch(name) and tensor.ndim == 4 and tensor.shape[0] != 3
    ]
    if not shapes:
        raise CheckpointError(f"{path} has no {family.upsampler}.0.weight, the upsampler's")
    widening = shapes[0][0] / shapes[0][1]
    found = 3 if widening == 9 else 2 ** len(shapes)
    if widening not in (4, 9):
        raise CheckpointError(
            f"{path}: its upsampler makes {shapes[0][0]} channels of {shapes[0][1]}; here they are "
            "4 times as many, or 9: weights of this layout cannot be imported"
        )
    if found != scale:
        raise CheckpointError(f"{path} super-resolves x{found}; x{scale} was asked for")


def _config_values(
    tensors: Tensors,
    *,
    name: ForeignName,
    sizes: Sizes,
    config: Mapping[str, object],
    mean: tuple[float, float, float] | None,
    path: str,
) -> dict[str, object]:
    values = config_to_dict(MODELS[name].config())
    if unknown := [key for key in config if key not in values]:
        raise ValueError(f"config: {name} has no {listed(unknown)}, only {listed(values)}")
    wrong = [key for key in sizes if config.get(key, sizes[key]) != sizes[key]]
    if wrong:
        found = ", ".join(f"{key}={sizes[key]}" for key in wrong)
        raise CheckpointError(f"{path} has {found}, not what was asked for")
    if name == "edsr" and all(sizes[key] == size for key, size in LARGE_EDSR.items()):
        values["residual_scale"] = LARGE_EDSR_RESIDUAL_SCALE
    values |= {**config, **sizes}
    if "mean" not in values:
        if mean is not None:
            raise ValueError(f"mean={mean}: {name} takes no mean away")
        return values
    asked = config.get("mean") if mean is None else mean
    shift = _mean_shift(tensors, path=path)
    if shift is None:
        if asked is None:
            raise CheckpointError(
                f"{path} holds no mean tensors; say the mean (R, G, B) on 0..1 that its model was "
                "trained with (BasicSR: 0.4488 0.4371 0.4040 unless its options say otherwise)"
            )
        return {**values, "mean": asked}
    if "pixel_range" not in config:
        # Pixels on 0..255 have no mean below 1.
        values["pixel_range"] = 255.0 if max(shift) > 1 else 1.0
    pixel_range = cast(float, values["pixel_range"])
    # Seven digits are what the float32 in the file is worth.
    values["mean"] = [round(level / pixel_range, 7) for level in shift]
    if asked is not None and not _is_close(asked, values["mean"]):
        raise CheckpointError(f"{path} has the mean {values['mean']}, not {asked}")
    return values


def _mean_shift(tensors: Tensors, *, path: str) -> list[float] | None:
    """What the first layer takes away and the last one adds; None where the file has neither."""
    if not any(name in tensors for name in MEAN_TENSORS):
        return None
    if missing := [name for name in MEAN_TENSORS if name not in tensors]:
        raise CheckpointError(f"{path} has no {listed(missing)}")
    away, back = tensors["sub_mean.bias"], tensors["add_mean.bias"]
    identity = torch.eye(3).reshape(3, 3, 1, 1)
    is_plain = all(
        tensors[name].shape == identity.shape and bool(torch.equal(tensors[name], identity))
        for name in ("sub_mean.weight", "add_mean.weight")
    )
    if not is_plain or away.shape != (3,) or not torch.equal(away, -back):
        raise CheckpointError(
            f"{path}: its mean tensors do more than to take a mean away and to give it back"
        )
    return [float(level) for level in back]


def _is_close(mean: object, other: object) -> bool:
    pairs = zip(cast(list[float], mean), cast(list[float], other), strict=True)
    return all(abs(a - b) <= MEAN_TOLERANCE for a, b in pairs)


def _renamed(
    tensors: Tensors, *, family: Family, sizes: Sizes, scale: int, path: str
) -> dict[str, Tensor]:
    places = [2 * number for number in range(len(upsampling_steps(scale)))]  # a shuffle between
    modules = [
        *family.modules(sizes),
        *((f"tail.0.{place}", f"{family.upsampler}.{place}") for place in places),
        ("tail.1", family.last or f"{family.upsampler}.{places[-1] + 2}"),
    ]
    names = {
        f"{ours}.{part}": f"{theirs}.{part}"
        for ours, theirs in modules
        for part in ("weight", "bias")
    }
    used = {*names.values(), *(MEAN_TENSORS if family.has_mean else ())}
    missing = [name for name in names.values() if name not in tensors]
    left = [name for name in tensors if name not in used]
    if missing or left:
        raise CheckpointError(
            f"{path} is not as {family.title} has it; tensors missing: {listed(missing)}; left "
            f"over: {listed(left)}"
        )
    return {ours: tensors[theirs] for ours, theirs in names.items()}


# ------------------------------------------------------------------------------- the command line


@dataclass(frozen=True, kw_only=True)
class ImportWeights:
    """Which weights become a checkpoint."""

    weights: tyro.conf.Positional[str]
    """A .safetensors, .pt or .pth file, local or s3://."""
    name: ForeignName
    """The model they are of."""
    scale: Literal[2, 3, 4, 8]
    """The SR factor they are made for."""
    output: str
    """Folder or s3:// prefix of the checkpoint."""
    mean: tuple[float, float, float] | None = None
    """Mean (R, G, B) on 0..1 that the model takes away, where the file does not hold it. BasicSR's
    default: 0.4488 0.4371 0.4040."""
    pixel_range: float | None = None
    """Level of white the model was trained on; None: 255, or 1 if the file's mean is below 1."""
    residual_scale: float | None = None
    """EDSR only: factor of the residuals; None: 1, or 0.1 with 32 blocks of 256 channels."""
    overwrite: bool = False
    """Replace a checkpoint that is there."""


def main(job: ImportWeights) -> None:
    """Import the weights and write their checkpoint.

    Raises:
        CheckpointError, ValueError, StorageError: as `import_state_dict`; or there is a checkpoint.
    """
    facts = storage.join(storage.normalize(job.output), CHECKPOINT)
    if not job.overwrite and storage.is_file(facts):
        raise CheckpointError(f"{job.output} holds a checkpoint; --overwrite replaces it")
    asked = {"pixel_range": job.pixel_range, "residual_scale": job.residual_scale}
    config: dict[str, object] = {key: value for key, value in asked.items() if value is not None}
    model = import_state_dict(
        job.weights, name=job.name, scale=job.scale, config=config, mean=job.mean
    )
    source = {
        "name": storage.name_of(job.weights),
        "content": storage.content_hash(storage.normalize(job.weights)),
    }
    checkpoint = write_checkpoint(
        job.output,
        model=model,
        model_name=job.name,
        training={"imported": source},
        step=None,
        dataset=None,
        metrics={},
    )
    sys.stdout.write(
        f"{checkpoint.uri}: {job.name} x{job.scale}, "
        f"{', '.join(f'{key}={value}' for key, value in checkpoint.model_config.items())}\n"
    )


def cli() -> int:
    """Parse the command line, run, and turn expected errors into one line each."""
    job = tyro.cli(ImportWeights, description=__doc__)
    try:
        main(job)
    except (CarnError, ValueError) as error:
        sys.stderr.write(f"foreign: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
