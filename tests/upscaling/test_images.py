"""Plain images to PNGs from the command line: pixels, chunks, runs that follow each other."""

import io
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from carn.degradation.numbers import NUMBERS
from carn.errors import CheckpointError, MissingObjectError, SlideError
from carn.models.checkpoint import checkpoint_hash, write_checkpoint
from carn.slides.opening import open_image
from carn.upscaling import images as images_module
from carn.upscaling.__main__ import main
from carn.upscaling.engine import EngineConfig, reference_engine
from carn.upscaling.images import (
    UpscaleImages,
    encode_png,
    list_images,
    read_provenance,
    upscale_images,
    upscale_view,
)
from carn.upscaling.lr_view import InputConfig, LrView
from carn.upscaling.pooling import frozen, pool_over
from carn.upscaling.telling import told_by
from tests.conftest import Bucket, draw
from tests.upscaling.lab import small_carn, view_of, whole
from tests.upscaling.networks import network

SCALE = 2


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return write_weights(tmp_path / "weights")


def write_weights(path: Path, *, num_blocks: int = 1) -> str:
    write_checkpoint(
        str(path),
        model=small_carn(SCALE, num_blocks=num_blocks),
        model_name="carn",
        training=None,
        step=None,
        dataset=None,
        metrics={},
    )
    return str(path)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    Image.fromarray(draw(70, 50)).save(folder / "a.png")
    Image.fromarray(draw(31, 40, seed=1)).save(folder / "b.tif")
    return folder


def config_for(checkpoint: str, output: Path | str, **options: object) -> UpscaleImages:
    engine = EngineConfig(precision="fp32", device="cpu")
    return UpscaleImages(checkpoint=checkpoint, output=str(output), engine=engine, **options)  # type: ignore[arg-type]


def outcomes(found: dict[str, str]) -> dict[str, str]:
    return {Path(uri).name: outcome for uri, outcome in found.items()}


def test_images_become_what_the_network_makes_of_them(
    inbox: Path, checkpoint: str, tmp_path: Path
) -> None:
    found = upscale_images([str(inbox)], config_for(checkpoint, tmp_path / "sr"))
    assert outcomes(found) == {"a.png": "written", "b.tif": "written"}
    model = small_carn(SCALE, num_blocks=1)
    halo = reference_engine(model).halo_px
    for name in ("a.png", "b.tif"):
        lr = open_image(inbox / name).read_region(0, 0, *open_image(inbox / name).extent)
        padded = np.pad(lr, ((halo, halo), (halo, halo), (0, 0)), mode="reflect")
        expected = whole(frozen(model, pool_over(model, [padded], halo_px=halo)), lr, halo_px=halo)
        with Image.open(tmp_path / "sr" / f"{name[0]}_x2.png") as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_the_profile_the_origin_and_the_resolution_are_in_the_file(
    tmp_path: Path, checkpoint: str
) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / "Smith_John.png"
    Image.fromarray(draw(20, 10)).save(path, icc_profile=profile)
    upscale_images([str(path)], config_for(checkpoint, tmp_path / "sr", input=InputConfig(mpp=0.5)))
    output = tmp_path / "sr" / "Smith_John_x2.png"
    with Image.open(output) as image:
        assert image.info["icc_profile"] == profile
        assert image.info["dpi"] == pytest.approx((25_400 / 0.25,) * 2, rel=1e-4)
        assert image.text["Disclaimer"] == "super-resolved, not for primary diagnosis"
    found = read_provenance(str(output))
    assert found is not None
    assert found["checkpoint"] == checkpoint_hash(checkpoint)
    assert found["notice"] == "super-resolved, not for primary diagnosis"
    assert found["scale"] == SCALE
    assert "Smith" not in str(found)


def test_a_second_run_leaves_what_is_done_alone(
    inbox: Path, checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(checkpoint, tmp_path / "sr")
    upscale_images([str(inbox)], config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sr").iterdir()}
    assert len(before) == 2
    Image.fromarray(draw(31, 40, seed=9)).save(inbox / "b.tif")
    Image.fromarray(draw(5, 5)).save(inbox / "c.png")
    found = upscale_images([str(inbox)], config)
    assert outcomes(found) == {"a.png": "skipped", "b.tif": "failed", "c.png": "written"}
    assert "--overwrite" in caplog.text
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    found = upscale_images([str(inbox)], config_for(checkpoint, tmp_path / "sr", overwrite=True))
    assert set(found.values()) == {"written"}


def test_other_weights_or_settings_are_no_reason_to_skip(
    inbox: Path, checkpoint: str, tmp_path: Path
) -> None:
    upscale_images([str(inbox / "a.png")], config_for(checkpoint, tmp_path / "sr"))
    other = write_weights(tmp_path / "other", num_blocks=2)
    assert not (tmp_path / "same").exists()
    found = upscale_images([str(inbox / "a.png")], config_for(other, tmp_path / "sr"))
    assert outcomes(found) == {"a.png": "failed"}
    changed = config_for(checkpoint, tmp_path / "sr", input=InputConfig(mpp=0.5))
    assert outcomes(upscale_images([str(inbox / "a.png")], changed)) == {"a.png": "failed"}


def test_what_lr_is_like_is_estimated_or_said_by_hand_and_stands_in_the_result(
    inbox: Path, tmp_path: Path, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    adaptive = write_checkpoint(
        str(tmp_path / "adaptive"),
        model=network("adaptive-carn"),
        model_name="adaptive-carn",
        training={"seed": 1},
        step=None,
        dataset=None,
        metrics={},
    ).uri
    Image.fromarray(draw(70, 50)).save(inbox / "c.jpg", quality=80)
    image, output = str(inbox / "c.jpg"), tmp_path / "sr"
    plain = config_for(adaptive, output)
    said = replace(plain, lr_like="jpeg80-420")
    with caplog.at_level(logging.WARNING):
        assert upscale_images([image], plain) == {image: "written"}
    assert "JPEG quality 80; adaptive was trained on lossless LR alone" in caplog.text
    own = read_provenance(str(output / "c_x2.png"))
    assert own is not None
    assert set(own["lr"]["numbers"]) == set(NUMBERS)
    assert own["lr"]["compression"].startswith("JPEG, quality 80")
    assert len(own["warnings"]) == 1
    assert upscale_images([image], plain) == {image: "skipped"}
    assert upscale_images([image], said) == {image: "failed"}
    assert upscale_images([image], replace(said, overwrite=True)) == {image: "written"}
    told = read_provenance(str(output / "c_x2.png"))
    assert told is not None
    assert told["lr"]["numbers"] == pytest.approx(told_by("jpeg80-420", scale=2))
    assert upscale_images([image], plain) == {image: "failed"}
    with pytest.raises(CheckpointError, match="does not adapt"):
        upscale_images([image], config_for(checkpoint, output, lr_like="mean"))


def test_a_self_ensemble_is_no_reason_to_skip_nor_the_lack_of_one(
    inbox: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, output = str(inbox / "a.png"), tmp_path / "sr"
    plain = config_for(checkpoint, output)
    turned = replace(plain, engine=replace(plain.engine, self_ensemble=True))
    assert upscale_images([image], plain) == {image: "written"}
    assert upscale_images([image], turned) == {image: "failed"}
    assert upscale_images([image], replace(turned, overwrite=True)) == {image: "written"}
    assert upscale_images([image], turned) == {image: "skipped"}
    assert upscale_images([image], plain) == {image: "failed"}
    # A file that was made before there was a choice does not say it.
    upscale_images([image], replace(plain, overwrite=True))
    read = images_module.read_provenance

    def without(uri: str) -> dict[str, Any] | None:
        return {name: value for name, value in (read(uri) or {}).items() if "self" not in name}

    monkeypatch.setattr(images_module, "read_provenance", without)
    assert upscale_images([image], plain) == {image: "skipped"}
    assert upscale_images([image], turned) == {image: "failed"}


def test_a_bad_image_does_not_stop_the_others(
    inbox: Path, checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (inbox / "0.png").write_bytes(b"no image")
    (inbox / "sub").mkdir()
    Image.fromarray(draw(8, 8)).save(inbox / "sub" / "a.bmp")
    found = upscale_images([str(inbox)], config_for(checkpoint, tmp_path / "sr"))
    assert outcomes(found) == {
        "0.png": "failed",
        "a.png": "written",
        "b.tif": "written",
        "a.bmp": "failed",
    }
    assert "0.png: is not an image" in caplog.text
    assert "a_x2.png, as" in caplog.text


def test_images_and_results_on_an_object_store(
    inbox: Path, checkpoint: str, s3: Bucket, tmp_path: Path
) -> None:
    uri = s3.put("in/a.png", inbox / "a.png")
    config = config_for(checkpoint, s3.uri("sr"))
    assert upscale_images([s3.uri("in")], config) == {uri: "written"}
    assert upscale_images([s3.uri("in")], config) == {uri: "skipped"}
    upscale_images([str(inbox / "a.png")], config_for(checkpoint, tmp_path / "sr"))
    assert s3.get("sr/a_x2.png") == (tmp_path / "sr" / "a_x2.png").read_bytes()


def test_images_are_listed_once_and_in_order(inbox: Path) -> None:
    a, b = str(inbox / "a.png"), str(inbox / "b.tif")
    (inbox / "notes.txt").write_text("no image")
    assert list_images([b, str(inbox)]) == [b, a]
    with pytest.raises(MissingObjectError):
        list_images([str(inbox / "c.png")])
    (inbox / "empty").mkdir()
    with pytest.raises(MissingObjectError):
        list_images([str(inbox / "empty")])


def test_a_result_too_large_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_REGION_PX", 399)
    model = small_carn(2)
    with pytest.raises(SlideError, match="super_resolve"):
        upscale_view(view_of(draw(10, 10)), model, reference_engine(model))


def test_an_inexact_engine_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = small_carn(2)
    engine = reference_engine(model)
    exact = engine.upscale_float
    engine.upscale_float = lambda window: exact(window) + 3 / 255  # type: ignore[method-assign]
    view: LrView = view_of(draw(40, 30))
    upscale_view(view, model, engine, is_measured=True)
    assert "--precision fp32" in caplog.text


# ----------------------------------------------------------------------------------------- PNG


def test_provenance_is_read_past_other_chunks_and_only_from_ours(tmp_path: Path) -> None:
    facts = {"input": "sha256:1", "scale": 2}
    profile = np.random.default_rng(0).bytes(200_000)
    content = encode_png(draw(9, 9), provenance=facts, mpp=(0.25, 0.5), icc_profile=profile)
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert read_provenance(str(path)) == facts
    plain = io.BytesIO()
    Image.fromarray(draw(9, 9)).save(plain, format="PNG")
    for other in (plain.getvalue(), b"", b"\xff\xd8 a JPEG", content[:100], content[:200_050]):
        path.write_bytes(other)
        assert read_provenance(str(path)) is None


# -------------------------------------------------------------------------------- command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line in this process; returns its exit status."""
    import runpy

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["carn.upscaling", *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "carn.upscaling.__main__", raising=False)
        with pytest.raises(SystemExit) as found:
            runpy.run_module("carn.upscaling", run_name="__main__")
        return int(found.value.code or 0)

    return run


def test_the_command_line(
    run: Callable[..., int],
    inbox: Path,
    checkpoint: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    arguments = ["--checkpoint", checkpoint, "--output", tmp_path / "sr", "--mpp", "0.25"]
    assert run(inbox / "a.png", inbox / "b.tif", *arguments, "--precision", "fp32") == 0
    assert "2 written, 0 skipped, 0 failed" in caplog.text
    assert {path.name for path in (tmp_path / "sr").iterdir()} == {"a_x2.png", "b_x2.png"}
    assert run(inbox / "a.png", *arguments, "--self-ensemble") == 1  # it is there, without
    assert "--overwrite" in caplog.text
    turned = ["--checkpoint", checkpoint, "--output", tmp_path / "turned", "--mpp", "0.25"]
    assert run(inbox / "a.png", *turned, "--precision", "fp32", "--self-ensemble") == 0
    one, other = (
        np.asarray(Image.open(tmp_path / folder / "a_x2.png")) for folder in ("sr", "turned")
    )
    assert one.shape == other.shape
    assert (one != other).any()
    (inbox / "a.png").write_bytes(b"")
    assert run(inbox, *arguments) == 1
    assert run(inbox / "nowhere", *arguments) == 2
    assert run(inbox, "--checkpoint", tmp_path / "none", "--output", tmp_path / "sr") == 2
    assert main((), config_for(checkpoint, tmp_path)) == 2
