"""What keeps the words of workers until the driver asks, in a process of its own.

It imports nothing: every run and every trial waits for such a process.
"""

from typing import Any


class Monitor:
    """An actor beside the driver that keeps what workers say until the driver asks."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._fatal: Exception | None = None

    def tell(self, event: dict[str, Any]) -> None:
        """Keep an event."""
        self._events.append(event)

    def give_up(self, error: Exception) -> None:
        """Note an error that another attempt would only meet again; the first one counts."""
        self._fatal = self._fatal or error

    def fatal(self) -> Exception | None:
        """The error that ended the run, if one did."""
        return self._fatal

    def drain(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events
