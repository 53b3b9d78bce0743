"""From the tables of a build to what its report shows."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from carn.bcsr.build import PAPER_CHANNEL_MEANS
from carn.bcsr.schema import SPLITS
from carn.report.bcsr_report import (
    BcsrReport,
    Failure,
    OverlapRow,
    Picture,
    SlideRow,
    TileBox,
)

# Pictures bound the page to a few MB, however many slides and tiles there are.
MAX_SLIDE_PICTURES = 24
MAX_SLIDE_ROWS = 500
MAX_KEPT_PICTURES = 48
MAX_DROPPED_PICTURES = 48

# (uri, x_l0, y_l0) of a tile, with (uri, None, None) for its slide.
Place = tuple[str, int | None, int | None]


def tiles_to_show(selected: pa.Table) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the kept and of the dropped tiles to picture, evenly spread over their ranks."""
    rows = selected.to_pylist()
    kept = sorted((r for r in rows if r["status"] in SPLITS), key=lambda r: r["rank"])
    surplus = sorted((r for r in rows if r["status"] == "surplus"), key=lambda r: r["rank"])
    white = sorted((r for r in rows if r["status"] == "white"), key=lambda r: r["white_fraction"])
    dropped = _spread(white, MAX_DROPPED_PICTURES // 2)
    dropped += _spread(surplus, MAX_DROPPED_PICTURES - len(dropped))
    return _spread(kept, MAX_KEPT_PICTURES), dropped


def slides_to_show(selected: pa.Table) -> list[str]:
    """URIs of the slides to picture: of those that could be read, the ones with most kept tiles."""
    counts: dict[str, int] = defaultdict(int)
    for row in selected.select(["uri", "status"]).to_pylist():
        if row["status"] != "failed":
            counts[row["uri"]] += row["status"] in SPLITS
    chosen = sorted(counts, key=lambda uri: (-counts[uri], uri))[:MAX_SLIDE_PICTURES]
    return sorted(chosen)


def _spread(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    if len(rows) <= most:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)]


def summarize(
    selected: pa.Table,
    *,
    manifest: dict[str, Any],
    failures: Sequence[dict[str, Any]],
    pictures: Mapping[Place, bytes],
    max_white_fraction: float,
) -> BcsrReport:
    """The report of a build.

    Args:
        selected: columns of SELECTED.
        manifest: as `make_manifest` made it.
        failures: FAILURES rows.
        pictures: JPEGs of tiles and slides, where there are any.
        max_white_fraction: the white filter's limit, 0..1.
    """
    survivors = selected.filter(pc.is_valid(selected["rank"])).sort_by("rank")
    fractions = selected["white_fraction"].drop_null().to_numpy()
    kept, dropped = tiles_to_show(selected)
    slides = _slide_rows(selected, pictures)
    means = manifest["channel_means"]
    return BcsrReport(
        title="bcSR dataset",
        facts=_facts(manifest),
        funnel=_funnel(manifest, max_white_fraction),
        white_fraction=fractions,
        max_white_fraction=max_white_fraction,
        distance=survivors["distance"].to_numpy(),
        is_kept=pc.is_in(survivors["status"], pa.array(SPLITS)).to_numpy(zero_copy_only=False),
        kept=_pictures(
            [(row, f"rank {row['rank'] + 1}, {row['status']}") for row in kept], pictures
        ),
        dropped=_pictures(
            [(row, _why_dropped(row, max_white_fraction)) for row in dropped], pictures
        ),
        slides=tuple(slides[:MAX_SLIDE_ROWS]),
        num_slides_total=len(slides),
        overlaps=tuple(OverlapRow(**row) for row in manifest["overlaps"]),
        failures=tuple(
            Failure(
                slide=row["slide"],
                place="" if row["x_l0"] is None else f"({row['x_l0']}, {row['y_l0']})",
                reason=row["reason"],
            )
            for row in failures
        ),
        channel_means=means or (float("nan"),) * 3,
        paper_channel_means=PAPER_CHANNEL_MEANS,
        config=manifest["config"],
    )


def _facts(manifest: dict[str, Any]) -> dict[str, str]:
    splits = manifest["splits"]
    config = manifest["config"]
    size = sum(shard["num_bytes"] for shard in manifest["shards"])
    empty = manifest["empty_slides"]
    without = {"Slides without a tile": f"{len(empty):,}: {', '.join(empty)}"} if empty else {}
    return without | {
        "Tiles": f"{sum(splits.values()):,}: "
        + ", ".join(f"{splits[name]:,} {name}" for name in SPLITS),
        "Slides": f"{len(manifest['inputs']):,}",
        "Tile": "whole images"
        if config["images"]
        else f"{config['filter']['tile_px']} x {config['filter']['tile_px']} px at level 0",
        "Split": config["select"]["split"],
        "Stored as": f"{config['store']['encoding']}, {len(manifest['shards'])} Parquet shards, "
        f"{size / 1e6:,.1f} MB",
        "Seed": str(config["seed"]),
        "Made by": f"carn {manifest['code_version']}",
    }


def _funnel(
    manifest: dict[str, Any], max_white_fraction: float
) -> tuple[tuple[str, int, str], ...]:
    counts = manifest["counts"]
    kept = sum(manifest["splits"].values())
    read = counts["drawn"] - counts["failed"]
    survived = read - counts["white"]
    missing = counts["listed_on_missing_slides"]
    return (
        ("positions known", counts["listed"], f"{missing:,} on missing slides" if missing else ""),
        ("drawn", counts["drawn"], ""),
        ("read", read, f"{counts['failed']:,} could not be read" if counts["failed"] else ""),
        ("not white", survived, f"{counts['white']:,} more than {max_white_fraction:.0%} white"),
        ("kept", kept, f"{counts['surplus']:,} ranked too low" if counts["surplus"] else ""),
    )


def _pictures(
    rows: Sequence[tuple[dict[str, Any], str]], pictures: Mapping[Place, bytes]
) -> tuple[Picture, ...]:
    """Those of the rows that could be pictured, each with its detail."""
    return tuple(
        Picture(
            jpeg=pictures[place],
            caption=f"{row['slide']} ({row['x_l0']}, {row['y_l0']}) {row['label']}",
            detail=detail,
        )
        for row, detail in rows
        if (place := (row["uri"], row["x_l0"], row["y_l0"])) in pictures
    )


def _why_dropped(row: dict[str, Any], max_white_fraction: float) -> str:
    if row["status"] == "white":
        return f"white {row['white_fraction']:.1%} > {max_white_fraction:.0%}"
    return f"rank {row['rank'] + 1}, too near the mean colour ({row['distance']:.1f})"


def _slide_rows(selected: pa.Table, pictures: Mapping[Place, bytes]) -> list[SlideRow]:
    by_slide: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in selected.to_pylist():
        by_slide[row["uri"]].append(row)
    return [_slide_row(uri, rows, pictures) for uri, rows in sorted(by_slide.items())]


def _slide_row(uri: str, rows: list[dict[str, Any]], pictures: Mapping[Place, bytes]) -> SlideRow:
    status = [row["status"] for row in rows]
    first = next((row for row in rows if row["slide_width_l0"]), rows[0])
    width, height = first["slide_width_l0"] or 0, first["slide_height_l0"] or 0
    thumbnail = pictures.get((uri, None, None))
    boxes = () if thumbnail is None else tuple(_box(row, width, height) for row in rows)
    mpp_x, mpp_y = first["mpp_x"], first["mpp_y"]
    return SlideRow(
        name=first["slide"],
        uri=uri,
        reader=first["reader"] or "",
        width_px=width,
        height_px=height,
        mpp=None if mpp_x is None or mpp_y is None else (mpp_x + mpp_y) / 2,
        num_drawn=len(rows),
        num_failed=status.count("failed"),
        num_white=status.count("white"),
        num_kept=sum(name in SPLITS for name in status),
        splits={name: status.count(name) for name in SPLITS},
        thumbnail=thumbnail,
        boxes=boxes,
    )


def _box(row: dict[str, Any], width: int, height: int) -> TileBox:
    return TileBox(
        x=row["x_l0"] / width,
        y=row["y_l0"] / height,
        width=row["width_px"] / width,
        height=row["height_px"] / height,
        status=row["status"],
    )
