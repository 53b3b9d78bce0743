"""A bounded cache of remote slides on the node's own disk, shared by its worker processes.

For the formats that only OpenSlide reads, which needs whole local files. One process fetches a
slide, the others wait for it. Slides in use are pinned by a shared file lock, which the system
drops with the process, so a killed worker leaves nothing locked. When the bound is reached, the
least recently used slides that nobody pins go first.

CARN_CACHE_DIR names the folder (default: `carn-slides-<user>` in the temporary folder) and
CARN_CACHE_GB its bound (default 50).
"""

import fcntl
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from carn import storage
from carn.errors import StorageError

DEFAULT_CACHE_GB = 50.0


def cache_dir() -> Path:
    """The cache's folder on this node."""
    chosen = os.environ.get("CARN_CACHE_DIR")
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"carn-slides-{os.getuid()}"


def cache_bytes() -> int:
    """The bound of the cache, in bytes.

    Raises:
        ValueError: CARN_CACHE_GB is not a positive number.
    """
    chosen = os.environ.get("CARN_CACHE_GB", str(DEFAULT_CACHE_GB))
    try:
        size = float(chosen) * 1e9
    except ValueError:
        size = 0.0
    if not (size > 0 and math.isfinite(size)):
        raise ValueError(f"CARN_CACHE_GB={chosen!r} must be a positive number of gigabytes")
    return int(size)


def fetch(uri: str) -> tuple[Path, IO[bytes]]:
    """A local copy of a remote slide with its companion files, and the pin that keeps it there.

    Companions are the folder of an MRXS slide's name and the other `.dcm` objects beside a DICOM
    one. The copy stays until the pin is closed.

    Raises:
        MissingObjectError, AccessDeniedError: as `storage.stat`.
        StorageError: the slide is larger than the cache's bound, the cache's folder cannot be
            written, or storage failed.
    """
    root = cache_dir()
    key = hashlib.sha256(f"{uri}|{storage.identity(uri)}".encode()).hexdigest()[:32]
    folder = root / key
    try:
        root.mkdir(parents=True, exist_ok=True)
        pin = _lock_file(root, key).open("ab")
    except OSError as error:
        raise StorageError(
            uri,
            f"needs the slide cache {root}, which cannot be written ({error.strerror}); "
            "set CARN_CACHE_DIR to a folder that can",
        ) from error
    try:
        # The pin comes first: from here on nobody evicts the copy, whole or half-fetched. Who
        # fetches is settled by another lock, or the holders of the pin would bar each other.
        fcntl.flock(pin, fcntl.LOCK_SH)
        if not (folder / ".complete").exists():
            with (root / f".{key}.fetch").open("ab") as turn, _locked(turn, fcntl.LOCK_EX):
                if not (folder / ".complete").exists():
                    _fetch_into(uri, folder, key)
                (folder / ".complete").touch()
        os.utime(folder / ".complete")  # the time of last use
    except BaseException:
        pin.close()
        raise
    return folder / storage.name_of(uri), pin


def _fetch_into(uri: str, folder: Path, key: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    wanted = [storage.stat(uri), *_companions(uri)]
    size = sum(item.size for item in wanted)
    _make_room(size, keep=key, uri=uri)
    below = uri.rsplit("/", maxsplit=1)[0] + "/"
    for item in wanted:
        path = folder / item.uri.removeprefix(below)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.download(item.uri, path)


def _companions(uri: str) -> list[storage.ObjectStat]:
    suffix = Path(storage.name_of(uri)).suffix.lower()
    if suffix in (".vms", ".vmu"):
        raise StorageError(
            uri, f"is a {suffix} slide of several files, which are not fetched; copy it to a disk"
        )
    if suffix == ".mrxs":
        return storage.list_objects(uri[: -len(suffix)])
    if suffix == ".dcm":
        folder = uri.rsplit("/", maxsplit=1)[0]
        return [
            item
            for item in storage.list_objects(folder)
            if item.uri != uri and item.uri.lower().endswith(".dcm")
        ]
    return []


def _make_room(size: int, *, keep: str, uri: str) -> None:
    bound = cache_bytes()
    if size > bound:
        raise StorageError(
            uri,
            f"takes {size / 1e9:.1f} GB on the node's disk, more than the slide cache's "
            f"{bound / 1e9:.1f} GB; set CARN_CACHE_GB higher, or CARN_CACHE_DIR to a larger disk",
        )
    root = cache_dir()
    with (root / ".eviction.lock").open("ab") as guard, _locked(guard, fcntl.LOCK_EX):
        folders = [path for path in root.iterdir() if path.is_dir() and path.name != keep]
        sizes = {path: _size(path) for path in folders}
        used = sum(sizes.values())
        for folder in sorted(folders, key=_last_use):
            if used + size <= bound:
                break
            if _evict(root, folder):
                used -= sizes[folder]
        if used + size > bound:
            raise StorageError(
                uri,
                f"finds no room in the slide cache {root} ({used / 1e9:.1f} of "
                f"{bound / 1e9:.1f} GB are in use by running work); set CARN_CACHE_GB higher",
            )
        # Written before the first byte is fetched: two fetches at once may not share one room.
        (root / keep).mkdir(exist_ok=True)
        (root / keep / ".size").write_text(str(size))


def _evict(root: Path, folder: Path) -> bool:
    with _lock_file(root, folder.name).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False  # pinned, or being fetched
        (folder / ".complete").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        return True


def _lock_file(root: Path, key: str) -> Path:
    return root / f".{key}.lock"


def _size(folder: Path) -> int:
    try:
        return int((folder / ".size").read_text())
    except (FileNotFoundError, ValueError):
        return 0  # killed before it fetched anything


def _last_use(folder: Path) -> float:
    try:
        return (folder / ".complete").stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextmanager
def _locked(file: IO[bytes], mode: int) -> Iterator[None]:
    fcntl.flock(file, mode)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
