"""How far an output pixel sees, measured by gradients."""

import pytest
import torch
from torch import Tensor, nn

from carn.degradation.bicubic import SCALES
from carn.models import ModelConfig, ModelName, build_model
from carn.models.bicubic import BicubicConfig
from carn.models.carn import CarnConfig, ChannelAttentionRetention
from carn.models.edsr import EdsrConfig
from carn.models.rcan import ChannelAttention, RcanConfig
from carn.models.rdn import RdnConfig
from carn.models.srcnn import SrcnnConfig

SMALL: list[tuple[ModelName, ModelConfig]] = [
    ("bicubic", BicubicConfig()),
    ("srcnn", SrcnnConfig(num_features=8, num_mapped=4)),
    ("edsr", EdsrConfig(num_blocks=2, channels=8)),
    ("rdn", RdnConfig(num_blocks=2, num_layers=3, growth=4, channels=8)),
    ("rcan", RcanConfig(num_groups=2, num_blocks=2, channels=8, reduction=2)),
    ("carn", CarnConfig(num_blocks=2, channels=8, reduction=2)),
]


def open_gate(_attention: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    """Stands for a channel attention whose gates no longer depend on the picture."""
    return inputs[0]


def measured_radius_px(model: nn.Module, *, scale: int, guess_px: int) -> int:
    """The farthest LR px, by rows or columns, that any px within one LR px's place depends on."""
    for module in model.modules():
        if isinstance(module, (ChannelAttention, ChannelAttentionRetention)):
            module.register_forward_hook(open_gate)
    model = model.double()
    middle = guess_px + 2
    side = 2 * middle + 1
    generator = torch.Generator().manual_seed(1)
    lr = torch.rand(1, 3, side, side, dtype=torch.float64, generator=generator, requires_grad=True)
    sr = model(lr)
    farthest = 0
    for place in range(scale):
        at = middle * scale + place
        (gradient,) = torch.autograd.grad(sr[..., at, at].sum(), lr, retain_graph=True)
        touched = gradient[0].any(dim=0)
        for axis in (0, 1):
            found = touched.any(dim=axis).nonzero()[:, 0]
            farthest = max(farthest, middle - int(found.min()), int(found.max()) - middle)
    return farthest


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "config"), SMALL, ids=[name for name, _ in SMALL])
def test_the_receptive_radius_is_exact(name: ModelName, config: ModelConfig, scale: int) -> None:
    torch.manual_seed(0)
    model = build_model(name, scale=scale, config=config)
    radius = model.receptive_radius_px
    assert isinstance(radius, int)
    assert measured_radius_px(model, scale=scale, guess_px=radius) == radius


@pytest.mark.parametrize("num_blocks", [1, 8])
def test_carn_sees_four_px_a_block_and_four_more(num_blocks: int) -> None:
    torch.manual_seed(0)
    model = build_model(
        "carn", scale=2, config=CarnConfig(num_blocks=num_blocks, channels=8, reduction=2)
    )
    radius = 4 * num_blocks + 4
    assert model.receptive_radius_px == radius
    assert measured_radius_px(model, scale=2, guess_px=radius) == radius


@pytest.mark.parametrize(
    ("name", "expected"), [("edsr", 36), ("rdn", 45), ("rcan", 52), ("carn", 36)]
)
def test_radius_of_the_papers_configuration(name: ModelName, expected: int) -> None:
    assert {build_model(name, scale=scale).receptive_radius_px for scale in SCALES} == {expected}


@pytest.mark.parametrize(("name", "config"), SMALL, ids=[name for name, _ in SMALL])
def test_pools_globally_tells_whether_the_far_corner_matters(
    name: ModelName, config: ModelConfig
) -> None:
    torch.manual_seed(0)
    model = build_model(name, scale=2, config=config).double()
    side = model.receptive_radius_px + 8
    lr = torch.rand(1, 3, side, side, dtype=torch.float64)
    changed = lr.clone()
    changed[..., -4:, -4:] = 0
    with torch.inference_mode():
        corner, other = model(lr)[..., :2, :2], model(changed)[..., :2, :2]
    assert model.pools_globally == (not torch.equal(corner, other))
