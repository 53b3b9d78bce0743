"""Describe slides, and make LR like them.

python -m carn.degradation describe slides/*.svs s3://lab/2026/a.tif --output scanner.yaml
python -m carn.degradation calibrate images.txt

The first says of each slide or image how it is stored, how sharp and how noisy it is, and writes
settings by which training makes LR like it. The second finds the constants behind that anew.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from carn import storage
from carn.degradation.config import DegradationConfig
from carn.degradation.describe import (
    NUM_WINDOWS,
    SlideDescription,
    calibrate,
    describe_slide,
)
from carn.degradation.jpeg import SUBSAMPLINGS, TABLES, Subsampling
from carn.errors import CarnError
from carn.slides.image import IMAGE_SUFFIXES
from carn.slides.listing import SLIDE_SUFFIXES
from carn.slides.opening import open_image
from carn.upscaling.inputs import SlideInput, find_inputs

# Variants of each tile: with one, a tile would show but one of the ways in the ranges.
LR_VARIANTS = 8
# The nearest of the subsamplings that LR is made with.
_NEAREST: dict[str, Subsampling] = {"4:4:0": "4:2:2", "4:1:1": "4:2:0", "4:1:0": "4:2:0"}
# Slides that are named in the head of the YAML.
_MAX_NAMED = 50


def describe(
    slides: tyro.conf.Positional[tuple[str, ...]],
    *,
    output: str | None = None,
    overwrite: bool = False,
    level: int = 0,
    mpp: float | None = None,
    windows: int = NUM_WINDOWS,
) -> int:
    """Describe slides and plain images, and write settings that make LR like them.

    Args:
        slides: files, folders, prefixes, globs or manifests, local or s3://.
        output: YAML file for `jobs/train.py --config`; none is written without.
        overwrite: replace what is there.
        level: pyramid level to describe, 0 the finest.
        mpp: um per level-0 px, for slides and images that do not say.
        windows: most places of each slide to look at.
    """
    target = None if output is None else storage.normalize(output)
    if not slides:
        raise CarnError("no slides are named; give files, folders, globs or s3:// prefixes")
    if target is not None and not overwrite and storage.is_file(target):
        raise CarnError(f"{target} is there already; name another, or give --overwrite")
    described: list[SlideDescription] = []
    num_failed = 0
    for item in _inputs(slides):
        try:
            if item.problem is not None:
                raise CarnError(f"{item.uri}: {item.problem}")
            said = item.mpp_um if item.mpp_um is not None else mpp
            found = describe_slide(item.uri, level=level, mpp_um=said, num_windows=windows)
        except CarnError as error:
            num_failed += 1
            print(f"describe: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
            continue
        described.append(found)
        print("\n".join(lines(found)), flush=True)  # noqa: T201
    if target is not None and described:
        content = scanner_yaml(described).encode()
        if overwrite:
            storage.write_bytes(target, content)
        elif not storage.create_bytes(target, content):
            raise CarnError(f"{target} has come to be meanwhile; give --overwrite to replace it")
    if num_failed:
        print(f"describe: {num_failed} could not be read", file=sys.stderr)  # noqa: T201
    return 2 if num_failed else 0


def calibrate_images(images: tyro.conf.Positional[tuple[str, ...]], ways: int = 16) -> int:
    """Print the constants of the estimates, found anew.

    Args:
        images: HR of 40x slides: files, folders, globs or manifests.
        ways: LR images that each is made into.
    """
    pixels = {}
    for item in find_inputs([], images):
        if item.problem is not None:
            raise CarnError(f"{item.uri}: {item.problem}")
        with open_image(item.uri) as image:
            pixels[item.uri] = image.read_region(0, 0, *image.extent)
    print(f"CALIBRATION = {calibrate(pixels, num_ways=ways)!r}")  # noqa: T201
    return 0


def _inputs(roots: Sequence[str]) -> Iterator[SlideInput]:
    """List slides under each root, or else images; a root with neither has a problem."""
    seen = set()
    for root in roots:
        try:
            found = _below(root)
        except CarnError as error:
            reason = str(error).removeprefix(f"{root}: ")
            found = [SlideInput(uri=root, name=root, problem=reason)]
        for item in found:
            if item.uri not in seen:
                seen.add(item.uri)
                yield item


def _below(root: str) -> list[SlideInput]:
    # A .png is never a slide, and a .txt lists any.
    is_plain = root.lower().endswith(IMAGE_SUFFIXES) and not root.lower().endswith(SLIDE_SUFFIXES)
    if is_plain:
        return find_inputs([], [root])
    try:
        return find_inputs([root])
    except CarnError as error:
        try:
            return find_inputs([], [root])
        except CarnError:
            raise error from None


# ----------------------------------------------------------------------------------------- text


def lines(found: SlideDescription) -> list[str]:
    """Write a few lines about a slide."""
    pixels = found.pixels
    size = f"{found.extent[0]} x {found.extent[1]} px"
    mpp = "um per px not known"
    if found.mpp is not None:
        mpp = f"{found.mpp[0]:.4g} x {found.mpp[1]:.4g} um per px"
    sharpness = "not told"
    if pixels.blur_px is not None:
        sharpness = f"falls by {pixels.fall_db:.1f} dB, as by a blur of {pixels.blur_px} HR px"
        if pixels.is_sharpened:
            sharpness += "; sharper than the optics make it"
    noise = "not told" if pixels.noise_levels is None else f"{pixels.noise_levels} grey levels"
    return [
        found.uri,
        f"  size         {size} on level {found.level}, {mpp}, {found.vendor}",
        f"  compression  {found.compression}",
        f"  sharpness    {sharpness}",
        f"  noise        {noise}",
        f"  seen         {found.num_windows[0]} windows of tissue, {found.num_windows[1]} of glass",
        *(f"  note         {note}" for note in found.notes),
    ]


def scanner_yaml(described: Sequence[SlideDescription]) -> str:
    """Write settings of DegradationConfig that cover all of the slides as YAML with comments.

    Args:
        described: one or more.
    """
    settings = _settings(described)
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value, _ in settings
    }
    # What does not hold together fails here, not when training begins.
    DegradationConfig(**fields)
    names = [f"#   {storage.name_of(found.uri)}" for found in described[:_MAX_NAMED]]
    if len(described) > _MAX_NAMED:
        names.append(f"#   and {len(described) - _MAX_NAMED} more")
    head = [
        f"# LR like that of {len(described)} slides, for jobs/train.py --config:",
        *names,
        "# Made by python -m carn.degradation describe. Ranges reach over the intervals of all.",
    ]
    body = [f"# {comment}\n{name}: {json.dumps(value)}" for name, value, comment in settings]
    return "\n".join([*head, *body]) + "\n"


_Setting = tuple[str, Any, str]


def _settings(described: Sequence[SlideDescription]) -> list[_Setting]:
    known = [
        found for found in described if found.is_calibrated and found.pixels.blur_px is not None
    ]
    num_sharpened = sum(found.pixels.is_sharpened for found in known)
    return [
        ("degradation", "scanner", "Blur, sampling, noise, sharpening and JPEG as below."),
        ("clean_share", 0.0, "All LR is like the slides."),
        ("lr_variants", LR_VARIANTS, "Ways that each tile is seen in."),
        *_blur_settings(known, num_slides=len(described)),
        ("sampling", "mixed", "Cannot be told from pixels: means, bicubic and in between."),
        *_noise_settings(described),
        (
            "sharpen_share",
            round(num_sharpened / max(1, len(known)), 2),
            f"{num_sharpened} of {len(known)} are sharper than LR of unblurred HR.",
        ),
        *_jpeg_settings(described),
    ]


def _blur_settings(known: Sequence[SlideDescription], *, num_slides: int) -> list[_Setting]:
    blurs = [found.pixels.blur_px for found in known if found.pixels.blur_px is not None]
    if not blurs:
        blur, share = _default("blur_px"), _default("blur_share")
        why = "The default: no slide says that it has px of the size blur is calibrated for."
        return [("blur_px", list(blur), why), ("blur_share", share, "The default.")]
    low, high = _outwards(min(blur.low for blur in blurs), max(blur.high for blur in blurs))
    return [
        ("blur_px", [low, high], f"Estimated on {len(blurs)} of {num_slides}; HR px."),
        ("blur_share", 1.0 if high > 0 else 0.0, "The range begins where the least blurred are."),
    ]


def _noise_settings(described: Sequence[SlideDescription]) -> list[_Setting]:
    told = [found.pixels for found in described if found.pixels.noise_levels is not None]
    noises = [pixels.noise_levels for pixels in told if pixels.noise_levels is not None]
    if not noises:
        noise, share = _default("noise_levels"), _default("noise_share")
        return [
            ("noise_levels", list(noise), "The default: noise is not told of any slide."),
            ("noise_share", share, "The default."),
        ]
    low, high = _outwards(min(noise.low for noise in noises), max(noise.high for noise in noises))
    num_hidden = sum(pixels.is_noise_hidden for pixels in told)
    share, why = 1.0, "Of all, for the range begins where there is least."
    if num_hidden:
        share = _default("noise_share")
        why = f"The default: JPEG hides the noise of {num_hidden}."
    comment = f"Estimated on {len(noises)} of {len(described)}; grey levels at mid-grey."
    return [("noise_levels", [low, high], comment), ("noise_share", share, why)]


def _jpeg_settings(described: Sequence[SlideDescription]) -> list[_Setting]:
    known = [found.compression for found in described if found.compression.codec != "unknown"]
    jpegs = [found for found in known if found.codec == "jpeg"]
    if not known:
        comment = "The default: it is not known how the slides are stored."
        return [("jpeg_share", _default("jpeg_share"), comment)]
    num_other = sum(found.codec in ("jpeg2000", "other") for found in known)
    comment = f"{len(jpegs)} of the {len(known)} of which it is known are JPEG"
    comment += f"; {num_other} are lossy otherwise, which is left out." if num_other else "."
    settings: list[_Setting] = [("jpeg_share", round(len(jpegs) / len(known), 2), comment)]
    told = [(found, found.quality) for found in jpegs if found.quality is not None]
    if not told:
        return settings
    qualities = [quality.quality for _, quality in told]
    num_exact = sum(quality.is_exact for _, quality in told)
    families = {quality.tables for _, quality in told}
    chroma = {
        "4:4:4"
        if found.is_rgb or found.subsampling is None
        else _NEAREST.get(found.subsampling, found.subsampling)
        for found, _ in told
    }
    return [
        *settings,
        (
            "jpeg_quality",
            [min(qualities), max(qualities)],
            f"By the files' tables, {num_exact} of {len(told)} exactly.",
        ),
        (
            "jpeg_subsampling",
            [name for name in SUBSAMPLINGS if name in chroma],
            "By the files' headers; RGB and grey count as 4:4:4.",
        ),
        (
            "jpeg_tables",
            [name for name in TABLES if name in families],
            "The tables that the files' are, or are nearest to.",
        ),
    ]


def _default(name: str) -> Any:
    return next(
        field.default for field in dataclasses.fields(DegradationConfig) if field.name == name
    )


def _outwards(low: float, high: float) -> tuple[float, float]:
    """Round both to two decimals, so that the range holds them."""
    return math.floor(low * 100) / 100, math.ceil(high * 100) / 100


def cli() -> int:
    """Run the subcommand; returns the process's exit status."""
    try:
        status: int = tyro.extras.subcommand_cli_from_dict(
            {"describe": describe, "calibrate": calibrate_images},
            prog="python -m carn.degradation",
        )
    except (CarnError, ValueError) as error:
        print(f"degradation: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return status


if __name__ == "__main__":
    sys.exit(cli())
