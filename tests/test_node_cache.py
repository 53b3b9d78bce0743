"""An entry of the node's cache is filled once, whole or not at all, and stays while it is held."""

import os
import threading
from pathlib import Path

import pytest

from carn.errors import StorageError
from carn.node_cache import hold


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CARN_CACHE_DIR", str(folder))
    monkeypatch.delenv("CARN_CACHE_GB", raising=False)
    return folder


class Filler:
    """Writes an entry of some bytes, and counts."""

    def __init__(self, *, num_bytes: int = 1000, fails: int = 0) -> None:
        self.num_bytes = num_bytes
        self.fails = fails
        self.fills = 0
        self.asked_sizes = 0

    def size(self) -> int:
        self.asked_sizes += 1
        return self.num_bytes

    def __call__(self, folder: Path) -> None:
        assert folder.is_dir()
        assert not list(folder.glob("[!.]*"))  # nothing of an earlier attempt
        self.fills += 1
        (folder / "content").write_bytes(bytes(self.num_bytes // 2))
        if self.fills <= self.fails:
            raise RuntimeError("lost half way")
        (folder / "content").write_bytes(bytes(self.num_bytes))

    def hold(self, key: str = "a") -> Path:
        """Hold the entry and let it go."""
        folder, pin = hold(key, uri=f"u/{key}", size=self.size, fill=self)
        pin.close()
        return folder


def test_an_entry_is_filled_once(cache: Path) -> None:
    filler = Filler()
    folder = filler.hold()
    assert folder == cache / "a"
    assert filler.hold() == folder
    assert (filler.fills, filler.asked_sizes) == (1, 1)
    assert len((folder / "content").read_bytes()) == 1000


def test_what_failed_half_way_is_filled_anew() -> None:
    filler = Filler(fails=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="lost half way"):
            filler.hold()
    assert len((filler.hold() / "content").read_bytes()) == 1000
    assert filler.fills == 3


def test_several_at_once_fill_once() -> None:
    filler, folders = Filler(), []
    start = threading.Barrier(4)

    def ask() -> None:
        start.wait()
        folders.append(filler.hold())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert filler.fills == 1
    assert len(folders) == 4


def test_an_entry_stays_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", str(1500 / 1e9))
    folder, pin = hold("a", uri="u", size=lambda: 1000, fill=Filler())
    with pytest.raises(StorageError, match=r"u/b: finds no room .*CARN_CACHE_GB"):
        Filler().hold("b")
    assert (folder / "content").exists()
    pin.close()
    Filler().hold("b")
    assert not folder.exists()


def test_a_failed_fill_lets_go_of_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", str(1500 / 1e9))
    with pytest.raises(RuntimeError):
        Filler(fails=1).hold("a")
    Filler().hold("b")  # the room that "a" took is free again


def test_the_last_used_stays_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", str(2500 / 1e9))
    folders = {key: Filler().hold(key) for key in "ab"}
    for number, key in enumerate("ab"):
        os.utime(folders[key] / ".complete", (number, number))
    Filler().hold("a")
    Filler().hold("c")
    assert [folders[key].exists() for key in "ab"] == [True, False]


def test_what_is_larger_than_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", str(900 / 1e9))
    filler = Filler()
    with pytest.raises(StorageError, match=r"u/a: takes .*CARN_CACHE_GB higher, or CARN_CACHE_DIR"):
        filler.hold()
    assert filler.fills == 0
