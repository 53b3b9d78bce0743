import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from carn.models.wavelet import haar, inverse_haar


def image_of(*, levels: int, height: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    """(2, 3, 2^levels * height, 2^levels * width) in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    sides = (height * 2**levels, width * 2**levels)
    return torch.rand(2, 3, *sides, dtype=torch.float64, generator=generator).to(dtype)


any_image = st.fixed_dictionaries(
    {
        "levels": st.integers(0, 3),
        "height": st.integers(1, 7),
        "width": st.integers(1, 7),
        "seed": st.integers(0, 2**31),
    }
)


@given(sizes=any_image, precision=st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-6)]))
def test_the_inverse_gives_the_image_back(
    sizes: dict[str, int], precision: tuple[torch.dtype, float]
) -> None:
    dtype, tolerance = precision
    image = image_of(**sizes, dtype=dtype)
    levels = sizes["levels"]
    coefficients = haar(image, levels=levels)
    assert coefficients.shape == (2, 3 * 4**levels, sizes["height"], sizes["width"])
    assert coefficients.dtype == dtype
    back = inverse_haar(coefficients, levels=levels)
    assert back.dtype == dtype
    torch.testing.assert_close(back, image, rtol=0, atol=tolerance)


@given(sizes=any_image)
def test_coefficients_of_an_inverse_are_those_it_was_made_of(sizes: dict[str, int]) -> None:
    levels = sizes["levels"]
    generator = torch.Generator().manual_seed(sizes["seed"])
    shape = (1, 2 * 4**levels, sizes["height"], sizes["width"])
    coefficients = torch.randn(shape, dtype=torch.float64, generator=generator)
    again = haar(inverse_haar(coefficients, levels=levels), levels=levels)
    torch.testing.assert_close(again, coefficients, rtol=0, atol=1e-12)


@given(sizes=any_image)
def test_energy_stays(sizes: dict[str, int]) -> None:
    image = image_of(**sizes, dtype=torch.float64)
    coefficients = haar(image, levels=sizes["levels"])
    torch.testing.assert_close(coefficients.square().sum(), image.square().sum())


def test_rows_of_the_transform_are_orthonormal() -> None:
    basis = haar(torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4), levels=2).flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64))


def test_each_channel_sees_its_direction() -> None:
    ramp = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    assert haar(ramp.expand(1, 1, 2, 2)).flatten().tolist() == [4.0, 2.0, 0.0, 0.0]
    assert haar(ramp.T.expand(1, 1, 2, 2)).flatten().tolist() == [4.0, 0.0, 2.0, 0.0]
    checks = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert haar(checks.expand(1, 1, 2, 2)).flatten().tolist() == [1.0, 0.0, 0.0, 1.0]


def test_channels_of_a_band_stand_together_in_their_order() -> None:
    flat = torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(haar(flat)[0, :3, 0, 0], torch.tensor([0.2, 0.4, 0.6]))
    assert not haar(flat)[0, 3:].any()
    torch.testing.assert_close(haar(flat, levels=2)[0, :3, 0, 0], torch.tensor([0.4, 0.8, 1.2]))


def test_two_levels_are_one_after_the_other() -> None:
    image = image_of(levels=2, height=3, width=2, seed=0, dtype=torch.float32)
    assert torch.equal(haar(image, levels=2), haar(haar(image)))


def test_against_the_matrix_of_the_transform() -> None:
    """The one-level transform along both sides, as products with Haar's 2 x 2 matrix."""
    image = image_of(levels=1, height=3, width=4, seed=1, dtype=torch.float64)
    matrix = np.array([[1.0, 1.0], [-1.0, 1.0]]) / np.sqrt(2)
    blocks = image.numpy().reshape(2, 3, 3, 2, 4, 2)
    bands = np.einsum("vi,bchiwj,uj->bvuchw", matrix, blocks, matrix)
    expected = bands.reshape(2, 12, 3, 4)
    # u runs fastest: low, horizontal (along x), vertical (along y), diagonal.
    np.testing.assert_allclose(haar(image).numpy(), expected, atol=1e-12)


def test_gradients_pass_both_ways() -> None:
    image = image_of(levels=2, height=1, width=2, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: haar(x, levels=2), image)
    coefficients = torch.rand(1, 16, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: inverse_haar(x, levels=2), coefficients)


def test_sides_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="2 Haar levels need sides that 4 divides, not 6 x 8"):
        haar(torch.zeros(1, 1, 6, 8), levels=2)
    with pytest.raises(ValueError, match="not 4 x 5"):
        haar(torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="16 channels of each, which does not divide 12 channels"):
        inverse_haar(torch.zeros(1, 12, 4, 4), levels=2)
