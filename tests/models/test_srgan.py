import pytest
import torch
from torch import Tensor, nn

from carn.models.srgan import Srgan, SrganConfig, SrganDiscriminator

SMALL = SrganConfig(num_blocks=1, channels=8)


def small(*, scale: int, seed: int = 0) -> Srgan:
    torch.manual_seed(seed)
    return Srgan(SMALL, scale=scale).eval()


def image_of(height: int, width: int, *, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator)


def count_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_those_of_the_papers_table() -> None:
    generator, discriminator = Srgan(SrganConfig(), scale=8), SrganDiscriminator()
    assert count_of(generator) == 881_932
    assert count_of(discriminator) == 5_215_425
    assert count_of(generator) + count_of(discriminator) == 6_097_357


@pytest.mark.parametrize(("scale", "steps"), [(2, [4]), (3, [9]), (4, [4, 4]), (8, [4, 4, 4])])
def test_upsampler_has_a_prelu_behind_each_step(scale: int, steps: list[int]) -> None:
    layers = list(small(scale=scale).tail)
    assert [layer.out_channels // 8 for layer in layers[:-1:3]] == steps
    assert [type(layer) for layer in layers[1:-1:3]] == [nn.PixelShuffle] * len(steps)
    assert [type(layer) for layer in layers[2:-1:3]] == [nn.PReLU] * len(steps)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 6)])
def test_sr_is_exactly_scale_times_lr(scale: int, size: tuple[int, int]) -> None:
    lr = image_of(*size)
    kept = lr.clone()
    with torch.inference_mode():
        sr = small(scale=scale)(lr)
    assert sr.shape == (2, 3, scale * size[0], scale * size[1])
    assert sr.dtype == torch.float32
    assert torch.equal(lr, kept)


def test_output_is_the_tanh_put_into_0_to_1() -> None:
    model = small(scale=2)
    last = model.tail[-1]
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([0.0, 100.0, -100.0])
    with torch.inference_mode():
        sr = model(image_of(4, 4))
    for channel, level in enumerate([0.5, 1.0, 0.0]):
        assert torch.equal(sr[:, channel], torch.full((2, 8, 8), level))


def test_every_parameter_gets_a_gradient() -> None:
    model = small(scale=3).train()
    model(image_of(6, 7)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_an_image_is_normalized_by_its_batch_only_while_training() -> None:
    model = small(scale=2)
    pair = torch.cat([image_of(8, 8, batch=1), image_of(8, 8, batch=1, seed=1) * 0.1])
    with torch.no_grad():
        alone = model(pair[:1])
        torch.testing.assert_close(model(pair)[:1], alone)
        assert torch.equal(model(pair[:1]), alone)
        model.train()
        difference = (model(pair)[:1] - model(pair[:1])).abs().max()
        assert difference > 1e-3
        model.eval()
        # Running statistics have moved.
        assert not torch.allclose(model(pair[:1]), alone, atol=1e-4)


def test_half_precision_and_channels_last_give_nearly_the_same() -> None:
    model, lr = small(scale=2), image_of(9, 10)
    with torch.inference_mode():
        expected = model(lr)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(lr)
        laid_out = model.to(memory_format=torch.channels_last)(
            lr.contiguous(memory_format=torch.channels_last)
        )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(laid_out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_receptive_radius_is_what_gradients_reach(scale: int) -> None:
    model = small(scale=scale).double()
    radius = model.receptive_radius_px
    centre = radius + 2
    lr = image_of(2 * radius + 5, 8, batch=1).double().requires_grad_()
    sr = model(lr)
    reach = 0
    for place in range(scale):
        at = scale * centre + place
        (gradient,) = torch.autograd.grad(sr[..., at, 4 * scale].sum(), lr, retain_graph=True)
        rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        reach = max(reach, centre - int(rows[0]), int(rows[-1]) - centre)
    assert reach == radius
    assert not model.pools_globally


def test_export_takes_any_size() -> None:
    model = small(scale=3)
    sides = {2: torch.export.Dim("h", min=2), 3: torch.export.Dim("w", min=2)}
    exported = torch.export.export(model, (image_of(6, 8),), dynamic_shapes={"lr": sides})
    lr = image_of(7, 5)
    torch.testing.assert_close(exported.module()(lr), model(lr))


@pytest.mark.parametrize("size", [(64, 64), (65, 96), (128, 100), (1, 1)])
def test_discriminator_gives_one_logit_an_image(size: tuple[int, int]) -> None:
    discriminator = SrganDiscriminator(channels=4).eval()
    image = image_of(*size, batch=3)
    with torch.inference_mode():
        logits = discriminator(image)
        grid = discriminator.features(image).shape
    assert logits.shape == (3,)
    assert grid == (3, 32, *[-(-side // 16) for side in size])


def test_discriminator_learns_to_tell_two_kinds_apart() -> None:
    torch.manual_seed(0)
    discriminator = SrganDiscriminator(channels=4)
    smooth = image_of(1, 1, batch=4).expand(4, 3, 64, 64)
    images = torch.cat([image_of(64, 64, batch=4), smooth])
    is_real = torch.tensor([1.0] * 4 + [0.0] * 4)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    for _ in range(15):
        loss = nn.functional.binary_cross_entropy_with_logits(discriminator(images), is_real)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in discriminator.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
        optimizer.step()
    logits = discriminator(images)
    assert (logits[:4] > 0).all()
    assert (logits[4:] < 0).all()


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="scale=5 is not one of 2, 3, 4, 8"):
        Srgan(SMALL, scale=5)
    with pytest.raises(ValueError, match="num_blocks=0 must be at least 1"):
        SrganConfig(num_blocks=0)
    with pytest.raises(ValueError, match="channels=-1 must be at least 1"):
        SrganConfig(channels=-1)
    with pytest.raises(ValueError, match="channels=0 must be at least 1"):
        SrganDiscriminator(channels=0)
