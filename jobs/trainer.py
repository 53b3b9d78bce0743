"""What the drivers of Ray Train's and Ray Tune's runs share: running them, and what ended them."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import ray

from carn.errors import RunError

# Seconds between two looks at what the workers say.
POLL_S = 0.5
# Of AWS, in the environment.
CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"),
)


class LostWorkersError(RunError):
    """Workers were lost, or did not start, more often than they are replaced."""


def keep_credentials_out_of_runtime_environments() -> None:
    """Let Ray Tune copy no credentials from the driver's environment to that of its trials.

    It does so by way of runtime environments, which Ray writes to its logs and shows in its
    dashboard. Nodes have credentials of their own; those of a Ray that a job starts are the job's.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(CREDENTIALS)


def call_in_thread(call: Callable[[], Any], *, meanwhile: Callable[[], None] | None = None) -> Any:
    """What a call returns, made in a thread of its own.

    In the main thread Ray would take Ctrl-C for itself, and end with another exit status and no
    word of how to go on.

    Args:
        call: `fit` of a trainer or tuner.
        meanwhile: called every POLL_S seconds until it has ended.
    """
    found: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        if meanwhile is not None:
            meanwhile()
    if errors:
        raise errors[0]
    return found[0]


def fit_showing(trainer: Any, monitor: Any, show: Callable[[dict[str, Any]], None]) -> None:
    """Run a trainer, showing what its monitor hears."""

    def drain() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            for event in ray.get(monitor.drain.remote()):
                show(event)

    call_in_thread(trainer.fit, meanwhile=drain)


def fatal_of(monitor: Any) -> Exception | None:
    """What a worker gave up for, if one did."""
    error: Exception | None = ray.get(monitor.fatal.remote())
    return error


def cause_of(monitor: Any, error: Exception) -> Exception:
    """What ended a run: Ray wraps what a worker raised in errors of its own."""
    with contextlib.suppress(ray.exceptions.RayError):
        if (fatal := fatal_of(monitor)) is not None:
            return fatal
    return LostWorkersError(failure_text(error))


def failure_text(error: BaseException) -> str:
    """The last line of an error that Ray has wrapped in others: what was raised at first."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
