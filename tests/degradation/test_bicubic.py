"""LR images against three other implementations: Pillow's, torch's, and MATLAB's by definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from carn.degradation.bicubic import SCALES, Border, crop_to_multiple, degrade


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """Real tissue (colonic glands, 512 x 512), cut to two odd sides."""
    return np.ascontiguousarray(data.immunohistochemistry()[:341, 100:437])


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Black and white noise: the kernel overshoots on both sides everywhere."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)


def by_pillow(hr: np.ndarray, scale: int) -> np.ndarray:
    height, width = hr.shape[0] // scale, hr.shape[1] // scale
    image = Image.fromarray(np.ascontiguousarray(hr[: height * scale, : width * scale]))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


# ------------------------------------------------------------ MATLAB's imresize, by its definition


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def matlab_weights(num_in: int, scale: int) -> np.ndarray:
    """(num_in // scale, num_in) weights: stretched kernel, normalised, mirrored at the border."""
    num_out = num_in // scale
    weights = np.zeros((num_out, num_in))
    for out in range(num_out):
        centre = (out + 1) * scale + 0.5 * (1 - scale)  # 1-based, as MATLAB counts
        first = int(np.floor(centre - 2 * scale))
        places = np.arange(first, first + 4 * scale + 2)
        share = cubic((centre - places) / scale)
        share /= share.sum()
        mirrored = (places - 1) % (2 * num_in)
        mirrored = np.where(mirrored >= num_in, 2 * num_in - 1 - mirrored, mirrored)
        np.add.at(weights[out], mirrored, share)
    return weights


def by_matlab(hr: np.ndarray, scale: int) -> np.ndarray:
    """`imresize(hr, 1 / scale, "bicubic")` in float64, rounded half away from zero."""
    hr = hr[: hr.shape[0] // scale * scale, : hr.shape[1] // scale * scale].astype(np.float64)
    rows, columns = matlab_weights(hr.shape[0], scale), matlab_weights(hr.shape[1], scale)
    small = np.einsum("ij,jkc,lk->ilc", rows, hr, columns, optimize=True)
    return np.clip(np.floor(small + 0.5), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["tissue", "grey noise"])
def test_pillow_differs_by_one_grey_level_at_most(
    kind: str, scale: int, tissue: np.ndarray
) -> None:
    rng = np.random.default_rng(1)
    hr = tissue if kind == "tissue" else rng.integers(60, 196, (203, 157, 3)).astype(np.uint8)
    lr = degrade(hr, scale=scale)
    peer = by_pillow(hr, scale)
    assert lr.dtype == np.uint8
    assert lr.shape == peer.shape
    difference = np.abs(lr.astype(int) - peer)
    assert difference.max() <= 1
    # Pillow rounds twice, so some values differ, but they must not lean to one side.
    assert (difference == 0).mean() > 0.8
    assert abs((lr.astype(int) - peer).mean()) < 0.02


@pytest.mark.parametrize("scale", SCALES)
def test_pillow_in_floating_point_agrees_where_the_kernel_overshoots(scale: int) -> None:
    # On uint8, Pillow clips between its two passes; on floats it does not.
    hr = np.kron(noise(60, 41), np.ones((scale, scale, 1), dtype=np.uint8))[1:, 1:]
    cropped = crop_to_multiple(hr, scale)
    size = (cropped.shape[1] // scale, cropped.shape[0] // scale)
    peer = np.stack(
        [
            np.asarray(
                Image.fromarray(cropped[..., channel].astype(np.float32)).resize(
                    size, Image.Resampling.BICUBIC
                )
            )
            for channel in range(3)
        ],
        axis=-1,
    )
    assert peer.min() < -5
    assert peer.max() > 260
    assert np.abs(degrade(hr, scale=scale) - peer.clip(0, 255)).max() <= 0.5 + 1e-3


def renormalized_weights(num_in: int, scale: int) -> np.ndarray:
    """(num_in // scale, num_in) weights: stretched kernel, its part inside the image normalised."""
    centres = (np.arange(num_in // scale) + 0.5) * scale
    weights = cubic((np.arange(num_in) + 0.5 - centres[:, None]) / scale)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


@pytest.mark.parametrize("border", ["renormalized", "symmetric"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("thin", [1, 2, 3, 4, 5])
def test_an_image_may_be_thin_in_either_direction(thin: int, scale: int, border: Border) -> None:
    rng = np.random.default_rng(thin)
    for long in (1, 2, 7, 64):
        # Not a multiple of the scale: what is too much is cropped.
        size = (long * scale + 1, thin * scale + scale - 1, 3)
        tall = rng.integers(0, 256, size).astype(np.uint8)
        for hr in (tall, np.ascontiguousarray(tall.transpose(1, 0, 2)), tall.transpose(1, 0, 2)):
            lr = degrade(hr, scale=scale, border=border)
            assert lr.shape == (hr.shape[0] // scale, hr.shape[1] // scale, 3)
            assert lr.flags.c_contiguous
            if border == "symmetric":
                assert np.abs(lr.astype(int) - by_matlab(hr, scale)).max() <= 1
                continue
            cropped = crop_to_multiple(hr, scale)
            rows, columns = (renormalized_weights(side, scale) for side in cropped.shape[:2])
            peer = np.einsum("ij,jkc,lk->ilc", rows, cropped.astype(np.float64), columns)
            assert np.abs(lr - peer.clip(0, 255)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(1, 20), (20, 1), (1, 1), (2, 20), (20, 2)])
def test_thin_images_are_pillows(size: tuple[int, int], scale: int) -> None:
    rng = np.random.default_rng(3)
    # Of low contrast: Pillow clips between its passes.
    hr = rng.integers(60, 196, (size[0] * scale, size[1] * scale, 3)).astype(np.uint8)
    difference = np.abs(degrade(hr, scale=scale).astype(int) - by_pillow(hr, scale))
    assert difference.max() <= 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["tissue", "noise"])
def test_the_symmetric_border_is_matlabs(kind: str, scale: int, tissue: np.ndarray) -> None:
    hr = tissue if kind == "tissue" else noise(99, 70)
    lr = degrade(hr, scale=scale, border="symmetric")
    peer = by_matlab(hr, scale)
    assert lr.shape == peer.shape
    difference = np.abs(lr.astype(int) - peer)
    assert difference.max() <= 1
    # float32 against float64: only values that lie at a half may fall to the other side.
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("size", [(8, 8), (16, 9), (24, 40)])
def test_the_symmetric_border_of_images_smaller_than_the_kernel(size: tuple[int, int]) -> None:
    hr = noise(*size, seed=5)
    lr = degrade(hr, scale=8, border="symmetric")
    assert np.abs(lr.astype(int) - by_matlab(hr, 8)).max() <= 1


@pytest.mark.parametrize("scale", SCALES)
def test_borders_differ_at_the_edge_only(scale: int) -> None:
    hr = noise(scale * 20, scale * 24, seed=2)
    mirrored = degrade(hr, scale=scale, border="symmetric")
    renormalized = degrade(hr, scale=scale)
    np.testing.assert_array_equal(mirrored[2:-2, 2:-2], renormalized[2:-2, 2:-2])
    assert (mirrored != renormalized).any()


@pytest.mark.parametrize("scale", SCALES)
def test_it_is_torchs_antialiased_bicubic(scale: int, tissue: np.ndarray) -> None:
    hr = crop_to_multiple(tissue, scale)
    pixels = torch.from_numpy(hr.copy()).permute(2, 0, 1)[None].to(torch.float64)
    size = (hr.shape[0] // scale, hr.shape[1] // scale)
    peer = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    peer = peer[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(degrade(tissue, scale=scale) - peer).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("border", ["renormalized", "symmetric"])
@given(
    grey=st.integers(0, 255),
    scale=st.sampled_from(SCALES),
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
)
def test_a_constant_image_stays_constant(
    grey: int, scale: int, size: tuple[int, int], border
) -> None:
    hr = np.empty((*size, 3), dtype=np.uint8)
    hr[:] = grey, 255 - grey, grey // 2
    lr = degrade(hr, scale=scale, border=border)
    assert lr.shape == (size[0] // scale, size[1] // scale, 3)
    assert (lr == hr[0, 0]).all()


def test_sides_that_are_no_multiple_are_cropped_at_the_right_and_bottom() -> None:
    hr = noise(1024, 1024, seed=3)
    assert crop_to_multiple(hr, 3).shape == (1023, 1023, 3)
    assert np.shares_memory(crop_to_multiple(hr, 3), hr)
    lr = degrade(hr, scale=3)
    assert lr.shape == (341, 341, 3)
    np.testing.assert_array_equal(lr, degrade(hr[:1023, :1023], scale=3))
    for other in (hr[1:, 1:], hr[:1023, 1:]):
        assert (lr != degrade(other, scale=3)).any()


@pytest.mark.parametrize("scale", SCALES)
def test_lr_pixels_lie_on_their_hr_blocks(scale: int) -> None:
    # One bright HR block must be brightest at its own LR pixel, and alike to both sides.
    hr = np.zeros((scale * 9, scale * 9, 3), dtype=np.uint8)
    hr[scale * 4 : scale * 5, scale * 6 : scale * 7] = 255
    lr = degrade(hr, scale=scale)[..., 0].astype(int)
    assert np.unravel_index(lr.argmax(), lr.shape) == (4, 6)
    assert lr[3, 6] == lr[5, 6] == lr[4, 5] == lr[4, 7]


def test_the_number_of_threads_changes_nothing(tissue: np.ndarray) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append([degrade(tissue, scale=scale) for scale in SCALES])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_the_image_itself_is_left_alone(tissue: np.ndarray) -> None:
    hr = tissue.copy()
    lr = degrade(hr, scale=2, border="symmetric")
    np.testing.assert_array_equal(hr, tissue)
    assert lr.flags.c_contiguous
    even = tissue[:340, :336]
    turned = degrade(even[:, ::-1], scale=2, border="symmetric").astype(int)
    # Sums in another order may fall to the other side of a half.
    assert np.abs(turned - degrade(even, scale=2, border="symmetric")[:, ::-1]).max() <= 1


@pytest.mark.parametrize("scale", [0, 1, 5, -2])
def test_another_scale_is_refused(scale: int) -> None:
    with pytest.raises(ValueError, match=rf"scale {scale} is not one of 2, 3, 4, 8"):
        degrade(noise(16, 16), scale=scale)


@pytest.mark.parametrize("size", [(7, 20), (20, 7), (3, 3)])
def test_an_image_smaller_than_an_lr_pixel_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no LR at scale 8"):
        degrade(noise(*size), scale=8)
