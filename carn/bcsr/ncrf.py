"""Fetch the coordinate lists from which the paper draws its positions.

python -m carn.bcsr.ncrf s3://lab/lists

Source: https://github.com/baidu-research/NCRF (Apache-2.0), folder `coords`.
"""

import logging
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from carn import storage
from carn.bcsr.coordinates import ncrf_label, read_ncrf_list
from carn.errors import CarnError, CoordinateError
from carn.log_lines import start_logging
from carn.web import fetch

logger = logging.getLogger("carn.bcsr.ncrf")

COMMIT = "111c7d19fc6c521d2d1a2c285f5bdf525174e73f"
ADDRESS = f"https://raw.githubusercontent.com/baidu-research/NCRF/{COMMIT}/coords"
LISTS = ("tumor_train.txt", "normal_train.txt")
# The paper's tiles; it decides nothing here but which positions would be refused.
_TILE_PX = 1024


def fetch_lists(folder: str, *, address: str = ADDRESS) -> list[str]:
    """Put the lists into a folder or prefix; those that are there already are left as they are.

    A list is there whole or not at all.

    Args:
        folder: local, or s3://.
        address: where they are published.

    Returns:
        Their URIs.

    Raises:
        StorageError: the network or storage does not answer, or breaks off.
        CoordinateError: what came is no list of coordinates.
    """
    uris = []
    for name in LISTS:
        uri = storage.join(storage.normalize(folder), name)
        if storage.is_file(uri):
            logger.info("%s is there already", uri)
        else:
            storage.write_bytes(uri, _fetched(f"{address}/{name}"))
            logger.info("%s fetched", uri)
        uris.append(uri)
    return uris


def _fetched(url: str) -> bytes:
    content = fetch(url)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, storage.name_of(url))
        path.write_bytes(content)
        label = ncrf_label(str(path))
        assert label is not None
        try:
            read_ncrf_list(str(path), label=label, tile_px=_TILE_PX)
        except CoordinateError as error:
            raise CoordinateError(f"{url} gave no list of coordinates: {error}") from error
    return content


def main(folder: Annotated[str, tyro.conf.Positional]) -> int:
    """Fetch the lists; returns the process's exit status.

    Args:
        folder: where to put them: a folder, or an s3:// prefix.
    """
    start_logging()
    try:
        fetch_lists(folder)
    except CarnError as error:
        print(f"ncrf: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m carn.bcsr.ncrf"))
