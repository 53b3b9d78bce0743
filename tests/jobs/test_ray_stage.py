"""What a stage says of itself; how it runs is tested with the jobs."""

import pytest

from jobs.ray_stage import progress


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
