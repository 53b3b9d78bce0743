"""PSNR and SSIM against scikit-image, pytorch-msssim and their definitions."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_msssim import ssim as peer_ssim
from skimage import color, data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.utils._python_dispatch import TorchDispatchMode

from carn.metrics import (
    Channel,
    convention,
    gaussian_weights,
    mean_psnr,
    psnr,
    ssim,
    to_uint8,
)

TISSUE = data.immunohistochemistry()


def degraded(hr: np.ndarray, *, sigma: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(hr + rng.normal(0, sigma, hr.shape), 0, 255).round().astype(np.uint8)


def batch(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """SR and HR of two different images (2, 96, 83, 3), the second much worse than the first."""
    hr = np.stack([TISSUE[:96, :83], TISSUE[300:396, 200:283]])
    sr = np.stack([degraded(hr[0], sigma=4), degraded(hr[1], sigma=25)])
    return sr, hr


def cropped(image: np.ndarray, px: int) -> np.ndarray:
    return image[px : image.shape[0] - px, px : image.shape[1] - px]


# ------------------------------------------------------------------------------------------ PSNR


@pytest.mark.parametrize("shave_px", [0, 8])
def test_psnr_is_scikit_images_for_each_image(
    images: tuple[np.ndarray, np.ndarray], shave_px: int
) -> None:
    sr, hr = images
    found = psnr(batch(*sr), batch(*hr), shave_px=shave_px)
    for number in range(2):
        one, other = cropped(sr[number], shave_px), cropped(hr[number], shave_px)
        wanted = peak_signal_noise_ratio(other, one, data_range=255)
        assert found[number].item() == pytest.approx(wanted, abs=1e-9)
    assert found[0] - found[1] > 10  # neither is a mean of both


def test_luma_is_that_of_matlab(images: tuple[np.ndarray, np.ndarray]) -> None:
    sr, hr = images
    luma = [color.rgb2ycbcr(image[0])[..., 0] for image in (sr, hr)]
    found = psnr(batch(sr[0]), batch(hr[0]), channel="y", shave_px=3)
    error = np.mean((cropped(luma[0], 3) - cropped(luma[1], 3)) ** 2)
    assert found.item() == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)
    # Studio swing: black to white is 16 to 235.
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    swing = psnr(batch(black), batch(white), channel="y").item()
    assert swing == pytest.approx(20 * math.log10(255 / 219), abs=1e-9)


def test_psnr_of_one_grey_level_in_one_value() -> None:
    hr = np.full((40, 50, 3), 90, np.uint8)
    sr = hr.copy()
    sr[7, 9, 1] += 1
    wanted = 10 * math.log10(255**2 * hr.size)
    assert psnr(batch(sr), batch(hr)).item() == pytest.approx(wanted, abs=1e-9)
    assert psnr(batch(hr), batch(sr)).item() == pytest.approx(wanted, abs=1e-9)  # 89 - 90 is -1


def test_psnr_of_the_largest_error_there_is() -> None:
    black = torch.zeros((1, 3, 120, 120), dtype=torch.uint8)  # its sum needs more than 31 bits
    assert psnr(black, black + 255).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("channel", ["rgb", "y"])
def test_equal_images(channel: Channel) -> None:
    image = batch(TISSUE[:20, :20])
    assert psnr(image, image, channel=channel).item() == math.inf
    assert ssim(image, image, channel=channel).item() == pytest.approx(1, abs=1e-9)


def test_mean_counts_an_equal_image_as_100_db() -> None:
    image, other = TISSUE[:20, :20], degraded(TISSUE[:20, :20], sigma=10)
    values = psnr(batch(image, other), batch(image, image))
    assert mean_psnr(values) == pytest.approx((100 + values[1].item()) / 2)
    assert mean_psnr([30.0, 31.0]) == 30.5
    assert mean_psnr([120.0, 30.0]) == 65


@pytest.mark.parametrize(("values", "said"), [([], "no image"), ([30.0, math.nan], "image 1")])
def test_mean_refuses_what_has_none(values: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mean_psnr(values)


# ------------------------------------------------------------------------------------------ SSIM


def scikit_images_ssim(sr: np.ndarray, hr: np.ndarray, *, channel_axis: int | None) -> float:
    return float(
        structural_similarity(
            sr,
            hr,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=channel_axis,
        )
    )


@pytest.mark.parametrize("shave_px", [0, 8])
def test_ssim_is_scikit_images_for_each_image(
    images: tuple[np.ndarray, np.ndarray], shave_px: int
) -> None:
    sr, hr = images
    found = ssim(batch(*sr), batch(*hr), shave_px=shave_px)
    for number in range(2):
        # It leaves out the same border that windows without padding do.
        wanted = scikit_images_ssim(
            cropped(sr[number], shave_px), cropped(hr[number], shave_px), channel_axis=-1
        )
        assert found[number].item() == pytest.approx(wanted, abs=1e-9)


def test_ssim_of_luma_is_scikit_images(images: tuple[np.ndarray, np.ndarray]) -> None:
    sr, hr = images
    luma = [color.rgb2ycbcr(image[0])[..., 0] for image in (sr, hr)]
    wanted = scikit_images_ssim(*luma, channel_axis=None)
    assert ssim(batch(sr[0]), batch(hr[0]), channel="y").item() == pytest.approx(wanted, abs=1e-9)
    assert abs(ssim(batch(sr[0]), batch(hr[0])).item() - wanted) > 1e-3  # another number than RGB's


def pytorch_msssims(sr: np.ndarray, hr: np.ndarray) -> float:
    # Its own window is rounded to float32, which on flat images shows in the sixth decimal.
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (line / line.sum()).expand(3, 1, 1, 11)
    sr64, hr64 = batch(sr).double(), batch(hr).double()
    return float(peer_ssim(sr64, hr64, data_range=255, win=window))


def flat(level: int) -> np.ndarray:
    """All but one colour: nothing but roundings can go wrong, and there they count most."""
    rng = np.random.default_rng(level)
    return np.clip(level + rng.integers(-1, 2, (48, 64, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("level", [0, 127, 243, 255])
def test_ssim_of_flat_images_is_precise(level: int) -> None:
    hr, sr = flat(level), np.roll(flat(level), 5, axis=0)
    assert ssim(batch(sr), batch(hr)).item() == pytest.approx(pytorch_msssims(sr, hr), abs=1e-9)


@given(
    height=st.integers(11, 30),
    width=st.integers(11, 30),
    sigma=st.floats(0, 120),
    seed=st.integers(0, 99),
)
def test_ssim_is_pytorch_msssims(height: int, width: int, sigma: float, seed: int) -> None:
    hr = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    sr = degraded(hr, sigma=sigma, seed=seed)
    found = ssim(batch(sr), batch(hr)).item()
    assert found == pytest.approx(pytorch_msssims(sr, hr), abs=1e-9)
    assert -1 <= found <= 1 + 1e-9
    assert found == pytest.approx(ssim(batch(hr), batch(sr)).item(), abs=1e-9)


def test_window() -> None:
    weights = gaussian_weights()
    assert len(weights) == 11
    assert math.fsum(weights) == pytest.approx(1, abs=1e-15)
    assert weights == weights[::-1]
    assert weights[5] / weights[8] == pytest.approx(math.exp(2))  # two sigmas away


def test_memory_does_not_grow_with_the_window_or_the_batch() -> None:
    class Largest(TorchDispatchMode):
        num_values = 0

        def __torch_dispatch__(
            self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype != torch.uint8:
                self.num_values = max(self.num_values, result.numel())
            return result

    image = batch(*[TISSUE[:64, :64]] * 4)
    with Largest() as largest:
        ssim(image, image)
        psnr(image, image)
    assert 0 < largest.num_values <= 3 * 64 * 64  # one image's values


# ---------------------------------------------------------------------------------- what is given


def test_to_uint8_clamps_and_rounds_half_to_even() -> None:
    levels = torch.tensor([-0.5, 0.0, 0.5, 1.5, 2.5, 254.49, 255.0, 300.0], dtype=torch.float64)
    wanted = torch.tensor([0, 0, 0, 2, 2, 254, 255, 255], dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 255), wanted)
    sr = torch.full((2, 3, 4, 4), 1.5)
    assert to_uint8(sr).shape == sr.shape
    assert sr.unique().item() == 1.5  # the input stays


@given(st.integers(0, 255))
def test_to_uint8_keeps_what_came_from_8_bit(level: int) -> None:
    assert to_uint8(torch.tensor([level / 255])).item() == level


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_wrong_input_is_named(metric: Callable[..., torch.Tensor]) -> None:
    metric = inspect.unwrap(metric)  # without the check of shapes that tests may run under
    image = batch(TISSUE[:20, :24])
    with pytest.raises(ValueError, match=r"\(1, 3, 20, 24\) .* \(1, 3, 20, 20\)"):
        metric(image, image[..., :20])
    with pytest.raises(ValueError, match="channel='luma'"):
        metric(image, image, channel="luma")
    with pytest.raises(ValueError, match="shave_px=-1"):
        metric(image, image, shave_px=-1)
    with pytest.raises(ValueError, match="shave_px=10 leaves less"):
        metric(image, image, shave_px=10)
    with pytest.raises(ValueError, match="to_uint8"):
        metric(image / 255, image)


@pytest.mark.parametrize("extent", [(10, 40), (40, 10)])
def test_ssim_needs_its_window(extent: tuple[int, int]) -> None:
    image = torch.zeros((1, 3, *extent), dtype=torch.uint8)
    with pytest.raises(ValueError, match="11 x 11 px"):
        ssim(image, image)
    assert psnr(image, image).item() == math.inf


def test_convention_says_what_the_numbers_depend_on() -> None:
    usual = convention()
    for fact in ("RGB", "no border", "data range 255", "11 x 11", "sigma 1.5", "100 dB", "mean"):
        assert fact in usual
    other = convention(shave_px=8, channel="y")
    assert "8 px of border" in other
    assert "Y channel" in other
    assert "RGB" not in other
    assert usual.count(".") - usual.count("1.5") == 1  # one sentence
