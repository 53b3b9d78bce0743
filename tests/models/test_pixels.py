"""What happens to pixels on their way into a network and out of it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carn.models import MODELS, ModelName, build_model
from carn.models.layers import BCSR_MEAN, PixelScaling, Upsampler


def as_column(levels: tuple[float, ...]) -> Tensor:
    return torch.tensor(levels).view(1, 3, 1, 1)


def seen_by(layer: nn.Module, *, model: nn.Module, lr: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(lr)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("pixel_range", [255.0, 1.0])
@pytest.mark.parametrize("name", ["carn", "edsr", "rcan"])
def test_the_mean_is_taken_away_in_the_networks_range(name: ModelName, pixel_range: float) -> None:
    mean = (0.1, 0.5, 0.9)
    settings: Any = {"mean": mean, "pixel_range": pixel_range}
    model: Any = build_model(name, scale=2, config=MODELS[name].config(**settings))
    lr = torch.rand(1, 3, 4, 5)
    expected = (lr - as_column(mean)) * pixel_range
    actual = seen_by(model.head, model=model, lr=lr)
    torch.testing.assert_close(actual, expected, atol=1e-6 * pixel_range, rtol=0)


def test_rdn_takes_no_mean_away() -> None:
    model: Any = build_model("rdn", scale=2)
    lr = torch.rand(1, 3, 4, 5)
    torch.testing.assert_close(seen_by(model.shallow, model=model, lr=lr), lr * 255)


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("name", ["carn", "edsr", "rcan"])
def test_a_silent_network_gives_the_mean(name: ModelName, scale: int) -> None:
    model: Any = build_model(name, scale=scale)
    nn.init.zeros_(model.tail[-1].weight)
    nn.init.zeros_(model.tail[-1].bias)
    with torch.inference_mode():
        sr = model(torch.rand(1, 3, 4, 5))
    expected = as_column(BCSR_MEAN).expand(sr.shape)
    torch.testing.assert_close(sr, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["carn", "edsr", "rcan", "rdn"])
def test_an_output_level_is_one_of_the_networks_range(name: ModelName) -> None:
    model: Any = build_model(name, scale=2)
    nn.init.zeros_(model.tail[-1].weight)
    nn.init.constant_(model.tail[-1].bias, 51.0)
    mean = (0.0, 0.0, 0.0) if name == "rdn" else BCSR_MEAN
    with torch.inference_mode():
        sr = model(torch.rand(1, 3, 2, 2))
    # Beyond 1 for two channels: nothing is clamped.
    torch.testing.assert_close(sr, as_column(mean).expand(sr.shape) + 0.2, atol=1e-6, rtol=0)


def test_scaling_there_and_back_changes_nothing() -> None:
    pixels = PixelScaling(pixel_range=255.0, mean=BCSR_MEAN)
    rgb = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(pixels.restore(pixels.centre(rgb)), rgb, atol=2e-7, rtol=0)


@pytest.mark.parametrize("name", ["carn", "edsr", "rcan", "rdn"])
def test_the_mean_is_not_among_the_weights(name: ModelName) -> None:
    model = build_model(name, scale=2)
    assert set(model.state_dict()) == {key for key, _ in model.named_parameters()}
    assert all(module.mean.dtype == torch.float32 for module in _scalings(model))


def _scalings(model: nn.Module) -> list[PixelScaling]:
    found = [module for module in model.modules() if isinstance(module, PixelScaling)]
    assert len(found) == 1
    return found


@pytest.mark.parametrize(("scale", "shuffles"), [(2, [2]), (3, [3]), (4, [2, 2]), (8, [2, 2, 2])])
def test_the_upsampler_enlarges_in_the_papers_steps(scale: int, shuffles: list[int]) -> None:
    upsampler = Upsampler(4, scale=scale)
    found = [layer.upscale_factor for layer in upsampler if isinstance(layer, nn.PixelShuffle)]
    assert found == shuffles
    assert upsampler(torch.rand(1, 4, 2, 3)).shape == (1, 4, 2 * scale, 3 * scale)
