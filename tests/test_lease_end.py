"""The end of a lease over many claims: all are released; storage that is down is asked briefly."""

import time
from pathlib import Path

import pytest

from carn.claims import RELEASE_THREADS, Claim, Lease, claim, find_holder
from carn.errors import StorageError


def take_all(root: Path, count: int) -> list[Claim]:
    taken = [claim(str(root), f"{n}", owner="me", lease_s=600) for n in range(count)]
    return [held for held in taken if held is not None]


def test_all_claims_are_released(tmp_path: Path) -> None:
    with Lease(take_all(tmp_path, 40)):
        pass
    holders = [find_holder(str(tmp_path), f"{n}") for n in range(40)]
    assert all(holder is not None and holder.is_released for holder in holders)


def test_storage_that_is_down_is_not_asked_for_every_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def down(held: Claim) -> None:
        asked.append(held.key)
        time.sleep(0.05)
        raise StorageError(held.root_uri, "cannot be reached")

    held = take_all(tmp_path, 100)
    monkeypatch.setattr(Claim, "release", down)
    with Lease(held):
        pass
    assert len(asked) < 2 * RELEASE_THREADS
