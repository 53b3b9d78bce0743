"""What the tests with mutated files share: how many, how long one may take, what may come out."""

import faulthandler
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import settings

from carn.errors import CarnError

# Longest that anything may take over a file of a few KB; seconds, on a machine that is busy.
MAX_SECONDS = 20.0
# Most that it may add to what the process has ever held.
MAX_GROWTH_BYTES = 1_000_000_000


def examples(fast: int) -> Any:
    """The settings of a test that is quick by default, and as long as CARN_FUZZ_EXAMPLES says."""
    chosen = os.environ.get("CARN_FUZZ_EXAMPLES")
    return settings(max_examples=int(chosen or fast), derandomize=chosen is None)


@contextmanager
def only_own_errors() -> Iterator[None]:
    """Fails for any other error than CarnError, for what takes too long, or too much memory."""
    said = ""
    before, started = _peak_bytes(), time.monotonic()
    # What hangs outside of Python ends the process, and says where.
    faulthandler.dump_traceback_later(6 * MAX_SECONDS, exit=True)
    try:
        yield
    except CarnError as error:
        said = str(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert len(said) < 10_000  # a file's content must not fill the logs
    assert time.monotonic() - started < MAX_SECONDS
    assert _peak_bytes() - before < MAX_GROWTH_BYTES


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
