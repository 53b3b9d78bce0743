"""Settings by name: the paper's for all networks alike, or each network's own.

The CARN paper trained every network that it compares in one way, which is what `TrainConfig` does
by default. Where a network is to show what its own authors got out of it, take its own recipe.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from carn.models.table import ModelName
from carn.training.config import TrainConfig

Recipe = Literal["paper", "own"]

# What the networks' own authors did otherwise than the CARN paper. Patches are in LR px: they
# state them so, and HR px follow from the scale.
_OWN_PATCH_LR_PX: Mapping[ModelName, int] = {
    # EDSR, https://doi.org/10.1109/CVPRW.2017.151, section 4.2
    "edsr": 48,
    # RCAN, https://doi.org/10.1007/978-3-030-01234-2_18, section 4.1
    "rcan": 48,
    # RDN, https://doi.org/10.1109/CVPR.2018.00262, section 5.1
    "rdn": 32,
}
_OWN_VALUES: Mapping[ModelName, Mapping[str, Any]] = {
    # SRGAN, https://doi.org/10.1109/CVPR.2017.19, section 3.2: HR patches of 96 px, 1e5 updates at
    # 1e-4 and 1e5 at a tenth of it (four halvings are nearest: a sixteenth).
    "srgan": {"patch_px": 96, "steps": 200_000, "halve_every": 50_000},
    # The published training script of SWD-Net, as numbers of updates with 1000 to the epoch: 600
    # epochs a stage, halved every 150, batches of 24.
    "swdnet": {
        "batch_size": 24,
        "weight_decay": 1e-5,
        "gradient_clip": 0.4,
        "augment": False,
        "halve_every": 150_000,
        "steps": 1_200_000,
    },
}


def recipe(name: Recipe, *, model: ModelName, scale: int) -> TrainConfig:
    """The settings of a recipe.

    Args:
        name: `paper`, the CARN paper's for whichever network; `own`, that of its own authors.
        model: the network.
        scale: the SR factor.

    Raises:
        ValueError: an unknown name, network or scale.
    """
    if name not in get_args(Recipe):
        raise ValueError(f"recipe={name!r} must be one of {', '.join(get_args(Recipe))}")
    values: dict[str, Any] = {"model": model, "scale": scale}
    if name == "own":
        values |= _OWN_VALUES.get(model, {})
        if model in _OWN_PATCH_LR_PX:
            values["patch_px"] = _OWN_PATCH_LR_PX[model] * scale
    return with_values(TrainConfig(), values)


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The settings with some changed, by the names of their fields: {"alpha": 0.7, "steps": 100}.

    Field names are unique over all parts of `TrainConfig`, so no part has to be named; files that
    nest them as `TrainConfig.to_dict` does are read as well.

    Raises:
        ValueError: a name that is no field, or a value of the wrong type or range.
    """
    places = field_places()
    changes: dict[str, dict[str, Any]] = {}
    for name, value in flat(values).items():
        if name not in places:
            raise ValueError(f"{name!r} is no setting of training; there are {', '.join(places)}")
        part, wanted = places[name]
        changes.setdefault(part, {})[name] = _typed(name, value, wanted)
    top = changes.pop("", {})
    parts = {
        part: dataclasses.replace(getattr(config, part), **fields)
        for part, fields in changes.items()
    }
    return dataclasses.replace(config, **parts, **top)


def field_places() -> dict[str, tuple[str, Any]]:
    """Every setting by name: the part of `TrainConfig` that has it ("" for itself), its type."""
    places: dict[str, tuple[str, Any]] = {}
    for part, part_type in get_type_hints(TrainConfig).items():
        if not dataclasses.is_dataclass(part_type):
            places[part] = ("", part_type)
            continue
        for name, field_type in get_type_hints(part_type).items():
            assert name not in places, f"two settings are called {name}"
            places[name] = (part, field_type)
    return places


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the parts of `TrainConfig` that they were nested in."""
    parts = {
        part for part, kind in get_type_hints(TrainConfig).items() if dataclasses.is_dataclass(kind)
    }
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in parts and isinstance(value, Mapping):
            found |= dict(value)
        else:
            found[name] = value
    return found


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """The value as its field holds it: whole numbers become floats, lists tuples."""
    origin, kinds = get_origin(wanted), get_args(wanted)
    shown = getattr(wanted, "__name__", None) or str(wanted)
    wrong = ValueError(f"{name}={value!r} is not of type {shown}")
    if origin is Literal:
        if value not in kinds:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, kinds))}")
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
            raise wrong
        value = tuple(_typed(name, item, kind) for item, kind in zip(value, kinds, strict=True))
    elif kinds:  # a union with None
        (kind,) = (kind for kind in kinds if kind is not type(None))
        value = None if value is None else _typed(name, value, kind)
    elif wanted is float and type(value) in (int, float, str):
        try:
            value = float(value)  # YAML takes 1e-4 for text
        except ValueError:
            raise wrong from None
    elif type(value) is not wanted:
        raise wrong
    return value
