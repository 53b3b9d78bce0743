"""What a stage says of itself; how it runs is tested with the jobs."""

import inspect
import ipaddress
import signal
from typing import Any

import pytest
import ray

from jobs.ray_stage import ClusterError, progress, start_ray

ray_init = ray.init


@pytest.mark.parametrize(
    ("done", "seconds", "expected"),
    [
        (1, 14.0, "1 of 1,000 tasks (0%) in 14 s"),
        # 100 tasks in the 20 s after the first one, so 899 more take 180 s.
        (101, 34.0, "101 of 1,000 tasks (10%) in 34 s, about 3 min 0 s left"),
        (1000, 4000.0, "1,000 of 1,000 tasks (100%) in 1 h 6 min"),
    ],
)
def test_progress_leaves_the_start_out_of_its_estimate(
    done: int, seconds: float, expected: str
) -> None:
    assert progress(done, 1000, seconds=seconds, seconds_to_first=14.0) == expected


@pytest.mark.parametrize("has_dashboard", [False, True])
def test_rays_dashboard_is_bound_to_this_machine(
    monkeypatch: pytest.MonkeyPatch, has_dashboard: bool
) -> None:
    class Stop(Exception):
        """Before Ray is started."""

    asked: dict[str, Any] = {}

    def init(**options: Any) -> None:
        asked.update(options)
        raise Stop

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError):
        start_ray(has_dashboard=has_dashboard)
    assert ipaddress.ip_address(asked["dashboard_host"]).is_loopback
    assert asked["include_dashboard"] is has_dashboard
    # Who starts Ray by hand gets the same unless they ask for more.
    default = inspect.signature(ray_init).parameters["dashboard_host"].default
    assert ipaddress.ip_address(default).is_loopback


def test_a_job_keeps_its_own_way_to_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_number: int, _frame: object) -> None:
        """Of the job."""

    def init(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray.data.DataContext, "get_current", type("Context", (), {}))
    before = signal.signal(signal.SIGTERM, stop)
    try:
        start_ray()
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
