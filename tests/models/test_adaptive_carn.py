"""An adaptive CARN estimates how LR was made, goes by what it is told, and is a CARN once told."""

import numpy as np
import pytest
import torch

from carn.degradation.numbers import NUMBERS
from carn.degradation.scanner import Degradation, apply
from carn.models.adaptive_carn import (
    AdaptedLayers,
    AdaptiveCarn,
    AdaptiveCarnConfig,
    DegradationEstimator,
    adapt,
    adapted,
)
from carn.models.carn import Carn, CarnConfig
from carn.models.cost import count_flops
from tests.upscaling.networks import batch_of, network, tissue


def adaptive() -> AdaptiveCarn:
    model = network("adaptive-carn")
    assert isinstance(model, AdaptiveCarn)
    return model


def test_fresh_weights_make_it_a_plain_carn() -> None:
    torch.manual_seed(1)
    model = AdaptiveCarn(AdaptiveCarnConfig(num_blocks=2, channels=16, reduction=4), scale=2).eval()
    plain = Carn(CarnConfig(num_blocks=2, channels=16, reduction=4), scale=2).eval()
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    )
    lr = batch_of(tissue(40))
    with torch.inference_mode():
        assert torch.equal(model(lr), plain(lr))


def test_it_is_a_plain_carn_once_it_is_known_how_lr_was_made() -> None:
    model, lr = adaptive(), batch_of(tissue(48))
    with torch.inference_mode():
        numbers = model.numbers(lr)
        plain = adapted(model)
        before = plain(lr)
        adapt(AdaptedLayers.of(plain), model, numbers)
        expected = model(lr)
        torch.testing.assert_close(plain(lr), expected, rtol=0, atol=1e-5)
    assert type(plain) is Carn
    assert (before - expected).abs().max() > 1e-2


def test_what_it_is_told_goes_before_its_estimate() -> None:
    model, lr = adaptive(), batch_of(tissue(48))
    with torch.inference_mode():
        estimate, unasked = model.numbers(lr), model(lr)
        model.tell({"noise": 0.7, "luma_step": 0.1})
        told, changed = model.numbers(lr), model(lr)
        model.tell({})
        assert torch.equal(model(lr), unasked)
    assert (changed - unasked).abs().max() > 1e-3
    for place, name in enumerate(NUMBERS):
        wanted = {"noise": 0.7, "luma_step": 0.1}.get(name, float(estimate[0, place]))
        assert float(told[0, place]) == pytest.approx(wanted)


def test_what_nobody_estimates_cannot_be_told() -> None:
    with pytest.raises(ValueError, match=r"sharpness.*is not one of contrast_at_half_nyquist"):
        adaptive().tell({"sharpness": 1.0})


def test_what_is_told_is_no_part_of_the_weights() -> None:
    model = adaptive()
    before = model.state_dict().keys()
    model.tell({"noise": 0.5})
    assert model.state_dict().keys() == before
    assert not any("told" in name for name in before)


@pytest.mark.parametrize("offset", [(0, 0), (3, 5)])
def test_shares_of_zeros_tell_jpeg_whatever_its_grid_begins_with(offset: tuple[int, int]) -> None:
    """Coefficients that JPEG made zero are near zero on its own grid, and on no other."""
    estimator = DegradationEstimator(channels=4)
    hr = tissue(400)
    largest = {}
    for quality in (None, 90, 80, 60):
        lr = apply(hr, Degradation(jpeg_quality=quality), scale=2, rng=np.random.default_rng(0))
        top, left = offset
        with torch.inference_mode():
            most, _ = estimator._compression(batch_of(lr[top:, left:]))
        largest[quality] = float(most.mean())
    assert largest[None] + 0.05 < largest[90]
    assert largest[90] + 0.1 < largest[80]
    assert largest[80] + 0.1 < largest[60]


def test_adapting_costs_next_to_nothing() -> None:
    plain = count_flops(Carn(CarnConfig(), scale=2))
    model = count_flops(AdaptiveCarn(AdaptiveCarnConfig(), scale=2))
    assert plain < model < 1.05 * plain


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="embedding=0 must be at least 1"):
        AdaptiveCarnConfig(embedding=0)
