"""Search spaces: what they hold, and what is refused before anything is started."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carn.training.config import TrainConfig
from carn.training.recipes import recipe
from carn.tuning.space import Interval, Simplex, Space, parse_space, read_space, weights_of_shares

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "tune_spaces").glob("*.yaml"))


def space_of(**content: Any) -> Space:
    return parse_space(content, name="space")


def base_of(space: Space) -> TrainConfig:
    return space.start(recipe("paper", model="carn", scale=2))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_spaces_can_be_trained(path: Path) -> None:
    space = read_space(str(path))
    space.check(base_of(space))
    assert space.question


def test_shipped_spaces_are_the_papers() -> None:
    spaces = {path.stem: read_space(str(path)) for path in SHIPPED}
    assert len(spaces["loss_weights"].grid()) == 22  # 21 on the grid of fifths, and the paper's
    assert {"alpha": 0.8, "beta": 0.1, "gamma": 0.1} in spaces["loss_weights"].grid()
    assert [point["num_blocks"] for point in spaces["blocks"].grid()] == [2, 4, 8, 12, 16, 20]
    reductions = spaces["reduction"].grid()
    assert [p["reduction"] for p in reductions if p["channels"] == 64] == [2, 4, 8, 16, 32]
    assert len(spaces["combined_or_mse"].grid()) == 8


def test_a_grid_is_every_point_with_every_value() -> None:
    space = space_of(
        points=[{"channels": 64, "reduction": 8}, {"channels": 32, "reduction": 4}],
        search={"batch_size": [4, 8, 16]},
    )
    points = space.grid()
    assert len(points) == 6
    assert points[0] == {"channels": 64, "reduction": 8, "batch_size": 4}
    assert space.columns == ("channels", "reduction", "batch_size")
    config = space.config(points[-1], base=base_of(space), seed=11)
    assert (config.network.channels, config.patches.batch_size, config.seed) == (32, 16, 11)


def test_drawn_points_are_those_of_the_seed_and_of_a_lower_count() -> None:
    space = space_of(
        search={
            "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
            "batch_size": {"low": 4, "high": 8},
            "weights": {"simplex": ["alpha", "beta", "gamma"]},
        },
        settings={"loss": "combined"},
    )
    drawn = space.draw(30, seed=1)
    assert drawn[:7] == space.draw(7, seed=1)
    assert drawn != space.draw(30, seed=2)
    assert all(1e-5 <= point["learning_rate"] <= 1e-3 for point in drawn)
    # On a logarithmic scale a half lies below the geometric mean.
    assert 5 <= sum(point["learning_rate"] < 1e-4 for point in drawn) <= 25
    assert {point["batch_size"] for point in drawn} <= {4, 5, 6, 7, 8}
    for point in drawn:
        assert sum(float(point[name]) for name in ("alpha", "beta", "gamma")) == pytest.approx(1)
        space.config(point, base=base_of(space), seed=1)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_any_shares_are_weights_of_the_simplex(shares: list[float]) -> None:
    axis = Simplex(names=("alpha", "beta", "gamma"), step=None, include=())
    weights = [float(weight) for weight in weights_of_shares(axis, shares).values()]
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1, abs=1e-9)


def test_suggestions_are_points() -> None:
    space = space_of(
        points=[{"channels": 64, "reduction": 8}, {"channels": 32, "reduction": 4}],
        search={"learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}},
    )
    assert list(space.shares) == ["point", "learning_rate"]
    assert isinstance(space.shares["learning_rate"], Interval)
    point = space.point_of({"point": 1, "learning_rate": 1e-4})
    assert point == {"channels": 32, "reduction": 4, "learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"search": {"redcution": [8]}}, "'redcution' is no setting"),
        ({"serach": {}}, "'serach' is no part of a space"),
        ({"search": {"reduction": []}}, "no values"),
        ({"search": {"reduction": [8, 8]}}, "twice"),
        ({"search": {"reduction": 8}}, "must be a list of values"),
        ({"search": {"seed": [1]}}, "say seeds"),
        ({"search": {"learning_rate": {"low": 1.0, "high": 0.1}}}, "low < high"),
        ({"search": {"learning_rate": {"low": "1e-5", "high": 1}}}, "1.0e-5"),
        ({"search": {"learning_rate": {"low": 0, "high": 1, "log": True}}}, "must be positive"),
        ({"search": {"w": {"simplex": ["alpha", "beta", "gamma"], "step": 0.3}}}, "must divide 1"),
        (
            {"search": {"w": {"simplex": ["alpha", "beta"], "include": [[0.5, 0.6]]}}},
            "off the simplex",
        ),
        ({"points": [{"channels": 64}, {"reduction": 8}]}, "same settings"),
        ({"search": {"reduction": [8]}, "settings": {"reduction": 4}}, "said twice"),
        ({"settings": {"model": "carn"}}, "nothing is searched"),
        ({"search": {"reduction": [8]}, "seeds": [1, 1]}, "different whole numbers"),
        ({"search": {"reduction": [8]}, "figure": {"kind": "pie"}}, "must be one of"),
        ({"search": {"reduction": [8]}, "figure": {"kind": "lines"}}, "needs its x"),
        ({"search": {"reduction": [8]}, "figure": {"kind": "ternary"}}, "simplex of three"),
        ({"search": {"reduction": [8]}, "published": [{"reduction": 8}]}, "psnr_db"),
        (
            {"search": {"reduction": [8]}, "published": [{"reduction": 8, "psnr_db": "40,3"}]},
            "must be a number",
        ),
        ({"search": {"reduction": [8]}, "published": None}, "must be a list"),
        ({"search": {"reduction": [8]}, "settings": {"scale": [2, 4]}}, "must be one value"),
        ({"search": None}, "search must hold"),
        (
            {"search": {"w": {"simplex": ["alpha", "beta"], "include": [0.5, 0.5]}}},
            "must include points",
        ),
    ],
)
def test_what_is_no_space_says_why(content: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_space(content, name="space")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"search": {"reduction": [8, 12]}}, "reduction=12 does not divide channels=64"),
        ({"search": {"scale": [2, 5]}}, "scale=5"),
        ({"points": [{"alpha": 0.5, "beta": 0.2, "gamma": 0.2}]}, "must be 1"),
        ({"search": {"alpha": [0.8, 0.7]}}, "must be 1"),
        ({"search": {"reduction": [8]}, "settings": {"gamma": 0.3}}, "must be 1"),
        (
            {"search": {"channels": {"low": 16, "high": 64}}, "settings": {"reduction": 16}},
            "does not divide channels",
        ),
        ({"search": {"num_blocks": {"low": 0, "high": 4}}}, "num_blocks"),
        ({"search": {"loss": ["combined", "ssim"]}}, "must be one of"),
    ],
)
def test_impossible_points_are_named(content: dict[str, Any], said: str) -> None:
    space = parse_space(content, name="space")
    with pytest.raises(ValueError, match=said):
        space.check(base_of(space))


def test_a_grid_wants_values() -> None:
    space = space_of(search={"learning_rate": {"low": 1e-5, "high": 1e-3}})
    with pytest.raises(ValueError, match="--strategy random or optuna"):
        space.grid()
    many = space_of(search={"steps": list(range(1, 200)), "batch_size": list(range(1, 200))})
    with pytest.raises(ValueError, match="more than 10,000"):
        many.grid()
    # Nor is it gone through to find out whether it can be drawn from.
    many.check(base_of(many))


def test_files_that_hold_no_space_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("search: [")
    with pytest.raises(ValueError, match="not YAML"):
        read_space(str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold a space"):
        read_space(str(tmp_path / "a.yaml"))
