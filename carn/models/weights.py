"""A model as the bytes of a safetensors file that says itself what model it is."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from carn.errors import CheckpointError
from carn.models.table import MODELS, build_model, config_from_dict, config_to_dict

FORMAT = "carn-checkpoint"
FORMAT_VERSION = 1
# Of any whole number in a configuration: channels, blocks, groups. The paper's networks have at
# most 256 (EDSR's channels).
MAX_CONFIG_NUMBER = 4096
# Fields that multiply: every one of the blocks that they say has tensors of its own.
DEPTHS = ("num_groups", "num_blocks", "num_layers")
# Where in a safetensors header a model says what it is. The only key: the format's writer keeps
# several in no order, and equal weights are to give equal bytes.
HEADER_KEY = "carn"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All that a network is but its weights.

    Attributes:
        name: a key of MODELS.
        config: the model's config, as JSON has it.
        scale: SR factor.
    """

    name: str
    config: Mapping[str, Any]
    scale: int


def architecture_of(model: nn.Module, *, model_name: str) -> Architecture:
    """What a model is, bare or wrapped.

    Raises:
        ValueError: it is not what `model_name` says.
    """
    model = unwrapped(model)
    entry = MODELS.get(cast(Any, model_name))
    if entry is None or type(model) is not entry.model:
        raise ValueError(f"model_name={model_name!r} is not the name of a {type(model).__name__}")
    config, scale = cast(Any, model).config, cast(Any, model).scale
    # As JSON has it, so that what was written equals what is read.
    return Architecture(
        name=model_name, config=json.loads(to_json(config_to_dict(config))), scale=scale
    )


def pack_model(model: nn.Module, *, model_name: str) -> bytes:
    """A model as a safetensors file that loads alone; equal models give equal bytes.

    Floating tensors are stored as float32, all contiguous, under the bare model's names.

    Raises:
        CheckpointError: a weight is not finite; the tensors are named.
        ValueError: the model is not what `model_name` says.
    """
    said = to_json(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": asdict(architecture_of(model, model_name=model_name)),
        }
    )
    tensors = {name: _stored(tensor) for name, tensor in unwrapped(model).state_dict().items()}
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{model_name}: weights that are not finite are not stored: {listed(broken)}; go back "
            "to an earlier checkpoint"
        )
    return safetensors.torch.save(tensors, metadata={HEADER_KEY: said})


def unpack(content: bytes, *, uri: str) -> tuple[Architecture, dict[str, Tensor]]:
    """What `pack_model` packed; `uri` names it in errors.

    Raises:
        CheckpointError: the file is damaged, no safetensors file, of another format, or does not
            say what model it is.
    """
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{uri} is damaged or no safetensors file: {error}") from error
    said = header.get("__metadata__", {}).get(HEADER_KEY)
    if said is None:
        raise CheckpointError(
            f"{uri} does not say what model it is; weights from elsewhere are imported by "
            "python -m carn.models.foreign"
        )
    fields = parse_format(said, uri=uri)
    try:
        return parse_architecture(fields["model"]), tensors
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{uri}: its header is not whole: {error!r}") from error


def build(architecture: Architecture, tensors: Mapping[str, Tensor], *, uri: str) -> nn.Module:
    """The model of these weights, on the CPU, in evaluation mode; `uri` names it in errors.

    The global random state stays as it is.

    Raises:
        CheckpointError: no such model here, or tensors are missing, unexpected or misshapen.
    """
    if architecture.name not in MODELS:
        raise CheckpointError(
            f"{uri} is of a model {architecture.name!r}; this version has {', '.join(MODELS)}"
        )
    name = cast(Any, architecture.name)
    try:
        config = config_from_dict(name, architecture.config)
        _check_size(architecture.config, num_tensors=len(tensors))
        # Without memory first: what the header says is as large as it likes, the file is not.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            check_fit(build_model(name, scale=architecture.scale, config=config), tensors, uri=uri)
        # Initial weights draw random numbers that belong to the caller.
        with torch.random.fork_rng(devices=[]):
            model = build_model(name, scale=architecture.scale, config=config)
    except ValueError as error:
        raise CheckpointError(f"{uri} is of a {name} that this version has not: {error}") from error
    load_tensors(model, tensors, uri=uri)
    return model.eval()


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, uri: str) -> None:
    """Give a model all its tensors, and no others; `uri` names them in errors.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen; they are named.
    """
    check_fit(model, tensors, uri=uri)
    model.load_state_dict(tensors)


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], *, uri: str) -> None:
    """Raise CheckpointError where `load_tensors` does."""
    own = model.state_dict()
    problems = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "misshapen": [
            f"{name} {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        words = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{uri} does not fit its {type(model).__name__}; tensors {words}")


def _check_size(config: Mapping[str, Any], *, num_tensors: int) -> None:
    numbers = {name: value for name, value in config.items() if type(value) is int}
    for name, value in numbers.items():
        if value > MAX_CONFIG_NUMBER:
            raise ValueError(f"{name}={value} is more than {MAX_CONFIG_NUMBER}")
    depth = math.prod(numbers.get(name, 1) for name in DEPTHS)
    if depth > max(1, num_tensors):
        raise ValueError(f"its {num_tensors} tensors are not those of {depth} blocks")


def unwrapped(model: nn.Module) -> nn.Module:
    """The bare model inside torch.compile and data parallelism, which prefix tensors' names."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _stored(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu")
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    return tensor.contiguous()


# --------------------------------------------------------------------------------- what JSON says


def to_json(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """JSON of a checkpoint's facts, keys in order.

    Raises:
        ValueError: JSON cannot say it, or a number is not finite.
    """
    try:
        return json.dumps(
            content, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts must be JSON, and numbers finite: {error}") from error


def parse_format(content: str | bytes, *, uri: str) -> dict[str, Any]:
    """The facts that `to_json` wrote, of this format and version.

    Raises:
        CheckpointError: they are of something else, or of a newer format.
    """
    try:
        fields: dict[str, Any] = json.loads(content)
        found = fields["format"], fields["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{uri} is not of a carn checkpoint") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{uri} is {found[0]} of format version {found[1]}; this version of carn reads "
            f"{FORMAT} of version {FORMAT_VERSION}"
        )
    return fields


def parse_architecture(fields: Mapping[str, Any]) -> Architecture:
    """An architecture from its JSON.

    Raises:
        KeyError, TypeError: a field is missing or of another type.
    """
    return Architecture(
        name=typed(fields["name"], str),
        config=typed(fields["config"], dict),
        scale=typed(fields["scale"], int),
    )


def typed(value: Any, kind: type) -> Any:
    """The value, when it is of this very type (True is no int).

    Raises:
        TypeError: it is of another.
    """
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """Names for an error message, the first few of many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
