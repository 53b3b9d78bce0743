"""Settings by name: recipes, and values from files and command lines."""

import json
from typing import Any

import pytest

from carn.models.table import MODELS
from carn.training.config import TrainConfig, resolve
from carn.training.recipes import field_places, recipe, with_values

TRAINABLE = [name for name in MODELS if name != "bicubic"]


@pytest.mark.parametrize("model", TRAINABLE)
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_every_network_has_both_recipes(model: Any, scale: int) -> None:
    paper, own = (recipe(name, model=model, scale=scale) for name in ("paper", "own"))
    for config in (paper, own):
        assert (config.network.model, config.network.scale) == (model, scale)
        assert resolve(config).patches.patch_px is not None
    # The paper trains all alike.
    assert paper == with_values(TrainConfig(), {"model": model, "scale": scale})


def test_own_recipes_are_those_of_the_networks_authors() -> None:
    assert recipe("own", model="rcan", scale=4).patches.patch_px == 4 * 48
    assert recipe("own", model="rdn", scale=2).patches.patch_px == 64
    swdnet = recipe("own", model="swdnet", scale=2)
    assert (swdnet.patches.batch_size, swdnet.optimizer.gradient_clip) == (24, 0.4)
    assert resolve(swdnet).swdnet_stage_steps == 600_000


def test_values_reach_their_part() -> None:
    values = {"alpha": 0.5, "num_blocks": 4, "steps": 10, "ema_decay": 0.9, "mean": "published"}
    config = with_values(TrainConfig(), values)
    assert (config.loss.alpha, config.network.num_blocks, config.steps) == (0.5, 4, 10)
    assert (config.optimizer.ema_decay, config.network.mean) == (0.9, "published")
    assert config.loss.beta == TrainConfig().loss.beta


def test_a_config_reads_back_from_what_it_writes() -> None:
    config = resolve(with_values(TrainConfig(), {"num_blocks": 2, "adam_betas": (0.8, 0.9)}))
    assert with_values(TrainConfig(), json.loads(json.dumps(config.to_dict()))) == config


def test_numbers_as_yaml_reads_them() -> None:
    config = with_values(TrainConfig(), {"learning_rate": "1e-3", "gamma": 0, "ema_decay": None})
    assert config.optimizer.learning_rate == 1e-3
    assert config.loss.gamma == 0.0
    assert isinstance(config.loss.gamma, float)
    assert config.optimizer.ema_decay is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"blocks": 4}, "'blocks' is no setting of training; there are .*num_blocks"),
        ({"steps": "many"}, "steps='many' is not of type int"),
        ({"steps": 1.5}, "steps=1.5 is not of type int"),
        ({"steps": True}, "steps=True is not of type int"),
        ({"learning_rate": "fast"}, "learning_rate='fast' is not of type float"),
        ({"learning_rate": True}, "learning_rate=True is not of type float"),
        ({"num_blocks": 2.5}, "num_blocks=2.5 is not of type int"),
        ({"adam_betas": [0.9]}, r"adam_betas=\[0.9\] is not of type"),
        ({"schedule": "linear"}, "schedule='linear' must be one of halving, cosine"),
        ({"model": "vdsr"}, "model='vdsr' must be one of bicubic, srcnn"),
        ({"reduction": 7}, "reduction=7"),
        ({"alpha": -1.0}, "alpha=-1.0 must be"),
        ({"model": "srgan", "channels": 32, "reduction": 4}, "'srgan' has no reduction"),
        ({"model": "srcnn", "mean": "div2k"}, "takes no mean away; leave mean out"),
    ],
)
def test_what_is_no_setting_is_named(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        with_values(TrainConfig(), values)


def test_every_setting_has_one_place() -> None:
    places = field_places()
    assert places["alpha"][0] == "loss"
    assert places["seed"][0] == ""
    content = TrainConfig().to_dict()
    for name, (part, _) in places.items():
        assert name in (content[part] if part else content)
