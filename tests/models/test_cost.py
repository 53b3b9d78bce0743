"""Parameters and FLOPs, and the tables that are printed of them."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from carn.models import MODELS, build_model
from carn.models.carn import Carn, CarnConfig
from carn.models.cost import count_flops, count_parameters


@pytest.mark.parametrize("with_biases", [True, False])
def test_a_multiplication_and_an_addition_are_two(with_biases: bool) -> None:
    layer = nn.Conv2d(3, 5, (3, 1), padding=(1, 0))
    expected = 2 * (3 * 3 + with_biases) * 5 * (7 * 4)
    assert count_flops(layer, lr_px=(7, 4), with_biases=with_biases) == expected


@pytest.mark.parametrize("with_biases", [True, False])
def test_a_linear_layer_counts_too(with_biases: bool) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))
    assert count_flops(model, with_biases=with_biases) == 2 * (3 + with_biases) * 7


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 6, 5, stride=2, padding=1, groups=3, bias=False),
        nn.Conv2d(3, 6, 3, dilation=2, bias=False),
        nn.ConvTranspose2d(3, 6, 4, stride=3, padding=1, bias=False),
        nn.Linear(9, 4, bias=False),
    ],
)
def test_without_biases_the_count_is_torchs(layer: nn.Module) -> None:
    torchs = count_flops(layer, lr_px=(9, 11), with_biases=False)
    assert count_flops(layer, lr_px=(9, 11)) == torchs > 0


@pytest.mark.parametrize(
    ("num_blocks", "giga"),
    [(2, 4.004), (4, 6.424), (8, 11.264), (12, 16.105), (16, 20.945), (20, 25.785)],
)
def test_carns_flops_by_depth(num_blocks: int, giga: float) -> None:
    with torch.device("meta"):
        model = Carn(CarnConfig(num_blocks=num_blocks), scale=2)
    assert round(count_flops(model) / 1e9, 3) == giga


def test_carns_flops_by_hand() -> None:
    small, large = 40 * 24, 4 * 40 * 24
    convolutions = 2 * 9 * (3 * 64 + 33 * 64 * 64 + 64 * 256) * small + 2 * 9 * 64 * 3 * large
    gates = 2 * 8 * (64 * 8 + 8 * 8 + 8 * 8 + 8 * 64)
    biases = 2 * ((64 + 33 * 64 + 256) * small + 3 * large + 8 * (8 + 8 + 8 + 64))
    model = build_model("carn", scale=2)
    assert count_flops(model, lr_px=(40, 24), with_biases=False) == convolutions + gates
    assert count_flops(model, lr_px=(40, 24)) == convolutions + gates + biases


def test_interpolation_is_not_counted() -> None:
    assert count_flops(build_model("bicubic", scale=4)) == 0


def test_counting_leaves_the_model_as_it_was() -> None:
    model = build_model("srgan", scale=2).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_flops(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training


def test_frozen_parameters_are_not_trainable() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(), nn.BatchNorm2d(4))
    assert count_parameters(model) == 12 + 4 + 1 + 8
    assert count_parameters(model, weights_only=True) == 12
    model[0].requires_grad_(False)
    assert count_parameters(model) == 9


def test_printed_tables_hold_every_model_and_the_papers_columns() -> None:
    from carn.models.__main__ import describe_costs

    text = describe_costs(2)
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert [entry.title for entry in MODELS.values() if entry.title in lines] == [
        entry.title for entry in MODELS.values()
    ]
    assert lines["CARN"][1:] == ["1.389", "1,379,779", "1,376,640", "11.264"]
    assert lines["SRGAN"][1:3] == ["6.097", "6,097,357"]
    assert lines["SWD-Net"][1:4] == ["3.158", "3,158,424", "3,139,612"]
    assert lines["8"][1:] == ["1,379,779", "11.303", "11.264", "40.385"]


def test_columns_are_aligned() -> None:
    from carn.models.__main__ import align

    assert align([["a", "bb"], ["ccc", "d"]], markdown=False) == "a    bb\nccc   d\n"
    assert align([["a", "bb"], ["ccc", "d"]], markdown=True) == (
        "| a   | bb |\n| --- | -: |\n| ccc |  d |\n"
    )


def test_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "carn.models", "--scale", "4", "--markdown"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| CARN " in done.stdout
    assert "1,527,491" in done.stdout
    assert "40.385" not in done.stdout  # the paper has PSNR by depth at x2 only
