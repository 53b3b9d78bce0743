"""Who works on what, where several runs share one storage and nothing else.

A claim is a small file or object `<root>/<key>.<generation>.json`. The highest generation counts;
to take over a claim that was released or has expired is to create the next one, which storage lets
only one of many do. Generations never start anew, so an owner that was taken for dead finds a
later one when it renews, and knows that it lost.

A claim saves work, it does not guard content. Expiry compares the clocks of two machines, which
may differ by seconds, and an owner may stall between a renewal and what it does next: leases are
minutes, and what is done under a claim must do no harm when it is done twice.

Source: C. Gray, D. Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file
cache consistency", SOSP 1989.
"""

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from carn import storage
from carn.errors import MissingObjectError, StorageError

logger = logging.getLogger(__name__)

# Times a claim is looked at, should its highest generation vanish between listing and reading:
# another took it over and tidied up.
LOOKS = 5
# Claims that are released at once at the end.
RELEASE_THREADS = 16
# A claim is renewed this often within its lease, so that one failed renewal does no harm.
RENEWALS_PER_LEASE = 3

PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """Tells a process from all others that have, had or will have its pid.

    Attributes:
        boot_id: of the running kernel, anew with every boot.
        pid_namespace: in which the pid counts; two containers of one machine have two.
        start_ticks: when the process began, in clock ticks since boot.
    """

    boot_id: str
    pid_namespace: str
    start_ticks: int


@dataclass(frozen=True, kw_only=True)
class Holder:
    """What one generation of a claim says.

    Attributes:
        generation: from 1.
        owner: the run, as it calls itself.
        host, pid: where that run is.
        expires: until when it holds, by its own clock.
        is_released: its owner has given it up.
        nonce: tells this claim from any other.
        process: what tells the pid's process from others; None where it is not known.
    """

    generation: int
    owner: str
    host: str
    pid: int
    expires: datetime
    is_released: bool
    nonce: str
    process: ProcessIdentity | None = None

    @property
    def is_live(self) -> bool:
        """Whether it keeps others off now."""
        return not self.is_released and self.expires > _now()


class Claim:
    """A key that is ours until its lease ends. Made by `claim`; safe to share between threads.

    Attributes:
        root_uri, key: what is claimed.
        lease_s: for how long each renewal holds.
        holder: what storage was told last.
    """

    def __init__(self, *, root_uri: str, key: str, lease_s: float, holder: Holder) -> None:
        self.root_uri = root_uri
        self.key = key
        self.lease_s = lease_s
        self.holder = holder
        self._lock = threading.Lock()

    def renew(self) -> bool:
        """Hold for another lease from now; False when it was lost to a later generation.

        Raises:
            StorageError: storage does not answer; the claim stands until it expires.
        """
        with self._lock:
            if self.holder.is_released or self._is_superseded():
                return False
            if not self.holder.is_live:
                # Others may be taking it over at this moment: do as they do, one wins.
                generation = self.holder.generation + 1
                taken = _create(self.root_uri, self.key, self.holder, self.lease_s, generation)
                self.holder = taken or self.holder
                return taken is not None
            self._write(replace(self.holder, expires=_end_of(self.lease_s)))
            # Looked at again: one who read the old expiry may have taken over before the write.
            return not self._is_superseded()

    def release(self) -> None:
        """Give it up: others may take it at once. One that was lost stays with who has it.

        Raises:
            StorageError: storage does not answer; the claim stands until it expires.
        """
        with self._lock:
            # Said, not removed: generations would start anew, below one that a stalled process
            # is about to create.
            if not self.holder.is_released and not self._is_superseded():
                self._write(replace(self.holder, is_released=True))

    def _write(self, holder: Holder) -> None:
        storage.write_bytes(_uri(self.root_uri, self.key, holder.generation), _to_json(holder))
        self.holder = holder

    def _is_superseded(self) -> bool:
        return max(_generations(self.root_uri, self.key), default=0) > self.holder.generation


def claim(
    root_uri: str, key: str, *, owner: str, lease_s: float, dead: Holder | None = None
) -> Claim | None:
    """Take a key for `lease_s` seconds; None where another live owner has it.

    An owner that claims what it holds already (a process of it that was started again) takes it
    from itself, so different runs need different names. A claim whose file is damaged keeps
    nobody off: how long to wait for it is not known.

    Args:
        root_uri: the folder or prefix that holds the claims.
        key: what is claimed; may contain slashes.
        owner: the run that claims.
        lease_s: minutes, renewed well before they end, as `Lease` does.
        dead: a holder that is gone, see `is_gone`: its lease is not waited for. Who took over from
            it meanwhile keeps the key.

    Raises:
        AccessDeniedError, StorageError: the claims cannot be read or written.
    """
    generation, found = _look(root_uri, key)
    if found is not None and found.is_live and found.owner != owner and found != dead:
        return None
    us = Holder(
        generation=0,
        owner=owner,
        host=socket.gethostname(),
        pid=os.getpid(),
        expires=_now(),
        is_released=False,
        nonce="",
        process=identify_process(),
    )
    holder = _create(root_uri, key, us, lease_s, generation + 1)
    if holder is None:
        return None
    return Claim(root_uri=root_uri, key=key, lease_s=lease_s, holder=holder)


def find_holder(root_uri: str, key: str) -> Holder | None:
    """Who has or last had a key; None where nobody claimed it, or the claim is damaged.

    Raises:
        AccessDeniedError, StorageError: the claims cannot be read.
    """
    return _look(root_uri, key)[1]


def is_gone(holder: Holder) -> bool:
    """Whether it is proven that the process which made a claim has ended.

    That can be seen from its own pid namespace only, and until the machine boots again: from
    anywhere else its pid is no process, or another's. Whatever is not known is False, and then
    the lease is what tells.
    """
    ours, theirs = identify_process(), holder.process
    if ours is None or theirs is None:
        return False
    if (ours.boot_id, ours.pid_namespace) != (theirs.boot_id, theirs.pid_namespace):
        return False
    if holder.pid <= 0:  # a signal to such a number goes to groups of processes
        return False
    try:
        # Asked first: /proc may hide the processes of other users.
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it runs, as another user
    except OverflowError:
        return False
    start_ticks = _start_ticks(str(holder.pid))
    return start_ticks is not None and start_ticks != theirs.start_ticks


def identify_process() -> ProcessIdentity | None:
    """This process; None where the system has no /proc, or one that does not show our pids."""
    try:
        # A namespace whose /proc was mounted outside of it: the pids in there are not ours.
        if str((PROC / "self").readlink()) != str(os.getpid()):
            return None
        boot_id = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        pid_namespace = str((PROC / "self/ns/pid").readlink())
    except (OSError, ValueError):
        return None
    start_ticks = _start_ticks("self")
    if not boot_id or start_ticks is None:
        return None
    return ProcessIdentity(boot_id=boot_id, pid_namespace=pid_namespace, start_ticks=start_ticks)


def _start_ticks(pid: str) -> int | None:
    """When a process began, in clock ticks since boot; None where that cannot be read.

    Source: proc_pid_stat(5), field 22.
    """
    try:
        stat = (PROC / pid / "stat").read_bytes()
        # The command in parentheses, field 2, may contain spaces, parentheses, any byte.
        return int(stat.rpartition(b")")[2].split()[22 - 3])
    except (OSError, ValueError, IndexError):
        return None


class Lease:
    """Renews claims from a background thread while work goes on; releases them at the end.

    with Lease() as lease:
        if (ours := claim(root, key, owner=owner, lease_s=600)) is not None:
            lease.hold(ours)
            ...
            lease.release(ours)
    """

    def __init__(self, claims: Iterable[Claim] = ()) -> None:
        self._condition = threading.Condition()
        # When each claim is to be renewed next, on the monotonic clock.
        self._due: dict[Claim, float] = {}
        self._lost: set[str] = set()
        self._is_over = False
        self._thread = threading.Thread(target=self._renew_all, name="claims", daemon=True)
        for held in claims:
            self.hold(held)

    @property
    def lost(self) -> frozenset[str]:
        """Keys of the claims that others have taken over meanwhile."""
        with self._condition:
            return frozenset(self._lost)

    def hold(self, held: Claim) -> None:
        """Renew this claim from now on."""
        with self._condition:
            self._due[held] = time.monotonic() + held.lease_s / RENEWALS_PER_LEASE
            self._lost.discard(held.key)
            self._condition.notify()

    def release(self, held: Claim) -> None:
        """Renew it no more, and let others have it.

        Raises:
            StorageError: as `Claim.release`.
        """
        with self._condition:
            self._due.pop(held, None)
        held.release()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._condition:
            self._is_over = True
            self._condition.notify()
        self._thread.join()
        # Side by side: who is asked to stop has seconds for hundreds of them.
        is_down = threading.Event()
        with ThreadPoolExecutor(RELEASE_THREADS, thread_name_prefix="claims") as pool:
            released = list(pool.map(lambda held: self._let_go(held, is_down), list(self._due)))
        if not all(released):
            logger.warning("%d claims stand until their leases end", released.count(False))

    def _let_go(self, held: Claim, is_down: threading.Event) -> bool:
        """Release a claim; False where storage does not answer, or did not answer others."""
        if is_down.is_set():
            return False
        try:
            self.release(held)
        except StorageError as failure:
            is_down.set()
            logger.warning("%s was not released: %s", held.key, failure)
            return False
        return True

    def _renew_all(self) -> None:
        while True:
            with self._condition:
                if self._is_over:
                    return
                held = min(self._due, key=lambda item: self._due[item], default=None)
                wait_s = None if held is None else self._due[held] - time.monotonic()
                if held is None or wait_s is None or wait_s > 0:
                    self._condition.wait(wait_s)
                    continue
            self._renew(held)

    def _renew(self, held: Claim) -> None:
        is_ours = True
        try:
            is_ours = held.renew()
        except StorageError as error:
            logger.warning("%s: the claim was not renewed: %s", held.key, error)
        with self._condition:
            if held not in self._due:  # released meanwhile
                return
            if is_ours:
                self._due[held] = time.monotonic() + held.lease_s / RENEWALS_PER_LEASE
            else:
                del self._due[held]
                self._lost.add(held.key)
                logger.warning("%s: another run has taken the claim over", held.key)


# ------------------------------------------------------------------------------ files of a claim


def _look(root_uri: str, key: str) -> tuple[int, Holder | None]:
    """The highest generation (0: none), and what it says; None where it is damaged."""
    for _ in range(LOOKS):
        generation = max(_generations(root_uri, key), default=0)
        if generation == 0:
            return 0, None
        try:
            content = storage.read_bytes(_uri(root_uri, key, generation))
        except MissingObjectError:
            continue
        return generation, _from_json(content, generation)
    raise StorageError(_uri(root_uri, key, generation), "changes hands while it is read; try again")


def _generations(root_uri: str, key: str) -> list[int]:
    prefix = storage.join(root_uri, key) + "."
    endings = (found.uri.removeprefix(prefix) for found in storage.list_prefix(prefix))
    return [int(end[:-5]) for end in endings if re.fullmatch(r"\d+\.json", end)]


def _create(
    root_uri: str, key: str, like: Holder, lease_s: float, generation: int
) -> Holder | None:
    """Create this generation, of this owner; None where another was first."""
    holder = replace(
        like, generation=generation, expires=_end_of(lease_s), nonce=secrets.token_hex(16)
    )
    if not storage.create_bytes(_uri(root_uri, key, generation), _to_json(holder)):
        return None
    found = _generations(root_uri, key)
    if max(found, default=0) > generation:
        # We stalled, and this number had been taken, taken over and tidied up meanwhile.
        storage.delete([_uri(root_uri, key, generation)])
        return None
    earlier = [number for number in found if number < generation]
    storage.delete([_uri(root_uri, key, number) for number in earlier])
    return holder


def _uri(root_uri: str, key: str, generation: int) -> str:
    return f"{storage.join(root_uri, key)}.{generation:06d}.json"


def _to_json(holder: Holder) -> bytes:
    fields = {
        "owner": holder.owner,
        "host": holder.host,
        "pid": holder.pid,
        "expires": holder.expires.isoformat(),
        "is_released": holder.is_released,
        "nonce": holder.nonce,
    }
    if holder.process is not None:
        fields |= asdict(holder.process)
    return json.dumps(fields, indent=2).encode()


def _from_json(content: bytes, generation: int) -> Holder | None:
    try:
        fields = json.loads(content)
        return Holder(
            generation=generation,
            owner=str(fields["owner"]),
            host=str(fields["host"]),
            pid=int(fields["pid"]),
            expires=datetime.fromisoformat(fields["expires"]).astimezone(UTC),
            is_released=bool(fields["is_released"]),
            nonce=str(fields["nonce"]),
            process=_process_from(fields),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _process_from(fields: dict[str, Any]) -> ProcessIdentity | None:
    """None for a claim of a release, or of a system, that did not tell."""
    match fields:
        case {
            "boot_id": str(boot_id),
            "pid_namespace": str(pid_namespace),
            "start_ticks": int(start_ticks),
        }:
            return ProcessIdentity(
                boot_id=boot_id, pid_namespace=pid_namespace, start_ticks=start_ticks
            )
    return None


def _now() -> datetime:
    return datetime.now(UTC)


def _end_of(lease_s: float) -> datetime:
    return _now() + timedelta(seconds=lease_s)
