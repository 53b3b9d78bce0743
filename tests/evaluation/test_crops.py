"""Which crops are shown, and that they show what they say."""

import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from carn.degradation.bicubic import degrade
from carn.evaluation.crops import choose_place, choose_tiles, crop_strip
from carn.evaluation.scoring import pair
from carn.metrics import psnr
from carn.models import build_model

Scores = Callable[..., pa.Table]


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def batch(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]


# ------------------------------------------------------------------------------------------ tiles


def test_one_of_each_slide_first(scores: Scores) -> None:
    spreads = {("x", 1): 5.0, ("x", 2): 4.0, ("y", 1): 1.0, ("z", 1): 2.0, ("z", 2): 3.0}
    tables = {
        "worst": [scores(dict.fromkeys(spreads, 30.0))],
        "best": [scores({key: 30 + spread for key, spread in spreads.items()})],
        "middle": [scores({key: 30 + spread / 2 for key, spread in spreads.items()})],
    }
    order = ("x_1", "z_2", "y_1", "x_2", "z_1")
    for n in range(1, 8):
        assert choose_tiles(tables, n=n) == order[:n]


def test_spreads_are_of_means_over_seeds(scores: Scores) -> None:
    tables = {
        "a": [scores({1: 30.0, 2: 30.0})],
        "b": [scores({1: 40.0, 2: 34.0}), scores({1: 20.0, 2: 34.0})],
    }
    assert choose_tiles(tables, n=1) == ("s_2",)


def test_what_nobody_sees_is_no_spread(scores: Scores) -> None:
    """Blank tiles: exact by one model, and one level off by another."""
    tables = {
        "a": [scores({"blank": math.inf, "tissue": 33.0})],
        "b": [scores({"blank": 51.0, "tissue": 32.0})],
    }
    assert choose_tiles(tables, n=2) == ("s_tissue", "s_blank")


def test_ties_go_by_name(scores: Scores) -> None:
    rows = dict.fromkeys((3, 1, 2), 30.0)
    tables = {"a": [scores(rows)], "b": [scores(dict.fromkeys(rows, 31.0))]}
    assert choose_tiles(tables, n=3) == ("s_1", "s_2", "s_3")


def test_tiles_cannot_be_chosen(scores: Scores) -> None:
    with pytest.raises(ValueError, match="at least 2, not 1"):
        choose_tiles({"a": [scores({1: 3.0})]}, n=1)
    with pytest.raises(ValueError, match="n=0"):
        choose_tiles({"a": [scores({1: 3.0})], "b": [scores({1: 3.0})]}, n=0)
    with pytest.raises(ValueError, match="b was not scored on the same tiles as a"):
        choose_tiles({"a": [scores({1: 3.0})], "b": [scores({2: 3.0})]}, n=1)


# ----------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(("height", "width", "side", "step"), [(61, 47, 16, 8), (40, 64, 12, 7)])
def test_the_place_by_trying_all(
    tissue: np.ndarray, height: int, width: int, side: int, step: int
) -> None:
    hr = tissue[:height, :width]
    rng = np.random.default_rng(height)
    strength = rng.uniform(0, 12, (3, -(-height // 10), -(-width // 10)))
    results = {}
    for number, name in enumerate("abc"):
        sigma = np.kron(strength[number], np.ones((10, 10)))[:height, :width, None]
        sr = np.clip(hr + sigma * rng.normal(0, 1, hr.shape), 0, 255)
        results[name] = sr.round().astype(np.uint8)
    spreads = {}
    for y, x in itertools.product(
        range(0, height - side + 1, step), range(0, width - side + 1, step)
    ):
        goal = batch(hr[y : y + side, x : x + side])
        found = [
            min(50, psnr(batch(sr[y : y + side, x : x + side]), goal).item())
            for sr in results.values()
        ]
        spreads[x, y] = max(found) - min(found)
    wanted = max(spreads, key=lambda place: spreads[place])
    assert choose_place(hr, results, side_px=side, step_px=step) == wanted
    assert wanted != (0, 0)


def test_the_last_place_is_one_and_what_nobody_sees_is_no_spread() -> None:
    hr = np.full((64, 96, 3), 250, np.uint8)
    hr[40:, 72:] = 100
    exact, off = hr.copy(), hr.copy()
    off[:20] += 1 * (np.arange(96) % 2 == 0).astype(np.uint8)[:, None]  # half a level: above 50 dB
    exact[56:, 88:] = 110
    off[56:, 88:] = 120
    assert choose_place(hr, {"a": exact, "b": off}, side_px=8, step_px=8) == (88, 56)
    # Nothing to choose by: the top-left.
    assert choose_place(hr, {"a": off, "b": off}, side_px=8, step_px=8) == (0, 0)
    assert choose_place(hr, {"b": off}, side_px=64, step_px=64) == (0, 0)


def test_places_that_there_are_not() -> None:
    hr = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(ValueError, match=r"side_px=21 .* 30 x 20 px"):
        choose_place(hr, {"a": hr}, side_px=21, step_px=2)
    with pytest.raises(ValueError, match="step_px=0"):
        choose_place(hr, {"a": hr}, side_px=2, step_px=0)
    with pytest.raises(ValueError, match="not 0"):
        choose_place(hr, {}, side_px=2, step_px=2)
    with pytest.raises(ValueError, match=r"SR of shape \(20, 29, 3\)"):
        choose_place(hr, {"a": hr[:, 1:]}, side_px=2, step_px=2)


# ----------------------------------------------------------------------------------------- strips


class Nearest(nn.Module):
    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, lr: Tensor) -> Tensor:
        return lr.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


@pytest.mark.parametrize("scale", [2, 3, 8])
def test_a_strip_shows_one_place(tissue: np.ndarray, scale: int) -> None:
    hr = tissue[:131, :101]
    row = {"tile_id": "s_0_0", "slide": "s"}
    models = {"bicubic": build_model("bicubic", scale=scale), "nearest": Nearest(scale)}
    strip = crop_strip(models, row, hr, scale=scale, protocol="aligned", side_px=41)
    assert (strip.tile_id, strip.slide, strip.scale) == ("s_0_0", "s", scale)
    assert strip.side_px == 41 // scale * scale
    assert strip.x % scale == strip.y % scale == 0
    assert [name for name, _, _ in strip.pictures] == ["HR", "LR", "bicubic", "nearest"]
    x, y, side = strip.x, strip.y, strip.side_px
    shown = {name: picture(png) for name, png, _ in strip.pictures}
    assert {image.shape for image in shown.values()} == {(side, side, 3)}
    assert np.array_equal(shown["HR"], hr[y : y + side, x : x + side])
    lr = degrade(hr, scale=scale)
    assert np.array_equal(
        shown["LR"][::scale, ::scale],
        lr[y // scale : (y + side) // scale, x // scale : (x + side) // scale],
    )
    assert np.array_equal(shown["nearest"], shown["LR"])
    psnrs = {name: value for name, _, value in strip.pictures}
    assert psnrs["HR"] is psnrs["LR"] is None
    for name in models:
        wanted = psnr(batch(shown[name]), batch(shown["HR"])).item()
        assert psnrs[name] == pytest.approx(wanted, abs=1e-9)
    again = crop_strip(models, row, hr, scale=scale, protocol="aligned", side_px=41)
    assert again == strip


def test_the_place_of_a_strip_is_where_models_differ(tissue: np.ndarray) -> None:
    hr = tissue[:128, :128].copy()
    hr[64:96, 32:64] = np.indices((32, 32)).sum(0)[..., None] % 4 // 2 * 255  # fine and strong
    models = {"bicubic": build_model("bicubic", scale=2), "nearest": Nearest(2)}
    row = {"tile_id": "t", "slide": "s"}
    strip = crop_strip(models, row, hr, scale=2, protocol="aligned", side_px=32)
    sr = {
        name: torch.round(model(batch(degrade(hr, scale=2)) / 255).clamp(0, 1) * 255)
        .to(torch.uint8)[0]
        .permute(1, 2, 0)
        .numpy()
        for name, model in models.items()
    }
    assert (strip.x, strip.y) == choose_place(hr, sr, side_px=32, step_px=16)


def test_one_that_differs_everywhere_need_not_decide(tissue: np.ndarray) -> None:
    hr = tissue[:128, :128].copy()
    hr[64:96, 32:64] = np.indices((32, 32)).sum(0)[..., None] % 4 // 2 * 255
    row = {"tile_id": "t", "slide": "s"}
    pair_of = {"nearest": Nearest(2), "same": Nearest(2)}
    models = {"bicubic": build_model("bicubic", scale=2), **pair_of}
    settings: Any = {"scale": 2, "protocol": "aligned", "side_px": 32}
    everyone = crop_strip(models, row, hr, **settings)
    networks = crop_strip(models, row, hr, **settings, judged=["nearest", "same"])
    assert (everyone.x, everyone.y) != (0, 0)
    # The two that decide are equal: the first place there is.
    assert (networks.x, networks.y) == (0, 0)
    assert [name for name, *_ in networks.pictures] == ["HR", "LR", *models]


def test_exact_results_and_small_tiles() -> None:
    hr = np.full((10, 13, 3), 9, np.uint8)
    row = {"tile_id": "t", "slide": "s"}
    strip = crop_strip({"a": Nearest(3)}, row, hr, scale=3, protocol="misaligned")
    assert strip.side_px == 9
    assert strip.pictures[-1][2] == math.inf
    assert np.array_equal(
        picture(strip.pictures[0][1]), pair(hr, scale=3, protocol="aligned")[1][:9, :9]
    )
    with pytest.raises(ValueError, match="side_px=2 must be at least the scale, 3"):
        crop_strip({"a": Nearest(3)}, row, hr, scale=3, protocol="aligned", side_px=2)
