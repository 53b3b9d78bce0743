"""What is true of every model of the table."""

import dataclasses
import json
from typing import Any, get_args

import pytest
import torch
from jaxtyping import config as shape_checks
from torch import Tensor, nn

from carn.degradation.bicubic import SCALES
from carn.models import MODELS, ModelName, build_model, config_from_dict, config_to_dict
from carn.models.cost import count_parameters

NAMES = list(MODELS)
TRAINABLE = [name for name in NAMES if name != "bicubic"]
# What it takes to trace a model grows with its layers, and what is found does not.
SHALLOW: dict[str, dict[str, int]] = {
    "srgan": {"num_blocks": 2},
    "edsr": {"num_blocks": 2},
    "rdn": {"num_blocks": 2, "num_layers": 2},
    "rcan": {"num_groups": 2},
    "swdnet": {"num_blocks": 1},
    "carn": {"num_blocks": 2},
    "adaptive-carn": {"num_blocks": 2},
}


def seeded(name: ModelName, *, scale: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, scale=scale).eval()


def shallow(name: ModelName) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = SHALLOW.get(name, {})
    return build_model(name, scale=2, config=MODELS[name].config(**settings)).eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def unsettle(model: nn.Module) -> nn.Module:
    """Take every parameter away from special values such as zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return model


@pytest.fixture
def unchecked() -> Any:
    """Calls as they are where types are not checked: tracing gives symbols for sizes."""
    before = shape_checks.jaxtyping_disable
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", before)


def test_the_names_are_those_of_the_type() -> None:
    assert tuple(MODELS) == get_args(ModelName)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_output_is_scale_times_the_input(name: ModelName, scale: int) -> None:
    model = seeded(name, scale=scale)
    with torch.inference_mode():
        for batch, height, width in ((2, 5, 7), (1, 1, 1), (1, 8, 1), (1, 3, 4)):
            sr = model(noise(batch, 3, height, width))
            assert sr.shape == (batch, 3, scale * height, scale * width)
            assert sr.dtype == torch.float32
            assert sr.isfinite().all()
    assert model.scale == scale
    assert model.config == MODELS[name].config()


@pytest.mark.parametrize("scale", [1, 0, 5, 6, 16, -2])
@pytest.mark.parametrize("name", NAMES)
def test_other_scales_are_refused(name: ModelName, scale: int) -> None:
    with pytest.raises(ValueError, match=rf"scale.*{scale}.*2, 3, 4"):
        build_model(name, scale=scale)


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_left_alone(name: ModelName) -> None:
    model, lr = seeded(name), noise(1, 3, 6, 5)
    kept = lr.clone()
    with torch.inference_mode():
        model(lr)
    assert torch.equal(lr, kept)


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_seed_decides_the_weights_and_nothing_else_the_result(name: ModelName) -> None:
    lr = noise(1, 3, 6, 5)
    with torch.inference_mode():
        first, again, other = (seeded(name, seed=seed)(lr) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_reach_every_parameter(name: ModelName) -> None:
    model = unsettle(seeded(name)).train()
    sr = model(noise(2, 3, 8, 8))
    (sr * noise(*sr.shape, seed=5)).sum().backward()
    idle = [
        key
        for key, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # A softmax over all places takes no notice of what is added to each: what is left is rounding.
    assert [key for key in idle if not key.endswith(".mask.bias")] == []


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_do_not_meet(name: ModelName) -> None:
    model, lr = seeded(name), noise(2, 3, 6, 5)
    with torch.inference_mode():
        torch.testing.assert_close(model(lr)[1:], model(lr[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_layout_in_memory_does_not_matter(name: ModelName) -> None:
    model, lr = seeded(name), noise(1, 3, 6, 5)
    with torch.inference_mode():
        expected = model(lr)
        model = model.to(memory_format=torch.channels_last)
        actual = model(lr.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_stays_near(name: ModelName) -> None:
    model, lr = seeded(name), noise(1, 3, 6, 5)
    with torch.inference_mode():
        expected = model(lr)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(lr)
    assert (actual.float() - expected).abs().max() < 0.02


# The others' own tests export them.
@pytest.mark.parametrize("name", ["bicubic", "srcnn", "edsr", "rdn", "rcan", "carn"])
def test_exports_for_any_size(name: ModelName, unchecked: None) -> None:
    model = shallow(name)
    height, width = (torch.export.Dim(side, min=2, max=4096) for side in ("h", "w"))
    exported = torch.export.export(
        model, (noise(1, 3, 12, 14),), dynamic_shapes=({2: height, 3: width},)
    ).module()
    with torch.inference_mode():
        for size in ((12, 14), (7, 9), (24, 5)):
            lr = noise(1, 3, *size)
            torch.testing.assert_close(exported(lr), model(lr), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_break(name: ModelName, unchecked: None) -> None:
    model, lr = shallow(name), noise(1, 3, 6, 5)
    # Traced and run as traced: no C++ compiler takes part, and a break in the graph is an error.
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(lr), model(lr), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "full", "weights"),
    [
        ("bicubic", 0, 0),
        ("srcnn", 8_129, 8_032),
        ("edsr", 1_369_859, 1_367_424),
        ("rdn", 2_377_155, 2_375_040),
        ("rcan", 1_969_987, 1_965_440),
        ("swdnet", 3_158_424, 3_139_612),
        ("carn", 1_379_779, 1_376_640),
    ],
)
def test_parameters_at_x2(name: ModelName, full: int, weights: int) -> None:
    model = build_model(name, scale=2)
    assert count_parameters(model) == full
    assert count_parameters(model, weights_only=True) == weights


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_survives_json(name: ModelName) -> None:
    config = MODELS[name].config()
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "mean":
            changes["mean"] = (0.25, 1.0, 0.0)
        elif type(value) is float:
            changes[field.name] = value / 2
        elif type(value) is int and field.name != "reduction":
            changes[field.name] = value * 2
    for chosen in (config, dataclasses.replace(config, **changes)):
        content = json.loads(json.dumps(config_to_dict(chosen)))
        assert config_from_dict(name, content) == chosen


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_key_is_named(name: ModelName) -> None:
    content = {**config_to_dict(MODELS[name].config()), "num_heads": 4}
    with pytest.raises(ValueError, match="Config has no num_heads, only"):
        config_from_dict(name, content)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_missing_key_is_named(name: ModelName) -> None:
    for key in (whole := config_to_dict(MODELS[name].config())):
        content = {other: value for other, value in whole.items() if other != key}
        with pytest.raises(ValueError, match=f"Config needs {key} as well"):
            config_from_dict(name, content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_blocks", "8"),
        ("num_blocks", 8.0),
        ("num_blocks", True),
        ("num_blocks", None),
        ("pixel_range", "255"),
        ("pixel_range", False),
        ("mean", 0.5),
        ("mean", [0.5, 0.5]),
        ("mean", ["0.5", 0.5, 0.5]),
    ],
)
def test_a_value_of_the_wrong_type_is_named(key: str, value: object) -> None:
    content = {**config_to_dict(MODELS["carn"].config()), key: value}
    with pytest.raises(ValueError, match=key):
        config_from_dict("carn", content)


def test_whole_numbers_may_stand_for_floats() -> None:
    content = {**config_to_dict(MODELS["carn"].config()), "pixel_range": 1, "mean": [0, 1, 0]}
    config = config_from_dict("carn", content)
    assert config_to_dict(config)["pixel_range"] == 1.0
    assert config_to_dict(config)["mean"] == [0.0, 1.0, 0.0]


def test_an_unknown_model_is_refused(unchecked: None) -> None:
    name: Any = "esrgan"
    with pytest.raises(ValueError, match=r"'esrgan' is not one of bicubic, srcnn, .*carn"):
        build_model(name, scale=2)
    with pytest.raises(ValueError, match="'esrgan' is not one of"):
        config_from_dict(name, {})


def test_anothers_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="carn takes a CarnConfig, and not a EdsrConfig"):
        build_model("carn", scale=2, config=MODELS["edsr"].config())


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("carn", {"num_blocks": 0}, "num_blocks=0 must be at least 1"),
        ("carn", {"reduction": 7}, "reduction=7 does not divide channels=64"),
        ("carn", {"reduction": 0}, "reduction=0 must be at least 1"),
        ("carn", {"channels": -8}, "channels=-8 must be at least 1"),
        ("carn", {"pixel_range": 0.0}, "pixel_range=0.0 must be above 0"),
        ("carn", {"pixel_range": float("nan")}, "pixel_range=nan must be above 0"),
        ("carn", {"mean": (0.5, 0.5, 128.0)}, r"mean=\(0.5, 0.5, 128.0\) must be three levels"),
        ("edsr", {"num_blocks": 0}, "num_blocks=0"),
        ("edsr", {"residual_scale": 0.0}, "residual_scale=0.0 must be above 0"),
        ("edsr", {"mean": (float("nan"), 0.5, 0.5)}, "must be three levels"),
        ("rdn", {"growth": 0}, "growth=0"),
        ("rdn", {"num_layers": -1}, "num_layers=-1"),
        ("rdn", {"pixel_range": -1.0}, "pixel_range=-1.0"),
        ("rcan", {"num_groups": 0}, "num_groups=0"),
        ("rcan", {"reduction": 24}, "reduction=24 does not divide channels=64"),
        ("srcnn", {"num_features": 0}, "num_features=0"),
    ],
)
def test_a_configuration_without_sense_is_refused(
    name: ModelName, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        MODELS[name].config(**values)
