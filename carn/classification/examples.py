"""A few test crops on which the kinds of pictures differ most, for the page."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from carn import storage
from carn.bcsr.codec import encode
from carn.classification.config import TrainOn
from carn.classification.crop_store import PictureSource
from carn.classification.kinds import LR, Kind
from carn.classification.statistics import THRESHOLD

NUM_EXAMPLES = 6

EXAMPLES = pa.schema(
    [
        ("number", pa.int32()),
        ("tile_id", pa.string()),
        ("slide", pa.string()),
        ("x_px", pa.int32()),
        ("y_px", pa.int32()),
        ("label", pa.string()),
        ("kind", pa.string()),
        ("probability", pa.float32()),
        ("png", pa.binary()),
    ]
)


def choose_examples(
    probability: npt.NDArray[np.float64], label: npt.NDArray[np.int64], slides: Sequence[str]
) -> list[int]:
    """Rows of crops that some kind takes for the other class, those first on which kinds differ.

    Ordered by the distance between the highest and the lowest probability over the kinds; one crop
    of each slide before a second of any. Nothing is picked by hand.

    Args:
        probability: (kinds, n) that a crop is tumour.
        label: (n,) 1 for tumour.
        slides: (n) of each crop.
    """
    is_wrong = ((probability >= THRESHOLD) != (label == 1)).any(0)
    rows = np.flatnonzero(is_wrong)
    spread = np.ptp(probability, axis=0)
    ordered = rows[np.argsort(-spread[rows], kind="stable")].tolist()
    seen: dict[str, int] = {}
    turns = []
    for place, row in enumerate(ordered):
        turns.append((seen.get(slides[row], 0), place, row))
        seen[slides[row]] = seen.get(slides[row], 0) + 1
    return [row for _, _, row in sorted(turns)[:NUM_EXAMPLES]]


def write_examples(
    tables: Mapping[str, pa.Table],
    *,
    kinds: Sequence[Kind],
    make_source: Callable[[Kind], PictureSource],
    train_on: TrainOn,
    work_uri: str,
) -> None:
    """Make the pictures of the examples, unless they are there.

    Args:
        tables: PREDICTIONS of each kind, by key, all of the same crops in the same order.
        kinds: in the order they are shown.
        make_source: what makes the test crops of a kind.
        train_on: which classifiers the predictions are of.
        work_uri: where to keep them.
    """
    uri = examples_uri(work_uri, kinds=kinds, train_on=train_on, tables=tables)
    if storage.is_file(uri):
        return
    first = next(iter(tables.values()))
    judged = [kind.key for kind in kinds if kind.key != LR]
    probability = np.stack([tables[key]["probability"].to_numpy() for key in judged])
    label = np.asarray(first["label"].to_pylist()) == "tumor"
    chosen = choose_examples(
        probability.astype(np.float64), label.astype(np.int64), first["slide"].to_pylist()
    )
    found = []
    for kind in kinds:
        rows = tables[kind.key].take(chosen).drop_columns(["kind"]).to_pylist()
        crops = _crops(make_source(kind), chosen)
        for number, (row, crop) in enumerate(zip(rows, crops, strict=True)):
            found.append({**row, "number": number, "kind": kind.key, "png": encode(crop, "png")})
    found.sort(key=lambda row: row["number"])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found, schema=EXAMPLES), sink)
    storage.write_bytes(uri, sink.getvalue())


def examples_uri(
    work_uri: str, *, kinds: Sequence[Kind], train_on: TrainOn, tables: Mapping[str, pa.Table]
) -> str:
    """Where the examples of these predictions are kept."""
    digest = hashlib.sha256(json.dumps([train_on, [kind.key for kind in kinds]]).encode())
    for kind in kinds:
        digest.update(tables[kind.key]["probability"].to_numpy().tobytes())
    return storage.join(work_uri, f"examples-{digest.hexdigest()[:16]}.parquet")


def _crops(source: PictureSource, rows: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
    """The crops of some rows of the index, in the order of the rows."""
    wanted = np.asarray(sorted(rows), np.int64)
    few = dataclasses.replace(source, index=source.index.take(wanted))
    blocks = [few.crops(group) for group in few.wanted_groups()]
    crops = np.concatenate(blocks) if blocks else np.empty((0, 1, 1, 3), np.uint8)
    return [crops[int(np.searchsorted(wanted, row))] for row in rows]
