"""Hold a slide against the LR that its network was trained on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from carn.degradation.config import DegradationConfig
from carn.degradation.describe import CALIBRATED_MPP, PixelEstimates
from carn.models.checkpoint import Checkpoint
from carn.slides.compression import Compression

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
        mpp = (checkpoint.dataset or {}).get("hr_mpp")
        return cls(
            network=checkpoint.uri.removeprefix("shipped:").rstrip("/").rsplit("/", 1)[-1],
            jpeg_quality=(
                tuple(values["jpeg_quality"]) if is_scanner and values["jpeg_share"] > 0 else None
            ),
            blur_px=(
                (0.0 if values["blur_share"] < 1 else low, high)
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


def file_warnings(
    trained: TrainingRange | None,
    *,
    compression: Compression,
    mpp: tuple[float, float] | None,
) -> tuple[str, ...]:
    """Say in what a slide's file is unlike training, each with its number and training's.

    Args:
        trained: by `TrainingRange.of`.
        compression: of the level that is read.
        mpp: um per LR px, (x, y).
    """
    if trained is None:
        return ()
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
    if mpp is not None and trained.lr_mpp is not None:
        finest, coarsest = trained.lr_mpp
        mean = (mpp[0] + mpp[1]) / 2
        if not finest / (1 + MPP_TOLERANCE) <= mean <= coarsest * (1 + MPP_TOLERANCE):
            span = f"{finest:.3g} to {coarsest:.3g}" if finest < coarsest else f"{finest:.3g}"
            found.append(
                f"{mean:.3g} um per px; {trained.network} was trained on {span}: --input-mpp "
                "chooses another level"
            )
    return tuple(found)


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
