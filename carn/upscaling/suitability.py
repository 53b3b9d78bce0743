"""Hold a slide against the LR that its network was trained on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from carn.degradation.config import DegradationConfig
from carn.degradation.describe import CALIBRATED_MPP, PixelEstimates
from carn.models.checkpoint import Checkpoint
from carn.slides.compression import Compression
from carn.slides.slide import SCANNED_MPP
from carn.upscaling.lr_view import InputConfig

# Scanners of one nominal magnification differ by as much: 20x is 0.45 to 0.55 um per px.
MPP_TOLERANCE = 0.15


@dataclass(frozen=True, kw_only=True)
class TrainingRange:
    """The LR that a network was trained on.

    Attributes:
        network: its name in messages.
        jpeg_quality: least and largest; None where all was lossless.
        blur_px: standard deviation of the least and the strongest blur, HR px.
        has_sharpened: whether some was sharpened.
        lr_mpp: um per LR px, least and largest; None where it is not known.
    """

    network: str
    jpeg_quality: tuple[int, int] | None
    blur_px: tuple[float, float]
    has_sharpened: bool
    lr_mpp: tuple[float, float] | None

    @property
    def mpp_range(self) -> tuple[float, float] | None:
        """Um per LR px that the network is fit for: those of training, and a little beyond."""
        if self.lr_mpp is None:
            return None
        return self.lr_mpp[0] / (1 + MPP_TOLERANCE), self.lr_mpp[1] * (1 + MPP_TOLERANCE)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self | None:
        """What a checkpoint says of its training; None where it says nothing, as weights alone."""
        if checkpoint.training is None:
            return None
        # Before there was a choice, LR was made by bicubic interpolation.
        known = checkpoint.training.get("degradation") or {"degradation": "bicubic"}
        default = asdict(DegradationConfig(degradation="scanner"))
        values = {**default, **known}
        is_scanner = values["degradation"] == "scanner"
        low, high = values["blur_px"]
        is_all_blurred = values["blur_share"] == 1 and values["clean_share"] == 0
        mpp = (checkpoint.dataset or {}).get("hr_mpp")
        return cls(
            network=_name_of(checkpoint.uri),
            jpeg_quality=(
                tuple(values["jpeg_quality"]) if is_scanner and values["jpeg_share"] > 0 else None
            ),
            blur_px=(
                (low if is_all_blurred else 0.0, high)
                if is_scanner and values["blur_share"] > 0
                else (0.0, 0.0)
            ),
            has_sharpened=is_scanner and values["sharpen_share"] > 0,
            lr_mpp=mpp and (mpp[0] * checkpoint.scale, mpp[1] * checkpoint.scale),
        )

    @classmethod
    def from_json_values(cls, values: Mapping[str, Any] | None) -> Self | None:
        """The range whose `dataclasses.asdict` went through JSON."""
        if values is None:
            return None
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**plain)


def _name_of(uri: str) -> str:
    """What people call a checkpoint: a shipped network's name, or that of its run's folder."""
    parts = uri.removeprefix("shipped:").rstrip("/").split("/")
    is_of_run = len(parts) > 2 and parts[-2] == "checkpoints"
    return parts[-3] if is_of_run else parts[-1]


def with_range(config: InputConfig, trained: TrainingRange | None) -> InputConfig:
    """The settings with the px size that a network is fit for, where nobody says another."""
    if config.mpp_range is not None or trained is None:
        return config
    return replace(config, mpp_range=trained.mpp_range)


def file_warnings(
    trained: TrainingRange | None,
    *,
    compression: Compression,
    mpp: tuple[float, float] | None,
    mpp_range: tuple[float, float] | None = None,
) -> tuple[str, ...]:
    """Say in what a slide's file is unlike training, each with its number and training's.

    Args:
        trained: by `TrainingRange.of`.
        compression: of the level that is read.
        mpp: um per LR px, (x, y).
        mpp_range: of `with_range`.
    """
    found = _mpp_warnings(mpp, mpp_range, network=trained.network if trained else "the network")
    if trained is None:
        return found
    return (*_compression_warnings(trained, compression), *found)


def _compression_warnings(trained: TrainingRange, compression: Compression) -> tuple[str, ...]:
    found = []
    quality = compression.quality
    if compression.codec in ("jpeg2000", "other"):
        found.append(f"stored as lossy {compression.name}, which {trained.network} never saw")
    elif quality is not None:
        about = "" if quality.is_exact else "about "
        if trained.jpeg_quality is None:
            found.append(
                f"JPEG quality {about}{quality.quality}; {trained.network} was trained on lossless "
                "LR alone and sharpens JPEG's blocks: take a network for slides as scanners store "
                "them"
            )
        elif quality.quality < trained.jpeg_quality[0]:
            low, high = trained.jpeg_quality
            found.append(
                f"JPEG quality {about}{quality.quality}; {trained.network} was trained on {low} "
                f"to {high}"
            )
    return tuple(found)


def _mpp_warnings(
    mpp: tuple[float, float] | None, mpp_range: tuple[float, float] | None, *, network: str
) -> tuple[str, ...]:
    if mpp is None:
        return ()
    mean = (mpp[0] + mpp[1]) / 2
    if not SCANNED_MPP[0] <= mean <= SCANNED_MPP[1]:
        return (f"{mean:.3g} um per px, which no scanner of slides makes: --mpp corrects it",)
    if mpp_range is None or mpp_range[0] <= mean <= mpp_range[1]:
        return ()
    low, high = mpp_range
    return (
        f"{mean:.3g} um per px; {network} is fit for {low:.3g} to {high:.3g}: --input-mpp and "
        "--on-odd-mpp choose another level",
    )


def pixel_warnings(
    trained: TrainingRange | None,
    *,
    pixels: PixelEstimates | None,
    mpp: tuple[float, float] | None,
) -> tuple[str, ...]:
    """Say in what the sharpness of a slide's tissue is unlike training.

    Nothing is said unless the whole interval of the estimate is outside, or where the estimate is
    not calibrated for px of this size.

    Args:
        trained: by `TrainingRange.of`.
        pixels: by `carn.degradation.describe`.
        mpp: um per LR px, (x, y).
    """
    if trained is None or pixels is None or mpp is None:
        return ()
    if not CALIBRATED_MPP[0] <= sum(mpp) / 2 <= CALIBRATED_MPP[1]:
        return ()
    low, high = trained.blur_px
    blur = pixels.blur_px
    if blur is not None and blur.low > high:
        span = f"a blur of {low:g} to {high:g}" if high else "none"
        return (f"as soft as by a blur of {blur} HR px; {trained.network} was trained on {span}",)
    if pixels.is_sharpened and not trained.has_sharpened:
        return (f"sharper than the optics make it; {trained.network} saw no sharpened LR",)
    return ()
