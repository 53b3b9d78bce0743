"""A slide is held against what its network was trained on, by name and number."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from carn.degradation.config import DegradationConfig
from carn.degradation.describe import Estimate, PixelEstimates
from carn.degradation.jpeg import quantisation_tables
from carn.models.checkpoint import Checkpoint, read_checkpoint
from carn.slides.compression import Compression, match_tables
from carn.upscaling.lr_view import InputConfig
from carn.upscaling.suitability import (
    TrainingRange,
    file_warnings,
    pixel_warnings,
    with_range,
)

SCANNER = TrainingRange(
    network="net",
    jpeg_quality=(50, 97),
    blur_px=(0.0, 1.3),
    has_sharpened=True,
    lr_mpp=(0.46, 0.5),
)
BICUBIC = replace(SCANNER, jpeg_quality=None, blur_px=(0.0, 0.0), has_sharpened=False)
LOSSLESS = Compression(codec="lossless", name="LZW")


def jpeg(quality: int) -> Compression:
    luma, chroma = quantisation_tables(quality)
    return Compression(codec="jpeg", name="JPEG", quality=match_tables(luma, chroma))


def pixels(low: float, high: float, *, is_sharpened: bool = False) -> PixelEstimates:
    return PixelEstimates(
        fall_db=20.0,
        blur_px=Estimate(value=(low + high) / 2, low=low, high=high),
        is_sharpened=is_sharpened,
        noise_levels=None,
        is_noise_hidden=True,
        has_flat_place=False,
    )


def trained_by(training: dict[str, Any] | None, dataset: dict[str, Any] | None) -> Checkpoint:
    shipped = read_checkpoint("shipped:carn-x2-bicubic")
    uri = "s3://lab/runs/ours/checkpoints/step-00000500"
    return replace(shipped, uri=uri, training=training, dataset=dataset)


def test_the_range_is_what_the_checkpoint_says() -> None:
    config = asdict(
        DegradationConfig(
            degradation="scanner", jpeg_quality=(60, 90), blur_share=1.0, clean_share=0.0
        )
    )
    found = TrainingRange.of(
        trained_by({"degradation": config | {"blur_px": [0.4, 1.0]}}, {"hr_mpp": [0.23, 0.25]})
    )
    assert found == TrainingRange(
        network="ours",
        jpeg_quality=(60, 90),
        blur_px=(0.4, 1.0),
        has_sharpened=True,
        lr_mpp=(0.46, 0.5),
    )
    assert found is not None
    assert TrainingRange.from_json_values(json.loads(json.dumps(asdict(found)))) == found
    # Where only some LR is blurred, the rest is not.
    some = {"degradation": config | {"blur_share": 0.5, "jpeg_share": 0.0, "sharpen_share": 0.0}}
    found = TrainingRange.of(trained_by(some, None))
    assert found is not None
    assert (found.jpeg_quality, found.blur_px[0], found.has_sharpened) == (None, 0.0, False)
    assert found.lr_mpp is None


def test_a_checkpoint_of_before_there_was_a_choice_is_of_bicubic_lr() -> None:
    found = TrainingRange.of(trained_by({"seed": 1}, {"digest": "1"}))
    assert found is not None
    assert (found.jpeg_quality, found.blur_px, found.has_sharpened) == (None, (0.0, 0.0), False)
    assert TrainingRange.of(trained_by(None, None)) is None


@pytest.mark.parametrize(
    ("trained", "compression", "mpp", "said"),
    [
        (SCANNER, jpeg(80), (0.5, 0.5), ()),
        (SCANNER, jpeg(99), (0.5, 0.5), ()),
        (SCANNER, LOSSLESS, (0.5, 0.5), ()),
        (SCANNER, jpeg(40), (0.5, 0.5), ("JPEG quality 40; net was trained on 50 to 97",)),
        (BICUBIC, jpeg(80), (0.5, 0.5), ("JPEG quality 80; net was trained on lossless LR alone",)),
        (BICUBIC, LOSSLESS, (0.5, 0.5), ()),
        (
            SCANNER,
            Compression(codec="jpeg2000", name="JPEG 2000"),
            (0.5, 0.5),
            ("stored as lossy JPEG 2000, which net never saw",),
        ),
        (SCANNER, Compression(codec="unknown", name="?"), (0.5, 0.5), ()),
        (SCANNER, LOSSLESS, (0.25, 0.25), ("0.25 um per px; net is fit for 0.4 to 0.575",)),
        (SCANNER, LOSSLESS, (0.57, 0.57), ()),
        (SCANNER, LOSSLESS, (1.0, 1.0), ("1 um per px; net is fit for 0.4 to 0.575",)),
        (SCANNER, LOSSLESS, (0.025, 0.025), ("0.025 um per px, which no scanner",)),
        (SCANNER, LOSSLESS, None, ()),
        (replace(SCANNER, lr_mpp=None), LOSSLESS, (1.0, 1.0), ()),
        (None, jpeg(10), (4.0, 4.0), ()),
        (None, jpeg(10), (42.3, 42.3), ("42.3 um per px, which no scanner",)),
    ],
)
def test_files_unlike_training_are_told_with_both_numbers(
    trained: TrainingRange | None,
    compression: Compression,
    mpp: tuple[float, float] | None,
    said: tuple[str, ...],
) -> None:
    config = with_range(InputConfig(), trained)
    found = file_warnings(trained, compression=compression, mpp=mpp, mpp_range=config.mpp_range)
    assert len(found) == len(said)
    assert all(text.startswith(start) for text, start in zip(found, said, strict=True))


@pytest.mark.parametrize(
    ("trained", "estimates", "mpp", "said"),
    [
        (SCANNER, pixels(0.2, 1.0), 0.5, None),
        (SCANNER, pixels(1.2, 1.9), 0.5, None),
        (SCANNER, pixels(1.4, 2.0), 0.5, "as soft as by a blur of 1.70 (1.40 to 2.00) HR px; net"),
        (SCANNER, pixels(0.0, 0.3, is_sharpened=True), 0.5, None),
        (BICUBIC, pixels(0.0, 0.4), 0.5, None),
        (BICUBIC, pixels(0.3, 0.9), 0.5, "as soft as by a blur of 0.60"),
        (BICUBIC, pixels(0.0, 0.3, is_sharpened=True), 0.5, "sharper than the optics"),
        # Px of another size, for which blur is not calibrated.
        (SCANNER, pixels(1.4, 2.0), 1.0, None),
        (SCANNER, None, 0.5, None),
        (None, pixels(1.4, 2.0), 0.5, None),
    ],
)
def test_softness_is_told_where_its_whole_interval_is_outside(
    trained: TrainingRange | None, estimates: PixelEstimates | None, mpp: float, said: str | None
) -> None:
    found = pixel_warnings(trained, pixels=estimates, mpp=(mpp, mpp))
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(said)
    assert pixel_warnings(trained, pixels=estimates, mpp=None) == ()


def test_what_is_said_by_hand_counts_before_training() -> None:
    own = InputConfig(mpp_range=(0.2, 0.3))
    assert with_range(own, SCANNER) == own
    assert with_range(InputConfig(), None) == InputConfig()
    assert with_range(InputConfig(), replace(SCANNER, lr_mpp=None)).mpp_range is None
