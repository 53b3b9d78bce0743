"""The network itself, held against a second reading of the paper written out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from carn.models import build_model
from carn.models.carn import Carn, CarnConfig, ChannelAttentionRetention
from carn.models.cost import count_parameters


@pytest.mark.parametrize(
    ("scale", "expected"), [(2, 1_379_779), (3, 1_564_419), (4, 1_527_491), (8, 1_675_203)]
)
def test_parameters_at_every_scale(scale: int, expected: int) -> None:
    assert count_parameters(build_model("carn", scale=scale)) == expected


@pytest.mark.parametrize("num_blocks", [2, 4, 12, 16, 20])
def test_parameters_grow_with_blocks_as_the_papers(num_blocks: int) -> None:
    with torch.device("meta"):
        model = Carn(CarnConfig(num_blocks=num_blocks), scale=2)
    assert count_parameters(model) == 188_163 + 148_952 * num_blocks


@pytest.mark.parametrize(("channels", "reduction"), [(64, 2), (64, 32), (128, 12), (128, 16)])
def test_widths_of_the_papers_table_4(channels: int, reduction: int) -> None:
    if channels % reduction:
        with pytest.raises(ValueError, match=f"reduction={reduction} does not divide"):
            CarnConfig(channels=channels, reduction=reduction)
        return
    with torch.device("meta"):
        model: Any = Carn(CarnConfig(channels=channels, reduction=reduction), scale=2)
    widths = [gate.out_channels for gate in _convolutions(model)]
    squeezed = channels // reduction
    assert widths == [squeezed, squeezed, squeezed, channels]


def _convolutions(model: Any) -> list[Any]:
    return [layer for layer in model.body[0].residual[-1].gate if hasattr(layer, "out_channels")]


def by_hand(lr: Tensor, *, weights: dict[str, Tensor], num_blocks: int, mean: Tensor) -> Tensor:
    """CARN at x2 from its weights in the order of the network, by functions alone."""
    kernels = iter(value for key, value in weights.items() if key.endswith("weight"))
    biases = iter(value for key, value in weights.items() if key.endswith("bias"))

    def conv(x: Tensor) -> Tensor:
        kernel = next(kernels)
        return functional.conv2d(x, kernel, next(biases), padding=kernel.shape[-1] // 2)

    shallow = conv(255 * (lr - mean))
    deep = shallow
    for _ in range(num_blocks):
        x = torch.relu(conv(conv(deep)))
        x = torch.relu(conv(conv(x)))
        pooled = x.mean(dim=(2, 3), keepdim=True)
        gate = torch.sigmoid(conv(conv(torch.relu(conv(conv(pooled))))))
        deep = deep + x * gate
    deep = shallow + conv(deep)
    return conv(functional.pixel_shuffle(conv(deep), 2)) / 255 + mean


def test_equals_the_paper_written_out() -> None:
    torch.manual_seed(0)
    model = Carn(CarnConfig(num_blocks=3, channels=8, reduction=2), scale=2)
    lr = torch.rand(2, 3, 6, 7)
    mean = torch.tensor([0.7204, 0.4298, 0.6397]).view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = by_hand(lr, weights=model.state_dict(), num_blocks=3, mean=mean)
        torch.testing.assert_close(model(lr), expected, atol=1e-6, rtol=1e-5)


def test_the_gate_is_one_number_a_channel_in_0_to_1() -> None:
    torch.manual_seed(0)
    attention = ChannelAttentionRetention(8, reduction=4)
    x = torch.rand(2, 8, 5, 6) + 0.5
    with torch.inference_mode():
        gates = attention(x) / x
    spread = gates.amax(dim=(2, 3)) - gates.amin(dim=(2, 3))
    assert spread.max() < 1e-6
    assert gates.min() > 0
    assert gates.max() < 1


def test_weights_load_strictly() -> None:
    donor, taker = (Carn(CarnConfig(num_blocks=1), scale=2) for _ in range(2))
    weights = donor.state_dict()
    taker.load_state_dict(weights)
    lr = torch.rand(1, 3, 4, 4)
    with torch.inference_mode():
        assert torch.equal(donor(lr), taker(lr))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*|Missing key.*"):
        Carn(CarnConfig(num_blocks=2), scale=2).load_state_dict(weights)
