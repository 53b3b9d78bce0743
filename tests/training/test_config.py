"""Settings that cannot be meant are named; what is left open is what the recipes say."""

import dataclasses
import json
import math
from typing import Any, get_args

import pytest

from carn.models.layers import BCSR_MEAN
from carn.models.table import MODELS, ModelName
from carn.training.config import (
    DIV2K_MEAN,
    NetworkConfig,
    OptimizerConfig,
    PatchConfig,
    TrainConfig,
    ValidationConfig,
    default_loss,
    learning_rate,
    resolve,
)
from carn.training.engine import EngineConfig
from carn.training.loop import check_group
from carn.training.loss import LossConfig
from tests.training.lab import NETWORKS, tiny_config

NAN = math.nan
MEAN = (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        (NetworkConfig, {"scale": 5}, "scale=5 is not one of 2, 3, 4, 8"),
        (NetworkConfig, {"model": "bicubic"}, "model='bicubic' has nothing to train"),
        (NetworkConfig, {"model": "srcnn", "channels": 8}, "model='srcnn' has no channels"),
        (NetworkConfig, {"model": "srgan", "reduction": 8}, "model='srgan' has no reduction"),
        (
            NetworkConfig,
            {"model": "srcnn", "reduction": 2, "num_blocks": 3},
            "has no num_blocks, reduction; leave it out",
        ),
        (NetworkConfig, {"num_blocks": 0}, "num_blocks"),
        (NetworkConfig, {"channels": -8}, "channels"),
        (NetworkConfig, {"channels": 8, "reduction": 16}, "reduction"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        (OptimizerConfig, {"learning_rate": -1e-4}, "learning_rate=-0.0001 must"),
        (OptimizerConfig, {"learning_rate": NAN}, "learning_rate=nan must"),
        (OptimizerConfig, {"learning_rate": math.inf}, "learning_rate=inf must"),
        (OptimizerConfig, {"adam_eps": 0.0}, "adam_eps=0.0 must be"),
        (OptimizerConfig, {"adam_betas": (0.9, 1.0)}, r"adam_betas=\(0.9, 1.0\) must"),
        (OptimizerConfig, {"adam_betas": (NAN, 0.9)}, "adam_betas="),
        (OptimizerConfig, {"adam_betas": (-0.1, 0.9)}, "adam_betas="),
        (OptimizerConfig, {"weight_decay": -1.0}, "weight_decay=-1.0 must not be negative"),
        (OptimizerConfig, {"weight_decay": NAN}, "weight_decay=nan"),
        (OptimizerConfig, {"halve_every": 0}, "halve_every=0 must be at least 1"),
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        (OptimizerConfig, {"gradient_clip": 0.0}, "gradient_clip=0.0 must be a positive"),
        (OptimizerConfig, {"gradient_clip": NAN}, "gradient_clip=nan must be a positive"),
        (OptimizerConfig, {"ema_decay": 1.0}, "ema_decay=1.0 must be between 0 and 1"),
        (OptimizerConfig, {"ema_decay": 0.0}, "ema_decay=0.0 must be between"),
        (OptimizerConfig, {"ema_decay": NAN}, "ema_decay=nan must be between"),
        (PatchConfig, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (PatchConfig, {"samples_per_tile": 0}, "samples_per_tile=0 must be at least 1"),
        (PatchConfig, {"patch_px": 1}, "patch_px=1 must be at least 2"),
        (ValidationConfig, {"validate_every": 0}, "validate_every=0 must"),
        (ValidationConfig, {"max_validation_tiles": 0}, "max_validation_tiles=0 must"),
        (ValidationConfig, {"validation_crop_px": 15}, "validation_crop_px=15 must be at least 16"),
        (TrainConfig, {"steps": 0}, "steps=0 must be at least 1"),
        (TrainConfig, {"seed": -1}, "seed=-1 must be at least 0"),
        (TrainConfig, {"swdnet_stage_steps": -1}, "swdnet_stage_steps=-1 must"),
        (
            TrainConfig,
            {"network": NetworkConfig(scale=3), "patches": PatchConfig(patch_px=64)},
            "patch_px=64 is not a multiple of scale=3",
        ),
        (
            TrainConfig,
            {
                "network": NetworkConfig(scale=3),
                "validation": ValidationConfig(validation_crop_px=17),
            },
            "validation_crop_px=15 must be at least 16",
        ),
        *(
            (
                TrainConfig,
                {"network": NetworkConfig(model=model), "loss": LossConfig(loss="l1")},
                f"model='{model}' is trained by .*; leave loss, alpha, beta and gamma out",
            )
            for model in ("srcnn", "srgan", "swdnet")
        ),
        (
            TrainConfig,
            {"network": NetworkConfig(model="srgan"), "loss": LossConfig(gamma=0.0)},
            "leave loss, alpha, beta and gamma out",
        ),
        (NetworkConfig, {"model": "rdn", "mean": "div2k"}, "model='rdn' takes no mean away"),
        (
            TrainConfig,
            {"network": NetworkConfig(model="swdnet"), "steps": 9, "swdnet_stage_steps": 9},
            "swdnet_stage_steps=9 leave nothing of steps=9 to the second stage",
        ),
        (EngineConfig, {"num_threads": 0}, "num_threads=0 must be at least 1"),
        (EngineConfig, {"log_every": 0}, "log_every=0 must"),
        (EngineConfig, {"checkpoint_every": 0}, "checkpoint_every=0 must"),
        (EngineConfig, {"keep_checkpoints": 0}, "keep_checkpoints=0 must"),
    ],
)
def test_a_wrong_value_is_named(kind: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kind(**changes)


# ------------------------------------------------------------------------------------ resolve


def test_the_defaults_are_the_papers() -> None:
    config = resolve(TrainConfig())
    assert (config.network.model, config.network.scale) == ("carn", 2)
    assert config.loss == LossConfig(loss="combined")
    assert config.patches.patch_px == 64
    assert config.patches.batch_size == 16
    assert (config.steps, config.optimizer.learning_rate) == (300_000, 1e-4)


@pytest.mark.parametrize(("scale", "side"), [(2, 64), (3, 48), (4, 64), (8, 64)])
def test_the_patch_is_the_released_code_s(scale: int, side: int) -> None:
    config = TrainConfig(network=NetworkConfig(scale=scale))
    assert config.patches.patch_px is None
    assert resolve(config).patches.patch_px == side


@pytest.mark.parametrize("model", [name for name in MODELS if name != "bicubic"])
def test_what_is_resolved_is_settled(model: ModelName) -> None:
    config = TrainConfig(network=NetworkConfig(model=model))
    resolved = resolve(config)
    assert resolve(resolved) == resolved
    has_own = model in ("srcnn", "srgan", "swdnet")
    assert resolved.loss.loss == (None if has_own else default_loss(model).loss)
    # What was chosen stays.
    if not has_own:
        chosen = dataclasses.replace(config, loss=LossConfig(loss="mse"))
        assert resolve(chosen).loss.loss == "mse"


@pytest.mark.parametrize(("steps", "stage_steps"), [(10, 5), (7, 3), (1, 0)])
def test_half_of_the_updates_are_swdnet_s_first_stage(steps: int, stage_steps: int) -> None:
    assert resolve(tiny_config("swdnet", steps=steps)).swdnet_stage_steps == stage_steps
    assert resolve(tiny_config("carn", steps=steps)).swdnet_stage_steps is None
    chosen = resolve(tiny_config("swdnet", steps=10, swdnet_stage_steps=0))
    assert chosen.swdnet_stage_steps == 0


def test_patches_have_room_for_ssim_s_window() -> None:
    small = {"patch_px": 10}
    with pytest.raises(ValueError, match="patch_px=10 is smaller than SSIM's window of 11 px"):
        resolve(tiny_config("carn", patches=small))
    assert resolve(tiny_config("edsr", patches=small)).patches.patch_px == 10
    without = tiny_config("carn", patches=small, loss=LossConfig(gamma=0.0))
    assert resolve(without).loss.loss == "combined"


def test_the_weights_of_the_loss_stay_when_it_is_resolved() -> None:
    config = TrainConfig(loss=LossConfig(alpha=0.5, gamma=0.0))
    assert resolve(config).loss == LossConfig(loss="combined", alpha=0.5, gamma=0.0)


def test_every_model_has_a_tiny_form_in_these_tests() -> None:
    assert set(NETWORKS) == set(get_args(ModelName)) - {"bicubic"}


@pytest.mark.parametrize("model", NETWORKS)
def test_settings_are_json_and_say_it_all(model: str) -> None:
    config = resolve(tiny_config(model, optimizer={"ema_decay": 0.5}))
    content = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert content == config.to_dict()
    assert content["network"]["model"] == model
    assert content["optimizer"]["adam_betas"] == [0.9, 0.999]
    for part in ("network", "loss", "optimizer", "patches", "validation"):
        fields = {field.name for field in dataclasses.fields(getattr(config, part))}
        assert set(content[part]) == fields
    assert set(content) == {field.name for field in dataclasses.fields(TrainConfig)}


# ------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    ("mean", "wanted"), [("dataset", MEAN), ("published", BCSR_MEAN), ("div2k", DIV2K_MEAN)]
)
@pytest.mark.parametrize("model", ["carn", "edsr", "rcan"])
def test_the_mean_that_a_network_takes_away(model: Any, mean: Any, wanted: Any) -> None:
    assert NetworkConfig(model=model, mean=mean).model_config(MEAN).mean == wanted


def test_what_is_left_out_is_the_papers_configuration() -> None:
    config = NetworkConfig(model="carn", channels=32).model_config(BCSR_MEAN)
    assert config == dataclasses.replace(MODELS["carn"].config(), channels=32)
    for model in ("srcnn", "srgan", "swdnet", "rdn"):
        assert NetworkConfig(model=model).model_config(MEAN) == MODELS[model].config()


# ---------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1), (9, 1), (10, 0.5), (19, 0.5), (20, 0.25), (35, 0.125)]
)
def test_halving(step: int, factor: float) -> None:
    config = tiny_config(optimizer={"learning_rate": 0.1, "halve_every": 10}, steps=7)
    assert learning_rate(step, config) == pytest.approx(0.1 * factor, rel=1e-15)


def test_the_papers_schedule() -> None:
    rates = {step: learning_rate(step, TrainConfig()) for step in (0, 199_999, 200_000, 299_999)}
    assert rates == {0: 1e-4, 199_999: 1e-4, 200_000: 5e-5, 299_999: 5e-5}


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1), (10, (1 + math.sqrt(0.5)) / 2), (20, 0.5), (30, (1 - math.sqrt(0.5)) / 2), (40, 0)],
)
def test_cosine(step: int, factor: float) -> None:
    config = tiny_config(optimizer={"learning_rate": 0.1, "schedule": "cosine"}, steps=40)
    assert learning_rate(step, config) == pytest.approx(0.1 * factor, abs=1e-16)


def test_cosine_never_rises_and_its_last_update_still_learns() -> None:
    config = tiny_config(optimizer={"schedule": "cosine", "warmup_steps": 5}, steps=40)
    rates = [learning_rate(step, config) for step in range(40)]
    assert rates[4] == rates[5] == 1e-3
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] > 0


@pytest.mark.parametrize("schedule", ["halving", "cosine"])
def test_warm_up(schedule: str) -> None:
    optimizer = {"learning_rate": 0.1, "warmup_steps": 4, "schedule": schedule}
    config = tiny_config(optimizer=optimizer, steps=40)
    found = [learning_rate(step, config) for step in range(5)]
    assert found == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1], rel=1e-12)


def test_a_warm_up_as_long_as_the_run() -> None:
    config = tiny_config(optimizer={"schedule": "cosine", "warmup_steps": 50}, steps=4)
    assert [learning_rate(step, config) > 0 for step in range(4)] == [True] * 4


# ------------------------------------------------------------------------------------- groups


def test_more_workers_than_samples_are_refused() -> None:
    from carn.errors import RunError

    check_group(tiny_config(), EngineConfig(), num_workers=4)
    with pytest.raises(RunError, match="5 workers cannot share a batch of 4"):
        check_group(tiny_config(), EngineConfig(), num_workers=5)


def test_a_stream_takes_windows() -> None:
    engine = EngineConfig(data="stream")
    check_group(tiny_config(patches={"order": "windowed"}), engine, num_workers=1)
    with pytest.raises(ValueError, match="it takes --order windowed"):
        check_group(tiny_config(), engine, num_workers=1)


def test_an_unknown_network_is_named() -> None:
    # Where annotations are checked, as in these tests, they are first to say so.
    with pytest.raises((ValueError, TypeError), match="vdsr"):
        NetworkConfig(model="vdsr")  # type: ignore[arg-type]
