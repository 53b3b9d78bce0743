"""The models' parameters and FLOPs beside the paper's: its Table 1 and the columns of Table 3.

python -m carn.models --scale 2
"""

import sys
from typing import Literal

import torch
import tyro
from torch import nn

from carn.models.carn import CarnConfig
from carn.models.cost import count_flops, count_parameters
from carn.models.srgan import SrganDiscriminator
from carn.models.table import MODELS, ModelName, build_model

LR_PX = 64

# Millions of parameters as printed. Source: the CARN paper, Table 1.
PAPER_MILLIONS: dict[ModelName, str] = {
    "srcnn": "0.008",
    "srgan": "6.097",
    "edsr": "1.367",
    "rdn": "2.375",
    "rcan": "1.965",
    "swdnet": "3.158",
    "carn": "1.389",
}
# PSNR in dB on bcSR at x2 by the number of CARBs. Source: the CARN paper, Table 3.
PAPER_PSNR_DB = {2: "39.780", 4: "40.137", 8: "40.385", 12: "40.446", 16: "40.456", 20: "40.513"}
# The scale at which the paper's SRGAN has as many parameters as it prints.
SRGAN_SCALE = 8

TABLE_1_NOTES = f"""\
Paper: millions of parameters as its Table 1 prints them, at x2. It counts weights without biases
for EDSR, RDN and RCAN, and everything for SRGAN and SWD-Net. Its 1.389 M for CARN is probably a
misprint of 1.379 M, which its own Table 3 implies.
SRGAN: parameters are the paper's sum, the generator's at x{SRGAN_SCALE} and the discriminator's;
FLOPs are those of the generator at the scale asked for.
FLOPs: 2 x multiply-adds of convolutions and linear layers, a bias counted as one more, for an LR
image of {LR_PX} x {LR_PX} px.
"""
TABLE_3_NOTES = f"""\
Paper's formula: 2 x {LR_PX} x {LR_PX} x parameters, from which its Table 3 has its FLOPs. It takes
every parameter to work at each LR px once; those behind an upsampler work at more px, those behind
the pooling at one. FLOPs: as above. PSNR: the paper's own numbers (bcSR, x2), not measured here.
"""


def rows_of_table_1(scale: int) -> list[list[str]]:
    """Each model's parameters and FLOPs, under a header."""
    rows = [["model", "paper, M", "parameters", "weights only", f"GFLOPs at x{scale}"]]
    for name, entry in MODELS.items():
        model = _build(name, scale=scale)
        parts = [model]
        if name == "srgan":
            with torch.device("meta"):
                parts = [_build(name, scale=SRGAN_SCALE), SrganDiscriminator()]
        total = sum(count_parameters(part) for part in parts)
        weights = sum(count_parameters(part, weights_only=True) for part in parts)
        printed = PAPER_MILLIONS.get(name, "-")
        rows.append([entry.title, printed, f"{total:,}", f"{weights:,}", _giga(count_flops(model))])
    return rows


def rows_of_table_3(scale: int) -> list[list[str]]:
    """What depth costs CARN, under a header."""
    rows = [["N", "parameters", "paper's formula, G", "GFLOPs", "paper's PSNR, dB"]]
    for num_blocks, psnr_db in PAPER_PSNR_DB.items():
        model = _build("carn", scale=scale, num_blocks=num_blocks)
        parameters = count_parameters(model)
        rows.append(
            [
                str(num_blocks),
                f"{parameters:,}",
                _giga(2 * LR_PX**2 * parameters),
                _giga(count_flops(model)),
                psnr_db if scale == 2 else "-",
            ]
        )
    return rows


def align(rows: list[list[str]], *, markdown: bool) -> str:
    """A header and rows as lines: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    if markdown:
        rules = [
            "-" * (width - 1) + (":" if column else "-") for column, width in enumerate(widths)
        ]
        lines.insert(1, f"| {' | '.join(rules)} |")
    return "\n".join(lines) + "\n"


def describe_costs(scale: Literal[2, 3, 4, 8] = 2, *, markdown: bool = False) -> str:
    """Both tables with their notes, as text.

    Args:
        scale: the SR factor that the models are built for.
        markdown: write tables as Markdown has them.
    """
    return "\n".join(
        [
            f"{'### ' if markdown else ''}Table 1: models at x{scale}\n",
            align(rows_of_table_1(scale), markdown=markdown),
            TABLE_1_NOTES,
            f"{'### ' if markdown else ''}Table 3: CARN at x{scale} by its number of CARBs\n",
            align(rows_of_table_3(scale), markdown=markdown),
            TABLE_3_NOTES,
        ]
    )


def _build(name: ModelName, *, scale: int, num_blocks: int | None = None) -> nn.Module:
    config = None if num_blocks is None else CarnConfig(num_blocks=num_blocks)
    with torch.device("meta"):  # nothing is computed, so nothing need be stored
        return build_model(name, scale=scale, config=config)


def _giga(count: int) -> str:
    return f"{count / 1e9:.3f}"


if __name__ == "__main__":
    sys.stdout.write(tyro.cli(describe_costs, prog="python -m carn.models"))
