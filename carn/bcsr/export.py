"""The folder layout that the EDSR family of codebases reads.

`HR/0001.png`, `LR_bicubic/X2/0001x2.png`, ...: training tiles first, the validation tiles last
among them, then the test tiles (the published bcSR: 1..1000 and 1001..1200). Loaders pair HR and LR
by sorted names, so all numbers have as many digits, four at the least. LR that is made in another
way lies in a folder by the name of its condition: `LR_jpeg80-420/X2/0001x2.png`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from carn import storage
from carn.bcsr.codec import encode
from carn.bcsr.dataset import shard_tiles
from carn.bcsr.shards import shard_uri
from carn.degradation.bicubic import BICUBIC, crop_to_multiple
from carn.degradation.conditions import DEFAULT, apply_condition, describe
from carn.degradation.scanner import Degradation

# Written last; says which dataset the folder holds.
EXPORT_MARKER = "export.json"
# Written first, removed in the end.
BEGUN_MARKER = "export.begun.json"


def first_numbers(shards: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The number (from 1) of each shard's first tile, in the manifest's order of shards."""
    numbers, number = {}, 1
    for shard in shards:
        numbers[str(shard["name"])] = number
        number += int(shard["num_tiles"])
    return numbers


def export_shard(
    dataset_uri: str,
    export_uri: str,
    name: str,
    *,
    first_number: int,
    num_digits: int,
    scales: Sequence[int],
    conditions: Mapping[str, Degradation],
) -> int:
    """Write the HR and LR images of one shard's tiles; returns how many tiles.

    Args:
        dataset_uri: the dataset.
        export_uri: folder or prefix of the export.
        name: the shard.
        first_number: of its first tile.
        num_digits: of all numbers.
        scales: of the LR images.
        conditions: ways to make LR by name, each of which gets a folder.

    Raises:
        StorageError, DatasetError: the shard cannot be read or an image not be written.
    """
    uri = shard_uri(dataset_uri, name)
    number = first_number
    for row, hr in shard_tiles(storage.read_bytes(uri), uri=uri):
        stem = f"{number:0{num_digits}d}"
        storage.write_bytes(storage.join(export_uri, f"HR/{stem}.png"), encode(hr, "png"))
        for scale in scales:
            cropped = crop_to_multiple(hr, scale)
            for condition, way in conditions.items():
                lr = apply_condition(cropped, way, scale=scale, tile=row["tile_id"])
                path = f"LR_{condition}/X{scale}/{stem}x{scale}.png"
                storage.write_bytes(storage.join(export_uri, path), encode(lr, "png"))
        number += 1
    return number - first_number


def describe_export(
    manifest: Mapping[str, Any], *, scales: Sequence[int], conditions: Mapping[str, Degradation]
) -> dict[str, Any]:
    """Say all that decides an export, as JSON values.

    Args:
        manifest: of the dataset.
        scales: of the LR images.
        conditions: see `export_shard`.
    """
    state: dict[str, Any] = {
        "shards": [[shard["name"], shard["num_tiles"]] for shard in manifest["shards"]],
        "splits": manifest["splits"],
        "scales": sorted(scales),
    }
    if conditions == DEFAULT:
        return state | {"degradation": BICUBIC}
    return state | {
        "degradation": {name: describe(way) for name, way in conditions.items()},
        "conditions": {name: asdict(way) for name, way in conditions.items()},
    }


def export_state(export_uri: str) -> tuple[dict[str, Any] | None, bool]:
    """What an export is of, and whether it is finished; (None, False) where there is none."""
    for name, is_finished in ((EXPORT_MARKER, True), (BEGUN_MARKER, False)):
        marker = storage.join(export_uri, name)
        if storage.is_file(marker):
            state: dict[str, Any] = json.loads(storage.read_bytes(marker))
            return state, is_finished
    return None, False


def begin_export(export_uri: str, state: dict[str, Any]) -> None:
    """Say what is going to be exported, so that an interrupted export is known for what it is."""
    _write_marker(export_uri, BEGUN_MARKER, state)


def finish_export(export_uri: str, state: dict[str, Any]) -> None:
    """Commit an export."""
    _write_marker(export_uri, EXPORT_MARKER, state)
    storage.delete([storage.join(export_uri, BEGUN_MARKER)])


def _write_marker(export_uri: str, name: str, state: dict[str, Any]) -> None:
    text = json.dumps(state, indent=1, sort_keys=True)
    storage.write_bytes(storage.join(export_uri, name), text.encode() + b"\n")
