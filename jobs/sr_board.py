"""What the actors of a run have to know of each other, in a process of its own.

It imports next to nothing: the run waits for this process, which would take seconds to load torch.
"""

import time
from typing import Literal

# Seconds without a word from who calibrates after which it counts as lost, with its node.
CALIBRATION_TURN_S = 30.0

Verdict = Literal["go", "cancelled", "stopped", "deadly"]
Turn = Literal["yours", "another's", "cancelled", "stopped"]


class Board:
    """What the actors of a run have to know of each other. One process, calls in turn."""

    def __init__(self, max_attempts: int) -> None:
        """Nothing is begun yet.

        Args:
            max_attempts: times that a block is begun before it is given up.
        """
        self._max_attempts = max_attempts
        self._begun: dict[str, int] = {}
        self._retries: dict[int, int] = {}
        self._cancelled: set[int] = set()
        self._is_stopped = False
        self._turns: dict[int, tuple[str, float]] = {}

    def begin(self, slide: int, block: int) -> Verdict:
        """Ask before a block is begun; `deadly` when it has taken its process down too often."""
        if self._is_stopped:
            return "stopped"
        if slide in self._cancelled:
            return "cancelled"
        key = f"{slide}/{block}"
        self._begun[key] = self._begun.get(key, 0) + 1
        if 1 < self._begun[key] <= self._max_attempts:
            self._retries[slide] = self._retries.get(slide, 0) + 1
        return "go" if self._begun[key] <= self._max_attempts else "deadly"

    def end(self, slide: int, block: int) -> None:
        """The process has survived the block."""
        self._begun.pop(f"{slide}/{block}", None)

    def retries(self, slide: int) -> int:
        """Times that a block of this slide was begun again, for its process had died."""
        return self._retries.get(slide, 0)

    def cancel(self, slide: int) -> None:
        """Blocks of this slide need not be begun any more."""
        self._cancelled.add(slide)

    def stop(self) -> None:
        """No block at all is to be begun any more."""
        self._is_stopped = True

    def take_turn(self, slide: int, actor: str) -> Turn:
        """Ask whose turn it is to calibrate a slide; the others wait for what that one writes."""
        if self._is_stopped:
            return "stopped"
        if slide in self._cancelled:
            return "cancelled"
        now = time.monotonic()
        holder, since = self._turns.get(slide, ("", 0.0))
        # An actor that asks again is still at it, or was restarted in the middle of it.
        if holder not in ("", actor) and now - since < CALIBRATION_TURN_S:
            return "another's"
        self._turns[slide] = actor, now
        return "yours"

    def end_turn(self, slide: int) -> None:
        """The calibration is on storage, or failed: nobody need wait for whoever tried."""
        self._turns.pop(slide, None)
