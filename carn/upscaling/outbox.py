"""What an output folder says of each slide: finished, in the way, begun by a run that is gone.

Below the output: the slides; `_state/done/<name>@<digest>.<size>` for every finished one;
`_state/claims`; `_work/<name>/<digest>/` for unfinished ones; `runs/<id>/`.
"""

import json
import logging
import re
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Literal, Self

from carn import storage, uploads
from carn.claims import Claim, Holder, Lease, claim, find_holder, is_gone
from carn.errors import MissingObjectError
from carn.slides.provenance import read_provenance
from carn.upscaling.task import SlideTask, key_of

logger = logging.getLogger(__name__)

NUM_THREADS = 16
# Of a work folder whose slide has been, or is about to be, committed.
COMMIT = "commit.npz"
UPLOAD_RECORD = re.compile(r"upload-\d+\.json")
Status = Literal["todo", "skipped", "conflict"]


class SlideClaims:
    """The slides of an output that this run works on, which other runs then leave alone.

    Held for a lease that a background thread renews; released at the end of the `with` block. A
    claim of a run on this machine, in this pid namespace, whose process is gone holds nobody up.
    """

    def __init__(self, output: str, *, owner: str, lease_s: float) -> None:
        self._root = storage.join(output, "_state", "claims")
        self._owner = owner
        self._lease_s = lease_s
        self._lease = Lease()
        self._claims: dict[str, Claim] = {}

    def take(self, name: str) -> bool:
        """Claim a slide; False when another run has it.

        Raises:
            AccessDeniedError, StorageError: the claims cannot be read or written.
        """
        key = key_of(name)
        holder = find_holder(self._root, key)
        dead = holder if holder is not None and _is_dead(holder) else None
        taken = claim(self._root, key, owner=self._owner, lease_s=self._lease_s, dead=dead)
        if taken is None:
            return False
        self._claims[name] = taken
        self._lease.hold(taken)
        return True

    def holder(self, name: str) -> str:
        """Who has a slide, in words."""
        found = find_holder(self._root, key_of(name))
        if found is None or not found.is_live:
            return "nobody any more"
        return f"run {found.owner} on {found.host}, until {found.expires:%H:%M:%S} UTC or longer"

    def holds(self, name: str) -> bool:
        """Whether a slide is still this run's."""
        return name in self._claims and key_of(name) not in self._lease.lost

    def release(self, name: str) -> None:
        """Let others have a slide.

        Raises:
            StorageError: storage does not answer; the claim then stands until its lease ends.
        """
        taken = self._claims.pop(name, None)
        if taken is not None:
            self._lease.release(taken)

    def __enter__(self) -> Self:
        self._lease.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lease.__exit__(kind, error, trace)


def _is_dead(holder: Holder) -> bool:
    """Whether it is known that the process which holds a claim is gone."""
    # The name alone proves nothing. It is asked too because virtual machines that were started
    # from one snapshot have one boot id, and pids of their own.
    return holder.host == socket.gethostname() and is_gone(holder)


def judge(tasks: Sequence[SlideTask], *, overwrite: bool) -> list[tuple[Status, str | None]]:
    """What each task comes to, and why: `skipped` (finished already), `conflict`, or `todo`.

    A slide is finished when what lies at its place was made from the same input, checkpoint and
    settings. What was made from others is in the way, unless it may be overwritten.

    Args:
        tasks: slides of one output.
        overwrite: replace what is in the way.

    Raises:
        AccessDeniedError, StorageError: the output cannot be read.
    """
    if not tasks:
        return []
    if len(tasks) < NUM_THREADS:
        done = {item.uri for task in tasks for item in storage.list_prefix(task.done_uri)}
    else:
        below = storage.join(tasks[0].output, "_state", "done")
        done = {item.uri for item in storage.list_objects(below)}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(lambda task: _judge(task, done, overwrite=overwrite), tasks))


def _judge(task: SlideTask, done: set[str], *, overwrite: bool) -> tuple[Status, str | None]:
    try:
        there = storage.stat(task.committed_uri)
    except MissingObjectError:
        is_foreign = (
            task.format.container == "ome-zarr"
            and not storage.list_objects(task.work_root)
            and bool(storage.list_objects(task.output_uri))
        )
        # Without the object that commits ours: another program's, or another version's.
        return (
            ("conflict", _difference(task, None))
            if is_foreign and not overwrite
            else ("todo", None)
        )
    if _note_uri(task, there.size) in done:
        return "skipped", None
    # Nobody came to note it down, or it is of other settings: the slide itself knows.
    found = read_provenance(task.output_uri)
    if found is not None and found.get("digest") == task.digest:
        if storage.is_file(storage.join(task.work_uri, COMMIT)):
            return "todo", None  # what is left to do are its notes
        mark_done(task)
        return "skipped", None
    return ("todo", None) if overwrite else ("conflict", _difference(task, found))


def _difference(task: SlideTask, found: dict[str, Any] | None) -> str:
    """Why what is there is in the way."""
    if found is None:
        return (
            f"{task.output_uri} is there, and was not made by this program; move it away, choose "
            "another --output, or replace it with --overwrite"
        )
    mine = task.provenance()
    other = [
        words
        for name, words in (
            ("input_identity", "another input"),
            ("checkpoint_hash", "another checkpoint"),
            ("settings", "other settings"),
        )
        if found.get(name) != mine[name]
    ]
    return (
        f"{task.output_uri} was made from {' and '.join(other) or 'other settings'}; replace it "
        "with --overwrite, or choose another --output"
    )


def mark_done(task: SlideTask) -> None:
    """Note that what lies at the slide's place is it, so that the next run need not open it."""
    size = storage.stat(task.committed_uri).size
    storage.write_bytes(_note_uri(task, size), b"")


def is_done(task: SlideTask) -> bool:
    """Whether what lies at the slide's place is noted as it.

    Raises:
        AccessDeniedError, StorageError: the output cannot be read.
    """
    try:
        size = storage.stat(task.committed_uri).size
    except MissingObjectError:
        return False
    return storage.is_file(_note_uri(task, size))


def unmark(task: SlideTask) -> None:
    """Forget that the slide was ever finished: other pixels are about to take its place."""
    mine = task.done_uri.rpartition("@")[0] + "@"
    storage.delete([item.uri for item in storage.list_prefix(mine)])


def _note_uri(task: SlideTask, size: int) -> str:
    # With its size in the name, a listing tells whether what lies there has been replaced.
    return f"{task.done_uri}.{size}"


def sweep_stale(task: SlideTask) -> None:
    """Remove unfinished work on a slide that was begun with other settings or by another version.

    To be called by who holds the claim on the slide.
    """
    stale = {
        _work_folder(item.uri)
        for item in storage.list_objects(task.work_root)
        if not item.uri.startswith(task.work_uri + "/")
    }
    for folder in sorted(stale):
        discard_work(folder)


def sweep_abandoned(
    output: str, claims: SlideClaims, *, days: float, tasks: Sequence[SlideTask] = ()
) -> None:
    """Remove work and uploads of slides that nobody has asked for, for days.

    Object stores keep, and bill, the parts of an upload that was never completed.

    Args:
        output: folder or prefix of all slides.
        claims: of this run; slides that another run has claimed stay.
        days: age from which work is abandoned.
        tasks: what this run is about to do; their work is not abandoned.
    """
    oldest = datetime.now(UTC) - timedelta(days=days)
    wanted = {task.output_uri for task in tasks}
    for upload in uploads.list_uploads(output):
        if upload.started > oldest or upload.uri in wanted:
            continue
        name = upload.uri.removeprefix(output.rstrip("/") + "/").removesuffix(".tif")
        # A bucket may hold other people's uploads, too.
        if not _is_ours(output, name, upload.upload_id) or not claims.take(name):
            continue
        logger.info("removing the upload of %s that was begun %s", upload.uri, upload.started)
        uploads.abort(upload.uri, upload.upload_id)
        storage.delete_below(storage.join(output, "_work", key_of(name)))
        claims.release(name)


def _is_ours(output: str, name: str, upload_id: str) -> bool:
    """Whether a work folder speaks of this upload."""
    return any(
        upload_id in storage.read_bytes(item.uri).decode()
        for item in storage.list_objects(storage.join(output, "_work", key_of(name)))
        if UPLOAD_RECORD.fullmatch(storage.name_of(item.uri))
    )


def discard_work(folder: str) -> None:
    """Remove a folder of unfinished work, and abort its uploads."""
    for item in storage.list_objects(folder):
        if UPLOAD_RECORD.fullmatch(storage.name_of(item.uri)):
            begun = json.loads(storage.read_bytes(item.uri))
            uploads.abort(begun["uri"], begun["upload_id"])
    storage.delete_below(folder)


def last_speed(output: str) -> float | None:
    """LR megapixels a second of the newest run below an output that says so."""
    summaries = [
        item.uri
        for item in storage.list_objects(storage.join(output, "runs"))
        if storage.name_of(item.uri) == "summary.json"
    ]
    for uri in reversed(summaries):  # names begin with their time
        speed = json.loads(storage.read_bytes(uri)).get("lr_mpx_per_s")
        if speed:
            return float(speed)
    return None


def _work_folder(uri: str) -> str:
    """`.../_work/<name>/<digest>` of anything below it."""
    root, _, below = uri.partition("/_work/")
    return "/".join([root, "_work", *below.split("/")[:2]])
