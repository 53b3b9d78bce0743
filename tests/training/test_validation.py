"""Scores are carn.metrics' on the tiles that are named, whoever shares the work."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from carn.bcsr.dataset import open_dataset
from carn.degradation.bicubic import crop_to_multiple, degrade
from carn.metrics import mean_psnr, psnr, ssim, to_uint8
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.training.config import ValidationConfig
from carn.training.group import WorkerGroup
from carn.training.tiles import load_tiles
from carn.training.validation import Scores, Validator
from tests.training.lab import VALIDATION_EXTENTS

CPU = torch.device("cpu")


def make(
    uri: str, *, scale: int = 2, group: WorkerGroup | None = None, **changes: Any
) -> Validator:
    store = load_tiles(open_dataset(uri), split="validation", scale=scale)
    return Validator(store, ValidationConfig(**changes), group=group or WorkerGroup())


def as_batch(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


class Lopsided(nn.Module):
    """Bicubic, and a wedge of light that falls from one side: not the same when it is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.bicubic = Bicubic(BicubicConfig(), scale=2)
        self.modes: list[bool] = []

    def forward(self, lr: Tensor) -> Tensor:
        self.modes.append(self.training)
        sr = self.bicubic(lr)
        return (
            sr
            + torch.linspace(0, 0.1, sr.shape[-1])
            - torch.linspace(0, 0.05, sr.shape[-2])[:, None]
        )


@pytest.mark.parametrize("scale", [2, 3])
def test_scores_are_those_of_whole_tiles(
    dataset_uri: str, pixels: dict[str, np.ndarray], scale: int
) -> None:
    validator = make(dataset_uri, scale=scale, validation_crop_px=None)
    assert validator.tile_ids == [f"validation_{n}" for n in range(4)]
    scores = validator.bicubic(CPU)
    for index, name in enumerate(validator.tile_ids):
        hr = crop_to_multiple(pixels[name], scale)
        lr = as_batch(degrade(pixels[name], scale=scale))
        sr = to_uint8(Bicubic(BicubicConfig(), scale=scale)(lr.float() / 255))
        assert scores.psnr[index] == psnr(sr, as_batch(hr)).item()
        assert scores.ssim[index] == ssim(sr, as_batch(hr)).item()
    assert len(set(scores.psnr.tolist())) == 4


def test_the_mean_is_that_over_tiles() -> None:
    scores = Scores(psnr=np.array([30.0, 33.0, np.inf]), ssim=np.array([0.5, 0.9, 1.0]))
    assert scores.mean_psnr == mean_psnr([30.0, 33.0, np.inf]) == pytest.approx(163 / 3)
    assert scores.mean_ssim == pytest.approx(0.8)


@pytest.mark.parametrize(("crop_px", "side"), [(32, 32), (33, 32), (68, 68), (1000, None)])
def test_the_middle_of_a_tile(
    dataset_uri: str, pixels: dict[str, np.ndarray], crop_px: int, side: int | None
) -> None:
    validator = make(dataset_uri, validation_crop_px=crop_px)
    for index, (width, height) in enumerate(VALIDATION_EXTENTS):
        lr, hr = validator.crop(index)
        whole = crop_to_multiple(pixels[f"validation_{index}"], 2)
        wanted = tuple(min(side or 1000, extent // 2 * 2) for extent in (height, width))
        assert hr.shape == (*wanted, 3)
        assert lr.shape == (wanted[0] // 2, wanted[1] // 2, 3)
        top, left = ((whole.shape[axis] - wanted[axis]) // 2 // 2 * 2 for axis in (0, 1))
        np.testing.assert_array_equal(hr, whole[top : top + wanted[0], left : left + wanted[1]])
        np.testing.assert_array_equal(
            lr,
            degrade(whole, scale=2)[
                top // 2 : (top + wanted[0]) // 2, left // 2 : (left + wanted[1]) // 2
            ],
        )


@pytest.mark.parametrize(
    ("most", "chosen"),
    [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])],
)
def test_the_tiles_used_spread_over_all(dataset_uri: str, most: int, chosen: list[int]) -> None:
    validator = make(dataset_uri, max_validation_tiles=most)
    assert validator.tile_ids == [f"validation_{n}" for n in chosen]
    assert len(validator.bicubic(CPU).psnr) == len(chosen)


def test_all_tiles_where_no_number_is_given(dataset_uri: str) -> None:
    assert len(make(dataset_uri, max_validation_tiles=None).tile_ids) == 4


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_workers_share_the_tiles(
    dataset_uri: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker scores its own, and what the others score is nought in its sum."""
    whole = make(dataset_uri).bicubic(CPU)
    monkeypatch.setattr(WorkerGroup, "sum", lambda self, values: values)
    parts = [
        make(dataset_uri, group=WorkerGroup(rank=rank, world_size=world_size)).bicubic(CPU)
        for rank in range(world_size)
    ]
    assert (sum(part.psnr for part in parts) == whole.psnr).all()
    assert (sum(part.ssim for part in parts) == whole.ssim).all()
    for rank, part in enumerate(parts):
        assert np.flatnonzero(part.psnr).tolist() == list(range(rank, 4, world_size))


# -------------------------------------------------------------------------------- self-ensemble


def test_self_ensemble_changes_nothing_where_turning_does_not(dataset_uri: str) -> None:
    plain, ensemble = (make(dataset_uri, self_ensemble=flag) for flag in (False, True))
    network = Bicubic(BicubicConfig(), scale=2)
    for index in range(4):
        one = plain.upscale(network, index, CPU).astype(int)
        other = ensemble.upscale(network, index, CPU).astype(int)
        assert one.shape == other.shape
        assert abs(one - other).max() <= 1  # roundings
        assert (one == other).mean() > 0.999


def test_self_ensemble_is_the_mean_over_eight_turns(dataset_uri: str) -> None:
    validator = make(dataset_uri, self_ensemble=True)
    network = Lopsided().eval()
    for index in range(4):
        lr = as_batch(validator.crop(index)[0]).float() / 255
        total = torch.zeros(1)
        for quarter in range(4):
            for is_mirrored in (False, True):
                turned = torch.rot90(lr, quarter, (-2, -1))
                turned = turned.flip(-1) if is_mirrored else turned
                sr = network(turned)
                sr = sr.flip(-1) if is_mirrored else sr
                total = total + torch.rot90(sr, -quarter, (-2, -1))
        wanted = to_uint8(total / 8)[0].permute(1, 2, 0).detach().numpy().astype(int)
        found = validator.upscale(network, index, CPU).astype(int)
        assert abs(found - wanted).max() <= 1
        assert (found == wanted).mean() > 0.99
    plain = make(dataset_uri).score(network, CPU)
    assert (validator.score(network, CPU).psnr != plain.psnr).all()


# ------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("is_training", [True, False])
def test_a_network_is_judged_in_evaluation_mode_and_left_as_it_was(
    dataset_uri: str, is_training: bool
) -> None:
    network = Lopsided().train(is_training)
    make(dataset_uri).score(network, CPU)
    assert network.training is is_training
    assert network.modes == [False] * 4


def test_no_gradient_is_kept(dataset_uri: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))
    make(dataset_uri).score(network, CPU)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_convention_says_how_the_numbers_came_about(dataset_uri: str) -> None:
    said = make(dataset_uri, validation_crop_px=32, max_validation_tiles=3).convention
    assert said.startswith("3 validation tiles, the middle 32 px of each tile. PSNR and SSIM of")
    said = make(dataset_uri, validation_crop_px=None, self_ensemble=True).convention
    assert said.startswith("4 validation tiles, whole tiles, averaged over 8 flips and turns. ")
