"""The steps of super-resolving slides around the blocks: looking at each, finishing each."""

import contextlib
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import pyarrow as pa
import ray

from carn.errors import CarnError, StorageError, UnfinishedError, UploadGoneError
from carn.report.page import format_count
from carn.upscaling.finish import finish
from carn.upscaling.lr_view import open_view
from carn.upscaling.task import SlidePlan, SlideTask
from carn.upscaling.work import inspect
from jobs.metrics import watch_s3
from jobs.ray_stage import MAX_ATTEMPTS, Attempt, Unit, duration

logger = logging.getLogger("super_resolve")

INSPECTED = pa.schema(
    [
        ("name", pa.string()),
        ("plan", pa.string()),
        ("reason", pa.string()),
        ("is_storage", pa.bool_()),
    ]
)
# Slides that are finished at a time: each reads its records and joins its small parts.
MAX_FINISHING = 8
# Seconds for which processes may be out of reach before their slide is given up.
UNAVAILABLE_S = 600.0
# Seconds between two tries meanwhile.
UNAVAILABLE_POLL_S = 5.0


def inspect_unit(unit: Unit, attempt: Attempt) -> pa.Table:
    """A row of INSPECTED for {"task", "is_forecast"}: its name, and a plan or a reason for none.

    The plan of a forecast is no more than the (width, height) of the LR. `is_storage` says whether
    the reason is an error of storage.
    """
    task = SlideTask.from_json(unit["task"])
    plan, reason, is_storage = None, None, False
    try:
        with attempt(task.name):
            if unit["is_forecast"]:
                view = open_view(task.uri, task.input, is_image=task.is_image)
                plan = json.dumps(view.extent)
                view.close()
            else:
                plan = inspect(task).to_json()
    except CarnError as error:
        reason, is_storage = str(error), isinstance(error, StorageError)
    except Exception as error:  # of this slide alone
        logger.exception("%s", task.name)
        reason = f"{type(error).__name__}: {error} (an error of this program)"
    row = {"name": task.name, "plan": plan, "reason": reason, "is_storage": is_storage}
    return pa.Table.from_pylist([row], schema=INSPECTED)


def finish_unit(plan: str, threshold_db: float, has_pictures: bool) -> dict[str, Any]:
    """What became of a slide whose blocks are all on storage.

    Returns:
        `summary` (of a SlideSummary, as JSON) and `pictures`, or `stale`, or `reason` with whether
        it `is_storage`'s fault.
    """
    try:
        summary, pictures = finish(
            SlidePlan.from_json(plan), threshold_db=threshold_db, has_pictures=has_pictures
        )
    except (UnfinishedError, UploadGoneError) as error:
        return {"stale": str(error)}
    except CarnError as error:
        return {"reason": str(error), "is_storage": isinstance(error, StorageError)}
    except Exception as error:  # of this slide alone
        logger.exception("finishing %s", plan[:200])
        return {"reason": f"{type(error).__name__}: {error} (an error of this program)"}
    return {"summary": summary.to_json(), "pictures": pictures}


class Finisher:
    """An actor that finishes slides; made early, for a process takes seconds to begin."""

    def finish(self, plan: str, threshold_db: float, has_pictures: bool) -> dict[str, Any]:
        """As `finish_unit`."""
        watch_s3(plan)
        return finish_unit(plan, threshold_db, has_pictures)


class _Job:
    """A slide to be finished, and how often that was tried."""

    def __init__(self, slide: int, arguments: tuple[Any, ...]) -> None:
        self.slide = slide
        self.arguments = arguments
        self.not_before = 0.0
        self._num_deaths = 0
        self._out_of_reach_since: float | None = None

    def may_try_again(self, error: Exception) -> bool:
        """Note that its process was lost; whether another may try."""
        now = time.monotonic()
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            # A node that was lost is called so for a while, and new processes are sent to it.
            self._out_of_reach_since = self._out_of_reach_since or now
            self.not_before = now + UNAVAILABLE_POLL_S
            return now - self._out_of_reach_since < UNAVAILABLE_S
        self._num_deaths += 1
        return self._num_deaths < MAX_ATTEMPTS


class Finishing:
    """Finishes slides on the cluster while the blocks of others are made."""

    def __init__(self) -> None:
        self._waiting: deque[_Job] = deque()
        self._running: dict[Any, tuple[_Job, Any]] = {}
        # Next to nothing to compute: it must not wait for the actors to leave a CPU.
        self._make: Any = (
            ray.remote(Finisher)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=3, scheduling_strategy="SPREAD")
            .remote
        )
        self._idle: list[Any] = [self._make()]

    def begin(
        self, slide: int, plan: SlidePlan, *, threshold_db: float, has_pictures: bool
    ) -> None:
        """Have a slide finished as soon as there is room; arguments as `carn.upscaling.finish`."""
        self._waiting.append(_Job(slide, (plan.to_json(), threshold_db, has_pictures)))

    def collect(self, *, timeout_s: float = 0.0) -> Iterator[tuple[int, dict[str, Any]]]:
        """The slides that are finished by now, each with what `finish_unit` says of it."""
        for _ in range(len(self._waiting)):
            job = self._waiting.popleft()
            if len(self._running) >= MAX_FINISHING or time.monotonic() < job.not_before:
                self._waiting.append(job)
                continue
            actor = self._idle.pop() if self._idle else self._make()
            self._running[actor.finish.remote(*job.arguments)] = job, actor
        if not self._running:
            time.sleep(timeout_s if self._waiting else 0.0)
            return
        done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=timeout_s)
        for reference in done:
            job, actor = self._running.pop(reference)
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayError as error:
                # Its process died, or its node is gone; done twice comes to the same.
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(actor)
                if job.may_try_again(error):
                    logger.warning("finishing a slide is tried again: %s", error)
                    self._waiting.append(job)
                else:
                    yield job.slide, {"reason": f"the process that finished it died: {error}"}
                continue
            self._idle.append(actor)
            yield job.slide, outcome

    def drop(self) -> list[int]:
        """Wait for nothing any more; returns the slides that were not collected."""
        left = [job.slide for job in self._waiting]
        left += [job.slide for job, _ in self._running.values()]
        self._waiting.clear()
        self._running.clear()
        return left

    @property
    def is_idle(self) -> bool:
        """Whether every slide that was begun has been collected."""
        return not self._waiting and not self._running


T = TypeVar("T")


def in_thread(items: Iterator[T], *, tick_s: float = 1.0) -> Iterator[T | None]:
    """The items of an iterator that runs in a thread of its own; None whenever none has come."""
    arrived: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def run() -> None:
        try:
            for item in items:
                arrived.put((True, item))
            arrived.put((False, None))
        except BaseException as error:  # raised again by who reads
            arrived.put((False, error))

    threading.Thread(target=run, daemon=True, name="blocks").start()
    while True:
        try:
            is_item, item = arrived.get(timeout=tick_s)
        except queue.Empty:
            yield None
            continue
        if not is_item:
            if item is not None:
                raise item
            return
        yield item


class ProgressLines:
    """Says in the log how far a run is, overall and for the slide at hand.

    How much is left is told by the bytes of the inputs, which are known before any is opened.
    """

    def __init__(self, sizes: Mapping[str, int], *, every_s: float) -> None:
        """Nothing is done yet.

        Args:
            sizes: of each input that is to be done, bytes, by name.
            every_s: seconds between two lines.
        """
        self._left = {name: float(max(1, size)) for name, size in sizes.items()}
        self._num_slides = len(self._left)
        self._shares: dict[str, float] = {}
        self._every_s = every_s
        self._done = 0.0
        self._num_lr_px = 0
        self._started = self._said = time.monotonic()
        self._first: float | None = None

    def begin(self, name: str, *, num_blocks: int, num_left: int) -> None:
        """A slide has so many blocks, of which so many are still to be made."""
        size = self._left.get(name, 1.0)
        self._left[name] = size * num_left / num_blocks
        self._shares[name] = size / num_blocks

    def end(self, name: str) -> None:
        """A slide has ended: whatever was left of it is not to be waited for."""
        self._left.pop(name, None)

    def block(self, name: str, *, num_left: int, num_blocks: int, num_lr_px: int) -> None:
        """Count a block of a slide; a line now and then, and whenever a slide is through."""
        now = time.monotonic()
        share = min(self._shares.get(name, 0.0), self._left.get(name, 0.0))
        if name in self._left:
            self._left[name] -= share
        if self._first is None:
            # The first came late: processes had to start for it.
            self._first = now
        else:
            self._done += share
        self._num_lr_px += num_lr_px
        if now - self._said < self._every_s and num_left:
            return
        self._said = now
        text = f"{name}: {format_count(num_blocks - num_left)} of {format_count(num_blocks)} blocks"
        ended = self._num_slides - len(self._left)
        text += f"; {format_count(ended)} of {format_count(self._num_slides)} slides ended"
        text += f", {self._num_lr_px / 1e6 / (now - self._started):.2f} LR megapixels a second"
        left = sum(self._left.values())
        if self._done and left:
            text += f", about {duration((now - self._first) / self._done * left)} left"
        logger.info("%s", text)
