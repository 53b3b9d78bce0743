import pytest
import torch
from torch import nn

from carn.degradation.bicubic import SCALES
from carn.models import ModelName, build_model
from carn.models.cost import count_flops
from carn.upscaling.folding import can_fold, fold, refold
from carn.upscaling.pooling import frozen, has_pooling, pool_over
from tests.upscaling.networks import FOLDED, SMALL, batch_of, network, tissue

# LR px at the border where zero padding inside the upsampler is another.
RIM_PX = 2


def inner(sr: torch.Tensor, *, scale: int) -> torch.Tensor:
    crop = RIM_PX * scale
    return sr[..., crop:-crop, crop:-crop]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", [*FOLDED, "srgan"])
def test_folded_networks_compute_what_the_frozen_ones_do(name: ModelName, scale: int) -> None:
    model, image = network(name, scale=scale), tissue(40)
    pooling = pool_over(model, [image], halo_px=8)
    folded = fold(model, pooling)
    with torch.inference_mode():
        lr = batch_of(image, image[::-1])
        found, expected = folded(lr), frozen(model, pooling)(lr)
    assert found.shape == expected.shape
    assert expected.std() > 0.01
    torch.testing.assert_close(
        inner(found, scale=scale), inner(expected, scale=scale), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", FOLDED)
def test_without_frozen_poolings_gates_stay_alive(name: ModelName) -> None:
    model, image = network(name), tissue(40)
    folded = fold(model, None)
    assert has_pooling(folded) == has_pooling(model)
    with torch.inference_mode():
        found, expected = folded(batch_of(image)), model(batch_of(image))
    torch.testing.assert_close(inner(found, scale=2), inner(expected, scale=2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["carn", "rcan", "adaptive-carn"])
def test_refolding_rewrites_weights_in_place(name: ModelName) -> None:
    model, image = network(name), tissue(64)
    first, second = (pool_over(model, [image[:, x : x + 32]], halo_px=4) for x in (0, 32))
    folded = fold(model, first)
    places = [item.data_ptr() for item in folded.parameters()]
    with torch.inference_mode():
        lr = batch_of(image)
        before = folded(lr)
    # Other kernels, and a network that has moved to another form since.
    refold(folded, second)
    assert [item.data_ptr() for item in folded.parameters()] == places
    with torch.inference_mode():
        assert torch.equal(folded(lr), fold(model, second)(lr))
        assert not torch.allclose(folded(lr), before, atol=1e-4)
    folded.to(torch.bfloat16)
    refold(folded, first)
    again = fold(model, first).to(torch.bfloat16)
    for item, expected in zip(folded.parameters(), again.parameters(), strict=True):
        assert torch.equal(item, expected)


def test_folded_carn_has_no_gates_and_the_stated_cost() -> None:
    for scale, million in ((2, 2.475), (4, 2.590), (8, 3.051)):
        model = build_model("carn", scale=scale).eval()
        folded = fold(model, pool_over(model, [tissue(24)], halo_px=4))
        kernels = [layer for layer in folded.modules() if isinstance(layer, nn.Conv2d)]
        assert len(kernels) == 1 + 8 * 4 + 1 + 1
        flops = count_flops(folded, lr_px=(32, 32), with_biases=False) / 32**2
        assert flops / 1e6 == pytest.approx(million, abs=0.001)


def test_the_model_stays_as_it_is() -> None:
    for name in SMALL:
        model, image = network(name), tissue(32)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        names = [module_name for module_name, _ in model.named_modules()]
        with torch.inference_mode():
            sr = model(batch_of(image))
        fold(model, pool_over(model, [image], halo_px=4))
        assert [module_name for module_name, _ in model.named_modules()] == names
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])
        with torch.inference_mode():
            assert torch.equal(model(batch_of(image)), sr)


def test_what_cannot_be_folded_is_copied() -> None:
    image = tissue(32)
    for name in SMALL:
        model = network(name)
        assert can_fold(model) == (name in FOLDED or name == "srgan")
        if not can_fold(model):
            pooling = pool_over(model, [image], halo_px=4)
            with torch.inference_mode():
                lr = batch_of(image)
                assert torch.equal(fold(model, pooling)(lr), frozen(model, pooling)(lr))
