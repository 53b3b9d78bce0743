"""A bounded cache on the node's own disk, shared by its worker processes.

One process fills an entry, the others wait for it. Entries in use are pinned by a shared file lock,
which the system drops with the process, so a killed worker leaves nothing locked. When the bound is
reached, the least recently used entries that nobody pins go first.

CARN_CACHE_DIR names the folder (default: `carn-slides-<user>` in the temporary folder) and
CARN_CACHE_GB its bound (default 50).
"""

import errno
import fcntl
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from carn.errors import CacheError

DEFAULT_CACHE_GB = 50.0


def cache_dir() -> Path:
    """The cache's folder on this node."""
    chosen = os.environ.get("CARN_CACHE_DIR")
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"carn-slides-{os.getuid()}"


def _make_cache_dir() -> Path:
    root = cache_dir()
    root.mkdir(parents=True, exist_ok=True, mode=0o777 if "CARN_CACHE_DIR" in os.environ else 0o700)
    # Anybody may have made a folder of this name in the temporary folder, and put slides into it.
    if "CARN_CACHE_DIR" not in os.environ and root.lstat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it belongs to another user")
    return root


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


def hold(
    key: str, *, uri: str, size: Callable[[], int], fill: Callable[[Path], None]
) -> tuple[Path, IO[bytes]]:
    """The folder of an entry, filled if nobody has yet, and the pin that keeps it there.

    The folder stays until the pin is closed.

    Args:
        key: letters and digits that name the entry and all that decides what it holds.
        uri: what is cached, for errors.
        size: the bytes that `fill` will write; asked only when it has to.
        fill: writes the entry into the folder it is given, which exists.

    Raises:
        CacheError: the entry is larger than the cache's bound, finds no room among entries in
            use, or the cache's folder cannot be written.
    """
    root = cache_dir()
    folder = root / key
    try:
        _make_cache_dir()
        pin = _lock_file(root, key).open("ab")
    except OSError as error:
        raise CacheError(
            uri,
            f"needs the cache {root}, which cannot be written ({error.strerror}); "
            "set CARN_CACHE_DIR to a folder that can",
        ) from error
    try:
        # The pin comes first: from here on nobody evicts the entry, whole or half-filled. Who
        # fills is settled by another lock, or the holders of the pin would bar each other.
        fcntl.flock(pin, fcntl.LOCK_SH)
        if not (folder / ".complete").exists():
            with (root / f".{key}.fetch").open("ab") as turn, _locked(turn, fcntl.LOCK_EX):
                if not (folder / ".complete").exists():
                    shutil.rmtree(folder, ignore_errors=True)
                    _make_room(size(), keep=key, uri=uri)
                    fill(folder)
                (folder / ".complete").touch()
        os.utime(folder / ".complete")  # the time of last use
    except BaseException:
        pin.close()
        raise
    return folder, pin


def _make_room(size: int, *, keep: str, uri: str) -> None:
    bound = cache_bytes()
    if size > bound:
        raise CacheError(
            uri,
            f"takes {size / 1e9:.1f} GB on the node's disk, more than the cache's "
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
            raise CacheError(
                uri,
                f"finds no room in the cache {root} ({used / 1e9:.1f} of "
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
