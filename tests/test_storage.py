"""Storage: the same behaviour on a local folder and on an object store."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from hypothesis import given
from hypothesis import strategies as st

from carn import s3 as s3_connection
from carn import storage
from carn.errors import AccessDeniedError, MissingObjectError, StorageError

REPOSITORY = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------- names


def test_normalize(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.normalize("a/b.tif") == str(tmp_path / "a/b.tif")
    assert storage.normalize(Path("a/b.tif")) == str(tmp_path / "a/b.tif")
    assert storage.normalize("/x/y.tif") == "/x/y.tif"
    assert storage.normalize("~/y.tif") == "/home/someone/y.tif"
    assert storage.normalize("file:///x/a%20b.tif") == "/x/a b.tif"
    assert storage.normalize("s3://bucket/a/b.tif") == "s3://bucket/a/b.tif"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://bucket/x", "'gs' is not supported"),
        ("https://host/x", "'https' is not supported"),
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        (Path("s3://bucket/key"), "lost a slash"),
    ],
)
def test_normalize_refuses_what_it_cannot_read(uri: str | Path, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        storage.normalize(uri)


def test_names() -> None:
    assert storage.join("s3://b/a/", "/c/", "d.tif") == "s3://b/a/c/d.tif"
    assert storage.join("/a", "b") == "/a/b"
    assert storage.name_of("s3://b/a/c.tif") == "c.tif"
    assert storage.stem_of("s3://b/a/Tumor_001.ome.tif") == "Tumor_001.ome"
    assert storage.is_s3("s3://b/k")
    assert not storage.is_s3("/s3/b")


# ---------------------------------------------------------------------------- reading and writing


def test_what_is_written_is_read(root: str) -> None:
    uri = storage.join(root, "deep", "er", "a.bin")
    assert not storage.is_file(uri)
    storage.write_bytes(uri, b"old")
    storage.write_bytes(uri, b"new content")
    assert storage.read_bytes(uri) == b"new content"
    assert storage.is_file(uri)
    found = storage.stat(uri)
    assert (found.uri, found.size) == (uri, 11)
    assert (found.etag is None) == (not storage.is_s3(root))
    assert [item.uri for item in storage.list_objects(root)] == [uri]


def test_written_files_have_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    storage.write_bytes(str(tmp_path / "ours"), b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_ranges_are_those_bytes(root: str) -> None:
    content = bytes(range(256)) * 400
    uri = storage.join(root, "a.bin")
    storage.write_bytes(uri, content)
    source = storage.open_source(uri)
    assert (source.uri, source.size) == (uri, len(content))
    end = len(content)
    ranges = [(50_000, 10), (0, 3), (0, 0), (end - 2, 100), (end, 5), (end + 9, 1), (5, 60_000)]
    found = source.read_ranges(ranges)
    assert found == [content[start : start + length] for start, length in ranges]
    assert source.read_ranges([]) == []
    source.close()


def test_an_empty_object_reads_as_nothing(root: str) -> None:
    uri = storage.join(root, "empty")
    storage.write_bytes(uri, b"")
    source = storage.open_source(uri)
    assert source.size == 0
    assert source.read_ranges([(0, 10), (3, 4)]) == [b"", b""]
    source.close()


def test_what_is_missing_is_named(root: str) -> None:
    uri = storage.join(root, "no", "such.tif")
    calls: list[Callable[[str], Any]] = [
        storage.stat,
        storage.read_bytes,
        storage.open_source,
        storage.identity,
    ]
    for call in calls:
        with pytest.raises(MissingObjectError, match=r"no/such\.tif: no such"):
            call(uri)
    assert not storage.is_file(uri)
    assert storage.list_objects(storage.join(root, "no")) == []


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_named() -> None:
    uri = "s3://carn-no-such-bucket/a.tif"
    with pytest.raises(MissingObjectError, match=r"carn-no-such-bucket.*no such (bucket|object)"):
        storage.stat(uri)
    with pytest.raises(MissingObjectError, match=r"carn-no-such-bucket.*no such bucket"):
        storage.read_bytes(uri)
    with pytest.raises(MissingObjectError, match="no such bucket"):
        storage.list_objects("s3://carn-no-such-bucket/x")


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/"])
def test_a_bucket_is_no_object(uri: str) -> None:
    for call in (storage.stat, storage.read_bytes, storage.open_source):
        with pytest.raises(StorageError, match="names a bucket, not an object"):
            call(uri)
    with pytest.raises(StorageError, match="names a bucket, not an object"):
        storage.write_bytes(uri, b"")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a directory"):
        storage.stat(str(tmp_path))
    with pytest.raises(StorageError, match="directory"):
        storage.read_bytes(str(tmp_path))
    with pytest.raises(StorageError, match="directory"):
        storage.write_bytes(str(tmp_path), b"x")
    assert not storage.is_file(str(tmp_path))


def test_a_file_where_a_folder_is_needed_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/a"):
        storage.write_bytes(str(tmp_path / "file" / "a"), b"x")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_access_denied(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(AccessDeniedError, match="secret"):
        storage.read_bytes(str(path))


def test_a_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("carn.storage.os.fsync", full)
    with pytest.raises(StorageError, match=r"a\.bin: No space left"):
        storage.write_bytes(str(path), b"new")
    assert [item.name for item in tmp_path.iterdir()] == ["a.bin"]
    assert path.read_bytes() == b"old"


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    # It tells when everything but the last step is done, then waits to be killed.
    script = f"""
        import os, sys, time
        from carn import storage
        def wait(descriptor):
            print(os.fstat(descriptor).st_size, flush=True)
            time.sleep(60)
        storage.os.fsync = wait
        storage.write_bytes({str(path)!r}, b"n" * 100_000)
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    assert writer.stdout is not None
    assert int(writer.stdout.readline()) == 100_000
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert path.read_bytes() == b"old"
    # What it left is no file of the folder for anybody who lists it.
    assert [item.uri for item in storage.list_objects(str(tmp_path))] == [str(path)]
    storage.write_bytes(str(path), b"newer")
    assert path.read_bytes() == b"newer"


# ------------------------------------------------------------------------------ one of many writes


def test_what_is_created_is_there_once(root: str) -> None:
    uri = storage.join(root, "deep", "a.json")
    assert storage.create_bytes(uri, b"first")
    assert not storage.create_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    storage.delete([uri])
    assert storage.create_bytes(uri, b"third")
    assert storage.read_bytes(uri) == b"third"
    assert [item.uri for item in storage.list_objects(root)] == [uri]


def test_one_of_many_racers_creates(root: str) -> None:
    contents = [f"racer {number}".encode() * 1000 for number in range(8)]
    start = threading.Barrier(len(contents))
    for turn in range(5):
        uri = storage.join(root, f"{turn}.json")

        def create(content: bytes, uri: str = uri) -> bool:
            start.wait()
            return storage.create_bytes(uri, content)

        with ThreadPoolExecutor(len(contents)) as pool:
            won = list(pool.map(create, contents))
        assert won.count(True) == 1
        assert storage.read_bytes(uri) == contents[won.index(True)]
    assert len(storage.list_objects(root)) == 5


def test_created_files_have_the_usual_mode_and_leave_no_litter(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    for _ in range(2):
        storage.create_bytes(str(tmp_path / "ours"), b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"usual", "ours"}


def test_a_file_system_without_hard_links_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("carn.storage.os.link", refuse)
    with pytest.raises(StorageError, match=r"a: its file system has no hard links.*on another"):
        storage.create_bytes(str(tmp_path / "a"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_network_file_systems_lost_answer_counts_as_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def asked_twice(*names: Any) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr("carn.storage.os.link", asked_twice)
    assert storage.create_bytes(str(tmp_path / "a"), b"ours")
    assert not storage.create_bytes(str(tmp_path / "a"), b"theirs")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    "kind",
    [
        *("lose_answer", "cut_answer", "drop", "reset", "cut_upload", "refuse", "refuse_after"),
    ],
)
def test_a_creation_whose_answer_is_lost_is_ours(faulty_s3: Any, kind: Any) -> None:
    uri = faulty_s3.bucket.uri("a.json")
    faulty_s3.faults.add(kind, "PutObject", times=3)
    assert storage.create_bytes(uri, b"ours, 1f3a")
    # A refusal that is cut counts as one: there is nothing to wait for.
    assert faulty_s3.faults.met[kind] == (2 if kind == "cut_answer" else 3)
    faulty_s3.faults.add(kind, "PutObject", times=3)
    assert not storage.create_bytes(uri, b"theirs, 9bc2")
    assert storage.read_bytes(uri) == b"ours, 1f3a"


def test_a_conflict_with_another_writer_is_tried_again(faulty_s3: Any) -> None:
    # Source: S3 answers so while a competing write is under way.
    conflict = {"status": 409, "code": "ConditionalRequestConflict"}
    faulty_s3.faults.add("refuse", "PutObject", times=2, **conflict)
    assert storage.create_bytes(faulty_s3.bucket.uri("a"), b"x")
    assert faulty_s3.faults.counts["PutObject"] == 3


# ------------------------------------------------------------------------------ listing, deleting


def test_listing_is_recursive_sorted_and_without_hidden_files(root: str) -> None:
    names = ["b.tif", "a/c.tif", "a/b/d.tif", "a.tif", "Z.tif", "a b/e é.tif"]
    for name in [*names, ".hidden", "a/.part", ".cache/x.tif", "a/.git/config"]:
        storage.write_bytes(storage.join(root, name), name.encode())
    found = storage.list_objects(root)
    assert [item.uri for item in found] == sorted(storage.join(root, name) for name in names)
    assert {item.uri: item.size for item in found}[storage.join(root, "a/c.tif")] == 7
    below = storage.list_objects(storage.join(root, "a"))
    assert [storage.name_of(item.uri) for item in below] == ["d.tif", "c.tif"]
    assert storage.list_objects(storage.join(root, "a/")) == below


def test_a_hidden_folder_that_is_named_is_listed(root: str) -> None:
    storage.write_bytes(storage.join(root, ".runs", "a.tif"), b"x")
    storage.write_bytes(storage.join(root, ".runs", ".part"), b"x")
    found = storage.list_objects(storage.join(root, ".runs"))
    assert [storage.name_of(item.uri) for item in found] == ["a.tif"]


def test_a_listing_goes_beyond_one_page(s3: Any) -> None:
    for number in range(5):
        s3.put(f"many/{number}", b"")
    events = s3_connection.s3_client().meta.events

    def two_at_a_time(params: dict[str, Any], **_: Any) -> None:
        params["MaxKeys"] = 2

    name = "before-parameter-build.s3.ListObjectsV2"
    events.register(name, two_at_a_time)
    try:
        assert len(storage.list_objects(s3.uri("many"))) == 5
    finally:
        events.unregister(name, two_at_a_time)


@pytest.mark.parametrize("page", [1, 3, 1000])
def test_what_lies_among_names(s3: Any, monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    names = [
        "A b",
        "a",
        "a.json",
        "a/deep",
        "a@1",
        "b",
        "c/1",
        "c/10",
        "c/2",
        "é",
        "ﬀ",
        "😀",
        "😀.2",
    ]
    for name in names:
        s3.put(f"many/{name}", name.encode())
    s3.put("many/_state/claims/a", b"")
    s3.put("other", b"")
    monkeypatch.setattr(storage, "PAGE", page)
    every = [item.uri for item in storage.list_objects(s3.uri("many"))]
    assert len(every) == len(names) + 1

    def among(*wanted: str) -> list[str]:
        found = storage.list_among(s3.uri("many/"), [s3.uri(f"many/{name}") for name in wanted])
        return [item.uri.rpartition("many/")[2] for item in found]

    ordered = sorted([*names, "_state/claims/a"])
    assert among(*names) == ordered
    assert among(*reversed(names)) == ordered
    assert among("b", "c/1") == ["b", "c/1", "c/10"]
    assert among("a", "nowhere", "c") == [name for name in ordered if "a" <= name < "o"]
    assert among("aa") == []
    assert among() == []


@pytest.mark.slow
def test_ten_thousand_objects_are_listed_and_removed(s3: Any) -> None:
    uris = [s3.uri(f"many/{number % 7}/{number:05d}.svs") for number in range(10_000)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: storage.write_bytes(uri, b""), uris))
    assert [item.uri for item in storage.list_objects(s3.uri("many"))] == sorted(uris)
    assert len(storage.list_prefix(s3.uri("many/3/0"))) == len(
        [uri for uri in uris if "/3/0" in uri]
    )
    storage.delete_below(s3.uri("many"))
    assert storage.list_objects(s3.uri("many")) == []


def test_a_listing_by_the_start_of_names(root: str) -> None:
    for name in ("a/b.1.json", "a/b.2.json", "a/.b.3", "a/bc", "a/b", "b.4.json", "a/b.d/deep"):
        storage.write_bytes(storage.join(root, name), name.encode())
    found = [item.uri for item in storage.list_prefix(storage.join(root, "a/b."))]
    expected = [storage.join(root, name) for name in ("a/b.1.json", "a/b.2.json")]
    assert [uri for uri in found if not uri.endswith("/deep")] == expected
    (hidden,) = storage.list_prefix(storage.join(root, "a/.b"))
    assert (hidden.uri, hidden.size) == (storage.join(root, "a/.b.3"), 6)
    assert storage.list_prefix(storage.join(root, "nowhere/b.")) == []


def test_links_are_followed_and_dangling_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.tif").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "real")
    (root / "b.tif").symlink_to(tmp_path / "real" / "a.tif")
    (root / "gone.tif").symlink_to(tmp_path / "nothing")
    (root / "linked" / "round").symlink_to(tmp_path / "real")
    found = [item.uri for item in storage.list_objects(str(root))]
    assert found == [str(root / "b.tif"), str(root / "linked" / "a.tif")]


def test_delete_below_leaves_other_prefixes_alone(root: str) -> None:
    for name in ("run/a", "run/b/c", "run2/a", "run.txt", "other"):
        storage.write_bytes(storage.join(root, name), b"x")
    storage.delete_below(storage.join(root, "run"))
    left = [item.uri for item in storage.list_objects(root)]
    assert left == [storage.join(root, name) for name in ("other", "run.txt", "run2/a")]
    assert storage.is_s3(root) or not Path(root, "run").exists()
    storage.delete_below(storage.join(root, "run"))


def test_delete_below_keeps_hidden_files(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "run" / "a"), b"x")
    (tmp_path / "run" / ".keep").touch()
    storage.delete_below(str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".keep"]


def test_deleting_what_is_gone_is_no_error(root: str) -> None:
    uri = storage.join(root, "a")
    storage.write_bytes(uri, b"x")
    storage.delete([uri, uri])
    assert not storage.is_file(uri)


def test_unfinished_files_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    kept = [tmp_path / "deep" / "a.parquet", tmp_path / ".hidden", tmp_path / "x.carn-part"]
    left = [tmp_path / "deep" / ".a.parquet.abc123.carn-part", tmp_path / ".m.json.x.carn-part"]
    for path in [*kept, *left]:
        path.write_bytes(b"x")
    storage.delete_unfinished(str(tmp_path))
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)
    storage.delete_unfinished(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------- identity


def test_identity_follows_the_content(root: str) -> None:
    uri = storage.join(root, "a.bin")
    content = bytes(200_000)
    storage.write_bytes(uri, content)
    first = storage.identity(uri)
    assert storage.identity(uri) == first
    for other in (content[:-1], b"x" + content[1:], content[:-1] + b"x", b""):
        storage.write_bytes(uri, other)
        assert storage.identity(uri) != first
    storage.write_bytes(uri, content)
    assert storage.identity(uri) == first


def test_identity_of_what_is_listed_is_the_same(root: str) -> None:
    for name in ("a", "b"):
        storage.write_bytes(storage.join(root, name), name.encode() * 100_000)
    for found in storage.list_objects(root):
        assert storage.identity_of(found) == storage.identity(found.uri)


def test_identity_of_a_listed_object_costs_no_request(faulty_s3: Any) -> None:
    for name in ("a", "b"):
        faulty_s3.bucket.put(name, name.encode())
    found = [storage.identity_of(item) for item in storage.list_objects(faulty_s3.bucket.uri())]
    assert len(set(found)) == 2
    assert faulty_s3.faults.counts == {"ListObjects": 1}


def test_identity_of_a_local_copy_is_the_same(tmp_path: Path) -> None:
    for size in (0, 10, 64 * 1024, 64 * 1024 + 1, 300_000):
        one, other = str(tmp_path / "one"), str(tmp_path / "other")
        storage.write_bytes(one, b"a" * size)
        storage.write_bytes(other, b"a" * size)
        assert storage.identity(one) == storage.identity(other)


# ------------------------------------------------------------------------------------ coalescing

RANGES = st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 20_000)), max_size=12)


@given(ranges=RANGES, gap=st.sampled_from([0, 1, 100, 8192]))
def test_spans_cover_the_ranges_and_skip_every_larger_gap(
    ranges: list[storage.Range], gap: int
) -> None:
    spans = storage.coalesce(ranges, gap_bytes=gap)
    ends = [start + length for start, length in spans]
    assert all(start > end + gap for (start, _), end in zip(spans[1:], ends, strict=False))
    for start, length in ranges:
        assert any(a <= start and start + length <= a + n for a, n in spans)
    covered = set().union(*(range(a, a + n) for a, n in ranges))
    wanted = sorted(covered | {start for start, _ in ranges})
    for start, length in spans:
        inside = [at for at in wanted if start <= at <= start + length]
        # Nothing is fetched but ranges and gaps small enough between them.
        assert inside[0] == start
        assert all(b - a <= gap + 1 for a, b in itertools.pairwise(inside))
        assert start + length - inside[-1] <= 1


def test_a_gap_is_read_over_up_to_its_bound() -> None:
    assert storage.coalesce([(20, 5), (0, 10)], gap_bytes=10) == [(0, 25)]
    assert storage.coalesce([(21, 5), (0, 10)], gap_bytes=10) == [(0, 10), (21, 5)]


def test_near_ranges_become_one_request(stub_s3: Any) -> None:
    stub_s3.objects["b/k"] = bytes(1_000_000)
    source = storage.open_source("s3://b/k")
    source.read_ranges([(0, 1000), (1500, 1000), (500_000, 10), (2500, 10)])
    assert stub_s3.count("GET") == 2
    assert stub_s3.body_bytes == 2510 + 10


def test_a_store_is_tried_for_what_claims_rest_on(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.check_creates(storage.join(root, "_state"))
    assert storage.list_objects(root) == []
    monkeypatch.setattr(storage, "create_bytes", lambda uri, content: True)
    with pytest.raises(StorageError, match="passes over If-None-Match"):
        storage.check_creates(storage.join(root, "_state"))


def test_a_store_that_refuses_conditional_writes_is_named(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(uri: str, content: bytes) -> bool:
        answer = {"Error": {"Code": "NotImplemented", "Message": "A header you provided implies"}}
        with s3_connection.s3_errors(uri):
            raise ClientError(answer, "PutObject")

    monkeypatch.setattr(storage, "create_bytes", refuse)
    with pytest.raises(StorageError, match="refuses conditional writes"):
        storage.check_creates(storage.join(root, "_state"))
