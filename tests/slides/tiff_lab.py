"""Slides that tests of written TIFFs write, and how they write and read them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import tifffile
from PIL import ImageCms

from carn import storage
from carn.slides.slide import Rgb
from carn.slides.slide_output import (
    Finished,
    OutputSpec,
    SlideFormat,
    SlideOutput,
    block_box,
    open_output,
)

LOSSLESS = SlideFormat(compression="lossless", tile_px=64)
JPEG = SlideFormat(tile_px=64)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Blocks of a few hundred px are parts of their own, unless a test says otherwise.
MIN_PART_BYTES = 20_000


def turned_tissue() -> Rgb:
    """1536 x 1536 px, no two 512-px squares of it alike in every px."""
    square = skimage.data.immunohistochemistry()
    rows = [np.concatenate([np.rot90(square, k + j) for k in range(3)], axis=1) for j in range(3)]
    return np.ascontiguousarray(np.concatenate(rows))


def spec_of(
    folder: Path | str, pixels: Rgb, form: SlideFormat = JPEG, **options: Any
) -> OutputSpec:
    return OutputSpec(
        **{
            "uri": storage.join(str(folder), "slide.tif"),
            "work_uri": storage.join(str(folder), "work"),
            "extent": (pixels.shape[1], pixels.shape[0]),
            "block_px": 256,
            "mpp": (0.25, 0.25),
            "provenance": {"slide": "sha256:12", "scale": 2},
            "format": form,
            **options,
        }
    )


def cut(spec: OutputSpec, pixels: Rgb, index: int) -> Rgb:
    x0, y0, x1, y1 = block_box(spec, index)
    return pixels[y0:y1, x0:x1]


def write(output: SlideOutput, pixels: Rgb, indexes: Any = None) -> None:
    output.begin()
    for index in range(output.num_blocks) if indexes is None else indexes:
        facts = {"index": index, "mean": np.float32(1.5), "name": f"b{index}", "grid": np.eye(2)}
        output.write_block(index, cut(output.spec, pixels, index), facts=facts)


def written(spec: OutputSpec, pixels: Rgb, indexes: Any = None) -> Finished:
    output = open_output(spec)
    write(output, pixels, indexes)
    return output.finish(icc_profile=ICC)


def levels_by_tifffile(content: bytes) -> list[Rgb]:
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        return [page.asarray() for page in tiff.pages]
