"""What a super-resolved slide says of its own making."""

import json
from collections.abc import Mapping
from typing import Any

from carn import storage
from carn.errors import MissingObjectError


def read_provenance(uri: str) -> dict[str, Any] | None:
    """The facts that a slide of this project carries; None where there is none of them.

    Args:
        uri: a `.tif`, or the folder of an `.ome.zarr`.

    Raises:
        AccessDeniedError, StorageError: storage does not let it be read.
    """
    try:
        if uri.rstrip("/").endswith(".zarr"):
            content = json.loads(storage.read_bytes(storage.join(uri, "zarr.json")))
            return _of(content["attributes"]["carn"])
        return _of_tiff(uri)
    # What is there may be anybody's.
    except (MissingObjectError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _of_tiff(uri: str) -> dict[str, Any] | None:
    import tifffile

    from carn.slides.tiff_mpp import DIRECTORY_ERRORS
    from carn.slides.tiled_tiff import HeaderFile

    source = storage.open_source(uri)
    try:
        with tifffile.TiffFile(HeaderFile(source)) as tiff:
            text = str(tiff.pages[0].description)
    except (tifffile.TiffFileError, *DIRECTORY_ERRORS):
        return None
    finally:
        source.close()
    start = text.find("{")
    return _of(json.loads(text[start:])) if start >= 0 else None


def _of(content: object) -> dict[str, Any] | None:
    found = content.get("provenance") if isinstance(content, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else None
