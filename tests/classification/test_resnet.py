"""The networks are those of their paper, and take the weights that torchvision publishes."""

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from carn.classification.resnet import ResNet, load_weights
from carn.errors import CheckpointError, MissingObjectError


@pytest.mark.parametrize(("depth", "count"), [(18, 11_689_512), (50, 25_557_032)])
def test_parameters_are_as_many_as_torchvisions(depth, count: int) -> None:
    model = ResNet(depth=depth, num_classes=1000)
    assert sum(weight.numel() for weight in model.parameters()) == count


def test_names_and_shapes_are_torchvisions() -> None:
    state = ResNet(depth=50, num_classes=1000).state_dict()
    assert len(state) == 320
    shapes = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_mean": (64,),
        "layer1.0.conv1.weight": (64, 64, 1, 1),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.num_batches_tracked": (),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer3.5.bn3.bias": (1024,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "fc.weight": (1000, 2048),
        "fc.bias": (1000,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    # What is normalised with is no part of it.
    assert not {"mean", "std"} & state.keys()


def test_the_3x3_convolution_has_the_stride() -> None:
    model = ResNet(depth=50)
    for layer in (2, 3, 4):
        block = model.get_submodule(f"layer{layer}.0")
        assert [getattr(block, f"conv{n}").stride for n in (1, 2, 3)] == [(1, 1), (2, 2), (1, 1)]
    assert model.get_submodule("layer1.0.conv2").stride == (1, 1)


def test_a_block_computes_what_it_should() -> None:
    """A bottleneck against its formula written out, in evaluation mode."""
    torch.manual_seed(3)
    block = ResNet(depth=50).eval().get_submodule("layer2.0")
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 256, 6, 6)

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        bn = block.get_submodule(name)
        assert isinstance(bn, nn.BatchNorm2d)
        shape = (1, -1, 1, 1)
        scaled = (y - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + bn.eps).sqrt()
        return scaled * bn.weight.view(shape) + bn.bias.view(shape)

    weights = block.state_dict()
    y = norm(functional.conv2d(x, weights["conv1.weight"]), "bn1").relu()
    y = norm(functional.conv2d(y, weights["conv2.weight"], stride=2, padding=1), "bn2").relu()
    y = norm(functional.conv2d(y, weights["conv3.weight"]), "bn3")
    short = norm(functional.conv2d(x, weights["downsample.0.weight"], stride=2), "downsample.1")
    torch.testing.assert_close(block(x), (y + short).relu(), rtol=1e-4, atol=1e-4)


def test_pictures_of_any_size_are_taken() -> None:
    model = ResNet(depth=18).eval()
    for side in (16, 48, 97):
        assert model(torch.rand(2, 3, side, side + 1)).shape == (2, 2)


def test_the_mean_of_imagenet_is_taken_off() -> None:
    torch.manual_seed(0)
    model = ResNet(depth=18).eval()
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    # The first layer sees zeros then, and all that follows is its zero biases.
    torch.testing.assert_close(model(grey), model.fc.bias[None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_torchvisions_names_are_taken_but_the_last_layer(
    tmp_path: Path, suffix: str
) -> None:
    torch.manual_seed(1)
    state = ResNet(depth=18, num_classes=1000).state_dict()
    path = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        # As the oldest of torchvision's files: without counters.
        torch.save({n: t for n, t in state.items() if "num_batches" not in n}, path)
    else:
        safetensors.torch.save_file(state, path)
    torch.manual_seed(2)
    model = ResNet(depth=18)
    own = model.fc.weight.detach().clone()
    load_weights(model, str(path))
    assert torch.equal(model.state_dict()["layer3.1.conv2.weight"], state["layer3.1.conv2.weight"])
    assert torch.equal(model.fc.weight, own)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(ResNet(depth=18).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"no weights of a ResNet-50 .*--depth"):
        load_weights(ResNet(depth=50), str(path))
    state = ResNet(depth=18).state_dict()
    del state["layer1.0.conv1.weight"]
    safetensors.torch.save_file(state, path)
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1"):
        load_weights(ResNet(depth=18), str(path))


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("run",))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "trap.pth"
    path.write_bytes(pickle.dumps({"conv1.weight": Trap()}, protocol=2))
    with pytest.raises(CheckpointError, match="no file of tensors"):
        load_weights(ResNet(depth=18), str(path))
    assert capsys.readouterr().out == ""


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.pth"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(CheckpointError, match="no file of tensors"):
            load_weights(ResNet(depth=18), str(tmp_path / name))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="something else than tensors"):
        load_weights(ResNet(depth=18), str(tmp_path / "list.pth"))
    with pytest.raises(MissingObjectError):
        load_weights(ResNet(depth=18), str(tmp_path / "absent.pth"))


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=34 is not one of 18, 50"):
        ResNet(depth=34)  # type: ignore[arg-type]
