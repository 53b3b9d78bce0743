"""PCam's files from outside: pixels come from the files themselves, and are bounded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from carn.classification import pcam as pcam_module
from carn.classification.pcam import open_pcam, read_labels
from carn.errors import CarnError, DatasetError
from tests.fuzzing import only_own_errors

STEM = "camelyonpatch_level_2_split_"


@pytest.fixture
def own(pcam: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pcam, tmp_path / "pcam"))


def rewrite(own: Path, part: str, write: Callable[[h5py.File], object]) -> None:
    path = own / f"{STEM}train_{part}.h5"
    path.unlink()
    with h5py.File(path, "w") as file:
        write(file)


def secret(own: Path) -> tuple[Path, tuple[int, ...]]:
    """A file of somebody else's, as large as the images."""
    with h5py.File(own / f"{STEM}train_x.h5") as file:
        shape = file["x"].shape
    path = own.parent / "secret"
    path.write_bytes(bytes(int(np.prod(shape))))
    return path, shape


def test_pixels_of_other_files_are_not_read(own: Path) -> None:
    # HDF5 would read any file of this machine as images, which then stand in reports.
    path, shape = secret(own)
    rewrite(
        own,
        "x",
        lambda file: file.create_dataset(
            "x", shape, "u1", external=[(str(path), 0, path.stat().st_size)]
        ),
    )
    with pytest.raises(DatasetError, match="x lies in other files"):
        open_pcam(str(own))


def test_arrays_that_are_put_together_from_other_files_are_not_read(own: Path) -> None:
    _, shape = secret(own)
    with h5py.File(own.parent / "other.h5", "w") as other:
        other.create_dataset("x", shape, "u1")
    layout = h5py.VirtualLayout(shape, "u1")
    layout[...] = h5py.VirtualSource(str(own.parent / "other.h5"), "x", shape)
    rewrite(own, "x", lambda file: file.create_virtual_dataset("x", layout))
    with pytest.raises(DatasetError, match="x lies in other files"):
        open_pcam(str(own))


@pytest.mark.parametrize("link", [h5py.ExternalLink("/other.h5", "/x"), h5py.SoftLink("/z")])
def test_links_are_not_followed(own: Path, link: object) -> None:
    rewrite(own, "x", lambda file: file.__setitem__("x", link))
    with pytest.raises(DatasetError, match="x is a link"):
        open_pcam(str(own))


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda file: file.create_group("y"), "y is no array"),
        (lambda file: file.create_dataset("y", data=1), "y is no array"),
        (lambda file: file.create_dataset("y", data=["a"] * 4), "y holds no numbers"),
        (lambda file: file.create_dataset("y", data=h5py.Empty("u1")), "y is no array"),
        (
            lambda file: file.create_dataset("y", (10**15, 1, 1, 1), "u1", chunks=True),
            "holds uint8",
        ),
        (
            lambda file: file.create_dataset("y", (10**12, 1, 1, 1), "u1", chunks=(2**31, 1, 1, 1)),
            "in parts of 2147483648 bytes",
        ),
        (
            lambda file: file.create_dataset("y", (40, 1, 1, 1), "u1", compression="lzf"),
            "packed by filters",
        ),
    ],
    ids=["group", "scalar", "texts", "empty", "very many", "large parts", "other filters"],
)
def test_labels_of_another_form_are_one_error(
    own: Path, write: Callable[[h5py.File], object], words: str
) -> None:
    rewrite(own, "y", write)
    with pytest.raises(DatasetError, match=words):
        open_pcam(str(own))


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.create_dataset("y", (10**12, 1, 1, 1), "u1", chunks=True),
        lambda file: file.create_dataset("y", data=np.zeros((4, 1, 1, 1))),
    ],
)
def test_labels_are_not_read_before_they_are_looked_at(
    own: Path, write: Callable[[h5py.File], object]
) -> None:
    rewrite(own, "y", write)
    with pytest.raises(DatasetError, match="holds no labels"):
        read_labels(str(own), "train")


def test_tables_of_slides_are_bounded_and_text(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = own / f"{STEM}train_meta.csv"
    table.write_text(f'wsi\n"{"a" * 200_000}"\n')
    with pytest.raises(DatasetError, match="does not name the slide"):
        open_pcam(str(own)).index("train")
    monkeypatch.setattr(pcam_module, "MAX_META_BYTES", 10)
    with pytest.raises(CarnError, match="at most 10"):
        open_pcam(str(own)).index("train")


def test_mutated_files_are_read_or_one_error(own: Path) -> None:
    rng = np.random.default_rng(1)
    path = own / f"{STEM}train_y.h5"
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        content = whole.copy()
        content[rng.integers(0, min(len(whole), 1200), 4)] = rng.choice([0, 1, 127, 128, 255], 4)
        path.write_bytes(content.tobytes())
        with only_own_errors():
            read_labels(str(own), "train")
