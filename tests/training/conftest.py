"""What the tests of training share: one drawn dataset, and a node cache of their own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.lab import write_dataset


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's cache of these tests, with one thread to compute with."""
    monkeypatch.setenv("CARN_CACHE_DIR", str(session_cache))
    monkeypatch.delenv("CARN_CACHE_GB", raising=False)
    torch.set_num_threads(1)
    return session_cache


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CARN_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, np.ndarray]]:
    """A dataset of 20 training and 4 validation tiles, and their pixels by name; not to change."""
    uri = str(tmp_path_factory.mktemp("set") / "bcsr")
    return uri, write_dataset(uri)


@pytest.fixture(scope="session")
def dataset_uri(drawn: tuple[str, dict[str, np.ndarray]]) -> str:
    return drawn[0]


@pytest.fixture(scope="session")
def pixels(drawn: tuple[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return drawn[1]


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "run")
