"""A slide through all steps of the job, in this process."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import ImageCms

from carn import storage
from carn.degradation.numbers import NUMBERS
from carn.errors import SlideError
from carn.models import build_model
from carn.models.carn import CarnConfig
from carn.models.checkpoint import checkpoint_hash, read_checkpoint, write_checkpoint
from carn.report.sr_records import SlideSummary
from carn.slides import open_slide
from carn.slides.slide_output import SlideFormat
from carn.upscaling.engine import EngineConfig
from carn.upscaling.finish import finish
from carn.upscaling.lr_view import InputConfig
from carn.upscaling.suitability import TrainingRange, with_range
from carn.upscaling.task import PixelConfig, SlidePlan, SlideTask
from carn.upscaling.telling import told_by
from carn.upscaling.work import BlockMaker, inspect
from tests.conftest import draw
from tests.upscaling.networks import network

WriteSlide = Callable[..., Path]
ICC_TAG = 34675
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
READERS = {"tiled-tiff": "jpeg", "openslide": "packbits"}


def task_of(path: Path, folder: Path, *, scale: int = 2) -> SlideTask:
    """A slide to be made by a small network, which is written for it."""
    torch.manual_seed(0)
    config = CarnConfig(num_blocks=1, channels=8, reduction=4)
    model = build_model("carn", scale=scale, config=config)
    uri = str(folder / "model")
    write_checkpoint(
        uri, model=model, model_name="carn", training=None, step=0, dataset=None, metrics={}
    )
    checkpoint = read_checkpoint(uri)
    return SlideTask(
        name="case/One",
        uri=str(path),
        identity=storage.identity(str(path)),
        is_image=False,
        checkpoint=checkpoint.uri,
        checkpoint_hash=checkpoint_hash(checkpoint),
        model="carn",
        scale=scale,
        halo_px=16,
        input=InputConfig(mpp=0.25),
        pixels=PixelConfig(),
        precision="fp32",
        format=SlideFormat(tile_px=64),
        output=str(folder / "sr"),
        block_px=256,
        code_version="1",
    )


def test_a_self_ensembled_slide_says_so_and_has_a_self_ensembled_reference(
    write_slide: WriteSlide, tmp_path: Path
) -> None:
    path = write_slide(extent=(150, 90), tile_px=64, num_levels=1)
    task = replace(task_of(path, tmp_path), self_ensemble=True)
    plan = inspect(task)
    settings = EngineConfig(device="cpu", precision="fp32", self_ensemble=True)
    maker = BlockMaker(settings, num_writers=1)
    maker.calibrate(plan)
    _, engine, reference = maker._networks(plan)
    assert engine.self_ensemble
    assert reference.self_ensemble
    for index in range(plan.num_blocks):
        maker.begin_block(plan, index)[0].result()
    summary, _ = finish(plan, threshold_db=30, has_pictures=False)
    assert "self-ensemble" in summary.engine
    assert summary.accuracy_db is not None
    assert summary.accuracy_db > 90
    notes = json.loads(Path(task.output, "case/One.json").read_text())
    assert notes["settings"]["self_ensemble"] is True
    assert "self-ensemble" in notes["engine"]


def test_the_notes_say_what_the_input_is_like_and_what_is_unlike_training(
    write_slide: WriteSlide, tmp_path: Path
) -> None:
    path = write_slide(extent=(150, 90), tile_px=64, num_levels=1)  # JPEG at 0.25 um per px
    trained = TrainingRange(
        network="net", jpeg_quality=None, blur_px=(0, 0), has_sharpened=False, lr_mpp=(0.5, 0.5)
    )
    task = replace(task_of(path, tmp_path), trained=trained)
    task = replace(task, input=with_range(task.input, trained))
    assert SlideTask.from_json(task.to_json()) == task
    assert task.digest == replace(task, trained=None).digest  # it decides nothing of the pixels
    plan = inspect(task)
    assert SlidePlan.from_json(plan.to_json()) == plan
    maker = BlockMaker(EngineConfig(device="cpu", precision="fp32"), num_writers=1)
    maker.calibrate(plan)
    for index in range(plan.num_blocks):
        maker.begin_block(plan, index)[0].result()
    summary, _ = finish(plan, threshold_db=30, has_pictures=False)
    assert summary.lr is not None
    assert summary.lr.compression.startswith("JPEG, quality ")
    assert summary.lr.numbers == {}
    assert [text.split(";")[0].rstrip("0123456789") for text in summary.warnings] == [
        "JPEG quality ",
        "0.25 um per px",
    ]
    notes = json.loads(Path(task.output, "case/One.json").read_text())
    assert notes["warnings"] == list(summary.warnings)
    assert notes["lr"]["compression"] == summary.lr.compression
    assert SlideSummary.from_json(summary.to_json()) == summary


@pytest.mark.parametrize("is_told", [False, True])
def test_the_notes_of_an_adaptive_network_say_what_it_took_the_slide_for(
    is_told: bool, write_slide: WriteSlide, tmp_path: Path
) -> None:
    path = write_slide(extent=(150, 90), tile_px=64, num_levels=1)
    task = task_of(path, tmp_path)
    checkpoint = write_checkpoint(
        str(tmp_path / "adaptive"),
        model=network("adaptive-carn"),
        model_name="adaptive-carn",
        training=None,
        step=0,
        dataset=None,
        metrics={},
    )
    told = told_by("jpeg80-420", scale=2) if is_told else {}
    task = replace(
        task,
        checkpoint=checkpoint.uri,
        checkpoint_hash=checkpoint_hash(checkpoint),
        model="adaptive-carn",
        told=told,
    )
    assert (task.digest == replace(task, told={}).digest) is not is_told
    plan = inspect(SlideTask.from_json(task.to_json()))
    maker = BlockMaker(EngineConfig(device="cpu", precision="fp32"), num_writers=1)
    maker.calibrate(plan)
    for index in range(plan.num_blocks):
        maker.begin_block(plan, index)[0].result()
    summary, _ = finish(plan, threshold_db=30, has_pictures=False)
    assert summary.lr is not None
    assert summary.lr.is_told is is_told
    assert tuple(summary.lr.numbers) == NUMBERS
    assert not is_told or summary.lr.numbers == pytest.approx(told)
    notes = json.loads(Path(task.output, "case/One.json").read_text())
    assert notes["lr"]["numbers"] == pytest.approx(dict(summary.lr.numbers))
    assert notes["settings"].get("told", {}) == pytest.approx(told)


def upscaled(path: Path, folder: Path, *, scale: int) -> tuple[Path, SlideSummary, set[str]]:
    """The finished slide, what became of it, and the kinds of its pictures."""
    task = task_of(path, folder, scale=scale)
    plan = inspect(task)
    maker = BlockMaker(EngineConfig(device="cpu", precision="fp32"), num_writers=1)
    maker.calibrate(plan)
    for index in range(plan.num_blocks):
        maker.begin_block(plan, index)[0].result()
    summary, _ = finish(plan, threshold_db=30, has_pictures=True)
    return Path(task.output_uri), summary, set(summary.pictures)


@pytest.mark.parametrize("reader", READERS)
def test_the_scanners_profile_comes_through(
    reader: str, write_slide: WriteSlide, tmp_path: Path
) -> None:
    path = write_slide(
        extent=(150, 90), tile_px=64, compression=READERS[reader], iccprofile=SRGB, num_levels=1
    )
    with open_slide(path) as slide:
        assert slide.reader == reader
        assert slide.properties.icc_profile == SRGB
    output, summary, _ = upscaled(path, tmp_path, scale=2)
    assert summary.status == "done"
    with tifffile.TiffFile(output) as tiff:
        assert tiff.pages[0].tags[ICC_TAG].value == SRGB
    with open_slide(output) as slide:
        assert slide.properties.icc_profile == SRGB


def test_a_profile_of_other_colours_than_rgb_is_left_out(
    write_slide: WriteSlide, tmp_path: Path
) -> None:
    path = write_slide(extent=(150, 90), tile_px=64, iccprofile=LAB, num_levels=1)
    output, _, _ = upscaled(path, tmp_path, scale=2)
    with tifffile.TiffFile(output) as tiff:
        assert ICC_TAG not in tiff.pages[0].tags


def test_a_slide_at_x3_is_finished_with_its_pictures(
    write_slide: WriteSlide, tmp_path: Path
) -> None:
    # The stain lies in the last of three blocks, which begins and ends within px of LR and holds no
    # whole cell.
    pixels = np.full((90, 250, 3), 235, dtype=np.uint8)
    pixels[:, 175:] = draw(75, 90)
    pixels[:, 175:, 1] //= 3
    path = write_slide(pixels=pixels, tile_px=64, num_levels=1)
    _, summary, pictures = upscaled(path, tmp_path, scale=3)
    assert summary.status == "done"
    assert "crop" in pictures


def test_an_input_that_is_replaced_meanwhile_is_noticed(
    write_slide: WriteSlide, tmp_path: Path
) -> None:
    path = write_slide(extent=(150, 90), tile_px=64, num_levels=1)
    task = task_of(path, tmp_path)
    plan = inspect(task)
    write_slide(extent=(150, 90), tile_px=64, num_levels=1, seed=5)
    maker = BlockMaker(EngineConfig(device="cpu", precision="fp32"), num_writers=1)
    with pytest.raises(SlideError, match="was replaced while it was worked on"):
        maker.read(plan, 0)
    with pytest.raises(SlideError, match="was replaced while it was worked on"):
        inspect(task)
