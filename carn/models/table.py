"""The one table of models, and the way from a name and a configuration to a network."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from torch import nn

from carn.models.adaptive_carn import AdaptiveCarn, AdaptiveCarnConfig
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.models.carn import Carn, CarnConfig
from carn.models.edsr import Edsr, EdsrConfig
from carn.models.rcan import Rcan, RcanConfig
from carn.models.rdn import Rdn, RdnConfig
from carn.models.srcnn import Srcnn, SrcnnConfig
from carn.models.srgan import Srgan, SrganConfig
from carn.models.swdnet import SwdNet, SwdNetConfig

ModelName = Literal[
    "bicubic", "srcnn", "srgan", "edsr", "rdn", "rcan", "swdnet", "carn", "adaptive-carn"
]
ModelConfig = (
    BicubicConfig
    | SrcnnConfig
    | SrganConfig
    | EdsrConfig
    | RdnConfig
    | RcanConfig
    | SwdNetConfig
    | CarnConfig
    | AdaptiveCarnConfig
)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A row of the table of models."""

    title: str
    """The model's name in print."""
    model: type[nn.Module]
    """Made by `model(config, scale=scale)`."""
    config: type[ModelConfig]
    """Its defaults are the configuration that the CARN paper compares."""


# In the order of the paper's tables, then what goes beyond them.
MODELS: Mapping[ModelName, ModelEntry] = MappingProxyType(
    {
        "bicubic": ModelEntry(title="bicubic", model=Bicubic, config=BicubicConfig),
        "srcnn": ModelEntry(title="SRCNN", model=Srcnn, config=SrcnnConfig),
        "srgan": ModelEntry(title="SRGAN", model=Srgan, config=SrganConfig),
        "edsr": ModelEntry(title="EDSR", model=Edsr, config=EdsrConfig),
        "rdn": ModelEntry(title="RDN", model=Rdn, config=RdnConfig),
        "rcan": ModelEntry(title="RCAN", model=Rcan, config=RcanConfig),
        "swdnet": ModelEntry(title="SWD-Net", model=SwdNet, config=SwdNetConfig),
        "carn": ModelEntry(title="CARN", model=Carn, config=CarnConfig),
        "adaptive-carn": ModelEntry(
            title="Adaptive CARN", model=AdaptiveCarn, config=AdaptiveCarnConfig
        ),
    }
)


def build_model(name: ModelName, *, scale: int, config: ModelConfig | None = None) -> nn.Module:
    """A model with fresh weights, drawn from torch's generator; on the default device.

    Args:
        name: a key of MODELS.
        scale: 2, 3, 4 or 8.
        config: of the class that MODELS names; None for the paper's.

    Raises:
        ValueError: an unknown name or scale, or another model's configuration.
    """
    entry = _entry(name)
    config = entry.config() if config is None else config
    if not isinstance(config, entry.config):
        raise ValueError(
            f"{name} takes a {entry.config.__name__}, and not a {type(config).__name__}"
        )
    return entry.model(config, scale=scale)


def config_to_dict(config: ModelConfig) -> dict[str, object]:
    """The configuration as JSON can hold it; `config_from_dict` is the way back."""
    return {
        field.name: _listed(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def config_from_dict(name: ModelName, content: Mapping[str, object]) -> ModelConfig:
    """The configuration that `config_to_dict` (and JSON) made `content` from.

    Raises:
        ValueError: an unknown model, keys that its configuration does not have, keys that are
            missing (a default may have changed since), or a value of the wrong type or range.
    """
    config_class = _entry(name).config
    types = get_type_hints(config_class)
    if unknown := sorted(content.keys() - types.keys()):
        raise ValueError(
            f"{config_class.__name__} has no {', '.join(unknown)}, only {', '.join(types) or '-'}"
        )
    if missing := sorted(types.keys() - content.keys()):
        raise ValueError(f"{config_class.__name__} needs {', '.join(missing)} as well")
    values: dict[str, Any] = {key: _typed(key, content[key], wanted=types[key]) for key in content}
    return config_class(**values)


def _entry(name: str) -> ModelEntry:
    for known, entry in MODELS.items():
        if known == name:
            return entry
    raise ValueError(f"model {name!r} is not one of {', '.join(MODELS)}")


def _listed(value: object) -> object:
    return [_listed(part) for part in value] if isinstance(value, tuple) else value


def _typed(key: str, value: object, *, wanted: object) -> object:
    """A value from JSON as its field has it: lists become tuples, whole numbers floats."""
    if wanted in (int, bool, str) and type(value) is wanted:
        return value
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    parts = getattr(wanted, "__args__", ())
    if parts and isinstance(value, (list, tuple)):
        if parts[-1] is Ellipsis:
            parts = (parts[0],) * len(value)
        if len(parts) == len(value):
            return tuple(
                _typed(f"{key}[{number}]", part, wanted=parts[number])
                for number, part in enumerate(value)
            )
    raise ValueError(f"{key}={value!r} is not of type {getattr(wanted, '__name__', wanted)}")
