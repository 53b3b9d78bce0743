from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config as shape_checks
from torch import Tensor, nn
from torch.nn import functional

from carn.models.swdnet import RCF, WAC, ChannelGate, SwdNet, SwdNetConfig, mirrored_to_multiple
from carn.models.wavelet import haar

SMALL = SwdNetConfig(channels=8, num_blocks=1, wavelet_channels=8)
SIZES = [(1, 1), (2, 2), (3, 2), (5, 6), (4, 7), (8, 8)]


def small(*, scale: int, seed: int = 0, config: SwdNetConfig = SMALL) -> SwdNet:
    torch.manual_seed(seed)
    return SwdNet(config, scale=scale)


def image_of(height: int, width: int, *, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=generator)


def count_of(module: nn.Module, *, weights_only: bool = False) -> int:
    least_axes = 2 if weights_only else 0
    return sum(p.numel() for p in module.parameters() if p.ndim >= least_axes)


def loss_of(model: SwdNet, lr: Tensor, hr: Tensor) -> Tensor:
    stages = model.forward_stages(lr)
    spatial, sr = (stages.spatial - hr).abs().sum(), (stages.sr - hr).abs().sum()
    return 0.1 * spatial + 0.1 * sr + (stages.coefficients - haar(hr)).abs().sum()


def let_contexts_in(model: SwdNet) -> None:
    """Weights of the fusions' last layers as if training had begun."""
    for module in model.modules():
        if isinstance(module, RCF):
            nn.init.normal_(module.context[-1].weight, std=0.3)


def test_parameters_are_those_of_the_papers_table() -> None:
    model = SwdNet(SwdNetConfig(), scale=2)
    assert count_of(model) == 3_158_424
    assert count_of(model, weights_only=True) == 3_139_612
    assert count_of(model.spatial) == 1_158_511
    assert count_of(model.wavelet) == 1_999_913


@pytest.mark.parametrize("scale", [3, 4, 8])
def test_other_scales_differ_by_carns_upsampler_alone(scale: int) -> None:
    def one_step(factor: int) -> int:
        return (9 * 32 + 1) * 32 * factor**2

    steps = {3: one_step(3), 4: 2 * one_step(2), 8: 3 * one_step(2)}
    extra = count_of(SwdNet(SwdNetConfig(), scale=scale)) - 3_158_424
    assert extra == steps[scale] - one_step(2)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_all_results_fit_the_hr(scale: int, size: tuple[int, int]) -> None:
    model, lr = small(scale=scale).eval(), image_of(*size)
    kept = lr.clone()
    with torch.inference_mode():
        stages = model.forward_stages(lr)
        sr = model(lr)
    height, width = scale * size[0], scale * size[1]
    assert stages.sr.shape == stages.spatial.shape == (2, 3, height, width)
    assert stages.coefficients.shape == (2, 12, (height + 1) // 2, (width + 1) // 2)
    assert torch.equal(sr, stages.sr)
    assert sr.dtype == torch.float32
    assert torch.isfinite(sr).all()
    assert torch.equal(lr, kept)
    if height % 2 == width % 2 == 0:
        torch.testing.assert_close(haar(stages.sr), stages.coefficients, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_without_its_last_layers_it_repeats_pixels(scale: int, size: tuple[int, int]) -> None:
    model, lr = small(scale=scale), image_of(*size)
    for layer in (model.spatial.tail[-1], model.wavelet.conv):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.inference_mode():
        stages = model.forward_stages(lr)
    repeated = lr.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    assert torch.equal(stages.spatial, repeated)
    torch.testing.assert_close(stages.sr, repeated, rtol=0, atol=1e-6)


def test_the_second_stage_corrects_the_first() -> None:
    with torch.inference_mode():
        stages = small(scale=2).forward_stages(image_of(6, 6))
    assert (stages.sr - stages.spatial).abs().max() > 1e-4


def test_every_parameter_learns_after_two_updates() -> None:
    model = small(scale=2, config=SwdNetConfig()).double()
    lr, hr = image_of(8, 8).double(), image_of(16, 16, seed=1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def still() -> set[str]:
        optimizer.zero_grad()
        loss_of(model, lr, hr).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        # Not even at first is there a parameter that the loss does not know of.
        assert None not in gradients.values()
        return {name for name, gradient in gradients.items() if not gradient.any()}

    # The half resolution streams wait for the fusions into the full one, whose last layers start at
    # zero, and what they take from the full one waits for their own fusions behind that.
    first = still()
    assert "spatial.modules_in_turn.0.to_half.0.weight" in first
    assert "wavelet.pairs_2.0.0.paths.0.0.weight" in first
    assert not any(name.endswith("context.2.weight") for name in first if ".fuse_full." in name)
    assert not any(name.endswith("context.2.weight") for name in first if ".fuse_1." in name)
    optimizer.step()
    second = still()
    assert "spatial.modules_in_turn.0.to_half.0.weight" not in second
    assert "spatial.modules_in_turn.0.stages.0.to_half.weight" in second
    optimizer.step()
    # A softmax over px cancels what is added to all of them.
    assert {name for name in still() if not name.endswith("mask.bias")} == set()


def test_fusion_is_the_gated_stream_plus_a_weighted_mean_of_the_other() -> None:
    torch.manual_seed(0)
    fusion = RCF(4).double()
    stream, bypass = torch.rand(2, 4, 3, 5).double(), torch.rand(2, 4, 3, 5).double()
    assert torch.equal(fusion(stream, bypass=bypass), fusion.excite(stream))

    nn.init.normal_(fusion.context[-1].weight)
    weights = fusion.mask(stream)[:, 0].exp()
    weights = weights / weights.sum((1, 2), keepdim=True)
    mean = (bypass * weights[:, None]).sum((2, 3), keepdim=True)
    expected = fusion.excite(stream) + fusion.context(mean)
    torch.testing.assert_close(fusion(stream, bypass=bypass), expected)


def test_wavelet_aware_convolution_has_four_paths() -> None:
    block = WAC(3, 5)
    kernels = [
        [layer.kernel_size for layer in path if isinstance(layer, nn.Conv2d)]
        for path in block.paths
    ]
    assert kernels == [[(3, 3)], [(1, 3)] * 2, [(3, 1)] * 2, [(3, 3)] * 2]
    x = torch.rand(1, 3, 4, 6)
    torch.testing.assert_close(block(x), sum(path(x) for path in block.paths))


def test_runs_in_evaluation_are_equal_and_images_independent() -> None:
    model, lr = small(scale=3).eval(), image_of(6, 5)
    let_contexts_in(model)
    with torch.inference_mode():
        sr = model(lr)
        assert torch.equal(model(lr), sr)
        torch.testing.assert_close(model(lr[1:]), sr[1:])
        assert torch.equal(small(scale=3, seed=4)(lr), small(scale=3, seed=4)(lr))


def test_half_precision_and_channels_last_give_nearly_the_same() -> None:
    model, lr = small(scale=2).eval(), image_of(9, 10)
    let_contexts_in(model)
    with torch.inference_mode():
        expected = model(lr)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(lr)
        laid_out = model.to(memory_format=torch.channels_last)(
            lr.contiguous(memory_format=torch.channels_last)
        )
    # The pixels themselves stay in single precision; only what is added to them is rounded.
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0, atol=0.03)
    torch.testing.assert_close(laid_out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_receptive_radius_bounds_what_gradients_reach(
    scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Everything that pools stands still; PReLUs never cut a gradient off.
    monkeypatch.setattr(ChannelGate, "forward", lambda self, x: x)
    monkeypatch.setattr(RCF, "forward", lambda self, stream, *, bypass: stream)
    config = SwdNetConfig(channels=2, num_blocks=1, wavelet_channels=2)
    model = small(scale=scale, config=config).double()
    radius = model.receptive_radius_px
    reach = 0
    lr = image_of(2 * radius + 6, 8, batch=1).double().requires_grad_()
    sr = model(lr)
    # At x3 the 2 x 2 blocks lie differently on even and on odd LR px.
    for centre in (radius + 2, radius + 3):
        for place in range(scale):
            at = scale * centre + place
            (gradient,) = torch.autograd.grad(sr[..., at, 4 * scale].sum(), lr, retain_graph=True)
            rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
            reach = max(reach, centre - int(rows[0]), int(rows[-1]) - centre)
    assert radius - 1 <= reach <= radius


def test_radius_of_the_published_network() -> None:
    assert [SwdNet(SwdNetConfig(), scale=s).receptive_radius_px for s in (2, 4)] == [71, 64]


def test_it_pools_over_the_whole_image() -> None:
    model = small(scale=2).eval()
    assert model.pools_globally
    lr = image_of(128, 8, batch=1)
    other = lr.clone()
    other[:, :, -8:] = 0
    assert model.receptive_radius_px < 120
    with torch.inference_mode():
        assert not torch.equal(model(lr)[..., 0, 0], model(other)[..., 0, 0])


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Tracing sees symbols where shape checks, where they are on, want numbers."""
    before = shape_checks.jaxtyping_disable
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("unchecked_shapes")
def test_export_takes_odd_and_even_sizes() -> None:
    model = small(scale=3).eval()
    let_contexts_in(model)
    sides = {2: torch.export.Dim("h", min=3), 3: torch.export.Dim("w", min=3)}
    exported = torch.export.export(model, (image_of(6, 8),), dynamic_shapes={"lr": sides})
    for size in [(7, 5), (4, 9)]:
        lr = image_of(*size)
        torch.testing.assert_close(exported.module()(lr), model(lr))


@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("size", [(4, 4), (5, 6), (7, 3)])
def test_mirroring_is_reflection_at_the_right_and_bottom(
    multiple: int, size: tuple[int, int]
) -> None:
    image = image_of(*size)
    down, across = (-side % multiple for side in size)
    expected = functional.pad(image, (0, across, 0, down), mode="reflect")
    assert torch.equal(mirrored_to_multiple(image, multiple), expected)


def test_a_single_px_is_repeated() -> None:
    image = image_of(1, 1)
    assert torch.equal(mirrored_to_multiple(image, 2), image.expand(2, 3, 2, 2))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="scale=6 is not one of 2, 3, 4, 8"):
        SwdNet(SMALL, scale=6)
    with pytest.raises(ValueError, match="channels=7 must be even and at least 2"):
        SwdNetConfig(channels=7)
    with pytest.raises(ValueError, match="wavelet_channels=0 must be even"):
        SwdNetConfig(wavelet_channels=0)
    with pytest.raises(ValueError, match="num_blocks=0 must be at least 1"):
        SwdNetConfig(num_blocks=0)
