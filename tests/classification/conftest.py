"""What the tests of classification share: one labelled dataset, PCam in small, a node cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.classification.lab import write_labelled, write_pcam


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    """A ResNet's state is 135 MB an epoch, and nobody pulls the plug here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's cache of a test, with one thread to compute with."""
    folder = tmp_path / "node-cache"
    monkeypatch.setenv("CARN_CACHE_DIR", str(folder))
    monkeypatch.delenv("CARN_CACHE_GB", raising=False)
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "bcsr")


@pytest.fixture(scope="session")
def pcam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pcam(tmp_path_factory.mktemp("pcam"))
