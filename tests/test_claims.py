"""Claims: one owner at a time, on a local folder and on an object store."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from carn import claims, storage
from carn.claims import (
    Claim,
    Holder,
    Lease,
    ProcessIdentity,
    claim,
    find_holder,
    identify_process,
    is_gone,
)
from carn.errors import StorageError
from carn.upscaling.outbox import SlideClaims

KEY = "center 1/tumor_001.tif"
NUM_RACERS = 8


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def pass_(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of every owner in this test."""
    clock = Clock()
    monkeypatch.setattr(claims, "_now", lambda: clock.now)
    return clock


def take(root: str, *, owner: str = "one", key: str = KEY, lease_s: float = 60) -> Claim:
    taken = claim(root, key, owner=owner, lease_s=lease_s)
    assert taken is not None
    return taken


def race(root: str, *, num_racers: int = NUM_RACERS) -> list[Claim]:
    """Claims of those that won."""
    start = threading.Barrier(num_racers)

    def run(number: int) -> Claim | None:
        start.wait()
        return claim(root, KEY, owner=f"run {number}", lease_s=60)

    with ThreadPoolExecutor(num_racers) as pool:
        return [found for found in pool.map(run, range(num_racers)) if found is not None]


def files(root: str) -> list[str]:
    return [found.uri.removeprefix(root + "/") for found in storage.list_objects(root)]


# ---------------------------------------------------------------------------------- one owner


def test_a_claim_keeps_others_off_until_it_is_released(root: str, clock: Clock) -> None:
    assert find_holder(root, KEY) is None
    ours = take(root)
    assert claim(root, KEY, owner="two", lease_s=60) is None
    held = find_holder(root, KEY)
    assert held == ours.holder
    assert held is not None
    assert (held.owner, held.host, held.pid) == ("one", socket.gethostname(), os.getpid())
    assert held.expires == clock.now + timedelta(seconds=60)
    assert take(root, owner="two", key="center 1/tumor_001").renew()  # another key
    ours.release()
    ours.release()
    assert not ours.renew()
    theirs = take(root, owner="two")
    assert claim(root, KEY, owner="one", lease_s=60) is None
    assert theirs.renew()


def test_a_renewed_claim_outlasts_its_first_lease(root: str, clock: Clock) -> None:
    ours = take(root)
    for _ in range(5):
        clock.pass_(50)
        assert ours.renew()
    clock.pass_(50)
    assert claim(root, KEY, owner="two", lease_s=60) is None
    clock.pass_(11)
    take(root, owner="two")


def test_an_expired_claim_is_lost_to_who_takes_it_over(root: str, clock: Clock) -> None:
    ours = take(root)
    clock.pass_(61)
    theirs = take(root, owner="two")
    assert not ours.renew()
    ours.release()  # gives up nothing of theirs
    assert claim(root, KEY, owner="three", lease_s=60) is None
    assert theirs.renew()
    assert files(root) == [f"{KEY}.000002.json"]


def test_an_expired_claim_that_nobody_took_is_renewed(root: str, clock: Clock) -> None:
    ours = take(root)
    clock.pass_(1000)
    assert ours.renew()
    assert claim(root, KEY, owner="two", lease_s=60) is None
    clock.pass_(1000)
    theirs = take(root, owner="two")
    assert not ours.renew()
    assert theirs.renew()


def test_a_run_that_starts_again_has_its_claims_back(root: str) -> None:
    before = take(root)
    after = take(root)
    assert not before.renew()
    assert after.renew()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"owner": "one"}', b"\xff\xfe", b'{"owner":1,"expires":"soon"}'],
)
def test_a_damaged_claim_keeps_nobody_off(tmp_path: Path, content: bytes) -> None:
    root = str(tmp_path)
    ours = take(root)
    file = tmp_path / f"{KEY}.000001.json"
    file.write_bytes(content)
    assert find_holder(root, KEY) is None
    assert take(root, owner="two").renew()
    assert not ours.renew()


def test_claims_are_readable_files(tmp_path: Path) -> None:
    take(str(tmp_path))
    written = json.loads((tmp_path / f"{KEY}.000001.json").read_bytes())
    assert written["owner"] == "one"
    assert datetime.fromisoformat(written["expires"]).tzinfo is not None


def test_keys_that_begin_alike_are_different_keys(root: str) -> None:
    for key in ("a", "a.1", "a.000001.json", "a/b", "ab", "é"):
        assert claim(root, key, owner=key, lease_s=60) is not None
    for key in ("a", "a.1", "a.000001.json", "a/b", "ab", "é"):
        held = find_holder(root, key)
        assert held is not None
        assert held.owner == key


# --------------------------------------------------------------------------------------- races


def test_one_of_many_racers_wins(root: str) -> None:
    for _ in range(3):
        (winner,) = race(root)
        assert winner.renew()
        assert find_holder(root, KEY) == winner.holder
        winner.release()
    assert len(files(root)) == 1


def test_one_of_many_takes_over_an_expired_claim(root: str) -> None:
    lost = take(root, lease_s=-1)
    (winner,) = race(root)
    assert winner.renew()
    assert not lost.renew()
    assert files(root) == [f"{KEY}.000002.json"]


def test_an_expired_owner_races_with_who_takes_over(root: str) -> None:
    for _ in range(4):
        ours = take(root, lease_s=-1)
        with ThreadPoolExecutor(2) as pool:
            renewed = pool.submit(ours.renew)
            taken = pool.submit(claim, root, KEY, owner="two", lease_s=60)
        # Renewed for a lease that is over at once, it may be taken over after that, too.
        last = taken.result()
        assert renewed.result() or last is not None
        if last is not None:
            assert not ours.renew()
            last.release()


def after_listing(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], Any]) -> None:
    """Do something else between the n-th listing of a claim's generations and what follows."""
    generations, calls = claims._generations, []

    def listed(*of: str) -> list[int]:
        found = generations(*of)
        calls.append(of)
        if len(calls) == number:
            monkeypatch.setattr(claims, "_generations", generations)
            action()
        return found

    monkeypatch.setattr(claims, "_generations", listed)


def before_creation(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """Do something else between the look at a claim and the next creation of a generation."""
    create_bytes = storage.create_bytes

    def create(uri: str, content: bytes) -> bool:
        monkeypatch.setattr(storage, "create_bytes", create_bytes)
        action()
        return create_bytes(uri, content)

    monkeypatch.setattr(storage, "create_bytes", create)


def test_a_renewal_after_the_lease_keeps_off_who_saw_it_expired(
    root: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = take(root)
    clock.pass_(61)
    renewed: list[bool] = []
    before_creation(monkeypatch, lambda: renewed.append(ours.renew()))
    assert claim(root, KEY, owner="two", lease_s=60) is None
    assert renewed == [True]
    assert ours.renew()


def test_a_takeover_in_the_middle_of_a_renewal_wins(
    root: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = take(root)
    clock.pass_(59)

    def stall() -> None:
        clock.pass_(2)
        taken.append(take(root, owner="two"))
        clock.pass_(-2)  # our own clock is behind theirs

    taken: list[Claim] = []
    after_listing(monkeypatch, 1, stall)
    assert not ours.renew()
    assert taken[0].renew()
    held = find_holder(root, KEY)
    assert held is not None
    assert held.owner == "two"


def test_who_stalls_before_a_takeover_finds_it_done(
    root: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(root)
    clock.pass_(61)
    taken: list[Claim] = []

    def others_come_and_go() -> None:
        take(root, owner="two").release()
        taken.append(take(root, owner="three"))

    # The generation that this one is about to create has been used and tidied up.
    before_creation(monkeypatch, others_come_and_go)
    assert claim(root, KEY, owner="late", lease_s=60) is None
    assert taken[0].renew()
    assert files(root) == [f"{KEY}.000003.json"]


def test_a_claim_removed_while_it_is_read_is_looked_at_again(
    root: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(root)
    clock.pass_(61)
    after_listing(monkeypatch, 1, lambda: take(root, owner="two"))
    assert claim(root, KEY, owner="late", lease_s=60) is None


@pytest.mark.usefixtures("no_waiting")
def test_a_claim_whose_answer_is_lost_is_ours(faulty_s3: Any) -> None:
    root = faulty_s3.bucket.uri("claims")
    faulty_s3.faults.add("lose_answer", "PutObject", times=2)
    ours = take(root)
    assert faulty_s3.faults.met == {"lose_answer": 2}
    assert find_holder(root, KEY) == ours.holder
    assert claim(root, KEY, owner="two", lease_s=60) is None


# ------------------------------------------------------------------- processes that are gone

BOOT_ID = "a2b4c6d8-0000-4000-8000-000000000000\n"
needs_proc = pytest.mark.skipif(identify_process() is None, reason="this system has no /proc")


def holder_of_the_dead(root: str, key: str = KEY) -> Holder:
    """Of a claim whose process ended without a word, well before its lease."""
    child = os.fork()
    if child == 0:
        try:
            claim(root, key, owner="killed", lease_s=600)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found = find_holder(root, key)
    assert found is not None
    assert found.pid == child
    return found


def known(holder: Holder) -> ProcessIdentity:
    assert holder.process is not None
    return holder.process


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc of our own making, with this process in it."""
    folder = tmp_path / "proc"
    ours = folder / str(os.getpid())
    (ours / "ns").mkdir(parents=True)
    (ours / "ns" / "pid").symlink_to("pid:[4026532001]")
    (folder / "self").symlink_to(str(os.getpid()))
    (folder / "sys/kernel/random").mkdir(parents=True)
    (folder / "sys/kernel/random/boot_id").write_text(BOOT_ID)
    put_stat(folder, os.getpid(), b"python", start_ticks=777)
    monkeypatch.setattr(claims, "PROC", folder)
    return folder


def put_stat(proc: Path, pid: int, command: bytes, *, start_ticks: int) -> None:
    fields = [b"S", *(b"%d" % number for number in range(4, 53))]
    fields[22 - 3] = b"%d" % start_ticks
    (proc / str(pid)).mkdir(exist_ok=True)
    (proc / str(pid) / "stat").write_bytes(b"%d (%s) %s\n" % (pid, command, b" ".join(fields)))


@needs_proc
def test_a_claim_says_which_process_made_it(root: str) -> None:
    ours = take(root)
    assert find_holder(root, KEY) == ours.holder
    process = known(ours.holder)
    assert ours.renew()
    assert known(ours.holder) == process
    assert process == identify_process()
    assert process.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert process.pid_namespace.startswith("pid:[")
    began = psutil.boot_time() + process.start_ticks / os.sysconf("SC_CLK_TCK")
    assert began == pytest.approx(psutil.Process().create_time(), abs=2)


@needs_proc
def test_what_ended_is_gone_and_what_runs_is_not(tmp_path: Path) -> None:
    dead = holder_of_the_dead(str(tmp_path))
    assert is_gone(dead)
    ours = take(str(tmp_path), key="ours").holder
    assert not is_gone(ours)
    # Another process got the dead one's pid.
    assert is_gone(replace(dead, pid=os.getpid()))
    assert is_gone(replace(ours, process=replace(known(ours), start_ticks=1)))


@needs_proc
def test_from_elsewhere_no_process_is_known_to_be_gone(tmp_path: Path) -> None:
    dead = holder_of_the_dead(str(tmp_path))
    process = known(dead)
    for other in (
        None,
        replace(process, pid_namespace="pid:[1]"),  # a container of this machine
        replace(process, boot_id="1234"),  # booted since, or a machine of the same name
        replace(process, boot_id="1234", pid_namespace="pid:[1]"),
    ):
        assert not is_gone(replace(dead, process=other))


@pytest.mark.parametrize("pid", [0, -1, -(2**22) - 1, 2**40])
def test_a_number_that_is_no_pid_is_no_dead_process(tmp_path: Path, pid: int) -> None:
    ours = take(str(tmp_path)).holder
    elsewhere = ProcessIdentity(boot_id="1", pid_namespace="pid:[1]", start_ticks=1)
    process = replace(ours.process or elsewhere, start_ticks=1)
    assert not is_gone(replace(ours, pid=pid, process=process))


def test_processes_of_other_users_are_told_by_when_they_began(
    tmp_path: Path, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(pid: int, signal: int) -> None:
        assert signal == 0
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    theirs = replace(take(str(tmp_path / "claims")).holder, pid=4711)
    assert not is_gone(theirs)  # it runs, and /proc hides it
    put_stat(proc, 4711, b"python", start_ticks=777)
    assert not is_gone(theirs)
    put_stat(proc, 4711, b"python", start_ticks=778)
    assert is_gone(theirs)
    (proc / "4711" / "stat").write_bytes(b"4711 (python")
    assert not is_gone(theirs)


@pytest.mark.parametrize("command", [b"a b", b") 1 2 (", b"((", b"))", b"", b"\xff\n)", b"S 1 1"])
def test_a_command_is_no_number(proc: Path, command: bytes) -> None:
    put_stat(proc, os.getpid(), command, start_ticks=123_456)
    assert identify_process() == ProcessIdentity(
        boot_id=BOOT_ID.strip(), pid_namespace="pid:[4026532001]", start_ticks=123_456
    )


@pytest.mark.parametrize(
    "missing", ["self", "sys/kernel/random/boot_id", "self/ns/pid", "self/stat"]
)
def test_without_proc_every_lease_is_waited_for(
    tmp_path: Path, proc: Path, missing: str, clock: Clock
) -> None:
    root = str(tmp_path / "claims")
    dead = holder_of_the_dead(root, "known")
    # The child was no process of this /proc, whose `self` is its parent.
    assert dead.process is None
    dead = replace(dead, process=identify_process())
    assert is_gone(dead)
    (proc / missing).unlink()
    assert identify_process() is None
    assert not is_gone(dead)
    assert take(root).holder.process is None
    assert b"start_ticks" not in storage.read_bytes(f"{root}/{KEY}.000001.json")
    assert claim(root, KEY, owner="two", lease_s=60) is None
    clock.pass_(61)
    take(root, owner="two")


def test_a_proc_of_other_pids_than_ours_is_none(proc: Path) -> None:
    assert identify_process() is not None
    (proc / "self").unlink()
    (proc / "self").symlink_to("1234")
    (proc / str(os.getpid())).rename(proc / "1234")
    assert identify_process() is None


@pytest.mark.parametrize(
    "process",
    [
        {},
        {"boot_id": "a"},
        {"boot_id": "a", "pid_namespace": "b", "start_ticks": "soon"},
        {"boot_id": None, "pid_namespace": None, "start_ticks": None},
    ],
)
def test_a_claim_without_its_process_is_read_and_waited_for(
    tmp_path: Path, clock: Clock, process: dict[str, Any]
) -> None:
    root = str(tmp_path)
    dead = holder_of_the_dead(root)
    file = tmp_path / f"{KEY}.000001.json"
    written = json.loads(file.read_bytes())
    for name in ("boot_id", "pid_namespace", "start_ticks"):
        written.pop(name, None)
    file.write_text(json.dumps(written | process))
    found = find_holder(root, KEY)
    assert found == replace(dead, process=None)
    assert not is_gone(found)
    assert claim(root, KEY, owner="two", lease_s=60) is None
    clock.pass_(601)
    take(root, owner="two")


@needs_proc
def test_only_one_takes_over_from_the_dead(root: str) -> None:
    dead = holder_of_the_dead(root)
    assert claim(root, KEY, owner="one", lease_s=60) is None
    ours = claim(root, KEY, owner="one", lease_s=60, dead=dead)
    assert ours is not None
    assert ours.holder.owner == "one"
    # Who saw the dead one too, but was later, finds a live one.
    assert claim(root, KEY, owner="two", lease_s=60, dead=dead) is None
    assert ours.renew()


@needs_proc
def test_a_live_run_in_another_container_keeps_its_slide(tmp_path: Path) -> None:
    root = tmp_path / "_state" / "claims"
    dead = holder_of_the_dead(str(root), "x")
    [file] = root.iterdir()
    # Containers of one name, on one machine or two: its pid is none of ours, or is ours.
    for pid in (dead.pid, os.getpid()):
        for changes in ({"pid_namespace": "pid:[1]"}, {"boot_id": "1234"}):
            process = replace(known(dead), **changes)  # type: ignore[arg-type]
            file.write_bytes(claims._to_json(replace(dead, pid=pid, process=process)))
            with SlideClaims(str(tmp_path), owner="next", lease_s=600) as next_run:
                assert not next_run.take("x")
    file.write_bytes(claims._to_json(replace(dead, pid=os.getpid())))
    with SlideClaims(str(tmp_path), owner="next", lease_s=600) as next_run:
        assert next_run.take("x")  # another process of this container has its pid
        assert "run next on" in next_run.holder("x")


# ------------------------------------------------------------------------------------ the lease


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)


def test_a_lease_renews_what_it_holds_and_releases_it(tmp_path: Path) -> None:
    root = str(tmp_path)
    with Lease([take(root, lease_s=0.9, key="a")]) as lease:
        lease.hold(take(root, lease_s=0.9, key="b"))
        first = {key: find_holder(root, key) for key in "ab"}
        for key in "ab":

            def is_renewed(key: str = key) -> bool:
                found, before = find_holder(root, key), first[key]
                assert found is not None
                assert before is not None
                return found.expires > before.expires

            wait_for(is_renewed)
            assert claim(root, key, owner="two", lease_s=60) is None
        assert lease.lost == frozenset()
    for key in "ab":
        take(root, owner="two", key=key)


def test_a_lease_renews_no_more_what_it_released(tmp_path: Path) -> None:
    root = str(tmp_path)
    ours = take(root, lease_s=0.3)
    with Lease() as lease:
        lease.hold(ours)
        lease.release(ours)
        theirs = take(root, owner="two")
        time.sleep(0.4)
        assert theirs.renew()
        assert lease.lost == frozenset()


def test_a_lease_knows_what_it_lost(tmp_path: Path) -> None:
    root = str(tmp_path)
    lost, kept = take(root, lease_s=0.3, key="lost"), take(root, lease_s=0.6, key="kept")
    with Lease([lost, kept]) as lease:
        theirs = take(root, key="lost")  # the same owner, started again
        wait_for(lambda: lease.lost == {"lost"})
        assert theirs.renew()
    assert find_holder(root, "lost") == theirs.holder
    # Who holds a key again has not lost it.
    with Lease() as lease:
        lease.hold(theirs)
        assert lease.lost == frozenset()


def test_a_lease_outlives_storage_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(tmp_path)
    ours = take(root, lease_s=0.9)
    write_bytes = storage.write_bytes
    failures: list[str] = []

    def fails_twice(uri: str, content: bytes) -> None:
        if len(failures) < 2:
            failures.append(uri)
            raise StorageError(uri, "no answer")
        write_bytes(uri, content)

    expires = ours.holder.expires
    monkeypatch.setattr(storage, "write_bytes", fails_twice)
    with Lease([ours]) as lease:
        wait_for(lambda: ours.holder.expires > expires)
        assert lease.lost == frozenset()
    assert "the claim was not renewed" in caplog.text


def test_a_lease_releases_when_work_fails(tmp_path: Path) -> None:
    root = str(tmp_path)

    def fail() -> None:
        with Lease([take(root)]):
            raise RuntimeError("work failed")

    with pytest.raises(RuntimeError):
        fail()
    take(root, owner="two")
