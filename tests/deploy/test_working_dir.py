"""What `ray job submit --working-dir .` sends: the code, and nothing that jobs have left."""

import shutil
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
# docs/cluster.md says 26 MB, of which four networks are 25. Ray warns of files beyond 10 MiB, and
# refuses 500 in all.
MAX_BYTES = 28_000_000
MAX_FILE_BYTES = 10 * 2**20


def sent(folder: Path, package: Path) -> dict[str, int]:
    """Bytes in the package of each file, as Ray makes it."""
    create_package(str(folder), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        return {item.filename: item.compress_size for item in archive.infolist()}


def test_the_code_goes_along_and_what_jobs_left_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "carn"
    folder.mkdir()
    for name in ("carn", "jobs", "tune_spaces"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    # The folders that jobs write to unless they are told otherwise, and those of this project.
    left = (
        *("runs", "sweeps", "evaluation", "camelyon", "own"),
        *("demo", ".venv", ".git", "tests", "docs"),
    )
    for name in left:
        (folder / name / "deep").mkdir(parents=True)
        (folder / name / "deep" / "model.safetensors").write_bytes(bytes(100))
    files = sent(folder, tmp_path / "package.zip")
    assert {"jobs/train.py", "carn/storage.py", "tune_spaces/blocks.yaml"} <= files.keys()
    assert not [name for name in files if name.split("/")[0] in left]
    assert sum(files.values()) < MAX_BYTES
    assert max(files.values()) < MAX_FILE_BYTES
    own = {str(path.relative_to(folder)) for path in (folder / "carn").rglob("*") if path.is_file()}
    assert own <= files.keys(), "an ignored name is one of the code"
