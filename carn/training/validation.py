"""How good a network is on tiles that it does not train on, next to bicubic."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carn.degradation.conditions import read_conditions
from carn.degradation.variants import LrMaker
from carn.metrics import convention, mean_psnr, psnr, ssim, to_uint8
from carn.models.bicubic import Bicubic, BicubicConfig
from carn.models.turns import mean_over_turns
from carn.slides.slide import Rgb
from carn.training.config import TrainConfig, ValidationConfig
from carn.training.group import WorkerGroup
from carn.training.patches import TileStore


@dataclass(frozen=True, kw_only=True)
class Scores:
    """PSNR and SSIM of some tiles, in their order.

    Attributes:
        psnr: (n,) dB; infinite where SR equals HR.
        ssim: (n,).
    """

    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]

    @property
    def mean_psnr(self) -> float:
        """Mean over tiles, dB; see `carn.metrics.mean_psnr`."""
        return mean_psnr(self.psnr.tolist())

    @property
    def mean_ssim(self) -> float:
        """Mean over tiles."""
        return float(self.ssim.mean())


def validation_maker(config: TrainConfig) -> LrMaker:
    """What makes LR of validation tiles: the conditions that the settings name, or bicubic LR.

    Raises:
        ValueError, StorageError: as `read_conditions`.
    """
    return LrMaker(conditions=read_conditions(config.validation.validation_conditions))


class Validator:
    """Scores networks on the same crops of the same tiles, shared out over the workers.

    Each tile is scored under each condition that the store's LR was made for.
    """

    def __init__(self, store: TileStore, config: ValidationConfig, *, group: WorkerGroup) -> None:
        self._store = store
        self._config = config
        self._group = group
        count = min(len(store.tile_ids), config.max_validation_tiles or len(store.tile_ids))
        tiles = [int(n) for n in np.linspace(0, len(store.tile_ids) - 1, count).round()]
        self.conditions = tuple(store.maker.conditions)
        self._places = [
            (tile, variant) for variant in range(store.maker.num_variants) for tile in tiles
        ]

    @property
    def tile_ids(self) -> list[str]:
        """The names of the tiles (and the condition, if there are any), in the order of scores."""
        names = [self._store.tile_ids[tile] for tile, _ in self._places]
        if not self.conditions:
            return names
        conditions = [self.conditions[variant] for _, variant in self._places]
        return [f"{name} ({condition})" for name, condition in zip(names, conditions, strict=True)]

    def by_condition(self, scores: Scores) -> dict[str, Scores]:
        """The scores under each condition; empty where there are none."""
        variants = np.array([variant for _, variant in self._places])
        return {
            name: Scores(psnr=scores.psnr[variants == number], ssim=scores.ssim[variants == number])
            for number, name in enumerate(self.conditions)
        }

    @property
    def convention(self) -> str:
        """One sentence that says how the numbers came about."""
        side = self._config.validation_crop_px
        part = "whole tiles" if side is None else f"the middle {side} px of each tile"
        turned = ", averaged over 8 flips and turns" if self._config.self_ensemble else ""
        under = f", each under {', '.join(self.conditions)}" if self.conditions else ""
        num_tiles = len({tile for tile, _ in self._places})
        return f"{num_tiles} validation tiles, {part}{turned}{under}. {convention()}"

    def bicubic(self, device: torch.device) -> Scores:
        """The scores of bicubic interpolation."""
        return self.score(Bicubic(BicubicConfig(), scale=self._store.scale), device)

    def score(self, model: nn.Module, device: torch.device) -> Scores:
        """The scores of a network, in float32; it is left in the mode it was in."""
        was_training = model.training
        model.eval()
        scores = torch.zeros(len(self._places), 2, dtype=torch.float64)
        for index in range(self._group.rank, len(self._places), self._group.world_size):
            lr, hr = self.crop(index)
            sr = to_uint8(self._upscale(model, _batch(lr, device)))
            target = torch.from_numpy(np.ascontiguousarray(hr)).permute(2, 0, 1)[None].to(device)
            scores[index, 0] = psnr(sr, target).item()
            scores[index, 1] = ssim(sr, target).item()
        model.train(was_training)
        scores = self._group.sum(scores.to(device)).cpu()
        return Scores(psnr=scores[:, 0].numpy(), ssim=scores[:, 1].numpy())

    def crop(self, index: int) -> tuple[Rgb, Rgb]:
        """LR and HR uint8 of a tile, or of its middle."""
        tile, variant = self._places[index]
        lr, hr = self._store.pair(tile, variant=variant)
        if self._config.validation_crop_px is None:
            return lr, hr
        scale = self._store.scale
        side = self._config.validation_crop_px // scale
        height, width = min(side, lr.shape[0]), min(side, lr.shape[1])
        top, left = (lr.shape[0] - height) // 2, (lr.shape[1] - width) // 2
        return (
            lr[top : top + height, left : left + width],
            hr[top * scale : (top + height) * scale, left * scale : (left + width) * scale],
        )

    def upscale(self, model: nn.Module, index: int, device: torch.device) -> Rgb:
        """SR (H, W, 3) uint8 of a tile by a network in evaluation mode."""
        lr, _ = self.crop(index)
        sr = to_uint8(self._upscale(model, _batch(lr, device)))
        pixels: Rgb = sr[0].permute(1, 2, 0).cpu().numpy()
        return pixels

    def _upscale(self, model: nn.Module, lr: Tensor) -> Tensor:
        with torch.inference_mode():
            if not self._config.self_ensemble:
                # Past torch.compile, which would compile anew for every size of tile.
                sr: Tensor = model.forward(lr)
                return sr
            return mean_over_turns(model.forward, lr)


def _batch(lr: Rgb, device: torch.device) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(lr)).to(device)
    return pixels.permute(2, 0, 1)[None].float().div_(255)
