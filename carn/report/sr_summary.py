"""From a run of super-resolution to its folder: `runs/<id>/` with the report and what it shows.

`python -m carn.report.sr_summary RUN_FOLDER` makes the report again from what lies there.
"""

import csv
import io
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from carn import storage
from carn.errors import CarnError, MissingObjectError, RunError
from carn.report.sr_records import (
    ConsistencySummary,
    DamagedPlace,
    LowPlace,
    Pace,
    RunSummary,
    Seam,
    SlideSummary,
)
from carn.report.sr_report import FAILURES, MAX_SHOWN, judge_run, needs_look, order_slides, render
from carn.slides.slide import Rgb

__all__ = [
    "ConsistencySummary",
    "DamagedPlace",
    "LowPlace",
    "Pace",
    "RunSummary",
    "Seam",
    "SlideSummary",
    "crop_pair",
    "crop_side_px",
    "join_seams",
    "seam_profile",
    "write_report",
    "write_run",
]

SUMMARY = "summary.json"
FAILURE_TABLE = "failures.csv"
REPORT = "report.html"
PICTURES = "pictures"
RUNS = "runs"
# A name that is one file in one folder on every storage, and nothing hidden.
SAFE_NAME = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]*")

# SR px on either side of a border whose steps are measured: at x2, a square of the input's JPEG.
SEAM_REACH_PX = 16
# From here on a step is "away from the border".
SEAM_BASELINE_PX = 4
# Longer sides of a zoomed crop, in LR px and in SR px: two of 512 px stand side by side on a
# screen with one of their px to one of its.
CROP_LR_PX = 256
CROP_SR_PX = 512
GAP_PX = 8
GAP_GREY = 128
JPEG_QUALITY = 92


# -------------------------------------------------------------------------------------- the folder


def write_run(output_uri: str, summary: RunSummary, pictures: Mapping[str, bytes]) -> str:
    """Write a run's folder below the output, over what an earlier call wrote; the report's URI.

    `runs/<run_id>/` gets pictures, `failures.csv`, `summary.json` and, last, `report.html`.

    Args:
        output_uri: folder or prefix of the slides.
        summary: what the run did.
        pictures: JPEGs and PNGs by the names that the slides give them.

    Raises:
        ValueError: the run's id or a picture's name is no plain file name, or a number is not one.
        AccessDeniedError, StorageError: the folder cannot be written.
    """
    for name in (summary.run_id, *pictures):
        if not SAFE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no plain file name; leave out slashes and a leading dot")
    folder = storage.join(storage.normalize(output_uri), f"{RUNS}/{summary.run_id}")
    text, page = summary.to_json(), render(summary, pictures)
    for name, content in pictures.items():
        storage.write_bytes(storage.join(folder, f"{PICTURES}/{name}"), content)
    for name, written in ((FAILURE_TABLE, list_failures(summary)), (SUMMARY, text), (REPORT, page)):
        storage.write_bytes(storage.join(folder, name), _to_bytes(written))
    return storage.join(folder, REPORT)


def _to_bytes(text: str) -> bytes:
    # Bytes of a file name that are no UTF-8 are lone surrogates in Python, and this their JSON.
    return text.encode(errors="backslashreplace")


def list_failures(summary: RunSummary) -> str:
    """The slides that failed or are in conflict, as CSV: name, uri, output_uri, status, reason."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(("name", "uri", "output_uri", "status", "reason"))
    for slide in order_slides(summary.slides):
        if slide.status in FAILURES:
            row = (slide.name, slide.uri, slide.output_uri or "", slide.status, slide.reason or "")
            rows.writerow(row)
    return buffer.getvalue()


def read_run(run_uri: str) -> RunSummary:
    """The summary in a run's folder.

    Raises:
        RunError: there is none, or it does not say what it must.
        AccessDeniedError, StorageError: it cannot be read.
    """
    uri = storage.join(storage.normalize(run_uri), SUMMARY)
    try:
        return RunSummary.from_json(storage.read_bytes(uri).decode())
    except MissingObjectError as error:
        raise RunError(
            f"{run_uri} holds no run of super-resolution: {SUMMARY} is missing; name a folder "
            f"below {RUNS}/ of an output"
        ) from error
    except ValueError as error:
        raise RunError(f"{uri}: {error}") from error


def write_report(run_uri: str) -> str:
    """Make `report.html` of a run again and return some lines that say what it came to.

    Raises:
        RunError: no run is there, or its summary or pictures are damaged.
        AccessDeniedError, StorageError: storage does not let it be read or written.
    """
    run_uri = storage.normalize(run_uri)
    summary = read_run(run_uri)
    try:
        page = render(summary, _read_pictures(run_uri, summary))
    except ValueError as error:
        raise RunError(f"{run_uri}: {error}") from error
    uri = storage.join(run_uri, REPORT)
    storage.write_bytes(uri, _to_bytes(page))
    return f"{judge_run(summary).text}\n  report {uri}"


def _read_pictures(run_uri: str, summary: RunSummary) -> dict[str, bytes]:
    """The pictures that the page may show; those that are not there are left out."""
    done = [slide for slide in summary.slides if slide.status == "done"]
    shown = sorted((s for s in done if s.pictures), key=lambda s: not needs_look(s))[:MAX_SHOWN]
    wanted = {name for slide in shown for name in slide.pictures.values()}
    wanted |= {slide.pictures["seam"] for slide in done if "seam" in slide.pictures}
    pictures = {}
    for name in sorted(filter(SAFE_NAME.fullmatch, wanted)):
        uri = storage.join(run_uri, f"{PICTURES}/{name}")
        if storage.is_file(uri):
            pictures[name] = storage.read_bytes(uri)
    return pictures


# ------------------------------------------------------------------------------- pixels to look at


def seam_profile(
    pixels: Rgb, *, border_px: int, axis: Literal[0, 1], reach_px: int = SEAM_REACH_PX
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How much neighbouring px differ, by their distance from a border, averaged along it.

    Args:
        pixels: (H, W, 3) on both sides of the border.
        border_px: the first row (axis 0) or column (axis 1) beyond the border.
        axis: across which the border is crossed: 0 downwards, 1 to the right.
        reach_px: largest distance. From 8 px of LR on, it takes in the squares next to the border
            of an input that is JPEG, whose own steps would else be seen at the border alone.

    Returns:
        (2 * reach + 1,) distances -reach..reach in px, 0 for the pair that the border parts, and,
        of the same shape, the mean |difference| of the pair at each, over RGB, in grey levels
        0..255.

    Raises:
        ValueError: fewer than reach + 1 px lie on a side of the border.
    """
    distances = np.arange(-reach_px, reach_px + 1)
    first, last = border_px - reach_px - 1, border_px + reach_px + 1
    if first < 0 or last > pixels.shape[axis]:
        raise ValueError(
            f"border_px {border_px} of {pixels.shape[axis]} px: {reach_px + 1} px are wanted "
            "on each side; cut a larger region"
        )
    part = np.moveaxis(pixels, axis, 0)[first:last].astype(np.int16)
    steps = np.abs(np.diff(part, axis=0)).mean(axis=(1, 2))
    return distances, steps


def join_seams(profiles: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]) -> Seam:
    """The mean of profiles of borders of blocks.

    Raises:
        ValueError: there is no profile.
    """
    if not profiles:
        raise ValueError("no profile to join; a slide of one block has no seam to show")
    distances = profiles[0][0]
    step = np.mean([values for _, values in profiles], axis=0)
    return Seam(
        distance_px=tuple(distances.tolist()),
        step=tuple(step.tolist()),
        baseline=float(step[np.abs(distances) >= SEAM_BASELINE_PX].mean()),
    )


def crop_side_px(scale: int) -> int:
    """Side of a crop in LR px whose pair is as wide as a screen: 256 at x2, 128 at x4."""
    return min(CROP_LR_PX, CROP_SR_PX // scale)


def crop_pair(lr_crop: Rgb, sr_crop: Rgb, scale: int) -> bytes:
    """A JPEG of LR enlarged by bicubic (left) and SR (right), of one place.

    The enlargement is Pillow's, whose kernel is that of `carn.models.bicubic`.

    Raises:
        ValueError: SR is not `scale` times as large as LR, or there is no pixel.
    """
    from PIL import Image

    height, width = lr_crop.shape[:2]
    if sr_crop.shape != (scale * height, scale * width, 3) or not lr_crop.size:
        raise ValueError(
            f"an SR crop of {sr_crop.shape} does not go with an LR crop of {lr_crop.shape} at x"
            f"{scale}; cut both from one place"
        )
    size = (scale * width, scale * height)
    pair = Image.new("RGB", (2 * size[0] + GAP_PX, size[1]), (GAP_GREY,) * 3)
    lr = Image.fromarray(np.ascontiguousarray(lr_crop))
    pair.paste(lr.resize(size, Image.Resampling.BICUBIC), (0, 0))
    pair.paste(Image.fromarray(np.ascontiguousarray(sr_crop)), (size[0] + GAP_PX, 0))
    buffer = io.BytesIO()
    pair.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    try:
        sys.stdout.write(tyro.cli(write_report, config=(tyro.conf.Positional,)) + "\n")
    except CarnError as error:
        sys.exit(f"sr_summary: {error}")
