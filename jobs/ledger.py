"""What counts attempts, in a process of its own.

It imports nothing: a job waits for this process, which would take seconds to load Ray Data.
"""


class Ledger:
    """Counts, per key, attempts that began and did not end."""

    def __init__(self) -> None:
        """Nothing is begun yet."""
        self._begun: dict[str, int] = {}

    def begin(self, key: str) -> int:
        """Count an attempt; returns how many there are."""
        self._begun[key] = self._begun.get(key, 0) + 1
        return self._begun[key]

    def end(self, key: str) -> None:
        """One was survived: begin from none."""
        self._begun[key] = 0
