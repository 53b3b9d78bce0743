"""Fixed ways from HR to LR, by name, that networks are compared under."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from carn import storage
from carn.degradation.jpeg import SUBSAMPLINGS
from carn.degradation.scanner import BICUBIC, Degradation
from carn.degradation.variants import LrMaker
from carn.slides.slide import Rgb

_SCANNED = Degradation(blur_px=0.8, mean_weight=1.0, noise_levels=1.5, jpeg_quality=80)

# From clean LR to what scanners store, at x2. Blur is in HR px.
CONDITIONS: Mapping[str, Degradation] = {
    "bicubic": BICUBIC,
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

# What LR is made by where nobody says otherwise.
DEFAULT: Mapping[str, Degradation] = {"bicubic": BICUBIC}
# Every one of CONDITIONS that is not named before.
ALL = "all"
# Names become folders and columns.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# YAML takes 4:2:0 for hours, minutes and seconds unless it is quoted.
_SUBSAMPLING_BY_SECONDS = {
    sum(int(digit) * 60**place for place, digit in enumerate(reversed(name.split(":")))): name
    for name in SUBSAMPLINGS
}


def read_conditions(names: Sequence[str]) -> dict[str, Degradation]:
    """Look up conditions by name, or read them from a YAML file.

    Args:
        names: of CONDITIONS; `all` for those of them that are not named before; or paths and
            s3:// URIs of files that hold the fields of Degradation by the condition's name. In the
            order that is wanted.

    Raises:
        ValueError: a name is not known or said twice, or a file holds something else.
        StorageError: a file cannot be read.
    """
    found: dict[str, Degradation] = {}
    for name in names:
        is_file = name.endswith((".yaml", ".yml"))
        if not is_file and name != ALL and name not in CONDITIONS:
            raise ValueError(
                f"condition {name!r} is not one of {', '.join(CONDITIONS)}, nor {ALL!r}, nor a "
                ".yaml file"
            )
        if name == ALL:
            more = {known: way for known, way in CONDITIONS.items() if known not in found}
        else:
            more = _read(name) if is_file else {name: CONDITIONS[name]}
        if twice := found.keys() & more.keys():
            raise ValueError(f"condition {min(twice)!r} is there twice")
        found |= more
    return found


def apply_condition(hr: Rgb, way: Degradation, *, scale: int, tile: str) -> Rgb:
    """Make LR of a tile under a condition, which depends on nothing but these arguments.

    Args:
        hr: (H, W, 3) uint8, cropped to a multiple of the scale.
        way: the condition's.
        scale: 2, 3, 4 or 8.
        tile: its name, which noise is drawn by.

    Returns:
        (H // scale, W // scale, 3) uint8.

    Raises:
        ValueError: as `carn.degradation.scanner.apply`.
    """
    return LrMaker(conditions={"": way}).make(hr, scale=scale, tile=tile, variant=0)


def describe(way: Degradation) -> str:
    """Say in words how LR is made: `bicubic interpolation, JPEG quality 80, 4:2:0`."""
    words = [f"blur of {way.blur_px:g} HR px"] if way.blur_px else []
    if way.mean_weight == 0:
        words.append("bicubic interpolation")
    elif way.mean_weight == 1:
        words.append("mean over each LR px")
    else:
        words.append(f"mean over each LR px by {way.mean_weight:.0%}, else bicubic interpolation")
    if way.noise_levels:
        words.append(f"noise of {way.noise_levels:g} grey levels")
    if way.sharpen_amount:
        words.append(f"sharpened by {way.sharpen_amount:g} over {way.sharpen_px:g} LR px")
    if way.jpeg_quality is not None:
        tables = "" if way.jpeg_tables == "ijg" else f", {way.jpeg_tables} tables"
        words.append(f"JPEG quality {way.jpeg_quality}, {way.jpeg_subsampling}{tables}")
    return ", ".join(words)


def _read(uri: str) -> dict[str, Degradation]:
    try:
        content = yaml.safe_load(storage.read_bytes(storage.normalize(uri)))
    except yaml.YAMLError as error:
        raise ValueError(f"{uri} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{uri} must hold conditions by name, each with its fields")
    return {str(name): _condition(uri, str(name), fields) for name, fields in content.items()}


def _condition(uri: str, name: str, fields: Any) -> Degradation:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{uri}: condition {name!r}: names are of letters, digits, dots, hyphens and "
            "underscores; rename it"
        )
    if name == ALL or name in CONDITIONS:
        raise ValueError(f"{uri}: condition {name!r} is a name that is taken; rename it")
    try:
        values = dict(fields or {})
        if "jpeg_subsampling" in values:
            said = values["jpeg_subsampling"]
            values["jpeg_subsampling"] = _SUBSAMPLING_BY_SECONDS.get(said, said)
        return Degradation(**values)
    except (TypeError, ValueError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(Degradation))
        raise ValueError(f"{uri}: condition {name!r}: {error}; its fields are {known}") from error
