"""The last step of a slide: notes beside it, the top of its pyramid, the commit."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carn import storage
from carn.errors import StorageError
from carn.report.sr_records import (
    ConsistencySummary,
    DamagedPlace,
    LowPlace,
    LrSummary,
    PictureKind,
    Seam,
    SlideSummary,
)
from carn.report.sr_summary import crop_pair, join_seams, seam_profile
from carn.slides.slide_output import SlideOutput, open_output
from carn.upscaling import consistency
from carn.upscaling.calibration import Calibration
from carn.upscaling.outbox import is_done, mark_done, publish_notes, stage_notes, unmark
from carn.upscaling.showing import JPEG_PX, SHOWN, jpeg, rim_px
from carn.upscaling.suitability import pixel_warnings
from carn.upscaling.task import SlidePlan, SlideTask, key_of
from carn.upscaling.work import (
    ICC_NAME,
    THUMBNAIL_NAME,
    calibration_uri,
    check_identity,
    kept_look,
    region_of,
)

logger = logging.getLogger(__name__)

# What the notes beside a slide repeat of its summary.
NOTED = (
    *("lr_extent", "mpp_in", "mpp_out", "num_blocks", "num_inferred_px", "num_background_px"),
    *("engine", "accuracy_db", "consistency", "damage", "lr", "warnings"),
)
# Places below the threshold that are listed of one slide: the lowest ones.
MAX_LISTED = 200


def finish(
    plan: SlidePlan, *, threshold_db: float, has_pictures: bool
) -> tuple[SlideSummary, dict[str, bytes]]:
    """Commit a slide whose blocks are all on storage; may be called again if it was killed.

    Writes `<name>.consistency.png` and `<name>.json` beside the slide first, then the slide. Where
    that takes another's place, they take the place of the other's after it: who is killed between
    leaves them in the work folder, and `outbox` sees to it that they get there.

    Args:
        plan: the slide.
        threshold_db: places where SR, made small again, is farther from LR are listed.
        has_pictures: make those of the report as well.

    Returns:
        What became of it, and pictures by file name.

    Raises:
        UnfinishedError: blocks are missing or no longer what was recorded.
        CarnError: storage failed, or the input was replaced.
    """
    task, output = plan.task, open_output(plan.spec)
    if is_done(task):  # by a call that was killed before it could say so
        _tidy_up(output, task)
        return _noted(plan), {}
    num_inferred_px = num_background_px = 0
    damage: list[DamagedPlace] = []
    shown: dict[str, Any] = {}
    engines = set()
    maps = []
    for index, facts in output.block_facts():
        region = region_of(plan, index)
        maps.append((region.sr_box, facts["consistency"]))
        num_inferred_px += int(facts["num_inferred_px"])
        num_background_px += int(facts["num_background_px"])
        damage += [DamagedPlace(**place) for place in json.loads(facts["damage"])]
        engines.add(str(facts["engine"]))
        shown |= {name: facts[name] for name in SHOWN if name in facts}
    errors = consistency.join(maps, extent_sr=plan.spec.extent, scale=task.scale)
    heat_map = consistency.heat_map_png(errors)
    calibrations = _calibrations(plan)
    known_db = [item.accuracy_db for item in calibrations if not math.isnan(item.accuracy_db)]
    check_identity(task)
    summary = replace(
        _begun_summary(plan),
        damage=tuple(damage),
        engine="; ".join(sorted(engines)),
        accuracy_db=min(known_db, default=None),
        lr=_lr_summary(plan, calibrations),
        warnings=(*plan.warnings, *_sharpness_warnings(plan, calibrations)),
        consistency=_summarized(errors, plan, threshold_db=threshold_db),
        seam=_seam(shown, task.scale),
        num_inferred_px=num_inferred_px,
        num_background_px=num_background_px,
    )
    pictures = _pictures(shown, task.scale) if has_pictures else {}
    if has_pictures:
        pictures["consistency"] = heat_map
        thumbnail = kept_look(plan, THUMBNAIL_NAME)
        pictures |= {"lr": thumbnail} if thumbnail is not None else {}
    stage_notes(task, {"consistency.png": heat_map, "json": _notes(plan, summary).encode()})
    is_replacing = storage.is_file(task.committed_uri)
    base = storage.join(task.output, task.name)
    if not is_replacing:  # who finds a new slide finds its notes
        publish_notes(task.work_uri, base)
    # The records stay until the slide is noted as done: who is killed before has all of this to do
    # again.
    unmark(task)
    finished = output.finish(icc_profile=_rgb_profile(plan), keep_work=True)
    if is_replacing:
        publish_notes(task.work_uri, base)
    _tidy_up(output, task)
    if has_pictures:
        pictures["sr"] = jpeg(finished.thumbnail)
    names = {kind: _picture_name(plan, kind, content) for kind, content in pictures.items()}
    summary = replace(
        summary, size_bytes=finished.size, num_parts=finished.num_parts, pictures=names
    )
    return summary, {names[kind]: content for kind, content in pictures.items()}


def _tidy_up(output: SlideOutput, task: SlideTask) -> None:
    """Note a slide as done, and remove its work folder; another run does what fails here."""
    try:
        mark_done(task)
        output.discard()
    except StorageError as error:
        logger.warning("%s is finished, but not tidied up: %s", task.name, error)


def _begun_summary(plan: SlidePlan) -> SlideSummary:
    """What the plan says of a finished slide."""
    return SlideSummary(
        name=plan.task.name,
        uri=plan.task.uri,
        status="done",
        scale=plan.task.scale,
        output_uri=plan.task.output_uri,
        lr_extent=plan.lr_extent,
        mpp_in=plan.mpp,
        mpp_out=plan.spec.mpp,
        num_blocks=plan.num_blocks,
        num_blocks_resumed=len(plan.done),
    )


def _noted(plan: SlidePlan) -> SlideSummary:
    """What became of a slide whose records are gone: its notes say it."""
    task = plan.task
    notes = json.loads(storage.read_bytes(storage.join(task.output, f"{task.name}.json")))
    facts = json.loads(_begun_summary(plan).to_json())
    # Notes of an earlier version do not say everything.
    facts |= {name: notes[name] for name in NOTED if name in notes}
    return replace(
        SlideSummary.from_json(json.dumps(facts)), size_bytes=storage.stat(task.committed_uri).size
    )


def _calibrations(plan: SlidePlan) -> list[Calibration]:
    """Those of all engines that worked on the slide; their windows are the same."""
    return [
        Calibration.from_bytes(storage.read_bytes(item.uri))
        for item in storage.list_prefix(calibration_uri(plan, ""))
    ]


def _lr_summary(plan: SlidePlan, calibrations: Sequence[Calibration]) -> LrSummary:
    """What was found out about the input's pixels."""
    found = calibrations[0] if calibrations else None
    blur = found.pixels.blur_px if found and found.pixels else None
    return LrSummary(
        compression=plan.compression,
        blur_px=None if blur is None else (blur.value, blur.low, blur.high),
        numbers=found.numbers if found else {},
        is_told=bool(plan.task.told),
        notes=plan.notes,
    )


def _sharpness_warnings(plan: SlidePlan, calibrations: Sequence[Calibration]) -> tuple[str, ...]:
    pixels = calibrations[0].pixels if calibrations else None
    return pixel_warnings(plan.task.trained, pixels=pixels, mpp=plan.mpp)


def _rgb_profile(plan: SlidePlan) -> bytes | None:
    """The input's ICC profile, where it is one for RGB pixels."""
    # The profile's colour space stands in its bytes 16 to 19 (ICC.1, section 7.2).
    profile = kept_look(plan, ICC_NAME)
    return profile if profile is not None and profile[16:20] == b"RGB " else None


def _summarized(
    errors: NDArray[np.float32], plan: SlidePlan, *, threshold_db: float
) -> ConsistencySummary | None:
    """The map in numbers; None where nothing was measured."""
    decibels = consistency.to_db(errors)
    known = decibels[~np.isnan(decibels)]
    if not known.size:
        return None
    low = consistency.low_cells(
        errors,
        threshold_db=threshold_db,
        extent_l0=plan.l0_extent,
        downsample=plan.downsample,
        limit=MAX_LISTED,
    )
    return ConsistencySummary(
        median_db=float(np.median(known)),
        min_db=float(known.min()),
        share_below=float((known < threshold_db).mean()),
        threshold_db=threshold_db,
        low=tuple(
            LowPlace(
                x_l0=cell.x_l0,
                y_l0=cell.y_l0,
                width=cell.width,
                height=cell.height,
                db=cell.consistency_db,
            )
            for cell in low
        ),
        range_db=consistency.HEAT_RANGE_DB,
    )


def _seam(shown: Mapping[str, Any], scale: int) -> Seam | None:
    """The steps at the border between the two blocks that were kept for it."""
    if "rim_left" not in shown or "rim_right" not in shown:
        return None
    left, right = shown["rim_right"], shown["rim_left"]
    if min(left.shape[1], right.shape[1]) < rim_px(scale):
        return None
    both = np.concatenate([left, right], axis=1)
    profile = seam_profile(both, border_px=left.shape[1], axis=1, reach_px=JPEG_PX * scale)
    return join_seams([profile])


def _pictures(shown: Mapping[str, Any], scale: int) -> dict[PictureKind, bytes]:
    """Pictures of what was kept; one that cannot be made is left out."""
    drawn: dict[PictureKind, Callable[[], bytes]] = {}
    if "crop_lr" in shown and "crop_sr" in shown:
        drawn["crop"] = lambda: crop_pair(shown["crop_lr"], shown["crop_sr"], scale)
    if "seam_left" in shown and "seam_right" in shown:
        sides = (shown["seam_right"], shown["seam_left"])
        drawn["seam"] = lambda: jpeg(np.concatenate(sides, axis=1))
    pictures: dict[PictureKind, bytes] = {}
    for kind, draw in drawn.items():
        try:
            pictures[kind] = draw()
        # Whatever it was, a picture for the report is no reason to keep a finished slide back.
        except Exception:
            logger.exception("the picture %r cannot be drawn and is left out of the report", kind)
    return pictures


def _picture_name(plan: SlidePlan, kind: str, content: bytes) -> str:
    suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
    return f"{key_of(plan.task.name)}.{kind}.{suffix}"


def _notes(plan: SlidePlan, summary: SlideSummary) -> str:
    """What lies beside the slide, for people and programs that look at it."""
    facts = json.loads(summary.to_json())
    content = plan.task.provenance() | {name: facts[name] for name in NOTED}
    return json.dumps(content, indent=1) + "\n"
