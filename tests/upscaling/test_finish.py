"""The last step of a slide under kills: the slide and its notes agree, and no work is left over."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from carn import storage, uploads
from carn.errors import StorageError
from carn.models import build_model
from carn.models.carn import CarnConfig
from carn.models.checkpoint import checkpoint_hash, read_checkpoint, write_checkpoint
from carn.slides.pyramid import write_pyramid
from carn.slides.slide_output import SlideFormat
from carn.slides.tiff_output import TiffOutput
from carn.slides.zarr_output import ZarrOutput
from carn.upscaling.engine import EngineConfig
from carn.upscaling.finish import finish
from carn.upscaling.lr_view import InputConfig
from carn.upscaling.outbox import SlideClaims, judge, sweep_abandoned
from carn.upscaling.task import PixelConfig, SlidePlan, SlideTask
from carn.upscaling.work import BlockMaker, inspect
from tests.conftest import draw

CONTAINERS = ("tiff", "ome-zarr")


@dataclass(frozen=True)
class Lab:
    """A slide with a result of its own beside the work on another, as both are to come out."""

    output: Path
    saved: Path
    old: SlideTask
    new: SlidePlan
    expected: dict[str, dict[str, bytes]]

    def restore(self) -> None:
        shutil.rmtree(self.output)
        shutil.copytree(self.saved, self.output)

    def shown(self) -> dict[str, bytes]:
        """Slides and notes by name."""
        return {
            item.uri.removeprefix(f"{self.output}/"): storage.read_bytes(item.uri)
            for item in storage.list_objects(str(self.output))
            if not item.uri.removeprefix(f"{self.output}/").startswith(("_work/", "_state/"))
        }

    def sweep(self, *tasks: SlideTask) -> None:
        with SlideClaims(str(self.output), owner="next", lease_s=600) as claims:
            sweep_abandoned(str(self.output), claims, days=7, tasks=tasks)

    def assert_tidy(self) -> None:
        assert not [path for path in self.output.joinpath("_work").rglob("*") if path.is_file()]
        assert not uploads.list_uploads(str(self.output))


def make_task(root: Path, container: Any, *, seed: int) -> SlideTask:
    checkpoint = read_checkpoint(str(root / "model"))
    uri = str(root / "One.tif")
    return SlideTask(
        name="case/One",
        uri=uri,
        identity=storage.identity(uri),
        is_image=False,
        checkpoint=checkpoint.uri,
        checkpoint_hash=checkpoint_hash(checkpoint),
        model="carn",
        scale=2,
        halo_px=16,
        input=InputConfig(),
        pixels=PixelConfig(seed=seed),
        precision="fp32",
        format=SlideFormat(container=container, tile_px=64),
        output=str(root / "sr"),
        block_px=128,
        code_version="1",
    )


def made(task: SlideTask) -> SlidePlan:
    """A slide of which all is on storage but the last step."""
    plan = inspect(task)
    maker = BlockMaker(EngineConfig(device="cpu", num_threads=1, precision="fp32"), num_writers=1)
    if not maker.has_calibration(plan):
        maker.calibrate(plan)
    for index in set(range(plan.num_blocks)) - set(plan.done):
        maker.begin_block(plan, index)[0].result()
    return plan


@pytest.fixture(scope="module", params=CONTAINERS)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("lab")
    torch.manual_seed(0)
    config = CarnConfig(num_blocks=1, channels=8, reduction=4)
    model = build_model("carn", scale=2, config=config)
    write_checkpoint(
        str(root / "model"),
        model=model,
        model_name="carn",
        training=None,
        step=0,
        dataset=None,
        metrics={},
    )
    write_pyramid(root / "One.tif", draw(90, 60), mpp_um=0.25, tile_px=64)
    old, new = (make_task(root, request.param, seed=seed) for seed in (1, 2))
    output, saved = root / "sr", root / "saved"
    lab = Lab(output, saved, old, made(new), {})
    finish(lab.new, threshold_db=30, has_pictures=False)
    lab.expected["new"] = lab.shown()
    shutil.rmtree(output)
    finish(made(old), threshold_db=30, has_pictures=False)
    lab.expected["old"] = lab.shown()
    plan = made(new)
    shutil.copytree(output, saved)
    assert lab.expected["new"].keys() == lab.expected["old"].keys()
    return replace(lab, new=plan)


class Killed(BaseException):
    """What a test kills a process with."""


def killed_at(number: int, call: Callable[[], object]) -> bool:
    """Whether a call ends before storage has done so many things in it, and is killed there."""
    left = [number]

    def dying(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            result = function(*arguments, **options)
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return result

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (uploads, "complete"),
            (storage, "write_bytes"),
            (storage, "delete"),
            (storage, "delete_below"),
        ):
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            call()
        except Killed:
            return True
    return False


def kills(lab: Lab) -> Iterator[int]:
    """The slide as it is left by a last step that was killed, at every point."""
    number = 0
    lab.restore()
    while killed_at(number, lambda: finish(lab.new, threshold_db=30, has_pictures=False)):
        yield number
        number += 1
        lab.restore()
    assert number > 20


def owner_of_slide(lab: Lab) -> str:
    """Whose slide is at its place: that of the old settings, of the new ones, or "none"."""
    name, shown = lab.old.committed_uri.removeprefix(f"{lab.output}/"), lab.shown()
    owners = [which for which in ("old", "new") if lab.expected[which][name] == shown.get(name)]
    return owners[0] if owners else "none"


def test_who_is_killed_while_replacing_a_slide_finds_its_work_and_ends_in_the_same(
    lab: Lab,
) -> None:
    for _ in kills(lab):
        ((status, _),) = judge([lab.new.task], overwrite=True)
        if status == "todo":
            finish(lab.new, threshold_db=30, has_pictures=False)
        else:
            lab.sweep()
        assert lab.shown() == lab.expected["new"]
        lab.assert_tidy()


def test_a_slide_and_its_notes_agree_after_the_next_run_whatever_that_is_over(lab: Lab) -> None:
    seen = []
    for _ in kills(lab):
        lab.sweep()  # of a run that has nothing to do with the slide
        seen.append(owner_of_slide(lab))
        if seen[-1] != "none":  # unlike a file, a folder is not replaced in one step
            assert lab.shown() == lab.expected[seen[-1]]
        if seen[-1] == "new":
            lab.assert_tidy()
            # Nor is it done again by another version of the program.
            later = replace(lab.new.task, code_version="2")
            assert judge([later], overwrite=True) == [("skipped", None)]
    is_folder = lab.old.format.container == "ome-zarr"
    assert list(dict.fromkeys(seen)) == ["none" if is_folder else "old", "new"]


def test_another_version_leaves_what_is_committed_to_the_sweep(lab: Lab) -> None:
    lab.restore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("carn.upscaling.finish.mark_done", dies)
        with pytest.raises(Killed):
            finish(lab.new, threshold_db=30, has_pictures=False)
    later = replace(lab.new.task, code_version="2")
    assert judge([later], overwrite=True) == [("todo", None)]
    lab.sweep(later)
    assert judge([later], overwrite=True) == [("skipped", None)]
    lab.assert_tidy()


def dies(*_arguments: object) -> None:
    raise Killed


@pytest.mark.parametrize("who", ["the next call", "the next run"])
def test_what_could_not_be_tidied_up_is_tidied_up_later(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    def fails(self: object) -> None:
        raise StorageError("s3://lab/x", "is busy")

    lab.restore()
    kind = TiffOutput if lab.old.format.container == "tiff" else ZarrOutput
    with monkeypatch.context() as patch:
        patch.setattr(kind, "discard", fails)
        summary, _ = finish(lab.new, threshold_db=30, has_pictures=False)
    assert summary.status == "done"
    assert storage.list_objects(lab.new.task.work_uri)
    assert judge([lab.new.task], overwrite=True) == [("skipped", None)]
    if who == "the next run":
        lab.sweep()
    else:  # of an actor that was killed before it could say that it is done
        again, _ = finish(lab.new, threshold_db=30, has_pictures=False)
        assert again.consistency == summary.consistency
    assert lab.shown() == lab.expected["new"]
    lab.assert_tidy()


def test_a_new_slide_is_not_seen_without_its_notes(lab: Lab) -> None:
    if lab.old.format.container == "ome-zarr":
        pytest.skip("what the work on one is done for is in its place already")
    lab.restore()
    storage.delete_below(str(lab.output / "case"))
    number = 0
    while killed_at(number, lambda: finish(lab.new, threshold_db=30, has_pictures=False)):
        if storage.is_file(lab.new.task.committed_uri):
            break
        number += 1
    assert number > 5
    assert lab.shown() == lab.expected["new"]
