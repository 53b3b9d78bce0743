"""Scores of tiles: how LR is made, what is compared with what, and what goes wrong."""

import math
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from carn.degradation.bicubic import degrade
from carn.degradation.conditions import CONDITIONS, apply_condition
from carn.degradation.scanner import Degradation
from carn.errors import CarnError
from carn.evaluation.lpips import Lpips
from carn.evaluation.scoring import (
    SCORES,
    conventions,
    device_of,
    full_precision,
    pair,
    score_tile,
    score_tiles,
    super_resolve,
)
from carn.evaluation.statistics import summarize_seeds
from carn.metrics import psnr, ssim
from carn.models import build_model
from carn.models.carn import CarnConfig
from tests.evaluation.test_lpips import drawn_lpips

ROW = {"tile_id": "s_0_0", "slide": "s", "label": "tumor", "x_l0": 0}


def batch(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]


class Blocks(nn.Module):
    """Each LR px becomes a block, and `more` is done to it."""

    def __init__(self, scale: int, more: Any = lambda sr: sr) -> None:
        super().__init__()
        self.scale, self.more = scale, more
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, lr: Tensor) -> Tensor:
        sr: Tensor = self.more(lr.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3))
        return sr


# --------------------------------------------------------------------------------------- protocol


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_protocols_are_the_same_where_sides_divide(tissue: np.ndarray, scale: int) -> None:
    hr = tissue[: 24 * scale, : 16 * scale]
    aligned, misaligned = (
        pair(hr, scale=scale, protocol=protocol) for protocol in ("aligned", "misaligned")
    )
    assert np.array_equal(aligned[0], degrade(hr, scale=scale))
    assert all(np.array_equal(*images) for images in zip(aligned, misaligned, strict=True))
    assert aligned[1].shape == hr.shape


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_sizes_where_sides_do_not_divide(tissue: np.ndarray, scale: int) -> None:
    hr = tissue[: 10 * scale + scale - 1, : 12 * scale + 1]
    for protocol in ("aligned", "misaligned"):
        lr, target = pair(hr, scale=scale, protocol=protocol)
        assert lr.shape == (10, 12, 3)
        assert lr.dtype == np.uint8
        assert np.array_equal(target, hr[: 10 * scale, : 12 * scale])


def test_misaligned_lr_is_of_the_whole_tile() -> None:
    hr = np.zeros((61, 62, 3), np.uint8)
    hr[:, 60:] = 255  # what `aligned` crops away
    aligned, _ = pair(hr, scale=3, protocol="aligned")
    misaligned, _ = pair(hr, scale=3, protocol="misaligned")
    assert not aligned.any()
    assert misaligned[:, -1].min() > 100
    # A ramp over 1024 px made 341: its middles lie where 1024 / 341 px each puts them.
    ramp = np.repeat(np.linspace(0, 255, 1024)[None, :, None], 3, axis=2).repeat(12, axis=0)
    lr, _ = pair(ramp.round().astype(np.uint8), scale=3, protocol="misaligned")
    wanted = ((np.arange(341) + 0.5) * 1024 / 341 - 0.5) * 255 / 1023
    assert np.abs(lr[2, 3:-3, 0] - wanted[3:-3]).max() < 1.01
    shrunk, _ = pair(ramp.round().astype(np.uint8), scale=3, protocol="aligned")
    assert lr[2, -4, 0] > shrunk[2, -4, 0]  # one px of 1024 over the whole length


def test_misalignment_costs_quality(tissue: np.ndarray) -> None:
    found = [
        score_tile(
            build_model("bicubic", scale=3), ROW, tissue[:128, :128], scale=3, protocol=protocol
        )
        for protocol in ("aligned", "misaligned")
    ]
    assert found[0]["psnr_db"] - found[1]["psnr_db"] > 0.1
    assert {(score["width_px"], score["height_px"]) for score in found} == {(126, 126)}


def test_the_papers_x3_was_misaligned(shared_data: Path) -> None:
    """Its bicubic has 0.74 dB more at x3 than at x4: on lymph nodes aligned LR gains far more."""
    found: dict[Any, float] = {}
    paths = sorted((shared_data / "patches" / "camelyon16_256").glob("*/*.png"))[::20]
    tiles = [
        ({"tile_id": path.stem, "slide": path.stem}, np.asarray(Image.open(path).convert("RGB")))
        for path in paths
    ]
    for scale, protocol in ((3, "aligned"), (3, "misaligned"), (4, "aligned")):
        table = score_tiles(
            build_model("bicubic", scale=scale), tiles, scale=scale, protocol=protocol
        )
        found[scale, protocol] = summarize_seeds([table]).psnr_db
    assert 0 < found[3, "misaligned"] - found[4, "aligned"] < 1.5
    assert found[3, "aligned"] - found[4, "aligned"] > 1.9


def test_lr_of_a_condition_is_of_the_cropped_tile(tissue: np.ndarray) -> None:
    hr, way = tissue[:65, :47], CONDITIONS["scanned-jpeg80"]
    lr, target = pair(hr, scale=3, protocol="aligned", way=way, tile="a")
    assert np.array_equal(target, hr[:63, :45])
    assert np.array_equal(lr, apply_condition(hr[:63, :45], way, scale=3, tile="a"))
    assert not np.array_equal(lr, degrade(hr, scale=3))
    with pytest.raises(ValueError, match="'misaligned' goes with bicubic interpolation alone"):
        pair(hr, scale=3, protocol="misaligned", way=way)


def test_scores_are_of_the_conditions_lr(tissue: np.ndarray) -> None:
    hr = tissue[:64, :64]
    model = build_model("bicubic", scale=2)

    def score(way: Degradation, tile_id: str = "a") -> dict[str, Any]:
        row = ROW | {"tile_id": tile_id}
        return score_tile(model, row, hr, scale=2, protocol="aligned", way=way)

    plain = score_tile(model, ROW | {"tile_id": "a"}, hr, scale=2, protocol="aligned")
    assert score(Degradation()) == plain
    found = {name: score(way)["psnr_db"] for name, way in CONDITIONS.items()}
    assert len(set(found.values())) == len(CONDITIONS)
    assert found["jpeg80-420"] < found["jpeg90-420"] < found["bicubic"] == plain["psnr_db"]
    # Noise is drawn by the tile's id.
    noisy = Degradation(noise_levels=4.0)
    assert score(noisy)["psnr_db"] == score(noisy)["psnr_db"] != score(noisy, "b")["psnr_db"]
    (row,) = score_tiles(
        model, [(ROW | {"tile_id": "b"}, hr)], scale=2, protocol="aligned", way=noisy
    ).to_pylist()
    assert row == score(noisy, "b")


@pytest.mark.parametrize(
    ("scale", "protocol", "side", "said"),
    [
        (5, "aligned", 64, "scale 5"),
        (5, "misaligned", 64, "scale 5"),
        (2, "shifted", 64, "protocol='shifted'"),
        (8, "aligned", 7, "no LR at scale 8"),
        (8, "misaligned", 7, "no LR at scale 8"),
    ],
)
def test_impossible_pairs(scale: int, protocol: Any, side: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unwrap(pair)(np.zeros((side, side, 3), np.uint8), scale=scale, protocol=protocol)


def test_a_tile_that_is_not_rgb() -> None:
    with pytest.raises(
        ValueError, match=r"tile s_0_0: HR must be \(H, W, 3\) uint8, .* make it RGB"
    ):
        score_tile(Blocks(2), ROW, np.zeros((64, 64, 4), np.uint8), scale=2, protocol="aligned")
    for hr in (np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8)):
        with pytest.raises(ValueError, match="HR must be"):
            unwrap(pair)(hr, scale=2, protocol="aligned")


# ----------------------------------------------------------------------------------------- scores


def test_scores_are_the_metrics_of_the_models_sr(tissue: np.ndarray) -> None:
    hr = tissue[:97, :85]
    model = build_model("carn", scale=4, config=CarnConfig(num_blocks=1)).eval()
    found = score_tile(model, ROW, hr, scale=4, protocol="aligned")
    with torch.inference_mode():
        raw = model(batch(degrade(hr, scale=4)).float() / 255)
    sr = (raw[0].clamp(0, 1) * 255).round().to(torch.uint8)
    target = np.ascontiguousarray(hr[:96, :84])
    goal = batch(target)
    wanted = peak_signal_noise_ratio(target, sr.permute(1, 2, 0).numpy(), data_range=255)
    assert found["psnr_db"] == pytest.approx(wanted, abs=1e-9)
    assert found["ssim"] == pytest.approx(ssim(sr[None], goal).item(), abs=1e-12)
    assert found["psnr_y_db"] == psnr(sr[None], goal, channel="y", shave_px=4).item()
    assert found["ssim_y"] == ssim(sr[None], goal, channel="y", shave_px=4).item()
    assert found["lpips"] is None
    assert (found["tile_id"], found["slide"], found["label"]) == ("s_0_0", "s", "tumor")
    assert (found["width_px"], found["height_px"]) == (84, 96)
    assert list(found) == SCORES.names


def test_a_table_in_the_order_of_the_tiles(tissue: np.ndarray) -> None:
    tiles = [
        ({"tile_id": f"s_{y}", "slide": "s", "label": None}, tissue[y : y + 64, :48])
        for y in (128, 0, 64)
    ]
    model = build_model("bicubic", scale=2)
    table = score_tiles(model, iter(tiles), scale=2, protocol="aligned")
    assert table.schema == SCORES
    assert table["tile_id"].to_pylist() == ["s_128", "s_0", "s_64"]
    assert table["label"].to_pylist() == [None] * 3
    for row, (tile, hr) in zip(table.to_pylist(), tiles, strict=True):
        assert row == score_tile(model, tile, hr, scale=2, protocol="aligned")
    assert score_tiles(model, [], scale=2, protocol="aligned").schema == SCORES


def test_equal_images_stay_infinite() -> None:
    hr = np.full((48, 40, 3), 137, np.uint8)
    table = score_tiles(Blocks(2), [(ROW, hr)], scale=2, protocol="aligned")
    (row,) = table.to_pylist()
    assert math.isinf(row["psnr_db"])
    assert math.isinf(row["psnr_y_db"])
    assert row["ssim"] == pytest.approx(1, abs=1e-12)


def test_lpips_of_each_tile(tissue: np.ndarray) -> None:
    lpips = drawn_lpips()
    table = score_tiles(
        build_model("bicubic", scale=2),
        [(ROW, tissue[:64, :64]), (ROW, tissue[64:128, :64])],
        scale=2,
        protocol="aligned",
        lpips=lpips,
    )
    first, second = table["lpips"].to_pylist()
    assert 0 < first != second > 0


def test_the_whole_tile_in_one_pass_of_its_own(tissue: np.ndarray) -> None:
    seen = []

    def look(sr: Tensor) -> Tensor:
        seen.append((tuple(sr.shape), sr.dtype, torch.is_grad_enabled(), model.training))
        return sr

    model = Blocks(2, look).train()
    tiles = [(ROW, tissue[:64, :48]), (ROW, tissue[:96, :96])]
    score_tiles(model, tiles, scale=2, protocol="aligned")
    assert seen == [
        ((1, 3, 64, 48), torch.float32, False, False),
        ((1, 3, 96, 96), torch.float32, False, False),
    ]
    assert model.training  # as it was


def test_read_only_tiles(tissue: np.ndarray) -> None:
    hr = tissue[:64, :64].copy()
    hr.flags.writeable = False
    assert score_tile(Blocks(2), ROW, hr, scale=2, protocol="aligned")["psnr_db"] > 15


def test_conventions_say_what_they_are() -> None:
    rgb, luma = conventions(scale=4)
    assert "on RGB" in rgb
    assert "no border" in rgb
    assert "Y channel" in luma
    assert "4 px of border" in luma


def test_device_of_a_model() -> None:
    assert device_of(build_model("bicubic", scale=2)) == torch.device("cpu")
    assert device_of(Blocks(2).to("meta")) == torch.device("meta")


# ----------------------------------------------------------------------------------------- errors


def failing(error: BaseException) -> Blocks:
    def fail(sr: Tensor) -> Tensor:
        raise error

    return Blocks(2, fail)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory(error: BaseException, tissue: np.ndarray) -> None:
    model = failing(error).train()
    with pytest.raises(CarnError, match=r"tile s_0_0: .* of cpu .* 24 x 32 LR px") as caught:
        score_tile(model, ROW, tissue[:64, :48], scale=2, protocol="aligned")
    assert "smaller tiles" in str(caught.value)
    assert caught.value.__cause__ is error
    assert model.training


def test_other_errors_of_a_model_stay(tissue: np.ndarray) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        super_resolve(failing(RuntimeError("a bug")), tissue[:16, :16], scale=2, name="t")


def test_another_scale_than_the_models(tissue: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"tile s_0_0: Blocks makes 24 x 32 LR px 96 x 128, .* x2"):
        score_tile(Blocks(4), ROW, tissue[:64, :48], scale=2, protocol="aligned")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverged(value: float, tissue: np.ndarray) -> None:
    def spoil(sr: Tensor) -> Tensor:
        sr[0, 0, 0, 0] = value
        return sr

    with pytest.raises(ValueError, match="tile s_0_0: Blocks gives values that are no numbers"):
        score_tile(Blocks(2, spoil), ROW, tissue[:64, :48], scale=2, protocol="aligned")


@pytest.mark.parametrize(("side", "lpips"), [(20, None), (30, drawn_lpips())])
def test_a_tile_that_is_too_small_is_named(side: int, lpips: Lpips | None) -> None:
    hr = np.zeros((side, side, 3), np.uint8)
    with pytest.raises(ValueError, match="tile s_0_0: an image of"):
        score_tile(
            Blocks(8 if lpips is None else 2),
            ROW,
            hr,
            scale=8 if lpips is None else 2,
            protocol="aligned",
            lpips=lpips,
        )


@pytest.mark.gpu
def test_a_gpu_scores_as_a_cpu_does(tissue: np.ndarray) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    model = build_model("carn", scale=2, config=CarnConfig(num_blocks=2))
    cpu = score_tile(model, ROW, tissue[:128, :128], scale=2, protocol="aligned")
    with full_precision(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
    gpu = score_tile(model.cuda(), ROW, tissue[:128, :128], scale=2, protocol="aligned")
    assert gpu["psnr_db"] == pytest.approx(cpu["psnr_db"], abs=1e-3)
    assert gpu["ssim_y"] == pytest.approx(cpu["ssim_y"], abs=1e-5)
