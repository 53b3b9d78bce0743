"""Published weights: the foreign networks, written anew in miniature, against what is imported."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from carn.errors import CheckpointError, MissingObjectError
from carn.models import foreign
from carn.models.checkpoint import load_model, read_checkpoint
from carn.models.foreign import ImportWeights, import_state_dict, read_tensors
from tests.conftest import Bucket

# Source: DIV2K's mean as EDSR-PyTorch and BasicSR have it.
DIV2K = (0.4488, 0.4371, 0.4040)
WIDTH, SQUEEZED, NUM_BLOCKS, NUM_GROUPS = 8, 2, 3, 2
State = dict[str, Tensor]
Run = Callable[[Tensor], Tensor]

# What follows knows nothing of carn: a drawn state dict under the other code base's names, and the
# network computed straight from it by functional calls, in the frame that code base works in.


class Drawn:
    """A state dict that grows as it is asked for convolutions."""

    def __init__(self, *, seed: int = 0) -> None:
        self.state: State = {}
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, inputs: int, outputs: int, side: int = 3) -> None:
        bound = (inputs * side**2) ** -0.5
        for part, shape in (("weight", (outputs, inputs, side, side)), ("bias", (outputs,))):
            drawn = torch.rand(shape, generator=self._generator)
            self.state[f"{name}.{part}"] = (2 * drawn - 1) * bound

    def add_mean(self, pixel_range: float) -> None:
        for name, sign in (("sub_mean", -1), ("add_mean", 1)):
            self.state[f"{name}.weight"] = torch.eye(3).view(3, 3, 1, 1)
            self.state[f"{name}.bias"] = sign * pixel_range * torch.tensor(DIV2K)

    def add_upsampler(self, name: str, *, scale: int) -> None:
        for place in range(1 if scale == 3 else {2: 1, 4: 2, 8: 3}[scale]):
            self.add(f"{name}.{2 * place}", WIDTH, WIDTH * (9 if scale == 3 else 4))

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return functional.conv2d(
            x, weight, self.state[f"{name}.bias"], padding=weight.shape[-1] // 2
        )

    def enlarge(self, name: str, x: Tensor, *, scale: int) -> Tensor:
        for place in range(1 if scale == 3 else {2: 1, 4: 2, 8: 3}[scale]):
            x = functional.pixel_shuffle(
                self.conv(f"{name}.{2 * place}", x), 3 if scale == 3 else 2
            )
        return x


def edsr_pytorch(name: str, *, scale: int, pixel_range: float = 255.0) -> tuple[State, Run]:
    """EDSR, RCAN or CARN in the layout of EDSR-PyTorch: pixels on 0..range, mean in 1x1 layers."""
    net = Drawn()
    net.add_mean(pixel_range)
    net.add("head.0", 3, WIDTH)
    num_outer = NUM_GROUPS if name == "rcan" else NUM_BLOCKS
    for block in range(num_outer):
        if name == "edsr":
            net.add(f"body.{block}.body.0", WIDTH, WIDTH)
            net.add(f"body.{block}.body.2", WIDTH, WIDTH)
        elif name == "carn":
            for layer in (0, 1, 3, 4):
                net.add(f"body.{block}.body.{layer}", WIDTH, WIDTH)
            gate = f"body.{block}.body.6.down_and_up"
            net.add(f"{gate}.0", WIDTH, SQUEEZED, 1)
            net.add(f"{gate}.1", SQUEEZED, SQUEEZED, 1)
            net.add(f"{gate}.3", SQUEEZED, SQUEEZED, 1)
            net.add(f"{gate}.4", SQUEEZED, WIDTH, 1)
        else:
            for inner in range(NUM_BLOCKS):
                net.add(f"body.{block}.body.{inner}.body.0", WIDTH, WIDTH)
                net.add(f"body.{block}.body.{inner}.body.2", WIDTH, WIDTH)
                net.add(f"body.{block}.body.{inner}.body.3.conv_du.0", WIDTH, SQUEEZED, 1)
                net.add(f"body.{block}.body.{inner}.body.3.conv_du.2", SQUEEZED, WIDTH, 1)
            net.add(f"body.{block}.body.{NUM_BLOCKS}", WIDTH, WIDTH)
    net.add(f"body.{num_outer}", WIDTH, WIDTH)
    net.add_upsampler("tail.0", scale=scale)
    net.add("tail.1", WIDTH, 3)

    def residual(block: int, x: Tensor) -> Tensor:
        at = f"body.{block}.body"
        if name == "edsr":
            return net.conv(f"{at}.2", net.conv(f"{at}.0", x).relu())
        if name == "carn":
            y = net.conv(f"{at}.1", net.conv(f"{at}.0", x)).relu()
            y = net.conv(f"{at}.4", net.conv(f"{at}.3", y)).relu()
            gate = net.conv(f"{at}.6.down_and_up.0", y.mean((2, 3), keepdim=True))
            gate = net.conv(f"{at}.6.down_and_up.1", gate).relu()
            gate = net.conv(f"{at}.6.down_and_up.4", net.conv(f"{at}.6.down_and_up.3", gate))
            return y * gate.sigmoid()
        inner_x = x
        for inner in range(NUM_BLOCKS):
            deep = f"{at}.{inner}.body"
            y = net.conv(f"{deep}.2", net.conv(f"{deep}.0", inner_x).relu())
            gate = net.conv(f"{deep}.3.conv_du.0", y.mean((2, 3), keepdim=True)).relu()
            inner_x = inner_x + y * net.conv(f"{deep}.3.conv_du.2", gate).sigmoid()
        return net.conv(f"{at}.{NUM_BLOCKS}", inner_x)

    def run(lr: Tensor) -> Tensor:
        head = net.conv("head.0", net.conv("sub_mean", lr))
        x = head
        for block in range(num_outer):
            x = x + residual(block, x)
        x = net.conv(f"body.{num_outer}", x) + head
        return net.conv("add_mean", net.conv("tail.1", net.enlarge("tail.0", x, scale=scale)))

    return net.state, run


def edsr_pytorch_rdn(*, scale: int, growth: int = WIDTH) -> tuple[State, Run]:
    """RDN in the layout of EDSR-PyTorch: 0..255, no mean, UPNet of `growth` channels."""
    net = Drawn()
    net.add("SFENet1", 3, WIDTH)
    net.add("SFENet2", WIDTH, WIDTH)
    num_layers = 4
    for block in range(NUM_BLOCKS):
        for layer in range(num_layers):
            net.add(f"RDBs.{block}.convs.{layer}.conv.0", WIDTH + layer * growth, growth)
        net.add(f"RDBs.{block}.LFF", WIDTH + num_layers * growth, WIDTH, 1)
    net.add("GFF.0", NUM_BLOCKS * WIDTH, WIDTH, 1)
    net.add("GFF.1", WIDTH, WIDTH)
    if scale == 4:
        net.add("UPNet.0", WIDTH, 4 * growth)
        net.add("UPNet.2", growth, 4 * growth)
        net.add("UPNet.4", growth, 3)
    else:
        net.add("UPNet.0", WIDTH, growth * scale**2)
        net.add("UPNet.2", growth, 3)

    def run(lr: Tensor) -> Tensor:
        shallow = net.conv("SFENet1", lr)
        x, outputs = net.conv("SFENet2", shallow), []
        for block in range(NUM_BLOCKS):
            seen = x
            for layer in range(num_layers):
                new = net.conv(f"RDBs.{block}.convs.{layer}.conv.0", seen).relu()
                seen = torch.cat([seen, new], 1)
            x = x + net.conv(f"RDBs.{block}.LFF", seen)
            outputs.append(x)
        x = net.conv("GFF.1", net.conv("GFF.0", torch.cat(outputs, 1))) + shallow
        if scale == 4:
            x = functional.pixel_shuffle(net.conv("UPNet.0", x), 2)
            x = functional.pixel_shuffle(net.conv("UPNet.2", x), 2)
            return net.conv("UPNet.4", x)
        return net.conv("UPNet.2", functional.pixel_shuffle(net.conv("UPNet.0", x), scale))

    return net.state, run


def basicsr(name: str, *, scale: int, residual_scale: float = 1.0) -> tuple[State, Run]:
    """EDSR or RCAN in BasicSR's layout: pixels on 0..1, (x - mean) * 255 inside, no mean stored."""
    net = Drawn()
    net.add("conv_first", 3, WIDTH)
    num_outer = NUM_GROUPS if name == "rcan" else NUM_BLOCKS
    for block in range(num_outer):
        if name == "edsr":
            net.add(f"body.{block}.conv1", WIDTH, WIDTH)
            net.add(f"body.{block}.conv2", WIDTH, WIDTH)
            continue
        for inner in range(NUM_BLOCKS):
            at = f"body.{block}.residual_group.{inner}.rcab"
            net.add(f"{at}.0", WIDTH, WIDTH)
            net.add(f"{at}.2", WIDTH, WIDTH)
            net.add(f"{at}.3.attention.1", WIDTH, SQUEEZED, 1)
            net.add(f"{at}.3.attention.3", SQUEEZED, WIDTH, 1)
        net.add(f"body.{block}.conv", WIDTH, WIDTH)
    net.add("conv_after_body", WIDTH, WIDTH)
    net.add_upsampler("upsample", scale=scale)
    net.add("conv_last", WIDTH, 3)

    def residual(block: int, x: Tensor) -> Tensor:
        if name == "edsr":
            y = net.conv(f"body.{block}.conv1", x).relu()
            return net.conv(f"body.{block}.conv2", y) * residual_scale
        for inner in range(NUM_BLOCKS):
            at = f"body.{block}.residual_group.{inner}.rcab"
            y = net.conv(f"{at}.2", net.conv(f"{at}.0", x).relu())
            gate = net.conv(f"{at}.3.attention.1", y.mean((2, 3), keepdim=True)).relu()
            x = x + y * net.conv(f"{at}.3.attention.3", gate).sigmoid()
        return net.conv(f"body.{block}.conv", x)

    def run(lr: Tensor) -> Tensor:
        mean = torch.tensor(DIV2K).view(1, 3, 1, 1)
        head = net.conv("conv_first", (lr - mean) * 255)
        x = head
        for block in range(num_outer):
            x = x + residual(block, x)
        x = net.conv("conv_after_body", x) + head
        return net.conv("conv_last", net.enlarge("upsample", x, scale=scale)) / 255 + mean

    return net.state, run


def save(path: Path, state: Any) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


def off_by(model: nn.Module, run: Run, *, pixel_range: float) -> float:
    """The largest difference on 0..1, over two images of differing shapes."""
    largest = 0.0
    for seed, size in enumerate([(9, 12), (7, 5)]):
        lr = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = run(lr * pixel_range) / pixel_range
            largest = max(largest, float((model(lr) - expected).abs().max()))
    return largest


# ------------------------------------------------------------------------------- what comes over


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["edsr", "rcan", "carn"])
def test_the_layout_of_edsr_pytorch_computes_the_same(
    tmp_path: Path, name: str, scale: int
) -> None:
    state, run = edsr_pytorch(name, scale=scale)
    model = import_state_dict(save(tmp_path / "w.pt", state), name=name, scale=scale)
    assert off_by(model, run, pixel_range=255.0) < 1e-5
    assert model.config.mean == pytest.approx(DIV2K, abs=1e-7)
    assert model.config.pixel_range == 255.0
    assert model.config.channels == WIDTH
    if name != "edsr":
        assert model.config.reduction == WIDTH // SQUEEZED
    assert model.config.num_blocks == NUM_BLOCKS
    assert not model.training


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_rdn_of_edsr_pytorch_computes_the_same(tmp_path: Path, scale: int) -> None:
    state, run = edsr_pytorch_rdn(scale=scale)
    model = import_state_dict(save(tmp_path / "w.pt", state), name="rdn", scale=scale)
    assert off_by(model, run, pixel_range=255.0) < 1e-5
    assert (model.config.num_blocks, model.config.num_layers) == (NUM_BLOCKS, 4)
    assert (model.config.growth, model.config.channels) == (WIDTH, WIDTH)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["edsr", "rcan"])
def test_the_layout_of_basicsr_computes_the_same(tmp_path: Path, name: str, scale: int) -> None:
    state, run = basicsr(name, scale=scale)
    path = save(tmp_path / "w.pth", {"params": state})
    model = import_state_dict(path, name=name, scale=scale, mean=DIV2K)
    assert off_by(model, run, pixel_range=1.0) < 1e-5
    assert model.config.mean == DIV2K


def test_the_residual_scale_is_what_is_said(tmp_path: Path) -> None:
    state, run = basicsr("edsr", scale=2, residual_scale=0.25)
    path = save(tmp_path / "w.pth", state)
    plain = import_state_dict(path, name="edsr", scale=2, mean=DIV2K)
    scaled = import_state_dict(
        path, name="edsr", scale=2, mean=DIV2K, config={"residual_scale": 0.25}
    )
    assert off_by(plain, run, pixel_range=1.0) > 1e-3
    assert off_by(scaled, run, pixel_range=1.0) < 1e-5


def test_the_large_edsr_scales_its_residuals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert foreign.LARGE_EDSR == {"num_blocks": 32, "channels": 256}
    # A large one in miniature: the real one has 43 million weights.
    monkeypatch.setattr(foreign, "LARGE_EDSR", {"num_blocks": NUM_BLOCKS, "channels": WIDTH})
    state, run = basicsr("edsr", scale=2, residual_scale=0.1)
    path = save(tmp_path / "w.pth", state)
    model = import_state_dict(path, name="edsr", scale=2, mean=DIV2K)
    assert model.config.residual_scale == 0.1
    assert off_by(model, run, pixel_range=1.0) < 1e-5
    asked = import_state_dict(
        path, name="edsr", scale=2, mean=DIV2K, config={"residual_scale": 1.0}
    )
    assert asked.config.residual_scale == 1.0


@pytest.mark.parametrize("pixel_range", [1.0, 255.0])
def test_the_pixel_range_is_read_off_the_mean(tmp_path: Path, pixel_range: float) -> None:
    state, run = edsr_pytorch("carn", scale=2, pixel_range=pixel_range)
    model = import_state_dict(save(tmp_path / "w.pt", state), name="carn", scale=2)
    assert model.config.pixel_range == pixel_range
    assert model.config.mean == pytest.approx(DIV2K, abs=1e-7)
    assert off_by(model, run, pixel_range=pixel_range) < 1e-5


def test_another_pixel_range_can_be_said(tmp_path: Path) -> None:
    state, run = edsr_pytorch("edsr", scale=2, pixel_range=100.0)
    path = save(tmp_path / "w.pt", state)
    model = import_state_dict(path, name="edsr", scale=2, config={"pixel_range": 100.0})
    assert model.config.mean == pytest.approx(DIV2K, abs=1e-7)
    assert off_by(model, run, pixel_range=100.0) < 1e-5


# ------------------------------------------------------------------------------ files and pickles


def test_files_of_every_kind_hold_the_same(tmp_path: Path) -> None:
    state, _ = edsr_pytorch("edsr", scale=2)
    forms: dict[str, Any] = {
        "plain.pt": state,
        "plain.safetensors": state,
        "parallel.pth": {f"module.{name}": tensor for name, tensor in state.items()},
        "state_dict.pt": {"epoch": 3, "state_dict": state},
        "params.pth": {"params": state},
        "ema.pth": {"params": {}, "params_ema": state},
        "model.pt": {"model": state, "note": "text"},
        "parameters.pt": {name: nn.Parameter(tensor) for name, tensor in state.items()},
    }
    for name, form in forms.items():
        found = read_tensors(save(tmp_path / name, form))
        assert found.keys() == state.keys(), name
        assert all(torch.equal(found[key], state[key]) for key in state), name


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    state, _ = edsr_pytorch("edsr", scale=2)
    path = save(tmp_path / "w.pt", {name: tensor.half() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in read_tensors(path).values()} == {torch.float32}


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_is_not_executed(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    zipped, bare = tmp_path / "zip.pt", tmp_path / "bare.pth"
    torch.save({"head.0.weight": Payload()}, zipped, pickle_protocol=protocol)
    bare.write_bytes(pickle.dumps(Payload(), protocol=protocol))
    for path in (zipped, bare):
        with pytest.raises(CheckpointError, match="pickle of more than tensors, which is not ex"):
            read_tensors(str(path))
    assert not trace.exists()
    pickle.loads(bare.read_bytes())
    assert trace.exists()  # the payload does work where it is let


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a dict of tensors"),
        (torch.zeros(1), "holds a Tensor, not a dict"),
        ({}, "holds a dict, not a dict of tensors"),
        ({"state_dict": {}}, "not a dict of tensors"),
        ({"a": torch.zeros(1), "epoch": 3}, "more than tensors by name: epoch"),
        ({"a": torch.zeros(1), 7: torch.zeros(1)}, "more than tensors by name: 7"),
        ({"optimizer": {"a": torch.zeros(1)}}, "more than tensors by name: optimizer"),
    ],
)
def test_what_is_no_dict_of_tensors_is_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_tensors(save(tmp_path / "w.pt", content))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    state, _ = edsr_pytorch("edsr", scale=2)
    path = tmp_path / name
    content = Path(save(path, state)).read_bytes()
    for damaged in (b"", b"garbage", content[:100], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_tensors(str(path))


def test_file_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors, \.pt or \.pth"):
        read_tensors("weights.ckpt")
    with pytest.raises(MissingObjectError):
        read_tensors(str(tmp_path / "none.pt"))


# ----------------------------------------------------------------------------- what does not fit


def imported(tmp_path: Path, state: State, **asked: Any) -> nn.Module:
    return import_state_dict(
        save(tmp_path / "w.safetensors", state), **{"name": "edsr", "scale": 2, **asked}
    )


def test_left_over_and_missing_tensors_are_listed(tmp_path: Path) -> None:
    state, _ = edsr_pytorch("edsr", scale=2)
    with pytest.raises(CheckpointError, match=r"left over: body\.0\.bn\.weight$"):
        imported(tmp_path, {**state, "body.0.bn.weight": torch.ones(WIDTH)})
    del state["body.1.body.2.bias"]
    with pytest.raises(CheckpointError, match=r"missing: body\.1\.body\.2\.bias; left"):
        imported(tmp_path, state)


def test_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state, _ = edsr_pytorch("edsr", scale=2)
    state["body.1.body.2.weight"] = torch.zeros(WIDTH, WIDTH, 5, 5)
    with pytest.raises(CheckpointError, match=r"misshapen: body\.1\.residual\.2\.weight"):
        imported(tmp_path, state)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_another_scale_is_refused(tmp_path: Path, scale: int) -> None:
    for number, state in enumerate(
        [edsr_pytorch("edsr", scale=scale)[0], basicsr("edsr", scale=scale)[0]]
    ):
        for asked in {2, 3, 4, 8} - {scale}:
            with pytest.raises(CheckpointError, match=f"x{scale}; x{asked} was asked for"):
                imported(tmp_path, state, scale=asked, mean=DIV2K if number else None)


@pytest.mark.parametrize("asked", ["edsr", "rcan", "carn", "rdn"])
@pytest.mark.parametrize("name", ["edsr", "rcan", "carn", "rdn"])
def test_another_model_is_refused(tmp_path: Path, name: str, asked: str) -> None:
    if name == asked:
        return
    state, _ = edsr_pytorch_rdn(scale=2) if name == "rdn" else edsr_pytorch(name, scale=2)
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        imported(tmp_path, state, name=asked)


def test_models_that_nobody_published_are_refused() -> None:
    with pytest.raises(ValueError, match="name='swdnet' must be one of edsr, rdn, rcan, carn"):
        import_state_dict("w.pt", name="swdnet", scale=2)


def test_an_upsampler_of_another_width_is_refused(tmp_path: Path) -> None:
    state, _ = edsr_pytorch_rdn(scale=2, growth=4)
    with pytest.raises(CheckpointError, match="makes 16 channels of 8"):
        imported(tmp_path, state, name="rdn")


def test_basicsr_wants_to_know_the_mean(tmp_path: Path) -> None:
    state, _ = basicsr("edsr", scale=2)
    with pytest.raises(CheckpointError, match=r"no mean tensors; say the mean.*0\.4488"):
        imported(tmp_path, state)


def test_a_mean_that_the_file_contradicts_is_refused(tmp_path: Path) -> None:
    state, _ = edsr_pytorch("edsr", scale=2)
    assert imported(tmp_path, state, mean=DIV2K).config.mean == pytest.approx(DIV2K, abs=1e-7)
    with pytest.raises(CheckpointError, match="has the mean"):
        imported(tmp_path, state, mean=(0.7204, 0.4298, 0.6397))
    rdn, _ = edsr_pytorch_rdn(scale=2)
    with pytest.raises(ValueError, match="rdn takes no mean away"):
        imported(tmp_path, rdn, name="rdn", mean=DIV2K)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sub_mean.weight", 0.5 * torch.eye(3).view(3, 3, 1, 1)),
        ("add_mean.weight", torch.ones(3, 3, 1, 1)),
        ("add_mean.bias", torch.tensor([1.0, 2.0, 3.0])),
        ("sub_mean.bias", torch.zeros(4)),
    ],
)
def test_mean_layers_that_do_more_are_refused(tmp_path: Path, name: str, value: Tensor) -> None:
    state, _ = edsr_pytorch("edsr", scale=2)
    with pytest.raises(CheckpointError, match="do more than"):
        imported(tmp_path, {**state, name: value})
    del state[name]
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        imported(tmp_path, state)


def test_config_fields_are_checked(tmp_path: Path) -> None:
    state, _ = edsr_pytorch("edsr", scale=2)
    assert imported(tmp_path, state, config={"channels": WIDTH}).config.channels == WIDTH
    with pytest.raises(CheckpointError, match=f"has channels={WIDTH}, not what was asked for"):
        imported(tmp_path, state, config={"channels": 64})
    with pytest.raises(ValueError, match="edsr has no width, only"):
        imported(tmp_path, state, config={"width": 64})


# ------------------------------------------------------------------------------- the command line


def test_the_command_writes_a_checkpoint(
    tmp_path: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, run = basicsr("rcan", scale=2)
    path = save(tmp_path / "RCAN_x2.pth", {"params": state})
    arguments = ["foreign", path, "--name", "rcan", "--scale", "2", "--output", s3.uri("rcan_x2")]
    monkeypatch.setattr("sys.argv", arguments)
    assert foreign.cli() == 2
    assert "no mean tensors" in capsys.readouterr().err
    assert s3.list_keys() == []

    arguments += ["--mean", "0.4488", "0.4371", "0.4040"]
    assert foreign.cli() == 0
    assert "rcan x2" in capsys.readouterr().out
    checkpoint = read_checkpoint(s3.uri("rcan_x2"))
    assert checkpoint.training is not None
    assert checkpoint.training["imported"]["name"] == "RCAN_x2.pth"
    model = load_model(checkpoint, expect_name="rcan", expect_scale=2)
    assert off_by(model, run, pixel_range=1.0) < 1e-5

    assert foreign.cli() == 2
    assert "--overwrite" in capsys.readouterr().err
    arguments.append("--overwrite")
    assert foreign.cli() == 0


def test_weights_that_are_not_finite_do_not_become_a_checkpoint(tmp_path: Path) -> None:
    state, _ = edsr_pytorch("edsr", scale=2)
    state["head.0.bias"][0] = torch.nan
    path = save(tmp_path / "w.pt", state)
    job = ImportWeights(weights=path, name="edsr", scale=2, output=str(tmp_path / "c"))
    with pytest.raises(CheckpointError, match="not finite"):
        foreign.main(job)
    assert not (tmp_path / "c").exists()


def test_what_was_imported_is_named(tmp_path: Path) -> None:
    state, _ = edsr_pytorch("carn", scale=4)
    path = save(tmp_path / "model_best.pt", state)
    foreign.main(ImportWeights(weights=path, name="carn", scale=4, output=str(tmp_path / "c")))
    facts = json.loads((tmp_path / "c/checkpoint.json").read_text())
    assert facts["training"]["imported"]["content"].startswith("sha256:")
    assert (facts["step"], facts["dataset"], facts["metrics"]) == (None, None, {})
