"""How far an engine's pixels are from those of the plain float32 network.

An engine is the default only where it keeps DEFAULT_DB, and is offered only where it keeps
OFFERED_DB and moves PSNR to HR by no more than MAX_HR_CHANGE_DB. Rounding to uint8 alone costs an
error of 58.9 dB.

Measured by the command below on two cores of an AVX-512 CPU with bf16, on seven tiles of tissue
that the networks had not seen. CARN x2 was trained with this package's defaults, the others for 300
small steps: their figures say what their form of bf16 does rather than what good weights lose.
Never more than two grey levels.

  engine                     dB to fp32   as uint8   values changed   dB to HR
  CARN x2   fp32, folded        139.8       95.9         0.000         +0.0000
  CARN x2   bf16                 73.6       62.0         0.041         -0.0006
  CARN x2   bf16, folded         74.1       62.3         0.039         -0.0010   default
  CARN x4   bf16, folded         75.4       62.9         0.033         -0.0003   default
  EDSR x2   bf16, folded         76.0       63.1         0.032         +0.0009   default
  RDN x2    bf16                 70.2       60.2         0.063         +0.0059
  RDN x2    bf16, folded         71.0       60.5         0.057         +0.0057   default
  SWD-Net   bf16                 70.7       60.4         0.059         -0.0012   default
  RCAN x2   bf16, folded         63.0       56.7         0.139         -0.0052   when asked for

For the rest there is fp32 alone: in bf16 SRGAN reached 63 dB and SRCNN 69, which gained no time,
and PSNR to HR moved by up to 0.025 dB. On a GPU the ends of a bf16 network are in TF32: with TF32's
10 bits imitated on the CPU, CARN lost 0.2 dB of its 73.2.

Examples:
  python -m carn.upscaling.accuracy runs/carn_x2 tissue/*.png
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from carn.slides.slide import Rgb
from carn.upscaling.engine import Engine, EngineConfig, make_engine, reference_engine
from carn.upscaling.folding import can_fold
from carn.upscaling.precision import Precision, offers_bf16

DEFAULT_DB = 70.0
OFFERED_DB = 60.0
MAX_HR_CHANGE_DB = 0.01
DATA_RANGE = 255


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """An engine beside the reference, over all pixels and channels of all windows.

    Attributes:
        psnr_db: of the results before rounding, on 0..1 and clamped; infinite where they are equal.
        psnr_uint8_db: of the pixels.
        max_difference: grey levels that a value of a pixel is off at most.
        share_changed: of the values, how many are off at all; 0..1.
        hr_change_db: PSNR to HR by the engine less that by the reference, both of the pixels; None
            where no HR was given.
    """

    psnr_db: float
    psnr_uint8_db: float
    max_difference: int
    share_changed: float
    hr_change_db: float | None = None


def compare(
    engine: Engine, reference: Engine, windows: Iterable[Rgb], *, hr: Sequence[Rgb] | None = None
) -> Accuracy:
    """How far an engine is from a reference, each with the pooling that it is set to.

    Args:
        engine: what is judged.
        reference: `reference_engine` of the same model, self-ensembled where the engine is.
        windows: LR with the engine's halo, inferred at once.
        hr: what the SR of each should be.

    Raises:
        ValueError: no windows, HR of another number or size than SR, or only one of the engines is
            self-ensembled.
    """
    if engine.self_ensemble != reference.self_ensemble:
        raise ValueError(
            f"self_ensemble={engine.self_ensemble} of the engine is not the reference's; make that "
            "by reference_engine(model, self_ensemble=engine.self_ensemble)"
        )
    exact, levels, engine_hr, reference_hr = (_Squares() for _ in range(4))
    largest, num_changed = 0, 0
    wanted: Iterable[Rgb | None] = itertools.repeat(None) if hr is None else hr
    for window, target in zip(windows, wanted, strict=hr is not None):
        ours, theirs = (_clamped(side.upscale_float(window)) for side in (engine, reference))
        exact.add(ours, theirs)
        pixels, expected = (np.rint(side * DATA_RANGE) for side in (ours, theirs))
        levels.add(pixels / DATA_RANGE, expected / DATA_RANGE)
        difference = np.abs(pixels - expected)
        largest = max(largest, int(difference.max()))
        num_changed += int(np.count_nonzero(difference))
        if target is not None:
            if target.shape != pixels.shape:
                raise ValueError(f"HR is {target.shape}, SR of its window {pixels.shape}")
            wished = target.astype(np.float32) / DATA_RANGE
            engine_hr.add(pixels / DATA_RANGE, wished)
            reference_hr.add(expected / DATA_RANGE, wished)
    if not exact.count:
        raise ValueError("no windows to compare on")
    return Accuracy(
        psnr_db=exact.psnr_db,
        psnr_uint8_db=levels.psnr_db,
        max_difference=largest,
        share_changed=num_changed / exact.count,
        hr_change_db=None if hr is None else engine_hr.psnr_db - reference_hr.psnr_db,
    )


@dataclass
class _Squares:
    """A mean squared error that grows."""

    total: float = 0.0
    count: int = 0

    def add(self, ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> None:
        self.total += float(np.square(ours.astype(np.float64) - theirs).sum())
        self.count += ours.size

    @property
    def psnr_db(self) -> float:
        return -10 * math.log10(self.total / self.count) if self.total else math.inf


def _clamped(sr: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(sr, 0, 1)


# -------------------------------------------------------------------------------------- command

HEADER = ("engine", "dB to fp32", "as uint8", "levels", "changed", "dB to HR")


def table_of(
    model: nn.Module, images: Iterable[Rgb], *, side_px: int, settings: EngineConfig
) -> Iterator[tuple[str, ...]]:
    """A row of the printed table for each engine that a model has.

    Args:
        model: the network.
        images: HR.
        side_px: the most of each that is taken, LR px from its middle.
        settings: what the engines have in common.
    """
    from carn.degradation.bicubic import degrade
    from carn.upscaling.pooling import has_pooling, pool_over

    reference = reference_engine(model, self_ensemble=settings.self_ensemble)
    halo = reference.halo_px
    hrs, windows = [], []
    for image in images:
        hr = _middle(image, scale=reference.scale, side_px=side_px)
        hrs.append(hr)
        lr = degrade(hr, scale=reference.scale)
        windows.append(np.pad(lr, ((halo, halo), (halo, halo), (0, 0)), mode="symmetric"))
    if not windows:
        raise ValueError("no images were named")
    pooling = pool_over(model, windows, halo_px=halo) if has_pooling(model) else None
    reference.set_pooling(pooling)
    for config in _offered(model, settings):
        engine = make_engine(model, config)
        engine.set_pooling(pooling)
        found = compare(engine, reference, windows, hr=hrs)
        assert found.hr_change_db is not None
        yield (
            engine.description,
            f"{found.psnr_db:.1f}",
            f"{found.psnr_uint8_db:.1f}",
            str(found.max_difference),
            f"{found.share_changed:.4f}",
            f"{found.hr_change_db:+.4f}",
        )


def _middle(image: Rgb, *, scale: int, side_px: int) -> Rgb:
    sides = [min(side // scale, side_px) * scale for side in image.shape[:2]]
    starts = [(have - want) // 2 for have, want in zip(image.shape, sides, strict=False)]
    return image[starts[0] : starts[0] + sides[0], starts[1] : starts[1] + sides[1]]


def _offered(model: nn.Module, settings: EngineConfig) -> Iterator[EngineConfig]:
    precisions: tuple[Precision, ...] = ("fp32", "bf16") if offers_bf16(model) else ("fp32",)
    for precision in precisions:
        for is_folded in (False, True) if can_fold(model) else (True,):
            yield replace(settings, precision=precision, fold=is_folded)


def main(
    checkpoint: str,
    images: tuple[str, ...],
    /,
    *,
    side_px: int = 128,
    settings: EngineConfig | None = None,
) -> int:
    """Print how far each engine of a model is from plain float32.

    Args:
        checkpoint: a checkpoint, run folder or weights file.
        images: HR images or slides; all of one size, or larger than what is taken of them.
        side_px: LR px that are taken from the middle of each.
        settings: the engines' other settings.
    """
    from carn.models.checkpoint import load_model
    from carn.slides import open_image

    def pixels() -> Iterator[Rgb]:
        for uri in images:
            with open_image(uri) as image:
                yield image.read_region(0, 0, *image.extent)

    model = load_model(checkpoint)
    rows = table_of(model, pixels(), side_px=side_px, settings=settings or EngineConfig())
    for row in itertools.chain([HEADER], rows):
        cells = [row[0].ljust(44), *(cell.rjust(11) for cell in row[1:])]
        sys.stdout.write(" ".join(cells) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    import tyro

    sys.exit(tyro.cli(main))
