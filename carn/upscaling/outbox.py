"""What an output folder says of each slide: finished, in the way, begun by a run that is gone.

Below the output: the slides; `_state/done/<name>@<digest>.<size>` for every finished one;
`_state/claims`; `_work/<name>/<digest>/` for unfinished ones; `runs/<id>/`. Beside each slide lie
its notes, `<name>.json` and `<name>.consistency.png`.
"""

import json
import logging
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Literal, Self

from carn import storage, uploads
from carn.claims import Claim, Holder, Lease, claim, find_holder, is_gone
from carn.errors import MissingObjectError
from carn.slides.provenance import read_provenance
from carn.slides.slide_output import SPEC, OutputSpec, SlideOutput, open_output
from carn.storage import ObjectStat
from carn.upscaling.task import SlideTask, key_of

logger = logging.getLogger(__name__)

NUM_THREADS = 16
# Objects a finished slide has at its place: itself, and its two notes.
OBJECTS_A_SLIDE = 3
# Of a work folder whose slide has been, or is about to be, committed.
COMMIT = "commit.npz"
# In a work folder: what is to lie beside the slide, by the end of its name.
NOTES = "notes"
# What a slide's name ends with, by container; see SlideTask.output_uri.
SUFFIXES = {"tiff": ".tif", "ome-zarr": ".ome.zarr"}
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
        return self._take(key_of(name))

    def _take(self, key: str) -> bool:
        holder = find_holder(self._root, key)
        dead = holder if holder is not None and _is_dead(holder) else None
        taken = claim(self._root, key, owner=self._owner, lease_s=self._lease_s, dead=dead)
        if taken is None:
            return False
        self._claims[key] = taken
        self._lease.hold(taken)
        return True

    @contextmanager
    def briefly(self, key: str) -> Iterator[bool]:
        """Claim the slide of a `key_of` for the `with` block, which is told whether it is ours.

        Raises:
            AccessDeniedError, StorageError: the claims cannot be read or written.
        """
        is_ours = self._take(key)
        try:
            yield is_ours
        finally:
            if is_ours:
                self._release(key)

    def was_taken(self, key: str) -> bool:
        """Whether a run has ever worked on the slide of a `key_of`."""
        return find_holder(self._root, key) is not None

    def holder(self, name: str) -> str:
        """Who has a slide, in words."""
        found = find_holder(self._root, key_of(name))
        if found is None or not found.is_live:
            return "nobody any more"
        return f"run {found.owner} on {found.host}, until {found.expires:%H:%M:%S} UTC or longer"

    def holds(self, name: str) -> bool:
        """Whether a slide is still this run's."""
        return key_of(name) in self._claims and key_of(name) not in self._lease.lost

    def release(self, name: str) -> None:
        """Let others have a slide.

        Raises:
            StorageError: storage does not answer; the claim then stands until its lease ends.
        """
        self._release(key_of(name))

    def _release(self, key: str) -> None:
        taken = self._claims.pop(key, None)
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
        uris = [task.done_uri for task in tasks]
        is_s3 = storage.is_s3(below)
        found = storage.list_among(below, uris) if is_s3 else storage.list_objects(below)
        done = {item.uri for item in found}
    sizes = _committed_sizes(tasks, num_done=len(done))
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(
            pool.map(lambda task, size: _judge(task, size, done, overwrite=overwrite), tasks, sizes)
        )


def _committed_sizes(tasks: Sequence[SlideTask], *, num_done: int) -> list[int | None]:
    """Sizes of what is at the places of slides; None where there is nothing."""
    output, form = tasks[0].output, tasks[0].format
    num_pages = num_done * OBJECTS_A_SLIDE / storage.PAGE
    is_listed = storage.is_s3(output) and form.container == "tiff"
    if is_listed and num_pages < len(tasks) / NUM_THREADS:
        places = [task.committed_uri for task in tasks]
        found = storage.list_among(output.rstrip("/") + "/", places)
        sizes = {item.uri: item.size for item in found}
        return [sizes.get(place) for place in places]

    def size_of(task: SlideTask) -> int | None:
        try:
            return storage.stat(task.committed_uri).size
        except MissingObjectError:
            return None

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(size_of, tasks))


def _judge(
    task: SlideTask, size: int | None, done: set[str], *, overwrite: bool
) -> tuple[Status, str | None]:
    if size is None:
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
    if _note_uri(task, size) in done:
        return "skipped", None
    # Nobody came to note it down, or it is of other settings: the slide itself knows.
    found = read_provenance(task.output_uri)
    if found is not None and found.get("digest") == task.digest:
        if _lacks_notes(task):
            return "todo", None  # they are all that is left to do
        mark_done(task)
        return "skipped", None
    return ("todo", None) if overwrite else ("conflict", _difference(task, found))


def _lacks_notes(task: SlideTask) -> bool:
    """Whether the slide was committed, by any version, and its notes were perhaps not published."""
    folders = _work_folders(task.output, below=task.work_root)
    return any(
        folder == task.work_uri or _is_at_its_place(_begun(task.output, folder))
        for folder, items in folders.items()
        if any(item.uri == storage.join(folder, COMMIT) for item in items)
    )


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


def stage_notes(task: SlideTask, notes: Mapping[str, bytes]) -> None:
    """Keep a slide's notes in its work folder: they go with it, to its place or nowhere.

    Args:
        task: the slide.
        notes: by what follows the slide's name and a dot.
    """
    for end, content in notes.items():
        storage.write_bytes(storage.join(task.work_uri, NOTES, end), content)


def publish_notes(work_uri: str, base: str) -> None:
    """Put the notes that were staged in a work folder beside the slide, whose name is `base`."""
    for item in storage.list_objects(storage.join(work_uri, NOTES)):
        content = storage.read_bytes(item.uri)
        storage.write_bytes(f"{base}.{storage.name_of(item.uri)}", content)


def sweep_stale(task: SlideTask) -> None:
    """Remove unfinished work on a slide that was begun with other settings or by another version.

    To be called by who holds the claim on the slide.
    """
    for folder in _work_folders(task.output, below=task.work_root):
        if folder != task.work_uri:
            _discard(task.output, folder)


def sweep_abandoned(
    output: str, claims: SlideClaims, *, days: float, tasks: Sequence[SlideTask] = ()
) -> None:
    """Remove what nobody will go on with, and tidy up after finished slides.

    That is work on slides that nobody has asked for, for days; work on slides that are there, whose
    process was killed before it could tidy up (if it had not brought their notes to them, they are
    brought now); and uploads that no work folder knows of, such as one whose beginning was not
    answered. Object stores keep, and bill, the parts of an upload that was never completed.

    Args:
        output: folder or prefix of all slides.
        claims: of this run; slides that another run has claimed stay.
        days: age from which work and uploads are abandoned.
        tasks: what this run is about to do; their work is not abandoned.

    Raises:
        AccessDeniedError, StorageError: something could not be looked at or removed.
    """
    oldest = datetime.now(UTC) - timedelta(days=days)
    _sweep_work(output, claims, oldest=oldest, tasks=tasks)
    _sweep_uploads(output, claims, oldest=oldest)


def _sweep_work(
    output: str, claims: SlideClaims, *, oldest: datetime, tasks: Sequence[SlideTask]
) -> None:
    wanted = {key_of(task.name) for task in tasks}
    under_way = {task.work_uri for task in tasks}

    def is_over(folder: str, items: Sequence[ObjectStat]) -> bool:
        if folder in under_way:
            return False
        is_old = all(item.modified is not None and item.modified < oldest for item in items)
        # Stale work on what is wanted goes when that is begun.
        is_old = is_old and _key_of_folder(folder) not in wanted
        return is_old or _is_at_its_place(_begun(output, folder))

    folders = _work_folders(output, below=storage.join(output, "_work"))
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        verdicts = list(pool.map(is_over, folders, folders.values()))
    for folder in (folder for folder, verdict in zip(folders, verdicts, strict=True) if verdict):
        with claims.briefly(_key_of_folder(folder)) as is_ours:
            # Another run may have been here meanwhile.
            items = storage.list_objects(folder)
            if is_ours and items and is_over(folder, items):
                logger.info("removing %s, which nobody goes on with", folder)
                _discard(output, folder)


def _sweep_uploads(output: str, claims: SlideClaims, *, oldest: datetime) -> None:
    for upload in uploads.list_uploads(output):
        suffix = SUFFIXES["tiff"]
        if upload.started > oldest or not upload.uri.endswith(suffix):
            continue
        key = key_of(upload.uri.removeprefix(output.rstrip("/") + "/").removesuffix(suffix))
        folder = storage.join(output, "_work", key)
        # A bucket may hold other people's uploads, too.
        if not claims.was_taken(key) and not storage.list_objects(folder):
            continue
        with claims.briefly(key) as is_ours:
            if is_ours and not _knows_of(folder, upload.upload_id):
                logger.info("removing the upload of %s begun %s", upload.uri, upload.started)
                uploads.abort(upload.uri, upload.upload_id)


def _knows_of(folder: str, upload_id: str) -> bool:
    """Whether the records below a folder speak of an upload."""
    return any(
        upload_id in storage.read_bytes(item.uri).decode(errors="replace")
        for item in storage.list_objects(folder)
        if storage.name_of(item.uri).startswith("upload-")
    )


def _discard(output: str, folder: str) -> None:
    """Remove a work folder, with its upload or shards; its slide, if it is there, has its notes."""
    begun = _begun(output, folder)
    if begun is not None:
        if _is_at_its_place(begun):
            suffix = SUFFIXES[begun.spec.format.container]
            publish_notes(folder, begun.spec.uri.removesuffix(suffix))
        begun.discard()
    # What was killed before its output was begun has none.
    storage.delete_unfinished(folder)
    storage.delete_below(folder)


def _is_at_its_place(begun: SlideOutput | None) -> bool:
    """Whether the slide that is there is this one."""
    return begun is not None and read_provenance(begun.spec.uri) == begun.spec.provenance


def _begun(output: str, folder: str) -> SlideOutput | None:
    """What is written from a work folder; None where it does not say so, or has been moved."""
    # Anything may lie there, and must not lead to another place.
    with suppress(MissingObjectError, ValueError, LookupError, TypeError, RecursionError):
        spec = OutputSpec.from_json(storage.read_bytes(storage.join(folder, SPEC)).decode())
        root, suffix = output.rstrip("/") + "/", SUFFIXES[spec.format.container]
        name = spec.uri.removeprefix(root).removesuffix(suffix)
        is_known = spec.uri == f"{root}{name}{suffix}" and storage.is_below(name)
        if is_known and spec.work_uri == folder and key_of(name) == _key_of_folder(folder):
            return open_output(spec)
    return None


def _work_folders(output: str, *, below: str) -> dict[str, list[ObjectStat]]:
    """What lies below `_work`, or a part of it, by work folder."""
    root = storage.join(output, "_work") + "/"
    folders = defaultdict(list)
    for item in storage.list_objects(below):
        key, _, rest = item.uri.removeprefix(root).partition("/")
        digest, is_within, _ = rest.partition("/")
        if is_within:
            folders[f"{root}{key}/{digest}"].append(item)
    return dict(folders)


def _key_of_folder(folder: str) -> str:
    """The `key_of` of the slide that a work folder is of."""
    return storage.name_of(folder.rpartition("/")[0])


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
