"""What a classifier says of each test crop, kept as Parquet.

A table is written a part for each group of tiles, by whichever worker has its turn, and joined at
the end; parts and tables name the classifier that they are of. SR is made as it is needed, once for
each model and tile, and not kept: the memory is that of one group.
"""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from carn import storage
from carn.classification.crop_store import PictureSource
from carn.classification.crops import CLASSES
from carn.classification.loop import predict
from carn.errors import DatasetError, MissingObjectError
from carn.training.group import WorkerGroup

PREDICTIONS = pa.schema(
    [
        ("tile_id", pa.string()),
        ("slide", pa.string()),  # what intervals take for independent
        ("x_px", pa.int32()),  # top-left corner of the crop in its tile, px of HR
        ("y_px", pa.int32()),
        ("label", pa.string()),
        ("kind", pa.string()),
        ("probability", pa.float32()),  # that it is tumour, by the classifier
    ]
)
# Of a table's metadata: SHA-256 of the classifier's weights.
_CLASSIFIER = b"classifier"


def read_predictions(uri: str, *, classifier_sha256: str) -> pa.Table | None:
    """A finished table; None where there is none, or it is of another classifier.

    Raises:
        DatasetError: it is damaged.
    """
    try:
        content = storage.read_bytes(uri)
    except MissingObjectError:
        return None
    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{uri} is damaged ({error}); remove it and run again") from error
    is_of_it = (table.schema.metadata or {}).get(_CLASSIFIER) == classifier_sha256.encode()
    return table if is_of_it and table.schema.names == PREDICTIONS.names else None


def predict_kind(
    source: PictureSource,
    *,
    classifier: nn.Module,
    classifier_sha256: str,
    uri: str,
    parts_uri: str,
    device: torch.device,
    group: WorkerGroup,
) -> None:
    """Write the table of a kind where it is not yet; every worker of the group calls it.

    Args:
        source: of the test crops.
        classifier: on `device`, in evaluation mode.
        classifier_sha256: of its weights.
        uri: of the table.
        parts_uri: folder or prefix of its parts.
        device: where to compute.
        group: the workers.

    Raises:
        DatasetError: a tile is damaged.
        StorageError: a location cannot be written.
    """
    numbers = source.wanted_groups()
    parts = {number: storage.join(parts_uri, f"part-{number:05d}.parquet") for number in numbers}
    for number in numbers[group.rank :: group.world_size]:
        if read_predictions(parts[number], classifier_sha256=classifier_sha256) is None:
            table = _predict_group(source, number, classifier, device)
            _write(parts[number], table, classifier_sha256)
    group.barrier()
    if group.rank == 0:
        tables = [
            read_predictions(part, classifier_sha256=classifier_sha256) for part in parts.values()
        ]
        whole = pa.concat_tables([PREDICTIONS.empty_table(), *(t for t in tables if t is not None)])
        if len(whole) != len(source.index):
            raise DatasetError(f"{parts_uri} lacks parts that were written; run again")
        _write(uri, whole, classifier_sha256)
        storage.delete(list(parts.values()))
    group.barrier()


def _predict_group(
    source: PictureSource, number: int, classifier: nn.Module, device: torch.device
) -> pa.Table:
    index = source.index_of(number)
    probability = predict(classifier, source.crops(number), device)
    columns = {
        "tile_id": [index.tile_ids[tile] for tile in index.tile],
        "slide": index.slide_of_crops(),
        "x_px": index.x_px.astype("int32"),
        "y_px": index.y_px.astype("int32"),
        "label": [CLASSES[label] for label in index.label],
        "kind": [source.kind.key] * len(index),
        "probability": probability,
    }
    return pa.table(columns, schema=PREDICTIONS)


def _write(uri: str, table: pa.Table, classifier_sha256: str) -> None:
    sink = io.BytesIO()
    named = table.replace_schema_metadata({_CLASSIFIER: classifier_sha256.encode()})
    pq.write_table(named, sink)
    storage.write_bytes(uri, sink.getvalue())
