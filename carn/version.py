"""Which code made an output: the version, and a hash of the source itself.

The hash tells two states of a checkout apart where no version control is at hand, as on a cluster
that was sent a working directory.
"""

import functools
import hashlib
from pathlib import Path

from carn import __version__


@functools.cache
def code_version() -> str:
    """`0.1.0+src.1a2b3c4d5e6f`: the version and a SHA-256 over carn's modules and templates."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.html")]):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return f"{__version__}+src.{digest.hexdigest()[:12]}"
