"""Which slides and images there are to super-resolve, by what name, and which content they have."""

import csv
import io
import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from carn import storage
from carn.errors import CarnError, MissingObjectError
from carn.slides.image import IMAGE_SUFFIXES
from carn.slides.listing import SLIDE_SUFFIXES, find_matching, find_slides, searched_folder
from carn.slides.slide import plausible_mpp
from carn.storage import ObjectStat

logger = logging.getLogger(__name__)

# Files asked for their identity at once: over S3 each is a round trip of tens of milliseconds.
NUM_IDENTITY_THREADS = 16
# Of a manifest: a million names of 64 characters.
MAX_MANIFEST_BYTES = 64 * 1024 * 1024
_COMMENT = re.compile(r"^\s*#|\s#\s")
# Folders below an output that are the program's own.
RESERVED = ("_state", "_work")


@dataclass(frozen=True, kw_only=True)
class SlideInput:
    """A slide or image that was found.

    Attributes:
        uri: where it is.
        name: its path below the folder that was searched, without suffix; what comes of it takes
            this name below the output.
        identity: `storage.identity`; empty where it could not be read.
        size_bytes: of the file.
        mpp_um: um per level-0 px as a manifest says; None where it does not.
        is_image: a plain image rather than a slide.
        problem: why it cannot be worked on; None where nothing is known against it.
    """

    uri: str
    name: str
    identity: str = ""
    size_bytes: int = 0
    mpp_um: float | None = None
    is_image: bool = False
    problem: str | None = None


def find_inputs(slides: Sequence[str], images: Sequence[str] = ()) -> list[SlideInput]:
    """What lies below folders and prefixes, matches globs, or stands in manifests; ordered by name.

    A manifest is a .txt with a URI on each line (# begins a comment at the start of a line, or
    between spaces), or a .csv with a header: `uri`, and if wanted `mpp` (um per level-0 px) and
    `name`. A single file that cannot be read becomes an input with a problem, and so do all but the
    first of those that would take the same name.

    Args:
        slides: folders, prefixes, globs (`s3://lab/2026-*/*.svs`; `*` stays within a folder), slide
            files or manifests.
        images: folders, prefixes, globs or files of plain images.

    Raises:
        MissingObjectError: there is nothing in any of them; where only some hold nothing, that is
            a warning.
        CarnError: storage does not answer, or a manifest is not one.
    """
    found: dict[str, SlideInput] = {}
    empty: list[MissingObjectError] = []
    for roots, is_image in ((slides, False), (images, True)):
        for root in roots:
            try:
                for item in _below(root, is_image=is_image):
                    found.setdefault(item.uri, item)
            except MissingObjectError as error:
                empty.append(error)
    if empty and not found:
        raise empty[0]
    if not found:
        raise MissingObjectError(
            ", ".join(slides), "there are files here, but none that is named as a slide is"
        )
    for missing in empty:
        logger.warning("%s", missing)
    with ThreadPoolExecutor(NUM_IDENTITY_THREADS) as pool:
        known = list(pool.map(_identified, found.values()))
    return _with_own_names(sorted(known, key=lambda item: (item.name, item.uri)))


def _below(given: str, *, is_image: bool) -> list[SlideInput]:
    root = storage.normalize(given)
    if root.lower().endswith((".txt", ".csv")):
        return _of_manifest(root, is_image=is_image)
    base = searched_folder(root)
    if base is not None:
        found = find_matching(root, base, IMAGE_SUFFIXES if is_image else SLIDE_SUFFIXES)
    elif is_image:
        base, found = root, _listed_images(root)
    else:
        base, found = root, find_slides([root])
    return [_listed(item, base, is_image=is_image) for item in found]


def _listed(found: ObjectStat, base: str, *, is_image: bool) -> SlideInput:
    name = _name(found.uri, base)
    # An object's key may hold "..", which leads out of a folder of the same name on a disk.
    problem = _problem_of(name)
    if not storage.is_text(found.uri):
        problem = f"name {found.uri!r} is no UTF-8 text; rename it"
    elif problem is not None:
        problem += "; rename it, or name it otherwise in a .csv manifest (uri,name)"
    return SlideInput(
        uri=found.uri,
        name=name,
        # A local file must be read for it, which is done for many at once.
        identity=storage.identity_of(found) if found.etag is not None else "",
        size_bytes=found.size,
        is_image=is_image,
        problem=problem,
    )


def _listed_images(root: str) -> list[ObjectStat]:
    if root.lower().endswith(IMAGE_SUFFIXES) and storage.is_file(root):
        return [storage.stat(root)]
    found = storage.list_objects(root)
    images = [item for item in found if item.uri.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        raise MissingObjectError(root, f"no images here ({', '.join(IMAGE_SUFFIXES)})")
    return images


def _of_manifest(uri: str, *, is_image: bool) -> list[SlideInput]:
    try:
        rows = _manifest_rows(uri)
    except (csv.Error, UnicodeDecodeError) as error:
        raise CarnError(f"{uri} is no manifest ({error}); write it as UTF-8 text") from error
    items = []
    for number, row in enumerate(rows, start=1):
        try:
            slide = storage.normalize((row["uri"] or "").strip())
            said = (row.get("mpp") or "").strip()
            mpp_um = float(said) if said else None
            if said and plausible_mpp(mpp_um) is None:
                raise ValueError(f"mpp is {said!r}; it must be a number of um per level-0 px")
        except ValueError as error:
            raise CarnError(f"{uri}, entry {number}: {error}") from error
        name = (row.get("name") or "").strip().strip("/") or storage.stem_of(slide)
        if (problem := _problem_of(name)) is not None:
            raise CarnError(f"{uri}, entry {number}: {problem}")
        items.append(SlideInput(uri=slide, name=name, mpp_um=mpp_um, is_image=is_image))
    if not items:
        raise MissingObjectError(uri, "names no slides")
    return items


def _manifest_rows(uri: str) -> list[dict[str, str | None]]:
    text = storage.read_bytes(uri, max_bytes=MAX_MANIFEST_BYTES).decode("utf-8-sig")
    rows: Iterable[dict[str, str | None]]
    if uri.lower().endswith(".txt"):
        # Names of files hold # as well: "Slide #3.svs".
        lines = (_COMMENT.split(line, maxsplit=1)[0].strip() for line in text.splitlines())
        rows = [{"uri": line} for line in lines if line]
    else:
        reader = csv.DictReader(io.StringIO(text))
        columns = set(reader.fieldnames or ())
        if "uri" not in columns or columns - {"uri", "mpp", "name"}:
            raise CarnError(
                f"{uri} has the columns {', '.join(sorted(columns)) or 'none'}; it needs uri, and "
                "may have mpp (um per level-0 px) and name"
            )
        rows = list(reader)
    return list(rows)


def _problem_of(name: str) -> str | None:
    """Why a slide's name cannot be that of its output."""
    if not storage.is_below(name) or storage.CONTROL.search(name):
        return f"name {name!r} is no path below the output"
    if name.split("/", maxsplit=1)[0] in RESERVED:
        return (
            f"name {name!r} is below {name.split('/', maxsplit=1)[0]}, which is the program's own"
        )
    return None


def _name(uri: str, base: str) -> str:
    base = base.rstrip("/")
    below = uri.removeprefix(base + "/") if uri != base else storage.name_of(uri)
    folder, _, file = below.rpartition("/")
    stem = storage.stem_of(file)
    return f"{folder}/{stem}" if folder else stem


def _identified(item: SlideInput) -> SlideInput:
    if item.problem is not None or item.identity:
        return item
    try:
        found = storage.stat(item.uri)
        return replace(item, identity=storage.identity_of(found), size_bytes=found.size)
    except CarnError as error:
        return replace(item, problem=str(error))


def _with_own_names(items: list[SlideInput]) -> list[SlideInput]:
    owners: dict[str, str] = {}
    kept = []
    for item in items:
        owner = owners.setdefault(item.name, item.uri)
        if owner != item.uri and item.problem is None:
            problem = f"takes the name {item.name!r}, as {owner} does; name them apart in a .csv "
            kept.append(replace(item, problem=problem + "manifest (uri,name)"))
        else:
            kept.append(item)
    return kept
