"""Fixed ways from HR to LR, by name, that networks are compared under."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from carn import storage
from carn.degradation.scanner import Degradation

_SCANNED = Degradation(blur_px=0.8, mean_weight=1.0, noise_levels=1.5, jpeg_quality=80)

# From clean LR to what scanners store, at x2. Blur is in HR px.
CONDITIONS: Mapping[str, Degradation] = {
    "bicubic": Degradation(),
    "mean": Degradation(mean_weight=1.0),
    "jpeg90-420": Degradation(jpeg_quality=90),
    "jpeg80-420": Degradation(jpeg_quality=80),
    "jpeg70-422": Degradation(jpeg_quality=70, jpeg_subsampling="4:2:2"),
    "mean-jpeg85-444": Degradation(mean_weight=1.0, jpeg_quality=85, jpeg_subsampling="4:4:4"),
    "scanned-jpeg80": _SCANNED,
    "sharpened-jpeg75": dataclasses.replace(
        _SCANNED, sharpen_amount=0.6, sharpen_px=1.0, jpeg_quality=75
    ),
}


def read_conditions(names: Sequence[str]) -> dict[str, Degradation]:
    """Look up conditions by name, or read them from a YAML file.

    Args:
        names: of CONDITIONS, or paths and s3:// URIs of files that hold the fields of Degradation
            by the condition's name; in the order that is wanted.

    Raises:
        ValueError: a name is not known or said twice, or a file holds something else.
        StorageError: a file cannot be read.
    """
    found: dict[str, Degradation] = {}
    for name in names:
        is_file = name.endswith((".yaml", ".yml"))
        if not is_file and name not in CONDITIONS:
            raise ValueError(
                f"condition {name!r} is not one of {', '.join(CONDITIONS)}, nor a .yaml file"
            )
        more = _read(name) if is_file else {name: CONDITIONS[name]}
        if twice := found.keys() & more.keys():
            raise ValueError(f"condition {min(twice)!r} is there twice")
        found |= more
    return found


def _read(uri: str) -> dict[str, Degradation]:
    try:
        content = yaml.safe_load(storage.read_bytes(storage.normalize(uri)))
    except yaml.YAMLError as error:
        raise ValueError(f"{uri} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{uri} must hold conditions by name, each with its fields")
    return {str(name): _condition(uri, str(name), fields) for name, fields in content.items()}


def _condition(uri: str, name: str, fields: Any) -> Degradation:
    try:
        return Degradation(**(fields or {}))
    except (TypeError, ValueError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(Degradation))
        raise ValueError(f"{uri}: condition {name!r}: {error}; its fields are {known}") from error
