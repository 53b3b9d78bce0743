"""The node's cache of remote slides: one fetch, a bound that holds, pins that outlive nobody."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from carn.errors import MissingObjectError, StorageError
from carn.slides import node_cache, open_slide

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CARN_CACHE_DIR", str(folder))
    monkeypatch.delenv("CARN_CACHE_GB", raising=False)
    return folder


@pytest.fixture
def python() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a script that has `node_cache` imported and prints; it is killed at the end."""
    started = []

    def start(script: str) -> subprocess.Popen[str]:
        head = "import sys, time\nfrom carn import storage\nfrom carn.slides import node_cache\n"
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", head + textwrap.dedent(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def fetch_and_let_go(uri: str) -> Path:
    path, pin = node_cache.fetch(uri)
    pin.close()
    return path


def is_cached(path: Path) -> bool:
    return path.exists() and (path.parent / ".complete").exists()


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("[!.]*") if path.is_file())


def test_a_slide_is_fetched_once(stub_s3: Any) -> None:
    stub_s3.objects["b/deep/a.svs"] = b"slide" * 1000
    first = fetch_and_let_go("s3://b/deep/a.svs")
    assert first.read_bytes() == b"slide" * 1000
    assert first.name == "a.svs"
    assert fetch_and_let_go("s3://b/deep/a.svs") == first
    assert stub_s3.count("GET") == 1


def test_slides_of_one_name_are_told_apart(s3: Any) -> None:
    paths = [fetch_and_let_go(s3.put(f"{n}/a.svs", b"%d" % n)) for n in (1, 2)]
    assert [path.read_bytes() for path in paths] == [b"1", b"2"]


def test_a_changed_object_is_fetched_anew(s3: Any) -> None:
    uri = s3.put("a.svs", b"old")
    assert fetch_and_let_go(uri).read_bytes() == b"old"
    s3.put("a.svs", b"new")
    assert fetch_and_let_go(uri).read_bytes() == b"new"


def test_processes_share_one_download(
    stub_s3: Any, python: Callable[[str], subprocess.Popen[str]]
) -> None:
    stub_s3.objects["b/a.svs"] = os.urandom(200_000)
    stub_s3.delay_s = 0.5
    script = """
        print("ready")
        sys.stdin.readline()
        path, pin = node_cache.fetch("s3://b/a.svs")
        print(path.stat().st_size)
    """
    processes = [python(script) for _ in range(4)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.stdout.readline() for process in processes] == ["200000\n"] * 4
    assert stub_s3.count("GET") == 1


def test_the_least_recently_used_go_first(
    s3: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", str(3500 / 1e9))
    uris = [s3.put(f"{name}.svs", name.encode() * 1000) for name in "abcde"]
    paths = {}
    for n, uri in enumerate(uris[:3]):
        paths[n] = fetch_and_let_go(uri)
        os.utime(paths[n].parent / ".complete", (n, n))
    fetch_and_let_go(uris[0])  # used again: now the most recent
    paths[3] = fetch_and_let_go(uris[3])
    assert [is_cached(paths[n]) for n in range(4)] == [True, False, True, True]
    assert bytes_in(cache) == 3000
    paths[4] = fetch_and_let_go(uris[4])
    assert [is_cached(paths[n]) for n in range(5)] == [True, False, False, True, True]


def test_pinned_slides_stay(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", str(2500 / 1e9))
    held, pin = node_cache.fetch(s3.put("a.svs", bytes(1000)))
    loose = fetch_and_let_go(s3.put("b.svs", bytes(1000)))
    os.utime(held.parent / ".complete", (0, 0))
    fetch_and_let_go(s3.put("c.svs", bytes(1000)))
    assert is_cached(held)
    assert not is_cached(loose)
    pin.close()
    os.utime(held.parent / ".complete", (0, 0))
    fetch_and_let_go(s3.put("d.svs", bytes(1000)))
    assert not is_cached(held)


def test_pins_of_another_process_hold_until_it_is_gone(
    s3: Any, monkeypatch: pytest.MonkeyPatch, python: Callable[[str], subprocess.Popen[str]]
) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", str(1500 / 1e9))
    uri = s3.put("a.svs", bytes(1000))
    other = s3.put("b.svs", bytes(1000))
    holder = python(f"""
        path, pin = node_cache.fetch({uri!r})
        print(path)
        sys.stdin.readline()
    """)
    held = Path(holder.stdout.readline().strip())
    with pytest.raises(StorageError, match=r"b\.svs: finds no room.*CARN_CACHE_GB"):
        node_cache.fetch(other)
    assert is_cached(held)
    holder.kill()
    holder.wait()
    assert is_cached(fetch_and_let_go(other))
    assert not held.exists()


def test_a_process_killed_in_the_middle_of_a_fetch_blocks_nobody(
    stub_s3: Any, cache: Path, python: Callable[[str], subprocess.Popen[str]]
) -> None:
    stub_s3.objects["b/a.svs"] = bytes(1000)
    stub_s3.delay_s = 30
    fetching = python('node_cache.fetch("s3://b/a.svs")')
    deadline = time.monotonic() + 20
    while not stub_s3.count("GET"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    fetching.kill()
    fetching.wait()
    stub_s3.delay_s = 0
    started = time.monotonic()
    path = fetch_and_let_go("s3://b/a.svs")
    assert path.read_bytes() == bytes(1000)
    assert time.monotonic() - started < 5
    # Half a file of the killed one is not left to fill the disk.
    assert bytes_in(cache) == 1000


def test_two_fetches_at_once_keep_the_bound(
    stub_s3: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", str(1500 / 1e9))
    for name in ("a", "b"):
        stub_s3.objects[f"b/{name}.svs"] = bytes(1000)
    stub_s3.delay_s = 0.4
    outcomes: list[object] = []

    def fetch(name: str) -> None:
        try:
            outcomes.append(node_cache.fetch(f"s3://b/{name}.svs"))
        except StorageError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=fetch, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bytes_in(cache) == 1000
    assert sorted(isinstance(outcome, StorageError) for outcome in outcomes) == [False, True]
    for outcome in outcomes:
        if isinstance(outcome, tuple):
            outcome[1].close()


def test_a_slide_larger_than_the_cache_is_refused_before_it_is_fetched(
    stub_s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", "0.0001")
    stub_s3.objects["b/a.svs"] = bytes(200_000)
    with pytest.raises(StorageError, match=r"s3://b/a\.svs: takes .* GB.*CARN_CACHE_GB"):
        node_cache.fetch("s3://b/a.svs")
    assert stub_s3.count("GET") == 0


@pytest.mark.parametrize("value", ["0", "-1", "much", "", "nan", "inf"])
def test_a_bad_bound_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", value)
    with pytest.raises(ValueError, match=r"CARN_CACHE_GB=.* must be a positive number"):
        node_cache.cache_bytes()


def test_settings(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert node_cache.cache_dir() == cache
    assert node_cache.cache_bytes() == 50_000_000_000
    monkeypatch.setenv("CARN_CACHE_GB", "1.5")
    assert node_cache.cache_bytes() == 1_500_000_000
    monkeypatch.delenv("CARN_CACHE_DIR")
    assert str(os.getuid()) in node_cache.cache_dir().name


def test_a_folder_that_cannot_be_written_is_named(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CARN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"a\.svs: .*file/cache.*CARN_CACHE_DIR"):
        node_cache.fetch(s3.put("a.svs", b"x"))


def test_what_is_missing_is_named(s3: Any) -> None:
    with pytest.raises(MissingObjectError, match=r"no\.svs"):
        node_cache.fetch(s3.uri("no.svs"))


def test_a_failed_fetch_is_tried_again(stub_s3: Any) -> None:
    stub_s3.objects["b/a.svs"] = bytes(100_000)
    stub_s3.num_cuts = 1000
    with pytest.raises(StorageError, match=r"s3://b/a\.svs"):
        node_cache.fetch("s3://b/a.svs")
    stub_s3.num_cuts = 0
    assert fetch_and_let_go("s3://b/a.svs").read_bytes() == bytes(100_000)


def test_mrxs_comes_with_its_folder(s3: Any) -> None:
    uri = s3.put("x/Slide.mrxs", b"main")
    s3.put("x/Slide/Slidedat.ini", b"ini")
    s3.put("x/Slide/Data0000.dat", b"data")
    s3.put("x/Slide2/Data0000.dat", b"another slide's")
    path = fetch_and_let_go(uri)
    assert path.read_bytes() == b"main"
    found = {str(p.relative_to(path.parent)) for p in path.parent.rglob("[!.]*") if p.is_file()}
    assert found == {"Slide.mrxs", "Slide/Slidedat.ini", "Slide/Data0000.dat"}


def test_dicom_comes_with_its_siblings(s3: Any) -> None:
    series = bytes(128) + b"DICM" + b"\x20\x00\x0e\x00UI\x06\x001.2.84"
    uri = s3.put("x/1.dcm", series)
    s3.put("x/2.DCM", series)
    s3.put("x/IM0003", series)
    s3.put("x/1.2.840.4", series)
    s3.put("x/5.dcm", series.replace(b"1.2.84", b"1.2.85"))
    s3.put("x/note.txt", series)
    s3.put("y/6.dcm", series)
    path = fetch_and_let_go(uri)
    found = {p.name for p in path.parent.iterdir() if not p.name.startswith(".")}
    assert found == {"1.dcm", "2.DCM", "IM0003", "1.2.840.4"}


def test_a_remote_slide_for_openslide_reads_as_the_local_one(
    s3: Any, shared_data: Path, cache: Path
) -> None:
    local = shared_data / "slides" / "uir-test-image-j2k.svs"
    with open_slide(s3.put("a/j2k.svs", local)) as remote, open_slide(local) as slide:
        assert remote.reader == "openslide"
        assert remote.uri == s3.uri("a/j2k.svs")
        assert (remote.read_region(5, 9, 300, 200) == slide.read_region(5, 9, 300, 200)).all()
        assert bytes_in(cache) == local.stat().st_size


def test_an_open_slide_pins_its_copy_until_it_is_closed(
    s3: Any, monkeypatch: pytest.MonkeyPatch, shared_data: Path
) -> None:
    local = shared_data / "slides" / "uir-test-image-j2k.svs"
    monkeypatch.setenv("CARN_CACHE_GB", str(local.stat().st_size * 1.5 / 1e9))
    slide = open_slide(s3.put("a.svs", local))
    other = s3.put("b.svs", local)
    with pytest.raises(StorageError, match="finds no room"):
        open_slide(other)
    slide.close()
    with open_slide(other) as second:
        second.read_region(0, 0, 10, 10)


def test_a_remote_text_file_frees_its_pin(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARN_CACHE_GB", str(1500 / 1e9))
    from carn.errors import SlideError

    for name in ("a.svs", "b.svs"):  # the second fits only where the first one let go
        with pytest.raises(SlideError, match=f"{name}: is not a slide"):
            open_slide(s3.put(name, b"text" * 250))


def test_several_hold_the_same_slide_at_once(stub_s3: Any, python: Any) -> None:
    stub_s3.objects["b/a.svs"] = b"slide" * 1000
    path, pin = node_cache.fetch("s3://b/a.svs")
    again, another_pin = node_cache.fetch("s3://b/a.svs")  # in this process
    assert again == path
    other = python(
        """
        path, pin = node_cache.fetch("s3://b/a.svs")
        print(path)
        sys.stdin.read()
        """
    )
    assert Path(other.stdout.readline().strip()) == path  # and in another, while both are held
    pin.close()
    another_pin.close()


def test_slides_of_several_files_that_are_not_fetched_say_so(stub_s3: Any) -> None:
    stub_s3.objects["b/a.vms"] = b"[Virtual Microscope Specimen]"
    with pytest.raises(StorageError, match="copy it to a disk"):
        node_cache.fetch("s3://b/a.vms")
