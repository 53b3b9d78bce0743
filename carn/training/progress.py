"""What a person sees while a network trains: a bar on a terminal, lines in a log."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from carn.training.loop import TrainResult

logger = logging.getLogger(__name__)

# Seconds between two lines in a log, at the least.
LINE_EVERY_S = 10.0

# Terms that are shown beside the loss, when there are any.
_SHOWN_TERMS = ("l1", "mse", "ssim", "content", "adversarial", "spatial", "final", "wavelet")


class ProgressView:
    """Shows the events of `carn.training.loop.train`; call it with each.

    Attributes:
        result: what the run came to, once it has ended.
    """

    def __init__(self, *, is_terminal: bool | None = None) -> None:
        """Nothing is shown before the first event.

        Args:
            is_terminal: show a bar; None to find out.
        """
        self.result: TrainResult | None = None
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._bar: Any = None
        self._best: float | None = None
        self._last: float | None = None
        self._bicubic: float | None = None
        self._begin_step = 0
        self._line_at = 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show an event."""
        kind = event["kind"]
        if kind == "begin":
            self._begin(event)
        elif kind == "step":
            self._step(event)
        elif kind == "validation":
            self._validation(event)
        elif kind == "end":
            facts = {name: event[name] for name in TrainResult.__dataclass_fields__}
            self.result = TrainResult(**facts)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _begin(self, event: Mapping[str, Any]) -> None:
        self.close()
        self._bicubic = event.get("bicubic_psnr")
        # Another part of the run may have done better.
        self._best = event.get("best_psnr")
        self._begin_step = event["step"]
        workers = event["num_workers"]
        self._say(
            f"training from update {event['step']:,} to {event['steps']:,} on {workers} "
            f"worker{'s' if workers > 1 else ''}"
            + (f"; bicubic {self._bicubic:.2f} dB" if self._bicubic is not None else "")
        )
        if self._is_terminal:
            self._bar = tqdm(
                total=event["steps"],
                initial=event["step"],
                unit=" updates",
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def _step(self, event: Mapping[str, Any]) -> None:
        words = [f"loss {event['loss']:.4g}"]
        words += [f"{name} {event[name]:.4g}" for name in _SHOWN_TERMS if name in event]
        if self._last is not None:
            words.append(f"PSNR {self._last:.2f} dB")
        words.append(f"{event['images_per_s']:.0f} images/s")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update(event["step"] - self._bar.n)
            return
        now = time.monotonic()
        is_last = event["step"] == event["steps"]
        if now - self._line_at < LINE_EVERY_S and not is_last:
            return
        self._line_at = now
        done = event["step"] - self._begin_step
        left = (event["steps"] - event["step"]) * event["elapsed_s"] / max(1, done)
        self._say(
            f"update {event['step']:,} of {event['steps']:,}: {', '.join(words)}, "
            f"{tqdm.format_interval(left)} left"
        )

    def _validation(self, event: Mapping[str, Any]) -> None:
        self._last = event["validation_psnr"]
        is_best = self._best is None or self._last > self._best
        self._best = max(self._last, self._best) if self._best is not None else self._last
        gain = f" ({self._last - self._bicubic:+.2f} dB over bicubic)" if self._bicubic else ""
        self._say(
            f"validation after update {event['step']:,}: PSNR {self._last:.2f} dB{gain}, "
            f"SSIM {event['validation_ssim']:.4f}{', the best so far' if is_best else ''}"
        )

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            logger.info("%s", line)
