"""Our PSNR and SSIM are the numbers that others mean by these names.

BasicSR's are stated here by what BasicSR itself computed, and by their definition
(basicsr/metrics/psnr_ssim.py and metric_util.py of https://github.com/XPixelGroup/BasicSR): PSNR
and SSIM of float64 pixels on 0..255, SSIM by an 11 x 11 Gaussian window of sigma 1.5 where it fits;
Y by BT.601 of pixels that were float32 on 0..1.
"""

import math

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from skimage import color, data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from carn.metrics import Channel, psnr, ssim

TISSUE = data.immunohistochemistry()
# (top, left, height, width, error): odd sides, the last barely larger than the window.
PAIRS = {
    "tissue": (0, 0, 97, 83, 6),
    "background": (400, 10, 64, 131, 2),
    "small": (200, 300, 29, 27, 40),
}


def made(name: str) -> tuple[np.ndarray, np.ndarray]:
    """SR and HR of a pair: SR is wrong by up to `error` levels, in a pattern without any chance."""
    top, left, height, width, error = PAIRS[name]
    hr = TISSUE[top : top + height, left : left + width]
    y, x, c = np.indices(hr.shape)
    wrong = (x * 7919 + y * 104729 + c * 31 + x * y) % (2 * error + 1) - error
    return np.clip(hr.astype(int) + wrong, 0, 255).astype(np.uint8), hr


def cropped(image: np.ndarray, px: int) -> np.ndarray:
    return image[px : image.shape[0] - px, px : image.shape[1] - px]


def ours(sr: np.ndarray, hr: np.ndarray, *, shave_px: int, channel: Channel) -> tuple[float, float]:
    one, other = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] for image in (sr, hr))
    return (
        psnr(one, other, shave_px=shave_px, channel=channel).item(),
        ssim(one, other, shave_px=shave_px, channel=channel).item(),
    )


# ---------------------------------------------------------------------------------- scikit-image


@pytest.mark.parametrize("channel", ["rgb", "y"])
@pytest.mark.parametrize("shave_px", [0, 2, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_scikit_images(name: str, shave_px: int, channel: Channel) -> None:
    sr, hr = made(name)
    one, other = cropped(sr, shave_px), cropped(hr, shave_px)
    if channel == "y":
        one, other = (color.rgb2ycbcr(image)[..., 0] for image in (one, other))
    wanted_ssim = structural_similarity(
        one,
        other,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=-1 if channel == "rgb" else None,
    )
    found_psnr, found_ssim = ours(sr, hr, shave_px=shave_px, channel=channel)
    wanted_psnr = peak_signal_noise_ratio(other, one, data_range=255)
    assert found_psnr == pytest.approx(wanted_psnr, abs=1e-6)
    assert found_ssim == pytest.approx(wanted_ssim, abs=1e-6)


# --------------------------------------------------------------------------------------- BasicSR


def basicsr_planes(image: np.ndarray, *, crop_border: int, test_y_channel: bool) -> np.ndarray:
    """The (H, W, planes) float64 pixels that BasicSR compares."""
    image = cropped(image, crop_border)
    if not test_y_channel:
        return image.astype(np.float64)
    unit = image.astype(np.float32) / np.float32(255)
    luma = unit @ np.array([65.481, 128.553, 24.966]) + 16  # float64
    # It goes back to float32 on 0..1, and from there to 0..255.
    return ((luma / 255).astype(np.float32) * np.float32(255)).astype(np.float64)[..., None]


def basicsr(
    sr: np.ndarray, hr: np.ndarray, *, crop_border: int, test_y_channel: bool
) -> tuple[float, float]:
    """PSNR and SSIM by BasicSR's definitions."""
    planes = [
        basicsr_planes(image, crop_border=crop_border, test_y_channel=test_y_channel)
        for image in (sr, hr)
    ]
    error = np.mean((planes[0] - planes[1]) ** 2)
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def mean(plane: np.ndarray) -> np.ndarray:
        return fftconvolve(plane, window, mode="valid")

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarities = []
    for plane in range(planes[0].shape[2]):
        x, y = planes[0][..., plane], planes[1][..., plane]
        mx, my = mean(x), mean(y)
        vx, vy, cxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        similarity = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        similarities.append(similarity.mean())
    return 10 * math.log10(255**2 / error), float(np.mean(similarities))


@pytest.mark.parametrize("test_y_channel", [False, True])
@pytest.mark.parametrize("crop_border", [0, 2, 3, 4, 8])
@pytest.mark.parametrize("name", PAIRS)
def test_basicsrs(name: str, crop_border: int, test_y_channel: bool) -> None:
    sr, hr = made(name)
    wanted = basicsr(sr, hr, crop_border=crop_border, test_y_channel=test_y_channel)
    found = ours(sr, hr, shave_px=crop_border, channel="y" if test_y_channel else "rgb")
    assert found[0] == pytest.approx(wanted[0], abs=1e-3)
    assert found[1] == pytest.approx(wanted[1], abs=1e-3)
    # Its roundings to float32 are all that is between, which is far less than is allowed.
    assert found == pytest.approx(wanted, abs=2e-5)


# (pair, crop_border, test_y_channel): PSNR and SSIM by calculate_psnr and calculate_ssim of BasicSR
# 1.4.2 (basicsr 1.4.2 of PyPI, with opencv-python-headless 5.0.0 and numpy 2.4.6), which takes BGR.
FACTS = {
    ("tissue", 0, False): (36.69763, 0.970539),
    ("tissue", 4, False): (36.70361, 0.971419),
    ("tissue", 0, True): (44.59843, 0.993508),
    ("tissue", 4, True): (44.66323, 0.993677),
    ("background", 0, False): (44.70316, 0.991931),
    ("background", 4, False): (44.70713, 0.991953),
    ("background", 0, True): (50.67112, 0.997421),
    ("background", 4, True): (50.66808, 0.997421),
    ("small", 0, False): (20.69709, 0.474010),
    ("small", 4, False): (20.65817, 0.456187),
    ("small", 0, True): (28.71786, 0.750225),
    ("small", 4, True): (28.73126, 0.737281),
}


@pytest.mark.parametrize("case", FACTS)
def test_the_numbers_stay(case: tuple[str, int, bool]) -> None:
    name, shave_px, is_y = case
    found = ours(*made(name), shave_px=shave_px, channel="y" if is_y else "rgb")
    assert found == pytest.approx(FACTS[case], abs=1e-4)


@pytest.mark.parametrize("case", FACTS)
def test_basicsrs_own_numbers(case: tuple[str, int, bool]) -> None:
    """The definition above is BasicSR's to all digits that are kept of it."""
    name, crop_border, is_y = case
    found = basicsr(*made(name), crop_border=crop_border, test_y_channel=is_y)
    assert found[0] == pytest.approx(FACTS[case][0], abs=6e-6)
    assert found[1] == pytest.approx(FACTS[case][1], abs=6e-7)


def test_the_conventions_differ() -> None:
    """Or the agreement above would say nothing about channel and border."""
    sr, hr = made("tissue")
    found = [
        ours(sr, hr, shave_px=shave_px, channel=channel)
        for channel in ("rgb", "y")
        for shave_px in (0, 4)
    ]
    for place in (0, 1):
        values = sorted(scores[place] for scores in found)
        assert min(np.diff(values)) > 1e-4
