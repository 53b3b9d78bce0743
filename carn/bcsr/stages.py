"""The stages of a build as functions of one work unit: plain values in, a small table out.

They raise nothing: what fails becomes rows. `attempt(key)` is entered round whatever may take the
process down; entering raises a CarnError when it did so too often. Finished tables of the costly
stages are kept below `_work/` of the output under a name that holds a hash of everything that
decides their content, so that a build that runs again takes them from there.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from carn import storage
from carn.bcsr.export import export_shard
from carn.bcsr.locate import LOCATED, locate_by_annotation, locate_grid
from carn.bcsr.measure import TilePlace, failed_rows, measure_image, measure_slide
from carn.bcsr.pictures import slide_picture, tile_picture
from carn.bcsr.shards import Attempt, ShardPlan, write_shard
from carn.degradation.scanner import Degradation
from carn.errors import CarnError
from carn.slides import cached_slide, open_image
from carn.version import code_version

logger = logging.getLogger(__name__)

LOCATE_RESULT = LOCATED.append(pa.field("reason", pa.string()))
WRITE_RESULT = pa.schema(
    [("name", pa.string()), ("num_bytes", pa.int64()), ("failures", pa.string())]
)
PICTURE_RESULT = pa.schema(
    [("uri", pa.string()), ("x_l0", pa.int64()), ("y_l0", pa.int64()), ("jpeg", pa.binary())]
)
EXPORT_RESULT = pa.schema([("num_tiles", pa.int64()), ("reason", pa.string())])

Unit = dict[str, Any]


def measure_unit(unit: Unit, attempt: Attempt) -> pa.Table:
    """Measure some tiles of one slide, or one plain image.

    Args:
        unit: `slide`, `uri`, `places` (lists of x_l0, y_l0, width_px, height_px, label), or None
            for a whole image with its `label`; `grey_threshold`, `work_uri`.
        attempt: see the module.

    Returns:
        A table with the columns of MEASURED.
    """
    slide, uri = unit["slide"], unit["uri"]
    is_image = unit["places"] is None
    label = unit.get("label", "")
    places = [
        TilePlace(x_l0=x, y_l0=y, width_px=width, height_px=height, label=label)
        for x, y, width, height, label in unit["places"] or [(0, 0, 0, 0, label)]
    ]
    identity = ""
    try:
        identity = storage.identity(uri)

        def measure() -> pa.Table:
            with attempt(f"{uri}|{places[0]}"):
                if is_image:
                    return measure_image(
                        slide,
                        uri,
                        label=label,
                        grey_threshold=unit["grey_threshold"],
                        identity=identity,
                    )
                return measure_slide(
                    slide,
                    uri,
                    places,
                    grey_threshold=unit["grey_threshold"],
                    identity=identity,
                )

        return _kept(
            unit,
            identity,
            measure,
            # What storage withheld this time may be there the next.
            is_final=lambda table: not any(table["is_transient"].to_pylist()),
        )
    except Exception as error:
        _warn_unless_expected(error, uri)
        return failed_rows(slide, uri, places, identity=identity, error=error, scope="slide")


def locate_unit(unit: Unit, attempt: Attempt) -> pa.Table:
    """Find tile positions on one slide.

    Args:
        unit: `slide`, `uri`, `tile_px`, `work_uri`; and either `min_tissue` for a tissue grid, or
            `annotation_uri` (None for no tumour), `annotation_identity`, `points_per_label`,
            `tumor_groups`, `excluded_groups` and `seed` for points by annotation.
        attempt: see the module.

    Returns:
        A table with the columns of LOCATE_RESULT: positions, or one row with a `reason`.
    """
    slide, uri = unit["slide"], unit["uri"]
    try:

        def locate() -> pa.Table:
            with attempt(uri):
                if "min_tissue" in unit:
                    return locate_grid(
                        slide, uri, tile_px=unit["tile_px"], min_tissue=unit["min_tissue"]
                    )
                return locate_by_annotation(
                    slide,
                    uri,
                    unit["annotation_uri"],
                    tile_px=unit["tile_px"],
                    points_per_label=unit["points_per_label"],
                    tumor_groups=unit["tumor_groups"],
                    excluded_groups=unit["excluded_groups"],
                    seed=unit["seed"],
                )

        located = _kept(unit, storage.identity(uri), locate, is_final=lambda _: True)
        return located.append_column("reason", pa.nulls(len(located), pa.string()))
    except Exception as error:
        _warn_unless_expected(error, uri)
        row = {"slide": slide, "uri": uri, "reason": _reason(error)}
        return pa.Table.from_pylist([row], schema=LOCATE_RESULT)


def write_unit(unit: Unit, attempt: Attempt) -> pa.Table:
    """Write one shard: `output` and a ShardPlan's fields in, one row of WRITE_RESULT out."""
    plan = ShardPlan(name=unit["name"], split=unit["split"], rows=unit["rows"])
    try:
        result = write_shard(unit["output"], plan, attempt=attempt)
        num_bytes, failures = result.num_bytes, result.failures
    except Exception as error:
        # Not a slide's fault: the shard itself cannot be stored. No tile is to blame.
        _warn_unless_expected(error, plan.name)
        row = {"name": plan.name, "num_bytes": -1, "failures": json.dumps(_reason(error))}
        return pa.Table.from_pylist([row], schema=WRITE_RESULT)
    row = {"name": plan.name, "num_bytes": num_bytes, "failures": json.dumps(failures)}
    return pa.Table.from_pylist([row], schema=WRITE_RESULT)


def picture_unit(unit: Unit, attempt: Attempt) -> pa.Table:
    """Pictures for the report, of one slide.

    Args:
        unit: `uri`, `is_image`, `has_thumbnail` and `places` (as for measuring).
        attempt: see the module.

    Returns:
        Rows of PICTURE_RESULT, the slide's own without x_l0; what cannot be read is left out.
    """
    rows: list[dict[str, Any]] = []
    uri = unit["uri"]
    try:
        with attempt(uri):
            if unit["is_image"]:
                slide = open_image(uri)
            else:
                slide = cached_slide(uri, identity=storage.identity(uri))
            wanted: list[tuple[dict[str, Any], Callable[[], bytes]]] = []
            if unit["has_thumbnail"]:
                wanted.append(({"uri": uri}, partial(slide_picture, slide)))
            for x, y, width, height in unit["places"]:
                place = TilePlace(x_l0=x, y_l0=y, width_px=width, height_px=height, label="")
                row = {"uri": uri, "x_l0": x, "y_l0": y}
                wanted.append((row, partial(tile_picture, slide, place)))
            for row, picture in wanted:
                try:
                    rows.append(row | {"jpeg": picture()})
                except CarnError as error:  # of this place; others may be sound
                    logger.warning("no picture of %s", error)
    except Exception as error:
        logger.warning("no picture of %s: %s", uri, error)
    return pa.Table.from_pylist(rows, schema=PICTURE_RESULT)


def export_unit(unit: Unit, attempt: Attempt) -> pa.Table:
    """Export one shard: `output`, `export_uri`, `name`, `first_number`, `conditions`, ... in."""
    num_tiles, reason = 0, None
    try:
        with attempt(unit["name"]):
            num_tiles = export_shard(
                unit["output"],
                unit["export_uri"],
                unit["name"],
                first_number=unit["first_number"],
                num_digits=unit["num_digits"],
                scales=unit["scales"],
                conditions={
                    name: Degradation(**fields) for name, fields in unit["conditions"].items()
                },
            )
    except Exception as error:
        _warn_unless_expected(error, unit["name"])
        reason = _reason(error)
    return pa.Table.from_pylist([{"num_tiles": num_tiles, "reason": reason}], schema=EXPORT_RESULT)


def _kept(
    unit: Unit,
    identity: str,
    compute: Callable[[], pa.Table],
    *,
    is_final: Callable[[pa.Table], bool],
) -> pa.Table:
    """The table that an earlier run kept for this unit, or else a new one, kept when final."""
    wish = {name: value for name, value in unit.items() if name != "work_uri"}
    text = json.dumps([code_version(), identity, wish], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    uri = storage.join(unit["work_uri"], f"{key}.parquet")
    # What is kept saves work; that it cannot be read or written is no fault of the slide's.
    try:
        if storage.is_file(uri):
            return pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except (CarnError, pa.ArrowException, OSError) as error:
        logger.warning("a kept result cannot be read, it is made again: %s", error)
    table = compute()
    if is_final(table):
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        try:
            storage.write_bytes(uri, buffer.getvalue())
        except CarnError as error:
            logger.warning("a result cannot be kept for a later run: %s", error)
    return table


def _reason(error: Exception) -> str:
    if isinstance(error, CarnError):
        return str(getattr(error, "reason", None) or error)
    return f"unexpected {type(error).__name__}: {error}"


def _warn_unless_expected(error: Exception, name: str) -> None:
    if not isinstance(error, CarnError):
        logger.exception("unexpected error over %s", name)
