"""The pixel losses against scikit-image and plain sums; what minimising each of them does."""

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor

from carn.training.loss import LossConfig, PixelLoss


def pair(*, side_px: int = 32, batch: int = 2, sigma: float = 6, seed: int = 0) -> list[Tensor]:
    """SR and HR (B, 3, side, side) float32 on 0..1: tissue, and tissue with grain."""
    rng = np.random.default_rng(seed)
    tissue = data.immunohistochemistry()
    hr = np.stack([tissue[40 * i : 40 * i + side_px, :side_px] for i in range(batch)])
    sr = hr + rng.normal(0, sigma, hr.shape)
    return [torch.from_numpy(i / 255).float().permute(0, 3, 1, 2).contiguous() for i in (sr, hr)]


def levels(images: Tensor) -> np.ndarray:
    """(B, H, W, 3) float64 on 0..255."""
    return images.detach().double().permute(0, 2, 3, 1).numpy() * 255


def zero_padded_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two planes on 0..255 by a 2-D window, zeros all round, and range 1's constants."""
    grid = np.arange(-5, 6)
    window = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = 0.01**2, 0.03**2

    def blur(plane: np.ndarray) -> np.ndarray:
        return convolve2d(plane, window, mode="same", boundary="fill", fillvalue=0)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(ssim.mean())


def reference_ssim(sr: Tensor, hr: Tensor, *, is_released: bool) -> float:
    pairs = list(zip(levels(sr), levels(hr), strict=True))
    if is_released:
        planes = [zero_padded_ssim(x[..., c], y[..., c]) for x, y in pairs for c in range(3)]
        return float(np.mean(planes))
    options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "data_range": 255}
    options |= {"use_sample_covariance": False, "channel_axis": -1}
    return float(np.mean([structural_similarity(x, y, **options) for x, y in pairs]))


# ---------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("is_released", [False, True])
def test_terms_and_their_sum(is_released: bool) -> None:
    sr, hr = pair()
    config = LossConfig(
        loss="released-code" if is_released else "combined", alpha=0.7, beta=0.02, gamma=3.0
    )
    terms = {name: term.item() for name, term in PixelLoss(config)(sr, hr).items()}
    error = levels(sr) - levels(hr)
    ssim = reference_ssim(sr, hr, is_released=is_released)
    assert set(terms) == {"loss", "l1", "mse", "ssim"}
    assert terms["l1"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert terms["mse"] == pytest.approx((error**2).mean(), rel=1e-5)
    assert terms["ssim"] == pytest.approx(ssim, abs=1e-5)
    similarity_term = 3.0 * ssim if is_released else 3.0 * (1 - ssim)
    wanted = 0.7 * np.abs(error).mean() + 0.02 * (error**2).mean() + similarity_term
    assert terms["loss"] == pytest.approx(wanted, rel=1e-5)


def test_defaults_are_the_papers() -> None:
    sr, hr = pair()
    terms = PixelLoss(LossConfig(loss="combined"))(sr, hr)
    wanted = 0.8 * terms["l1"] + 0.1 * terms["mse"] + 0.1 * (1 - terms["ssim"])
    assert terms["loss"].item() == pytest.approx(wanted.item(), rel=1e-6)


def test_the_two_similarities_differ() -> None:
    sr, hr = pair()
    of_equation = PixelLoss(LossConfig(loss="combined"))(sr, hr)["ssim"]
    of_code = PixelLoss(LossConfig(loss="released-code"))(sr, hr)["ssim"]
    assert abs(of_equation - of_code) > 1e-3


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_one_term_alone(loss: Any) -> None:
    sr, hr = pair()
    terms = PixelLoss(LossConfig(loss=loss))(sr, hr)
    assert set(terms) == {"loss", "l1", "mse"}
    assert torch.equal(terms["loss"], terms[loss])


@pytest.mark.parametrize("loss", ["combined", "released-code"])
def test_ssim_without_weight_is_not_computed(loss: Any) -> None:
    sr, hr = pair(side_px=8)  # smaller than its window
    terms = PixelLoss(LossConfig(loss=loss, alpha=2.0, beta=0.0, gamma=0.0))(sr, hr)
    assert set(terms) == {"loss", "l1", "mse"}
    assert terms["loss"].item() == pytest.approx(2 * terms["l1"].item())


@pytest.mark.parametrize("loss", ["combined", "released-code"])
def test_equal_images(loss: Any) -> None:
    _, hr = pair()
    terms = PixelLoss(LossConfig(loss=loss))(hr, hr)
    assert terms["l1"] == terms["mse"] == 0
    assert terms["ssim"].item() == pytest.approx(1, abs=1e-6)
    assert terms["loss"].item() == pytest.approx(0 if loss == "combined" else 0.1, abs=1e-6)


@pytest.mark.parametrize("level", [100, 243, 255])
def test_released_similarity_of_flat_white_is_no_rounding(level: int) -> None:
    """Its constants are so small that float32 gives similarities of 1.3 and more here."""
    hr = torch.full((1, 3, 24, 24), level / 255)
    noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(level))
    sr = (hr + 0.003 / 255 * noise).requires_grad_()
    terms = PixelLoss(LossConfig(loss="released-code"))(sr, hr)
    # The loss takes 255 times the float32 input in float32.
    wanted = [(255 * images.detach()).double() / 255 for images in (sr, hr)]
    assert terms["ssim"].item() == pytest.approx(
        reference_ssim(*wanted, is_released=True), abs=1e-5
    )
    terms["loss"].backward()
    assert sr.grad is not None
    assert sr.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["combined", "released-code"])
def test_memory_format_does_not_matter(loss: Any) -> None:
    sr, hr = pair()
    judge = PixelLoss(LossConfig(loss=loss))
    plain = judge(sr, hr)["loss"]
    last = judge(sr.contiguous(memory_format=torch.channels_last), hr)["loss"]
    assert plain.item() == pytest.approx(last.item(), rel=1e-6)


# --------------------------------------------------------------------------------------- training


def ssim_after_training(config: LossConfig) -> tuple[float, float]:
    """SSIM (the usual one) before and after a few Adam steps on the pixels of an image."""
    sr, hr = pair(side_px=16, batch=1, sigma=10)
    before = reference_ssim(sr, hr, is_released=False)
    sr.requires_grad_()
    judge = PixelLoss(config)
    optimizer = torch.optim.Adam([sr], lr=2 / 255)
    for _ in range(30):
        optimizer.zero_grad()
        judge(sr, hr)["loss"].backward()
        optimizer.step()
    return before, reference_ssim(sr, hr, is_released=False)


def test_the_released_code_minimises_similarity() -> None:
    before, after = ssim_after_training(LossConfig(loss="released-code", alpha=0.0, beta=0.0))
    assert after < before - 0.2
    before, after = ssim_after_training(LossConfig(loss="combined", alpha=0.0, beta=0.0))
    assert after > before + 0.02


def test_in_the_full_mix_both_forms_improve_the_image() -> None:
    for loss in ("combined", "released-code"):
        before, after = ssim_after_training(LossConfig(loss=loss))
        assert after > before + 0.02


@pytest.mark.parametrize("loss", ["combined", "released-code", "l1", "mse"])
def test_gradient_reaches_every_pixel_through_the_loss_alone(loss: Any) -> None:
    sr, hr = pair()
    sr.requires_grad_()
    terms = PixelLoss(LossConfig(loss=loss))(sr, hr)
    assert not any(term.requires_grad for name, term in terms.items() if name != "loss")
    terms["loss"].backward()
    assert sr.grad is not None
    assert sr.grad.isfinite().all()
    assert (sr.grad != 0).all()


def test_gradient_is_the_slope() -> None:
    sr, hr = pair(side_px=14, batch=1)
    judge = PixelLoss(LossConfig(loss="combined", gamma=50.0))
    sr.requires_grad_()
    judge(sr, hr)["loss"].backward()
    assert sr.grad is not None
    direction = torch.sign(sr.grad)
    with torch.no_grad():
        step = 2e-4
        ahead, behind = (judge(sr + s * direction, hr)["loss"].item() for s in (step, -step))
    assert (ahead - behind) / (2 * step) == pytest.approx(sr.grad.abs().sum().item(), rel=0.01)


@pytest.mark.parametrize("loss", ["combined", "released-code"])
def test_bf16_input_and_autocast_do_not_cost_precision(loss: Any) -> None:
    sr, hr = (images.bfloat16() for images in pair())
    judge = PixelLoss(LossConfig(loss=loss))
    wanted = judge(sr.float(), hr.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = judge(sr.requires_grad_(), hr)
    for name, term in found.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, wanted[name])
    found["loss"].backward()
    assert sr.grad is not None
    assert sr.grad.dtype == torch.bfloat16
    assert sr.grad.isfinite().all()


def test_nothing_is_stored_with_the_weights() -> None:
    judge = PixelLoss(LossConfig(loss="combined"))
    assert not judge.state_dict()
    assert not list(judge.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("loss", ["combined", "released-code"])
def test_a_gpu_gives_the_same(loss: Any) -> None:
    sr, hr = pair(side_px=64, batch=16)
    judge = PixelLoss(LossConfig(loss=loss))
    wanted = judge(sr, hr)
    found = judge.cuda()(sr.cuda().contiguous(memory_format=torch.channels_last), hr.cuda())
    for name, term in found.items():
        assert term.item() == pytest.approx(wanted[name].item(), rel=1e-5)


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_bad_weights_are_named(name: str, value: float) -> None:
    weights: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        LossConfig(**weights)


def test_weights_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match="alpha, beta and gamma are all 0"):
        LossConfig(alpha=0.0, beta=0.0, gamma=0.0)
    with pytest.raises(ValueError, match=r"beta=0\.5 does nothing with loss='l1'"):
        LossConfig(loss="l1", beta=0.5)
    with pytest.raises(ValueError, match=r"gamma=0\.0 does nothing with loss='mse'"):
        LossConfig(loss="mse", gamma=0.0)
    # TypeError: where tests run under a check of all types, that one comes first.
    with pytest.raises((ValueError, TypeError), match="'huber'"):
        LossConfig(loss="huber")  # type: ignore[arg-type]


def test_a_recipe_that_is_left_open_is_no_loss() -> None:
    with pytest.raises(ValueError, match="loss=None"):
        PixelLoss(LossConfig())


def test_wrong_images_are_named() -> None:
    # Without the check of shapes that tests may run under.
    forward = inspect.unwrap(PixelLoss.forward)
    sr, hr = pair()
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\) .* \(2, 3, 32, 32\)"):
        forward(PixelLoss(LossConfig(loss="combined")), sr[:1], hr)
    for loss in ("combined", "released-code"):
        judge = PixelLoss(LossConfig(loss=loss))
        with pytest.raises(ValueError, match=r"32 x 10 px .* 11 px"):
            judge(sr[:, :, :10], hr[:, :, :10])
