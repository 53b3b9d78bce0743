"""What each network minimises, by plain sums, and whom its gradient reaches."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from carn.models.carn import Carn, CarnConfig
from carn.models.srcnn import Srcnn, SrcnnConfig
from carn.models.srgan import Srgan, SrganConfig, SrganDiscriminator
from carn.models.swdnet import SwdNet, SwdNetConfig
from carn.models.wavelet import haar
from carn.training.loss import LossConfig, PixelLoss
from carn.training.objectives import (
    DiscriminatorObjective,
    GeneratorObjective,
    PixelObjective,
    SrcnnObjective,
    SwdNetObjective,
)


def images(*, scale: int = 2, side_px: int = 12, batch: int = 2) -> tuple[Tensor, Tensor]:
    """LR and HR on 0..1, unrelated."""
    generator = torch.Generator().manual_seed(3)
    lr = torch.rand((batch, 3, side_px, side_px), generator=generator)
    return lr, torch.rand((batch, 3, scale * side_px, scale * side_px), generator=generator)


def make_carn() -> Carn:
    torch.manual_seed(0)
    return Carn(CarnConfig(num_blocks=1, channels=16, reduction=2), scale=2)


def make_swdnet(*, scale: int = 2) -> SwdNet:
    torch.manual_seed(0)
    return SwdNet(SwdNetConfig(channels=4, num_blocks=1, wavelet_channels=4), scale=scale)


def make_srgan() -> tuple[Srgan, SrganDiscriminator]:
    torch.manual_seed(0)
    return Srgan(SrganConfig(num_blocks=1, channels=4), scale=2), SrganDiscriminator(channels=4)


def names_with_gradient(model: nn.Module) -> set[str]:
    found = model.named_parameters()
    return {name for name, p in found if p.grad is not None and bool((p.grad != 0).any())}


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------- pixels


def test_pixel_objective_is_the_pixel_loss_of_the_result() -> None:
    lr, hr = images()
    objective = PixelObjective(make_carn(), LossConfig(loss="combined", gamma=2.0))
    terms = objective(lr, hr)
    wanted = PixelLoss(LossConfig(loss="combined", gamma=2.0))(objective.model(lr), hr)
    assert terms.keys() == wanted.keys()
    assert all(torch.equal(terms[name], wanted[name]) for name in terms)
    terms["loss"].backward()
    assert names_with_gradient(objective.model) == names(objective.model)


def test_srcnn_learns_luma_alone() -> None:
    lr, hr = images()
    torch.manual_seed(0)
    model = Srcnn(SrcnnConfig(num_features=8, num_mapped=8), scale=2)
    objective = SrcnnObjective(model)
    terms = objective(lr, hr)
    error = (model(lr) - hr).double()
    luma = 0.299 * error[:, 0] + 0.587 * error[:, 1] + 0.114 * error[:, 2]
    assert terms["loss"].item() == pytest.approx((luma**2).mean().item(), rel=1e-5)
    # Colours may be as wrong as they like where the luma is right.
    colour = torch.tensor([0.114, 0.0, -0.299]).view(1, 3, 1, 1)
    assert objective(lr, hr + colour)["loss"].item() == pytest.approx(terms["loss"].item(), 1e-4)
    terms["loss"].backward()
    assert names_with_gradient(model) == names(model)


def test_models_with_other_results_than_hr_are_refused() -> None:
    lr, hr = images()
    generator, discriminator = make_srgan()
    for objective in (
        PixelObjective(make_carn(), LossConfig(loss="combined")),
        SrcnnObjective(Srcnn(SrcnnConfig(), scale=2)),
        SwdNetObjective(make_swdnet(), stage=1),
        SwdNetObjective(make_swdnet(), stage=2),
        GeneratorObjective(generator, discriminator),
        DiscriminatorObjective(discriminator, generator),
    ):
        # One px wide, it would be stretched over the whole without a word. (TypeError: where tests
        # run under a check of all shapes, that one may come first.)
        with pytest.raises((ValueError, TypeError), match=r"24, ?1\b"):
            inspect.unwrap(type(objective).forward)(objective, lr, hr[..., :1])


# --------------------------------------------------------------------------------------- SWD-Net


def test_stage_1_looks_at_the_spatial_stage_alone() -> None:
    lr, hr = images(batch=3)
    model = make_swdnet()
    terms = SwdNetObjective(model, stage=1)(lr, hr)
    error = (model.forward_stages(lr).spatial - hr).double()
    assert set(terms) == {"loss", "spatial"}
    assert terms["loss"].item() == pytest.approx(error.abs().sum().item() / 3, rel=1e-5)
    terms["loss"].backward()
    assert all(name.startswith("spatial.") for name in names_with_gradient(model))
    assert not any(parameter.requires_grad for parameter in model.wavelet.parameters())


def test_stage_2_weighs_three_sums() -> None:
    lr, hr = images(batch=3)
    model = make_swdnet()
    SwdNetObjective(model, stage=1)
    terms = SwdNetObjective(model, stage=2)(lr, hr)  # thaws what stage 1 froze
    stages = model.forward_stages(lr)
    spatial, final = ((found - hr).abs().sum() / 3 for found in (stages.spatial, stages.sr))
    wavelet = (stages.coefficients - haar(hr)).abs().sum() / 3
    wanted = 0.1 * spatial + 0.1 * final + wavelet
    assert terms["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert terms["wavelet"].item() == pytest.approx(wavelet.item(), rel=1e-5)
    assert terms["final"].item() == pytest.approx(final.item(), rel=1e-5)
    terms["loss"].backward()
    reached = names_with_gradient(model)
    assert any(name.startswith("wavelet.") for name in reached)
    assert any(name.startswith("spatial.") for name in reached)


@pytest.mark.parametrize("stage", [1, 2])
def test_odd_sides_at_x3(stage: Any) -> None:
    lr, hr = images(scale=3, side_px=7)
    terms = SwdNetObjective(make_swdnet(scale=3), stage=stage)(lr, hr)
    assert terms["loss"].isfinite()


def test_no_other_stage() -> None:
    with pytest.raises(ValueError, match="stage=3 must be 1"):
        inspect.unwrap(SwdNetObjective.__init__)(
            SwdNetObjective.__new__(SwdNetObjective), make_swdnet(), stage=3
        )


# ----------------------------------------------------------------------------------------- SRGAN


def test_generator_terms() -> None:
    lr, hr = images()
    generator, discriminator = make_srgan()
    terms = GeneratorObjective(generator, discriminator, adversarial_weight=0.5)(lr, hr)
    sr = generator(lr)
    content = ((2 * sr - 2 * hr) ** 2).mean()
    adversarial = -discriminator(sr).sigmoid().log().mean()
    assert terms["content"].item() == pytest.approx(content.item(), rel=1e-5)
    assert terms["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx((content + 0.5 * adversarial).item(), rel=1e-5)
    usual = GeneratorObjective(generator, discriminator)(lr, hr)
    wanted = usual["content"] + 1e-3 * usual["adversarial"]
    assert usual["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_discriminator_terms() -> None:
    lr, hr = images()
    generator, discriminator = make_srgan()
    terms = DiscriminatorObjective(discriminator, generator)(lr, hr)
    real = -discriminator(hr).sigmoid().log().mean()
    fake = -(1 - discriminator(generator(lr)).sigmoid()).log().mean()
    assert terms["real"].item() == pytest.approx(real.item(), rel=1e-5)
    assert terms["fake"].item() == pytest.approx(fake.item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx((real + fake).item(), rel=1e-5)


def of_generator(generator: Srgan, discriminator: SrganDiscriminator) -> nn.Module:
    # Heavy enough on the verdict for its gradient to be seen.
    return GeneratorObjective(generator, discriminator, adversarial_weight=1.0)


def of_discriminator(generator: Srgan, discriminator: SrganDiscriminator) -> nn.Module:
    return DiscriminatorObjective(discriminator, generator)


@pytest.mark.parametrize("make", [of_generator, of_discriminator])
def test_each_of_the_two_leaves_the_other_alone(make: Callable[..., nn.Module]) -> None:
    lr, hr = images()
    networks = make_srgan()
    objective = make(*networks)
    own, other = networks if make is of_generator else networks[::-1]
    before, own_before = state(other), state(own)
    objective(lr, hr)["loss"].backward()
    assert all(parameter.grad is None for parameter in other.parameters())
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert is_same(state(other), before)  # running statistics, too
    assert not is_same(state(own), own_before)
    assert objective.model is own
    assert {f"model.{name}" for name in names(own)} == names(objective)
    assert set(objective.state_dict()) == {f"model.{name}" for name in own.state_dict()}
    assert {name for name, p in own.named_parameters() if p.grad is not None} == names(own)


def test_generator_is_pulled_towards_what_passes_for_real() -> None:
    lr, hr = images()
    generator, discriminator = make_srgan()

    def slopes(loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(loss, list(generator.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    def objective(weight: float) -> nn.Module:
        return GeneratorObjective(generator, discriminator, adversarial_weight=weight)

    without, with_it = (slopes(objective(weight)(lr, hr)["loss"]) for weight in (0.0, 1.0))
    pull = with_it - without
    wanted = slopes(functional.softplus(-discriminator(generator(lr))).mean())
    assert wanted.abs().max() > 0
    assert torch.allclose(pull, wanted, atol=1e-5)


def test_a_discriminator_learns_to_tell() -> None:
    lr, hr = images(side_px=16)
    generator, discriminator = make_srgan()
    objective = DiscriminatorObjective(discriminator, generator)
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    first = objective(lr, hr)["loss"].item()
    for _ in range(15):
        optimizer.zero_grad()
        terms = objective(lr, hr)
        terms["loss"].backward()
        optimizer.step()
    assert terms["loss"].item() < 0.5 * first


@pytest.mark.parametrize("weight", [-1e-3, math.nan, math.inf])
def test_bad_adversarial_weight(weight: float) -> None:
    with pytest.raises(ValueError, match=f"adversarial_weight={weight}"):
        GeneratorObjective(*make_srgan(), adversarial_weight=weight)


# ------------------------------------------------------------------------------------- precision


def test_all_run_under_autocast_with_float32_losses() -> None:
    lr, hr = images(side_px=16)
    generator, discriminator = make_srgan()
    for objective in (
        PixelObjective(make_carn(), LossConfig(loss="combined")),
        SrcnnObjective(Srcnn(SrcnnConfig(num_features=4, num_mapped=2), scale=2)),
        SwdNetObjective(make_swdnet(), stage=1),
        SwdNetObjective(make_swdnet(), stage=2),
        GeneratorObjective(generator, discriminator),
        DiscriminatorObjective(discriminator, generator),
    ):
        exact = objective(lr, hr)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = objective(lr, hr)
        assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())
        assert not any(term.requires_grad for name, term in terms.items() if name != "loss")
        assert terms["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)
        terms["loss"].backward()
        found = [p.grad for p in objective.parameters() if p.grad is not None]
        assert found
        assert all(gradient.isfinite().all() for gradient in found)
