"""How a job is stopped from outside."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """`ray job stop`, systemd and Kubernetes end a job by SIGTERM: as Ctrl-C does, in good order.

    `start_ray` keeps the handler, in whose place Ray puts one that just exits.

    Raises:
        KeyboardInterrupt: the signal came.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # no thread but the first may set it
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
