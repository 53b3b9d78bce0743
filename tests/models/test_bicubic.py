"""Bicubic enlargement against Pillow and the kernel written out, and SRCNN that stands on it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from carn.degradation.bicubic import SCALES
from carn.models.bicubic import Bicubic, BicubicConfig, enlarge_bicubic
from carn.models.srcnn import Srcnn, SrcnnConfig

# RGB to Y, Cb, Cr of full range. Source: JFIF (ITU-T T.871), without its offset of 128.
JFIF = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)


def enlarge(pixels: NDArray[np.float32], *, scale: int) -> NDArray[np.float32]:
    lr = torch.from_numpy(pixels)[None, None].expand(1, 3, -1, -1)
    with torch.inference_mode():
        sr = Bicubic(BicubicConfig(), scale=scale)(lr)
    assert torch.equal(sr[:, 0], sr[:, 2])
    return sr[0, 0].numpy()


def cubic(x: NDArray[np.float64], *, a: float) -> NDArray[np.float64]:
    """Keys' kernel."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def weights_of(length: int, *, scale: int, a: float, mirror: bool) -> NDArray[np.float64]:
    """(scale * length, length): what each LR px gives to each output px of a row.

    With `mirror` px beyond the border are the image mirrored, as in MATLAB's imresize, and else
    they are left out and the rest scaled to a sum of one.
    """
    places = (np.arange(scale * length) + 0.5) / scale - 0.5
    reached = np.arange(-3, length + 3)
    weights = cubic(places[:, None] - reached, a=a)
    inner = weights[:, 3:-3].copy()
    if mirror:
        for beyond in range(3):
            inner[:, min(beyond, length - 1)] += weights[:, 2 - beyond]
            inner[:, max(length - 1 - beyond, 0)] += weights[:, length + 3 + beyond]
    return inner / inner.sum(axis=1, keepdims=True)


def by_hand(
    pixels: NDArray[np.float32], *, scale: int, a: float = -0.5, mirror: bool = False
) -> NDArray[np.float64]:
    rows, columns = (weights_of(n, scale=scale, a=a, mirror=mirror) for n in pixels.shape)
    enlarged: NDArray[np.float64] = rows @ pixels.astype(np.float64) @ columns.T
    return enlarged


@given(
    scale=st.sampled_from(SCALES),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_equals_pillow_and_the_kernel_to_the_border(
    scale: int, height: int, width: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).random((height, width), dtype=np.float32)
    actual = enlarge(pixels, scale=scale)
    size = (width * scale, height * scale)
    pillow = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    np.testing.assert_allclose(actual, pillow, atol=2e-6)
    np.testing.assert_allclose(actual, by_hand(pixels, scale=scale), atol=2e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_equals_matlabs_two_px_from_the_border(scale: int) -> None:
    pixels = np.random.default_rng(0).random((11, 9), dtype=np.float32)
    matlab = by_hand(pixels, scale=scale, mirror=True)
    difference = np.abs(enlarge(pixels, scale=scale) - matlab)
    margin = 2 * scale
    assert difference[margin:-margin, margin:-margin].max() < 2e-6
    assert difference.max() > 1e-3  # the border is where the two part


@pytest.mark.parametrize("scale", SCALES)
def test_a_is_not_the_one_torch_takes_for_plain_bicubic(scale: int) -> None:
    pixels = np.random.default_rng(0).random((11, 9), dtype=np.float32)
    plain = nn.functional.interpolate(
        torch.from_numpy(pixels)[None, None], scale_factor=scale, mode="bicubic"
    )[0, 0].numpy()
    inner = slice(2 * scale, -2 * scale)
    np.testing.assert_allclose(
        plain[inner, inner], by_hand(pixels, scale=scale, a=-0.75)[inner, inner], atol=2e-6
    )
    assert np.abs(plain - enlarge(pixels, scale=scale))[inner, inner].max() > 0.01


@pytest.mark.parametrize("scale", SCALES)
def test_parabolas_are_kept(scale: int) -> None:
    """Of all cubic kernels the one of a = -0.5 alone does that."""
    places = np.arange(10)
    pixels = np.tile((places - 4.0) ** 2, (6, 1)).astype(np.float32)
    finer = (np.arange(10 * scale) + 0.5) / scale - 0.5
    expected = (finer - 4.0) ** 2
    inner = slice(2 * scale, -2 * scale)
    np.testing.assert_allclose(enlarge(pixels, scale=scale)[3, inner], expected[inner], atol=1e-4)


def test_a_flat_image_stays_flat_to_its_border() -> None:
    flat = np.full((4, 5), 0.37, dtype=np.float32)
    np.testing.assert_allclose(enlarge(flat, scale=8), 0.37, rtol=1e-6)


def test_overshoot_is_not_clamped() -> None:
    step = np.repeat(np.float32([[0, 0, 0, 1, 1, 1]]), 4, axis=0)
    enlarged = enlarge(step, scale=4)
    assert enlarged.min() < -0.01
    assert enlarged.max() > 1.01


@pytest.mark.parametrize("scale", SCALES)
def test_srcnn_keeps_the_colour_of_bicubic(scale: int) -> None:
    torch.manual_seed(0)
    lr = torch.rand(2, 3, 6, 5)
    with torch.inference_mode():
        sharpened = _in_jfif(Srcnn(SrcnnConfig(), scale=scale)(lr))
        enlarged = _in_jfif(enlarge_bicubic(lr, scale=scale))
    torch.testing.assert_close(sharpened[:, 1:], enlarged[:, 1:], atol=2e-6, rtol=0)
    assert (sharpened[:, 0] - enlarged[:, 0]).abs().mean() > 0.01


def test_srcnns_luma_is_what_its_network_says() -> None:
    torch.manual_seed(0)
    model = Srcnn(SrcnnConfig(), scale=2)
    lr = torch.rand(1, 3, 6, 5)
    with torch.inference_mode():
        luma = _in_jfif(enlarge_bicubic(lr, scale=2))[:, :1]
        expected = model.reconstruct(torch.relu(model.map(torch.relu(model.extract(luma)))))
        actual = _in_jfif(model(lr))[:, :1]
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


def test_srcnn_that_passes_luma_on_is_bicubic() -> None:
    model = Srcnn(SrcnnConfig(num_features=2, num_mapped=3), scale=3)
    with torch.no_grad():
        for layer in (model.extract, model.map, model.reconstruct):
            layer.weight.zero_()
            layer.bias.zero_()
            middle = layer.kernel_size[0] // 2
            layer.weight[0, 0, middle, middle] = 1
    lr = 0.3 + 0.4 * torch.rand(1, 3, 5, 6)  # within bounds, so that no luma is below zero
    with torch.inference_mode():
        torch.testing.assert_close(model(lr), enlarge_bicubic(lr, scale=3), atol=1e-6, rtol=0)


def _in_jfif(rgb: Tensor) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", JFIF, rgb)
