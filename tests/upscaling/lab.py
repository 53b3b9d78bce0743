"""What the tests of this folder share: views of drawn pixels, and small networks."""

import numpy as np
import torch
from torch import nn

from carn.errors import DamagedTileError
from carn.models.carn import Carn, CarnConfig
from carn.models.edsr import Edsr, EdsrConfig
from carn.slides.slide import Level, Rgb, Slide, SlideProperties
from carn.upscaling.lr_view import InputConfig, LrView


class DrawnSlide(Slide):
    """Levels held in memory, without any loss; boxes (x, y, width, height) of level 0 may be bad.

    A read that touches one fails as the direct reader's do: the first, by rows, is named.
    """

    def __init__(
        self,
        *levels: Rgb,
        mpp: tuple[float, float] | None = (0.25, 0.25),
        bad: tuple[tuple[int, int, int, int], ...] = (),
        bad_levels: tuple[int, ...] = (0,),
        reader: str = "openslide",
    ) -> None:
        base = levels[0]
        super().__init__(
            "drawn",
            levels=tuple(
                Level(
                    width_px=level.shape[1],
                    height_px=level.shape[0],
                    downsample=float(round(base.shape[1] / level.shape[1])),
                )
                for level in levels
            ),
            properties=SlideProperties(
                mpp_x=mpp and mpp[0], mpp_y=mpp and mpp[1], vendor="drawn", icc_profile=None
            ),
        )
        self.pixels = levels
        self.bad = bad
        self.bad_levels = bad_levels
        self.reader = reader

    def _read_level(self, x: int, y: int, width: int, height: int, *, level: int) -> Rgb:
        downsample = self.levels[level].downsample
        for left, top, across, down in self.bad if level in self.bad_levels else ():
            x0, y0 = x * downsample, y * downsample
            x1, y1 = (x + width) * downsample, (y + height) * downsample
            if x0 < left + across and left < x1 and y0 < top + down and top < y1:
                raise DamagedTileError(self.uri, "torn", level, left, top)
        return self.pixels[level][y : y + height, x : x + width].copy()

    def close(self) -> None: ...


def view_of(pixels: Rgb, *, config: InputConfig | None = None) -> LrView:
    """A plain image as a view."""
    slide = DrawnSlide(pixels, mpp=None, reader="image")
    return LrView(slide, config or InputConfig())


def small_edsr(scale: int) -> nn.Module:
    """A network of few weights without pooling; its results are pictures."""
    return _picturing(Edsr(EdsrConfig(num_blocks=1, channels=6), scale=scale))


def small_carn(scale: int, *, num_blocks: int = 2) -> nn.Module:
    """Likewise with pooling, and gates that depend on it."""
    config = CarnConfig(num_blocks=num_blocks, channels=8, reduction=2)
    model = _picturing(Carn(config, scale=scale))
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            # Features are of the order of 100: gates are neither shut nor open.
            parameter.data *= 0.7
    return model


def _picturing(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        inputs = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator) / inputs**0.5
    return model.eval()


def whole(model: nn.Module, pixels: Rgb, *, halo_px: int) -> Rgb:
    """One float32 pass over an image with its border mirrored `halo_px` wide, cut to the image."""
    padded = np.pad(pixels, ((halo_px, halo_px), (halo_px, halo_px), (0, 0)), mode="reflect")
    with torch.inference_mode():
        lr = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
        sr = model(lr).clamp(0, 1).mul(255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    rim = halo_px * model.scale
    return sr[rim : sr.shape[0] - rim, rim : sr.shape[1] - rim]
