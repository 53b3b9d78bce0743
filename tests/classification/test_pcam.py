"""PCam's files are read as published, in parts, from disk and from an object store."""

import gzip
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from carn.classification import pcam as pcam_module
from carn.classification.pcam import open_pcam
from carn.errors import DatasetError
from tests.classification.lab import PCAM_COUNTS, write_pcam

STEM = "camelyonpatch_level_2_split_"


@pytest.fixture
def own(pcam: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pcam, tmp_path / "pcam"))


def test_images_labels_and_slides_are_those_of_the_files(pcam: Path, monkeypatch) -> None:
    monkeypatch.setattr(pcam_module, "IMAGES_PER_GROUP", 16)
    corpus = open_pcam(str(pcam))
    assert corpus.has_slides
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        index = corpus.index(split)  # type: ignore[arg-type]
        assert len(index) == PCAM_COUNTS[name]
        assert index.label.tolist() == [n % 2 for n in range(len(index))]
        assert index.slides == tuple(f"{name}_{n // 4}" for n in range(len(index)))
    groups = corpus.groups("train")
    assert groups == [(0, 16), (16, 16), (32, 8)]
    with h5py.File(pcam / f"{STEM}train_x.h5") as file:
        wanted = file["x"][:]
    found = np.stack([image for number in range(3) for image in corpus.read("train", number)])
    assert (found == wanted).all()
    assert corpus.index("train").tile_ids[33] == "train-000033"


def test_without_tables_each_image_stands_alone(tmp_path: Path) -> None:
    corpus = open_pcam(str(write_pcam(tmp_path / "pcam", has_slides=False)))
    assert not corpus.has_slides
    assert len(set(corpus.index("test").slides)) == PCAM_COUNTS["test"]


def test_files_on_an_object_store(pcam: Path, s3) -> None:
    for path in pcam.iterdir():
        s3.client.put_object(Bucket=s3.name, Key=f"p/{path.name}", Body=path.read_bytes())
    corpus = open_pcam(f"s3://{s3.name}/p")
    assert corpus.index("test").slides == open_pcam(str(pcam)).index("test").slides
    for one, other in zip(
        corpus.read("test", 0), open_pcam(str(pcam)).read("test", 0), strict=True
    ):
        assert (one == other).all()


def test_absent_files_are_said_with_where_they_are_published(tmp_path: Path, own: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"has no .*train_x\.h5.*github\.com/basveeling/pcam.*zenodo.*2546921"
    ):
        open_pcam(str(tmp_path / "nowhere"))
    (own / f"{STEM}valid_y.h5").unlink()
    with pytest.raises(DatasetError, match=r"has no .*valid_y\.h5"):
        open_pcam(str(own))


def test_packed_files_are_refused_with_the_command_that_unpacks_them(own: Path) -> None:
    path = own / f"{STEM}test_x.h5"
    (own / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    path.unlink()
    with pytest.raises(
        DatasetError, match=r"test_x\.h5\.gz, which is packed.*gunzip camelyonpatch"
    ):
        open_pcam(str(own))


def test_files_of_another_form_are_refused(own: Path) -> None:
    path = own / f"{STEM}test_x.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros((12, 64, 64, 3), np.uint8)
    with pytest.raises(DatasetError, match=r"\(12, 64, 64, 3\).*\(N, 96, 96, 3\)"):
        open_pcam(str(own))
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros((11, 96, 96, 3), np.uint8)
    with pytest.raises(DatasetError, match=r"test_x\.h5"):
        open_pcam(str(own))
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((12, 96, 96, 3), np.uint8)
    with pytest.raises(DatasetError, match=r"test_x\.h5 is damaged or not PCam's"):
        open_pcam(str(own))
    path.write_bytes(b"no HDF5 at all")
    with pytest.raises(DatasetError, match=r"test_x\.h5 is damaged or not PCam's"):
        open_pcam(str(own))


def test_other_labels_and_tables_are_refused(own: Path) -> None:
    meta = own / f"{STEM}test_meta.csv"
    meta.write_text(meta.read_text().rsplit("\n", 2)[0] + "\n")
    with pytest.raises(DatasetError, match=r"test_meta\.csv does not name the slide"):
        open_pcam(str(own)).index("test")
    with h5py.File(own / f"{STEM}test_y.h5", "w") as file:
        file["y"] = np.full((12, 1, 1, 1), 3, np.uint8)
    with pytest.raises(DatasetError, match=r"other labels than 0 and 1"):
        open_pcam(str(own)).index("test")


def test_the_digest_follows_the_files(own: Path) -> None:
    before = open_pcam(str(own)).digest
    assert open_pcam(str(own)).digest == before
    with h5py.File(own / f"{STEM}test_y.h5", "w") as file:
        file["y"] = np.ones((12, 1, 1, 1), np.uint8)
    assert open_pcam(str(own)).digest != before
