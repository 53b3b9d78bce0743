"""Exported files compute what the models do, for any size, and are not written when they do not."""

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from carn.errors import CheckpointError
from carn.models import export
from carn.models.adaptive_carn import AdaptiveCarnConfig
from carn.models.bicubic import BicubicConfig
from carn.models.carn import CarnConfig
from carn.models.checkpoint import checkpoint_hash, write_checkpoint
from carn.models.edsr import EdsrConfig
from carn.models.export import ExportModel, export_onnx, export_program
from carn.models.rcan import RcanConfig
from carn.models.rdn import RdnConfig
from carn.models.srcnn import SrcnnConfig
from carn.models.srgan import SrganConfig
from carn.models.swdnet import SwdNetConfig
from carn.models.table import MODELS, ModelConfig, ModelName, build_model
from tests.conftest import Bucket

SMALL: Mapping[ModelName, ModelConfig] = {
    "bicubic": BicubicConfig(),
    "srcnn": SrcnnConfig(num_features=4, num_mapped=2),
    "srgan": SrganConfig(num_blocks=1, channels=8),
    "edsr": EdsrConfig(num_blocks=1, channels=8),
    "rdn": RdnConfig(num_blocks=2, num_layers=2, growth=4, channels=8),
    "rcan": RcanConfig(num_groups=1, num_blocks=2, channels=8, reduction=4),
    "swdnet": SwdNetConfig(channels=2, num_blocks=1, wavelet_channels=2),
    "carn": CarnConfig(num_blocks=1, channels=8, reduction=4),
    "adaptive-carn": AdaptiveCarnConfig(
        num_blocks=1, channels=8, reduction=4, estimator_channels=4, embedding=4
    ),
}
# Sizes that the export itself does not try; the smallest is what every model takes.
SIZES = ((1, 4, 4), (2, 13, 5), (1, 40, 33))
# An adaptive network pads what is smaller, which a traced program does not.
LEAST_SIDE_PX = {"AdaptiveCarn": 24}


def small(name: ModelName, *, scale: int = 2) -> nn.Module:
    """A small model whose output depends on all that it is made of."""
    torch.manual_seed(0)
    model = build_model(name, scale=scale, config=SMALL[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda lr: torch.from_numpy(np.asarray(session.run(["sr"], {"lr": lr.numpy()})[0]))


def check_all_sizes(model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    for shape in SIZES:
        if min(shape[1:]) < LEAST_SIDE_PX.get(type(model).__name__, 0):
            continue
        lr = torch.rand(shape[0], 3, *shape[1:])
        with torch.no_grad():
            assert torch.allclose(run(lr), model(lr), rtol=0, atol=1e-4), shape


def test_every_model_is_tried() -> None:
    assert set(SMALL) == set(MODELS)


# x3 has its own upsampler, and in SWD-Net its own padding; x4 and x8 are x2 again and again. With
# free sizes SWD-Net takes half a minute: torch works out each of its many paddings symbolically.
CASES = [
    *(pytest.param(name, 2, id=name) for name in MODELS if name != "swdnet"),
    pytest.param("carn", 3, id="carn-3"),
    *(
        pytest.param("swdnet", scale, id=f"swdnet-{scale}", marks=pytest.mark.slow)
        for scale in (2, 3)
    ),
]


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_onnx_computes_the_same_at_any_size(tmp_path: Path, name: ModelName, scale: int) -> None:
    model = small(name, scale=scale)
    path = tmp_path / "model.onnx"
    assert export_onnx(model, str(path)) <= 1e-4
    check_all_sizes(model, run_onnx(path))


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_programs_compute_the_same_at_any_size(tmp_path: Path, name: ModelName, scale: int) -> None:
    model = small(name, scale=scale)
    path = tmp_path / "model.pt2"
    assert export_program(model, str(path)) <= 1e-4
    check_all_sizes(model, torch.export.load(path).module())


def test_files_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(small("carn"), str(path), source="sha256:12")
    proto = onnx.load(path)
    (said,) = (entry.value for entry in proto.metadata_props if entry.key == "carn")
    assert '"name": "carn"' in said
    assert '"scale": 2' in said
    assert '"source": "sha256:12"' in said
    axes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (proto.graph.input[0], proto.graph.output[0])
    ]
    assert axes[0] == ["batch", 3, "height", "width"]
    assert axes[1] == ["batch", 3, "2*height", "2*width"]

    export_program(small("carn"), str(tmp_path / "model.pt2"), source="sha256:12")
    extra = {"carn": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert extra["carn"] == said


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_files_name_nothing_of_this_machine_and_repeat(tmp_path: Path, form: str) -> None:
    contents = []
    for number in range(2):
        path = tmp_path / f"{number}.{form}"
        write = export_onnx if form == "onnx" else export_program
        write(small("edsr"), str(path))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]
    for folder in (export.__file__, torch.__file__):
        assert str(Path(folder).parent).encode() not in contents[0]


@pytest.mark.parametrize("name", ["carn", pytest.param("swdnet", marks=pytest.mark.slow)])
def test_a_static_file_takes_one_size(tmp_path: Path, name: ModelName) -> None:
    model, path = small(name), tmp_path / "model.onnx"
    assert export_onnx(model, str(path), dynamic=False, side_px=12) <= 1e-4
    run = run_onnx(path)
    lr = torch.rand(1, 3, 12, 12)
    assert torch.allclose(run(lr), model(lr), rtol=0, atol=1e-4)
    with pytest.raises(Exception, match=r"(?i)invalid dimensions"):
        run(torch.rand(1, 3, 12, 13))


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = small("srgan").to(torch.float64).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, str(tmp_path / "model.onnx"))
    export_program(model, str(tmp_path / "model.pt2"))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


# --------------------------------------------------------------------------- what is not written


@pytest.mark.parametrize("write", [export_onnx, export_program])
def test_a_file_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., float]
) -> None:
    def shifted(model: nn.Module, run: Callable[[Tensor], Tensor], **asked: Any) -> float:
        return difference(model, lambda lr: run(lr) + 2e-4, **asked)

    difference = export._difference
    monkeypatch.setattr(export, "_difference", shifted)
    with pytest.raises(CheckpointError, match=r"is not written: on \(1, 3, 19, 32\).*0\.0002"):
        write(small("carn"), str(tmp_path / "model.file"))
    assert not list(tmp_path.iterdir())


def test_the_comparison_sees_sizes_and_nan() -> None:
    model = small("carn")
    tried = ((1, 5, 4),)
    with pytest.raises(CheckpointError, match=r"makes \(1, 3, 9, 8\) of \(1, 3, 5, 4\)"):
        export._difference(model, lambda lr: model(lr)[:, :, 1:], tried=tried, path="m.onnx")
    with pytest.raises(CheckpointError, match="off by up to nan"):
        export._difference(model, lambda lr: model(lr) * torch.nan, tried=tried, path="m.onnx")
    assert export._difference(model, lambda lr: model(lr) + 5e-5, tried=tried, path="m") > 4e-5


def test_other_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Linear is none of bicubic"):
        export_onnx(nn.Linear(1, 1), str(tmp_path / "model.onnx"))


def test_only_what_is_known_is_kept_quiet() -> None:
    name = "torch.onnx._internal.exporter._registration"
    with export._quiet_exporter():
        with pytest.warns(FutureWarning, match="of our own"):
            warnings.warn("of our own", FutureWarning, stacklevel=1)
        assert logging.getLogger(name).getEffectiveLevel() == logging.ERROR
    assert logging.getLogger(name).level != logging.ERROR


# ------------------------------------------------------------------------------- the command line


def test_the_command_exports_a_checkpoint(
    tmp_path: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small("edsr")
    write_checkpoint(
        str(tmp_path / "c"),
        model=model,
        model_name="edsr",
        training=None,
        step=None,
        dataset=None,
        metrics={},
    )
    arguments = ["export", str(tmp_path / "c"), "--format", "onnx", "--output", s3.uri("m.onnx")]
    monkeypatch.setattr("sys.argv", arguments)
    assert export.cli() == 0
    assert "edsr x2 as onnx" in capsys.readouterr().out
    (tmp_path / "m.onnx").write_bytes(s3.get("m.onnx"))
    check_all_sizes(model, run_onnx(tmp_path / "m.onnx"))
    assert checkpoint_hash(str(tmp_path / "c")).encode() in s3.get("m.onnx")

    assert export.cli() == 2
    assert "--overwrite" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "--overwrite", "--side-px", "8"])
    assert export.cli() == 0
    arguments[-1] = s3.uri("other.onnx")
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "none"), *arguments[2:]])
    assert export.cli() == 2
    assert "no finished checkpoint" in capsys.readouterr().err


def test_the_command_writes_programs(tmp_path: Path) -> None:
    model = small("carn")
    write_checkpoint(
        str(tmp_path / "c"),
        model=model,
        model_name="carn",
        training=None,
        step=None,
        dataset=None,
        metrics={},
    )
    path = tmp_path / "m.pt2"
    export.main(ExportModel(checkpoint=str(tmp_path / "c"), format="pt2", output=str(path)))
    check_all_sizes(model, torch.export.load(path).module())


@pytest.mark.parametrize("asked", [{"format": "pt2", "side_px": 64}, {"side_px": 2}])
def test_sizes_are_checked(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="side_px"):
        ExportModel(**{"checkpoint": "c", "format": "onnx", "output": "m", **asked})
