"""Crops to look at, chosen by rule and not by taste: where the models differ most."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import nn

from carn.bcsr.codec import encode
from carn.degradation.scanner import BICUBIC, Degradation
from carn.evaluation.scoring import Protocol, pair, super_resolve
from carn.evaluation.statistics import mean_scores
from carn.metrics import DATA_RANGE
from carn.slides.slide import Rgb

VISIBLE_CAP_DB = 50.0
"""What a PSNR counts at most here: the error is then under one grey level and nobody sees it.

Without, white background would be chosen, where one model is exact and another off by one level.
"""

CROP_PX = 96


@dataclass(frozen=True, kw_only=True)
class CropStrip:
    """One place of a tile as HR, LR and each model have it.

    Attributes:
        tile_id, slide: the tile.
        x, y: top-left corner of the crop, HR px from the tile's.
        side_px: of the crop, HR px.
        scale: SR factor.
        pictures: (name, PNG, PSNR of the crop in dB) each, all of side_px: "HR", "LR" (nearest
            neighbour enlarged) and the models; no PSNR for the first two, an infinite one where SR
            equals HR.
    """

    tile_id: str
    slide: str
    x: int
    y: int
    side_px: int
    scale: int
    pictures: tuple[tuple[str, bytes, float | None], ...]


def choose_tiles(scores: Mapping[str, Sequence[pa.Table]], *, n: int) -> tuple[str, ...]:
    """The ids of the tiles on which the models differ most, at most `n`, in the order of choice.

    The spread of a tile is the PSNR of the best model on it less that of the worst (RGB, mean over
    seeds, 50 dB at most). Of each slide the tile with the largest spread is a candidate, and the
    candidates are taken by spread, largest first. Where there are fewer slides than `n`, each
    slide's second tile follows in the same way, then the third. Equal spreads go by tile id.

    Args:
        scores: by model, tables of SCORES, one a seed; all over the same tiles.
        n: how many.

    Raises:
        ValueError: n below 1, fewer than two models, or models scored on different tiles.
    """
    if n < 1 or len(scores) < 2:
        raise ValueError(f"n={n} must be at least 1, and models at least 2, not {len(scores)}")
    by_model = [mean_scores(tables) for tables in scores.values()]
    for name, values in zip(scores, by_model, strict=True):
        if values.keys() != by_model[0].keys():
            raise ValueError(
                f"{name} was not scored on the same tiles as {next(iter(scores))}; score both on "
                "the same split"
            )
    first = next(iter(scores.values()))[0]
    slide_of = dict(zip(first["tile_id"].to_pylist(), first["slide"].to_pylist(), strict=True))
    spreads = {tile_id: _spread(values[tile_id] for values in by_model) for tile_id in by_model[0]}
    ranked = sorted(spreads, key=lambda tile_id: (-spreads[tile_id], tile_id))
    taken: dict[str, int] = {}
    rounds = []
    for tile_id in ranked:
        slide = slide_of[tile_id]
        rounds.append(taken.get(slide, 0))
        taken[slide] = rounds[-1] + 1
    # A stable sort: within a round the order by spread stays.
    chosen = sorted(zip(rounds, ranked, strict=True), key=lambda entry: entry[0])
    return tuple(tile_id for _, tile_id in chosen[:n])


def choose_place(
    hr: Rgb, results: Mapping[str, Rgb], *, side_px: int, step_px: int
) -> tuple[int, int]:
    """(x, y) of the crop of a tile on which the models differ most, HR px.

    The places are a grid from the top-left corner with step `step_px`, as far as crops fit. The one
    with the largest spread of PSNR (RGB, 50 dB at most) between the best and the worst model is
    taken; of equal ones the topmost, then the leftmost.

    Args:
        hr: (H, W, 3) uint8.
        results: SR by model, likewise.
        side_px: of the crop, at most the tile's.
        step_px: of the grid.

    Raises:
        ValueError: no model, SR of another size than HR, a step below 1, or a crop that does not
            fit.
    """
    height, width = hr.shape[:2]
    if not results or step_px < 1 or not 1 <= side_px <= min(height, width):
        raise ValueError(
            f"side_px={side_px} must be within 1 and the sides of {width} x {height} px, "
            f"step_px={step_px} at least 1, and models at least 1, not {len(results)}"
        )
    tops = np.arange(0, height - side_px + 1, step_px)
    lefts = np.arange(0, width - side_px + 1, step_px)
    sums = [_block_sums(_squares(sr, hr), tops, lefts, side_px) for sr in results.values()]
    psnrs = np.minimum(_psnr(np.stack(sums), side_px), VISIBLE_CAP_DB)
    # Rounded: places that are equal but for the last digits are equal.
    spreads = (psnrs.max(axis=0) - psnrs.min(axis=0)).round(9)
    row, column = np.unravel_index(int(spreads.argmax()), spreads.shape)
    return int(lefts[column]), int(tops[row])


def crop_strip(
    models: Mapping[str, nn.Module],
    row: Mapping[str, Any],
    hr: Rgb,
    *,
    scale: int,
    protocol: Protocol,
    way: Degradation = BICUBIC,
    side_px: int = CROP_PX,
    judged: Collection[str] | None = None,
) -> CropStrip:
    """The place of a tile where the models differ most, as HR, LR and each of them have it.

    Each model super-resolves the whole tile, as scores do; then `choose_place` takes the place, on
    a grid of half the crop's side. With `misaligned` the enlarged LR is off HR by up to one px.

    Args:
        models: by name, at least one; as `super_resolve` takes them.
        row: of the tile; `tile_id` and `slide` are needed.
        hr: (H, W, 3) uint8, the whole tile.
        scale: the models'.
        protocol: how LR is made.
        way: likewise, see `pair`.
        side_px: of the crop in HR px; the next multiple of the scale below, and at most the tile's.
        judged: names of the models whose differences decide the place; None for all.

    Raises:
        ValueError: a side below one LR px; as `pair` and `super_resolve`.
        CarnError: memory does not suffice for the tile.
    """
    name = str(row["tile_id"])
    lr, target = pair(hr, scale=scale, protocol=protocol, way=way, tile=name)
    side = min(side_px, *target.shape[:2]) // scale * scale
    if side < scale:
        raise ValueError(f"side_px={side_px} must be at least the scale, {scale}")
    results: dict[str, Rgb] = {
        title: super_resolve(model, lr, scale=scale, name=name)[0].permute(1, 2, 0).cpu().numpy()
        for title, model in models.items()
    }
    step = max(1, side // scale // 2) * scale
    deciding = {t: sr for t, sr in results.items() if judged is None or t in judged}
    x, y = choose_place(target, deciding, side_px=side, step_px=step)
    place = (slice(y, y + side), slice(x, x + side))
    small = lr[y // scale : (y + side) // scale, x // scale : (x + side) // scale]
    pictures: list[tuple[str, bytes, float | None]] = [
        ("HR", _png(target[place]), None),
        ("LR", _png(small.repeat(scale, axis=0).repeat(scale, axis=1)), None),
    ]
    for title, sr in results.items():
        error = _squares(sr[place], target[place]).sum(keepdims=True)
        pictures.append((title, _png(sr[place]), _psnr(error, side).item()))
    return CropStrip(
        tile_id=name,
        slide=str(row["slide"]),
        x=x,
        y=y,
        side_px=side,
        scale=scale,
        pictures=tuple(pictures),
    )


def _spread(psnrs: Iterator[float]) -> float:
    capped = [min(value, VISIBLE_CAP_DB) for value in psnrs]
    return round(max(capped) - min(capped), 9)


def _squares(sr: Rgb, hr: Rgb) -> NDArray[np.int64]:
    """Squared error of each pixel, summed over its channels."""
    if sr.shape != hr.shape:
        raise ValueError(f"SR of shape {sr.shape} against HR of shape {hr.shape}")
    squares: NDArray[np.int64] = ((sr.astype(np.int64) - hr) ** 2).sum(axis=-1)
    return squares


def _block_sums(
    values: NDArray[np.int64], tops: NDArray[np.int64], lefts: NDArray[np.int64], side: int
) -> NDArray[np.int64]:
    """Sums over squares with the given top and left sides, (tops, lefts)."""
    integral = np.pad(values.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    bands = integral[tops + side] - integral[tops]
    sums: NDArray[np.int64] = bands[:, lefts + side] - bands[:, lefts]
    return sums


def _psnr(squares: NDArray[np.int64], side: int) -> NDArray[np.float64]:
    """PSNR in dB by the summed squared error of RGB crops; infinite where it is zero."""
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = 10 * np.log10(DATA_RANGE**2 * 3 * side**2 / squares)
    return found


def _png(pixels: Rgb) -> bytes:
    return encode(np.ascontiguousarray(pixels), "png")
