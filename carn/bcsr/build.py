"""What a build decides once all tiles are measured: selection, failures, overlaps, the manifest."""

import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from carn import storage
from carn.bcsr.config import FilterConfig, SelectConfig
from carn.bcsr.coordinates import overlap_pairs
from carn.bcsr.schema import FAILURES, MEASURED, SPLITS
from carn.bcsr.selection import (
    channel_means,
    rank_tiles,
    split_at_random,
    split_by_group,
    split_by_order,
    with_selection,
)
from carn.bcsr.shards import ShardPlan
from carn.errors import DatasetError
from carn.version import code_version

# Paper, section "Dataset": mean (R, G, B) of its training set.
PAPER_CHANNEL_MEANS = (0.7204, 0.4298, 0.6397)
# What is known of a tile's pixels; a row that failed has none of it.
PIXEL_COLUMNS = ("inside_fraction", "white_fraction", "mean_r", "mean_g", "mean_b")
# Order of tiles wherever ties or sequence matter.
TILE_ORDER = [(name, "ascending") for name in ("slide", "y_l0", "x_l0", "label", "uri")]


def select_tiles(
    measured: pa.Table, *, white: FilterConfig, select: SelectConfig, seed: int
) -> pa.Table:
    """Filter, rank, keep and split measured tiles.

    Args:
        measured: columns of MEASURED, in any order.
        white: the white filter.
        select: numbers to keep and the split.
        seed: of the split.

    Returns:
        Columns of SELECTED, in TILE_ORDER.

    Raises:
        DatasetError: nothing survives, or too few slides for a split by slide.
    """
    measured = measured.sort_by(TILE_ORDER)
    fraction = measured["white_fraction"].to_numpy(zero_copy_only=False).astype(np.float64)
    has_failed = pc.is_valid(measured["reason"]).to_numpy()
    is_white = ~has_failed & (fraction > white.max_white_fraction)
    is_ranked = ~has_failed & ~is_white
    survivors = measured.filter(pa.array(is_ranked))
    if not len(survivors):
        raise DatasetError(
            f"no tile is left to keep: of {len(measured)}, {int(has_failed.sum())} could not be "
            f"read and {int(is_white.sum())} are more than {white.max_white_fraction:.0%} white"
            + (f"; the first failure: {_first_reason(measured)}" if has_failed.any() else "")
        )
    means = np.stack([survivors[f"mean_{c}"].to_numpy() for c in "rgb"], axis=1)
    ranking = rank_tiles(means)
    # The published layout is taken as it is: whoever numbered the images has chosen already.
    is_numbered = select.split == "numbered"
    keep = len(survivors) if select.keep is None or is_numbered else select.keep
    is_kept = ranking.rank < keep
    status = np.where(has_failed, "failed", "white").astype("<U10")
    survivor_status = np.full(len(survivors), "surplus", dtype="<U10")
    if is_numbered:
        # By all numbers, so that one that does not read moves none from one side to the other.
        every = dataclasses.replace(select, keep=None)
        num_test, num_validation = every.wished(len(measured))
        counts = {"num_test": num_test, "num_validation": num_validation}
        _check_counts(len(measured), **counts)
        survivor_status = split_by_order(len(measured), **counts)[is_ranked]
    else:
        survivor_status[is_kept] = _split(survivors.filter(pa.array(is_kept)), select, seed=seed)
    status[is_ranked] = survivor_status
    return with_selection(measured, status=status.tolist(), ranking=ranking, is_ranked=is_ranked)


def _split(kept: pa.Table, select: SelectConfig, *, seed: int) -> Any:
    num_test, num_validation = select.wished(len(kept))
    counts = {"num_test": num_test, "num_validation": num_validation}
    _check_counts(len(kept), **counts)
    if select.split == "paper":
        return split_at_random(len(kept), seed=seed, **counts)
    groups = [group_of(name, select.group_regex) for name in kept["slide"].to_pylist()]
    return split_by_group(groups, seed=seed, **counts)


def _check_counts(num_tiles: int, *, num_test: int, num_validation: int) -> None:
    if num_test + num_validation >= num_tiles:
        raise DatasetError(
            f"{num_tiles} tiles cannot be split into {num_test} for testing, {num_validation} for "
            "validation and at least one for training; ask for fewer (--num-test, "
            "--num-validation)"
        )


def group_of(slide_name: str, group_regex: str | None) -> str:
    """The patient a slide's name tells by the pattern, or else the slide's name itself."""
    found = re.search(group_regex, slide_name) if group_regex else None
    return found.group(0) if found else slide_name


def _first_reason(measured: pa.Table) -> str:
    row = measured.filter(pc.is_valid(measured["reason"])).slice(0, 1).to_pylist()[0]
    return f"{row['slide']}: {row['reason']}"


def measured_failures(measured: pa.Table, *, stage: str = "measure") -> list[dict[str, Any]]:
    """FAILURES rows of measured tiles: one for a slide of which nothing reads, else one a tile."""
    rows = measured.filter(pc.is_valid(measured["reason"])).sort_by(TILE_ORDER).to_pylist()
    failures: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        is_slide = row["failed_scope"] == "slide"
        x, y = (None, None) if is_slide else (row["x_l0"], row["y_l0"])
        failure = failures.setdefault(
            (row["uri"], x, y, row["reason"]),
            {
                "slide": row["slide"],
                "uri": row["uri"],
                "x_l0": x,
                "y_l0": y,
                "num_tiles": 0,
                "stage": stage,
                "reason": row["reason"],
            },
        )
        failure["num_tiles"] += 1
    return list(failures.values())


# Why there is no word of a unit that was begun.
LOST = "its reading processes died before they could say why; see the workers' logs"


def with_lost(measured: pa.Table, units: Sequence[dict[str, Any]]) -> pa.Table:
    """Measured rows, with failed ones for the units that never came back."""
    found = {
        (row["uri"], row["x_l0"], row["y_l0"])
        for row in measured.select(["uri", "x_l0", "y_l0"]).to_pylist()
    }
    rows = []
    for unit in units:
        for x, y, width, height, label in unit["places"] or [(0, 0, 0, 0, unit.get("label"))]:
            if (unit["uri"], x, y) not in found:
                row = {"slide": unit["slide"], "uri": unit["uri"], "x_l0": x, "y_l0": y}
                row |= {"width_px": width, "height_px": height, "label": label}
                rows.append(row | {"reason": LOST, "failed_scope": "slide", "is_transient": True})
    return pa.concat_tables([measured, pa.Table.from_pylist(rows, schema=MEASURED)])


def mark_failed(measured: pa.Table, failures: Sequence[tuple[str, str, int, int, str]]) -> pa.Table:
    """Measured rows, those that failed since, by (slide, uri, x_l0, y_l0, reason), marked so."""
    reasons = {(uri, x, y): reason for _, uri, x, y, reason in failures}
    rows = measured.to_pylist()
    for row in rows:
        reason = reasons.get((row["uri"], row["x_l0"], row["y_l0"]))
        if reason is not None:
            row.update(dict.fromkeys(PIXEL_COLUMNS), reason=reason, failed_scope="tile")
            row["is_transient"] = True
    return pa.Table.from_pylist(rows, schema=MEASURED)


def overlap_report(selected: pa.Table, *, tile_px: int) -> list[dict[str, Any]]:
    """How many kept tiles show the same tissue, within a split and between two.

    Returns:
        For each pair of splits (`splits`): pairs of overlapping tiles (`num_pairs`), tiles in one
        (`num_tiles`), and tiles that share more than half of their area (`num_tiles_over_half`).
    """
    kept = selected.filter(pc.is_in(selected["status"], pa.array(SPLITS)))
    split = kept["status"].to_numpy(zero_copy_only=False).astype(str)
    first, second, share = overlap_pairs(
        kept["uri"].to_numpy(zero_copy_only=False),
        kept["x_l0"].to_numpy(),
        kept["y_l0"].to_numpy(),
        tile_px=tile_px,
    )
    rows = []
    for i, one in enumerate(SPLITS):
        for other in SPLITS[i:]:
            is_pair = ((split[first] == one) & (split[second] == other)) | (
                (split[first] == other) & (split[second] == one)
            )
            is_half = is_pair & (share > 0.5)
            rows.append(
                {
                    "splits": f"{one} / {other}",
                    "num_pairs": int(is_pair.sum()),
                    "num_tiles": len(np.union1d(first[is_pair], second[is_pair])),
                    "num_tiles_over_half": len(np.union1d(first[is_half], second[is_half])),
                }
            )
    return rows


def make_manifest(
    selected: pa.Table,
    *,
    config: dict[str, Any],
    source_digest: str,
    lists: Mapping[str, str],
    empty_slides: Sequence[str],
    num_listed: int,
    num_missing: int,
    plans: Sequence[ShardPlan],
    shard_bytes: dict[str, int],
    num_failures: int,
    overlaps: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The manifest of a dataset: equal for equal inputs and settings, whatever ran it, when."""
    status = selected["status"].to_pylist()
    counts = {name: status.count(name) for name in (*SPLITS, "white", "surplus", "failed")}
    read = selected.filter(pc.is_null(selected["reason"]))
    inputs = {
        row["uri"]: {
            name: row[name]
            for name in ("slide", "uri", "slide_identity", "reader", "mpp_x", "mpp_y")
        }
        for row in read.sort_by(TILE_ORDER).to_pylist()
    }
    return {
        "code_version": code_version(),
        "config": config,
        "source_digest": source_digest,
        "lists": [{"uri": uri, "identity": found} for uri, found in sorted(lists.items())],
        "empty_slides": list(empty_slides),
        "counts": {
            "listed": num_listed,
            "listed_on_missing_slides": num_missing,
            "drawn": len(selected),
            "failures": num_failures,
            **counts,
        },
        "splits": {name: counts[name] for name in SPLITS},
        "channel_means": channel_means(selected),
        "paper_channel_means": PAPER_CHANNEL_MEANS,
        "overlaps": list(overlaps),
        "inputs": list(inputs.values()),
        "shards": [
            {
                "name": plan.name,
                "split": plan.split,
                "num_tiles": len(plan.rows),
                "num_bytes": shard_bytes[plan.name],
            }
            for plan in plans
        ],
    }


# HR pixels of scanners at 40x are of 0.22 to 0.26 um; at the next magnification, twice as large.
MAX_MPP_RATIO = 1.3


def doubts_about_magnification(inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What speaks against training on tiles of these slides, as sentences.

    Args:
        inputs: those of a manifest: `slide`, `mpp_x` (um per px, or None).
    """
    known = sorted((row["mpp_x"], row["slide"]) for row in inputs if row["mpp_x"] is not None)
    doubts = []
    if num_unknown := len(inputs) - len(known):
        doubts.append(
            f"{num_unknown} of {len(inputs)} slides do not say their um per px: nobody can "
            "tell whether their tiles are of the magnification that is meant"
        )
    if known and known[-1][0] > MAX_MPP_RATIO * known[0][0]:
        (least, finest), (most, coarsest) = known[0], known[-1]
        doubts.append(
            f"tiles are of {least:.3g} ({finest}) to {most:.3g} um/px ({coarsest}): a network is "
            "for one magnification; build from slides of one"
        )
    return doubts


def write_table(uri: str, table: pa.Table) -> None:
    """Write a small table as Parquet, atomically; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table.combine_chunks(), buffer, compression="zstd")
    storage.write_bytes(uri, buffer.getvalue())


def failures_table(failures: Sequence[dict[str, Any]]) -> pa.Table:
    """FAILURES rows, ordered by slide, stage and place."""
    rows = sorted(failures, key=lambda row: json.dumps(row, sort_keys=True))
    rows.sort(key=lambda row: (row["slide"], row["stage"], *_place_order(row)))
    return pa.Table.from_pylist(rows, schema=FAILURES)


def _place_order(row: dict[str, Any]) -> tuple[bool, int, int]:
    # The slide as a whole, then its tiles, of which some lie at 0 or, over the border, below it.
    has_place = row["x_l0"] is not None
    return has_place, row["y_l0"] if has_place else 0, row["x_l0"] if has_place else 0
