import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from carn.errors import CarnError
from carn.models import MODELS, ModelName
from carn.models.layers import GlobalMean
from carn.upscaling import pooling as module_under_test
from carn.upscaling.engine import reference_engine
from carn.upscaling.pooling import (
    FrozenMean,
    Pooling,
    frozen,
    has_pooling,
    pool_over,
    pooling_names,
    refreeze,
)
from tests.upscaling.networks import POOLING, SMALL, batch_of, network, tissue, window_of

HALO_PX = 24
CASES: list[tuple[ModelName, int]] = [
    ("carn", 2),
    ("rcan", 4),
    ("swdnet", 2),
    ("swdnet", 3),
    ("swdnet", 8),
]


def assert_close(pooling: Pooling, other: Pooling, *, relative: float = 1e-5) -> None:
    assert pooling.means.keys() == other.means.keys()
    for name, mean in pooling.means.items():
        size = float(other.means[name].abs().max())
        torch.testing.assert_close(mean, other.means[name], rtol=0, atol=relative * size)


def test_the_models_that_pool() -> None:
    for name in SMALL:
        model = network(name)
        assert has_pooling(model) == (name in POOLING) == model.pools_globally
    assert set(MODELS) == set(SMALL)
    # Two gates and a fusion for each of RCF, of which a module has six, the wavelet stage five.
    assert len(pooling_names(network("swdnet"))) == 3 + 2 * (2 * 6 + 5)


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_windows_that_tile_an_image_give_the_means_of_the_image(
    name: ModelName, scale: int
) -> None:
    model, image = network(name, scale=scale), tissue(96)[:64]
    halo_px = reference_engine(model).halo_px
    whole = window_of(image, 0, 0, 96, 64, halo_px=halo_px)
    parts = [window_of(image, x, y, 48, 32, halo_px=halo_px) for y in (0, 32) for x in (0, 48)]
    found = pool_over(model, parts, halo_px=halo_px)
    assert_close(found, pool_over(model, [whole], halo_px=halo_px))
    # Each part alone is something else: there is something to agree on.
    alone = pool_over(model, parts[:1], halo_px=halo_px)
    with pytest.raises(AssertionError):
        assert_close(alone, found, relative=1e-3)


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_of_one_window_without_halo_it_is_the_models_own_pooling(
    name: ModelName, scale: int
) -> None:
    model, image = network(name, scale=scale), tissue(40)
    pooling = pool_over(model, [image], halo_px=0)
    with torch.inference_mode():
        expected, found = model(batch_of(image)), frozen(model, pooling)(batch_of(image))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["carn", "rcan"])
def test_means_are_those_of_the_interiors_with_all_gates_frozen(name: ModelName) -> None:
    """What the frozen network's features really average to."""
    model, image = network(name), tissue(128)
    windows = [window_of(image, x, 8, 40, 32, halo_px=HALO_PX) for x in (0, 60)]
    rng = np.random.default_rng(0)
    weights = [rng.random((32, 40)) < share for share in (0.2, 0.9)]
    pooling = pool_over(model, windows, halo_px=HALO_PX, weights=weights)
    seen: dict[str, Tensor] = {}

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        crop = slice(HALO_PX, -HALO_PX)
        seen[layer.name] = inputs[0][:, :, crop, crop]

    copied = frozen(model, pooling)
    for module in copied.modules():
        if isinstance(module, FrozenMean):
            module.register_forward_hook(keep)
    with torch.inference_mode():
        copied(batch_of(*windows))
    counts = torch.from_numpy(np.stack(weights)).float()[:, None]
    means = {
        key: ((x * counts).sum((0, 2, 3)) / counts.sum())[None, :, None, None]
        for key, x in seen.items()
    }
    assert_close(pooling, Pooling(means))


def test_coarse_features_count_by_the_area_that_counts() -> None:
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.pool = GlobalMean()

        def forward(self, lr: Tensor) -> Tensor:
            return self.pool(functional.avg_pool2d(lr, 2))

    image = tissue(32)
    counts = np.zeros((16, 16), dtype=bool)
    counts[:4, :7] = True  # cuts through 2 x 2 px
    found = pool_over(Halving(), [image], halo_px=8, weights=[counts]).means["pool"]
    halves = image.reshape(16, 2, 16, 2, 3).mean((1, 3))[4:-4, 4:-4] / 255
    area = counts.reshape(8, 2, 8, 2).mean((1, 3))
    expected = (halves * area[..., None]).sum((0, 1)) / area.sum()
    np.testing.assert_allclose(found.flatten(), expected, rtol=1e-6)


def test_a_window_of_which_nothing_counts_does_not_count() -> None:
    model, image = network("swdnet"), tissue(128)
    first, second = (window_of(image, x, 0, 32, 32, halo_px=HALO_PX) for x in (0, 64))
    everything = np.ones((32, 32), dtype=bool)
    found = pool_over(
        model, [first, second], halo_px=HALO_PX, weights=[everything, np.zeros_like(everything)]
    )
    assert_close(found, pool_over(model, [first], halo_px=HALO_PX))


def test_the_model_stays_as_it_is() -> None:
    model = network("carn")
    before = [(name, type(module)) for name, module in model.named_modules()]
    pooling = pool_over(model, [tissue(40)], halo_px=8)
    frozen(model, pooling)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert pool_over(network("edsr"), [tissue(40)], halo_px=8).means == {}


def test_frozen_networks_do_not_depend_on_what_lies_far_off() -> None:
    model, image = network("carn"), tissue(96)
    far = image.copy()
    far[60:] = 255
    pooling = pool_over(model, [image], halo_px=16)
    for copied, is_local in ((frozen(model, pooling), True), (model, False)):
        with torch.inference_mode():
            one, other = (copied(batch_of(pixels))[..., :40, :] for pixels in (image, far))
        assert torch.equal(one, other) == is_local


def test_refreezing_changes_means_in_place() -> None:
    model, image = network("swdnet"), tissue(64)
    first, second = (pool_over(model, [image[:, x : x + 32]], halo_px=4) for x in (0, 32))
    copied = frozen(model, first)
    refreeze(copied, second)
    with torch.inference_mode():
        lr = batch_of(image)
        assert torch.equal(copied(lr), frozen(model, second)(lr))
        assert not torch.equal(copied(lr), frozen(model, first)(lr))


def test_bytes_there_and_back() -> None:
    pooling = pool_over(network("carn"), [tissue(40)], halo_px=8)
    content = pooling.to_bytes()
    back = Pooling.from_bytes(content)
    assert back.to_bytes() == content
    for name, mean in pooling.means.items():
        assert mean.dtype == torch.float32
        assert mean.shape == (1, 16, 1, 1)
        assert torch.equal(back.means[name], mean)
    for damaged in (b"", b"nonsense", content[:-5]):
        with pytest.raises(CarnError, match="no stored pooling"):
            Pooling.from_bytes(damaged)


def test_what_cannot_be_pooled_over_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, window = network("carn"), tissue(40)
    with pytest.raises(ValueError, match="of one shape and at least one"):
        pool_over(model, [], halo_px=8)
    with pytest.raises(ValueError, match="of one shape"):
        pool_over(model, [window, window[:32]], halo_px=8)
    with pytest.raises(ValueError, match="halo of 20 px"):
        pool_over(model, [window], halo_px=20)
    nothing = np.zeros((24, 24), dtype=bool)
    with pytest.raises(ValueError, match="no px of any window counts"):
        pool_over(model, [window], halo_px=8, weights=[nothing])
    with pytest.raises(ValueError, match=r"1 of shape \(24, 24\)"):
        pool_over(model, [window], halo_px=8, weights=[nothing[1:]])
    with pytest.raises(ValueError, match=r"measured with another model: it has .*rcan|another"):
        frozen(model, pool_over(network("rcan"), [window], halo_px=8))
    monkeypatch.setattr(module_under_test, "MAX_POOLED_PX", 40 * 40)
    pool_over(model, [window], halo_px=8)
    with pytest.raises(ValueError, match="sample fewer or smaller windows"):
        pool_over(model, [window, window], halo_px=8)
    # Behind the upsampler SWD-Net has 16 times the px at x8.
    with pytest.raises(ValueError, match="sample fewer"):
        pool_over(network("swdnet", scale=8), [window], halo_px=8)
