"""What the suite takes for granted of the programs that run it."""

import os

import pytest


@pytest.mark.xdist_group("ray")
def test_tests_of_a_group_share_a_process(request: pytest.FixtureRequest) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("there is but one process")
    # Otherwise every process would start a Ray of its own, and wait for the others'.
    assert request.node.nodeid.endswith("@ray")
