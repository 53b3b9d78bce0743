"""Remote slides on the node's disk, for formats that only OpenSlide reads, and reads from files."""

import hashlib
from pathlib import Path
from typing import IO

from carn import storage
from carn.errors import StorageError
from carn.node_cache import cache_bytes, cache_dir, hold
from carn.slides.listing import files_of_series

__all__ = ["cache_bytes", "cache_dir", "fetch"]


def fetch(uri: str) -> tuple[Path, IO[bytes]]:
    """A local copy of a remote slide with its companion files, and the pin that keeps it there.

    Companions are the folder of an MRXS slide's name and the objects beside a DICOM one that are of
    its series. The copy stays until the pin is closed; see `carn.node_cache`.

    Raises:
        MissingObjectError, AccessDeniedError: as `storage.stat`.
        StorageError: the slide is larger than the cache's bound, the cache's folder cannot be
            written, or storage failed.
    """
    key = hashlib.sha256(f"{uri}|{storage.identity(uri)}".encode()).hexdigest()[:32]
    wanted: list[storage.ObjectStat] = []

    def size() -> int:
        wanted[:] = [storage.stat(uri), *_companions(uri)]
        return sum(item.size for item in wanted)

    def fill(folder: Path) -> None:
        below = uri.rsplit("/", maxsplit=1)[0] + "/"
        for item in wanted:
            name = item.uri.removeprefix(below)
            if not storage.is_below(name):
                raise StorageError(item.uri, f"{name!r} leads out of its folder; rename the object")
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.download(item.uri, path)

    folder, pin = hold(key, uri=uri, size=size, fill=fill)
    return folder / storage.name_of(uri), pin


def _companions(uri: str) -> list[storage.ObjectStat]:
    suffix = Path(storage.name_of(uri)).suffix.lower()
    if suffix in (".vms", ".vmu"):
        raise StorageError(
            uri, f"is a {suffix} slide of several files, which are not fetched; copy it to a disk"
        )
    if suffix == ".mrxs":
        return storage.list_objects(uri[: -len(suffix)])
    return files_of_series(uri)
