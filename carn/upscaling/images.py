"""Plain images to super-resolved PNGs, on one machine, by the same code as whole slides.

A result says in its own text chunks what it was made from and with, so that a second run knows
whether it may be left alone.
"""

import dataclasses
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from carn import storage
from carn.errors import CarnError, MissingObjectError, SlideError
from carn.models.checkpoint import checkpoint_hash, load_model, read_checkpoint
from carn.models.shipped import shipped_for
from carn.slides.compression import read_compression
from carn.slides.image import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from carn.slides.slide import MAX_REGION_PX, Rgb
from carn.slides.slide_output import NOTICE
from carn.upscaling.blocks import block_region, num_blocks, read_block, upscale_block
from carn.upscaling.calibration import Calibration, calibrate
from carn.upscaling.engine import Engine, EngineConfig, make_engine
from carn.upscaling.lr_view import InputConfig, LrView, open_view
from carn.upscaling.suitability import (
    TrainingRange,
    file_warnings,
    pixel_warnings,
    with_range,
)
from carn.upscaling.telling import tell, told_by
from carn.version import code_version

logger = logging.getLogger(__name__)

# Keyword of the text chunk that holds the provenance, JSON.
PROVENANCE_KEYWORD = "carn"
BLOCK_PX = 4096
# An engine this far from float32 is worth a warning: a difference of 60 dB is 1 grey level in 4 px.
MIN_ACCURACY_DB = 60.0
# Effort of zlib, 0..9: 9 takes many times as long for a few percent.
PNG_COMPRESSION = 4
# PNG, https://www.w3.org/TR/png-3/: signature, and a text chunk no longer than ours can be.
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 1 << 16
# Before the pixels of a PNG; ours has 8.
MAX_CHUNKS = 1000

Outcome = Literal["written", "skipped", "failed"]


@dataclass(frozen=True, kw_only=True)
class UpscaleImages:
    """Super-resolve plain images: PNG, JPEG, TIFF, ... in, PNG out as <stem>_x<scale>.png."""

    output: str
    """Folder or prefix that the results go to."""
    checkpoint: str | None = None
    """Folder or prefix of a training run (its best checkpoint) or checkpoint, a .safetensors file,
    or the name of a network that comes with the project; None for that network at x2."""
    lr_like: str | None = None
    """How LR was made, said by hand to a network that adapts to it: a condition by name, such as
    jpeg80-420, or a .yaml file with one (docs/degradation.md). None: it is estimated for each
    image."""
    input: InputConfig = field(default_factory=InputConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    overwrite: bool = False
    """Replace results that are there. Otherwise those made from the same image with the same
    weights and settings are left alone, and others are an error."""


def upscale_images(
    images: Sequence[str],
    config: UpscaleImages,
    *,
    progress: Callable[[Sequence[str]], Iterator[str]] = iter,
) -> dict[str, Outcome]:
    """Super-resolve images one by one; a bad one is told and does not stop the others.

    Args:
        images: files, or folders or prefixes to search at any depth; local or `s3://`.
        config: how.
        progress: shows how far it is; gets the URIs of the images and hands them on.

    Returns:
        What became of each image, by URI.

    Raises:
        MissingObjectError: an image, or a folder with images in it, is not there.
        CheckpointError: the weights cannot be loaded.
        StorageError: storage does not answer.
    """
    uris = list_images(images)
    checkpoint = read_checkpoint(config.checkpoint or shipped_for(None))
    trained = TrainingRange.of(checkpoint)
    config = dataclasses.replace(config, input=with_range(config.input, trained))
    model = load_model(checkpoint)
    told = told_by(config.lr_like, scale=checkpoint.scale)
    tell(model, told, network=checkpoint.uri)
    engine = make_engine(model, config.engine)
    weights = checkpoint_hash(checkpoint)
    owners: dict[str, str] = {}
    outcomes: dict[str, Outcome] = {}
    for uri in progress(uris):
        name = f"{storage.stem_of(uri)}_x{engine.scale}.png"
        output_uri = storage.join(storage.normalize(config.output), name)
        try:
            if (owner := owners.setdefault(output_uri, uri)) != uri:
                raise SlideError(uri, f"would become {name}, as {owner} does; rename one")
            outcomes[uri] = _upscale_image(
                uri,
                output_uri,
                config=config,
                model=model,
                engine=engine,
                weights=weights,
                told=told,
                trained=trained,
                is_first="written" not in outcomes.values(),
            )
        except CarnError as error:
            logger.error("%s", error)
            outcomes[uri] = "failed"
    return outcomes


def list_images(roots: Sequence[str]) -> list[str]:
    """The images named, or found by suffix below folders and prefixes; distinct, in order.

    Raises:
        MissingObjectError: a root is neither a file nor anything with images in it.
        StorageError: storage does not answer.
    """
    found: dict[str, None] = {}
    for given in roots:
        root = storage.normalize(given)
        if storage.is_file(root):
            found[root] = None
            continue
        below = [item.uri for item in storage.list_objects(root)]
        images = [uri for uri in below if uri.lower().endswith(IMAGE_SUFFIXES)]
        if not images:
            raise MissingObjectError(
                root, f"no file, and no folder or prefix with images ({', '.join(IMAGE_SUFFIXES)})"
            )
        found.update(dict.fromkeys(images))
    return list(found)


def _upscale_image(
    uri: str,
    output_uri: str,
    *,
    config: UpscaleImages,
    model: nn.Module,
    engine: Engine,
    weights: str,
    told: Mapping[str, float],
    trained: TrainingRange | None,
    is_first: bool,
) -> Outcome:
    # What decides over the pixels, but for roundings; no path, which may name a patient.
    source = {
        "input": storage.content_hash(uri, max_bytes=MAX_IMAGE_BYTES),
        "checkpoint": weights,
        "input_config": config.input.settings(),
        "self_ensemble": engine.self_ensemble,
        "told": dict(told),
    }
    if not config.overwrite and storage.is_file(output_uri):
        # Files made before there was a choice do not say that it is off.
        made_from = {"self_ensemble": False, "told": {}} | (read_provenance(output_uri) or {})
        if source.items() <= made_from.items():
            return "skipped"
        raise SlideError(
            uri,
            f"{output_uri} is there, and was made from other pixels, weights or settings; name "
            "another output, or say --overwrite",
        )
    with open_view(uri, config.input, is_image=True) as view:
        pixels, found = upscale_view(view, model, engine, is_measured=is_first)
        compression = read_compression(view.slide, level=view.level)
        warnings = (
            *file_warnings(
                trained, compression=compression, mpp=view.mpp, mpp_range=config.input.mpp_range
            ),
            *pixel_warnings(trained, pixels=found.pixels, mpp=view.mpp),
        )
        for warning in warnings:
            logger.warning("%s: %s", uri, warning)
        provenance = source | {
            "scale": engine.scale,
            "engine": engine.description,
            "code_version": code_version(),
            "notice": NOTICE,
            "lr": {"compression": str(compression), "numbers": dict(found.numbers)},
            "warnings": list(warnings),
        }
        content = encode_png(
            pixels,
            provenance=provenance,
            mpp=view.mpp and (view.mpp[0] / engine.scale, view.mpp[1] / engine.scale),
            icc_profile=view.icc_profile,
        )
    storage.write_bytes(output_uri, content)
    return "written"


def upscale_view(
    view: LrView,
    model: nn.Module,
    engine: Engine,
    *,
    block_px: int = BLOCK_PX,
    is_measured: bool = False,
) -> tuple[Rgb, Calibration]:
    """All of a view, super-resolved in memory, its poolings frozen at those of the whole view.

    Args:
        view: a plain image.
        model: the network that `engine` runs.
        engine: its pooling is replaced.
        block_px: side of a block in SR px.
        is_measured: hold the engine against float32 on one place, and warn where it is far off.

    Returns:
        (scale * height, scale * width, 3) uint8 RGB, and what was settled for the whole view.

    Raises:
        SlideError: the result would have more than MAX_REGION_PX.
        DamagedTileError, StorageError: pixels cannot be read.
    """
    scale = engine.scale
    extent = (view.extent[0] * scale, view.extent[1] * scale)
    if extent[0] * extent[1] > MAX_REGION_PX:
        raise SlideError(
            view.slide.uri,
            f"becomes {extent[0]} x {extent[1]} px, more than the {MAX_REGION_PX} that are made in "
            "memory; store it as a tiled TIFF, and use jobs/super_resolve.py",
        )
    found = calibrate(view, model, engine, num_probes=1 if is_measured else 0)
    if found.accuracy_db < MIN_ACCURACY_DB:
        logger.warning(
            "%s: %s is %.1f dB from float32; try --precision fp32",
            *(view.slide.uri, engine.description, found.accuracy_db),
        )
    sr: Rgb = np.empty((extent[1], extent[0], 3), dtype=np.uint8)
    for index in range(math.prod(num_blocks(extent, block_px=block_px))):
        region = block_region(
            extent, block_px=block_px, index=index, scale=scale, halo_px=engine.halo_px
        )
        lr_block = read_block(view, region, on_damage=view.config.on_damaged_tile)
        made = upscale_block(lr_block, engine)
        sr[region.y0 : region.y1, region.x0 : region.x1] = made.pixels
    return sr, found


# ----------------------------------------------------------------------------------------- PNG


def encode_png(
    pixels: Rgb,
    *,
    provenance: dict[str, Any],
    mpp: tuple[float, float] | None,
    icc_profile: bytes | None,
) -> bytes:
    """An image as PNG: 8-bit RGB, its ICC profile, resolution, and where it came from.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        provenance: JSON values; `read_provenance` is the way back.
        mpp: um per px, (x, y), for the resolution chunk.
        icc_profile: embedded as it is.
    """
    text = PngInfo()
    text.add_text("Software", "carn")
    text.add_text("Disclaimer", NOTICE)
    text.add_text(PROVENANCE_KEYWORD, json.dumps(provenance, sort_keys=True))
    options: dict[str, Any] = {} if icc_profile is None else {"icc_profile": icc_profile}
    if mpp is not None:
        options["dpi"] = (25_400 / mpp[0], 25_400 / mpp[1])
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file, format="PNG", pnginfo=text, compress_level=PNG_COMPRESSION, **options
    )
    return file.getvalue()


def read_provenance(uri: str) -> dict[str, Any] | None:
    """What a PNG of ours was made from, or None where it does not say. No pixels are read.

    Raises:
        MissingObjectError, AccessDeniedError, StorageError: it cannot be read.
    """
    source = storage.open_source(uri)
    try:
        position = len(PNG_SIGNATURE)
        if source.read_ranges([(0, position)]) != [PNG_SIGNATURE]:
            return None
        for _ in range(MAX_CHUNKS):
            # A chunk is length, type, content, checksum (PNG section 5.3).
            (head,) = source.read_ranges([(position, 8)])
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind in (b"IDAT", b"IEND", b""):
                return None
            if kind == b"tEXt" and length <= MAX_TEXT_BYTES:
                (content,) = source.read_ranges([(position + 8, length)])
                keyword, _, text = content.partition(b"\0")
                if keyword == PROVENANCE_KEYWORD.encode():
                    found = json.loads(text)
                    return found if isinstance(found, dict) else None
            position += 8 + length + 4
        return None
    except (ValueError, RecursionError):
        return None
    finally:
        source.close()
