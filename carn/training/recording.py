"""What a run leaves to look at while it goes on: metrics.csv and TensorBoard's files."""

import csv
import io
import logging
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from carn import storage
from carn.errors import MissingObjectError
from carn.training.run_folder import METRICS

logger = logging.getLogger(__name__)

# Columns that every row has; the terms of the loss stand between them and those of validation.
FIRST_COLUMNS = ("step", "seconds", "learning_rate", "images_per_s")
VALIDATION_COLUMNS = ("validation_psnr", "validation_ssim")
# Those of one condition are called `validation_psnr/<condition>`.
_VALIDATION = "validation_"

Row = dict[str, float]


class Recorder:
    """Rows of metrics, kept from an earlier part of the run up to the step it resumes from."""

    def __init__(self, uri: str, *, first_step: int) -> None:
        self._uri = uri
        self.rows = [row for row in read_metrics(uri) if row["step"] <= first_step]
        self._board: Any = None
        self._board_folder: Path | None = None
        self._first_step = first_step

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all parts of the run."""
        return self.rows[-1]["seconds"] if self.rows else 0.0

    def add(self, row: Mapping[str, float]) -> None:
        """A row; values that repeat a step's are joined with its row."""
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1].update(row)
        else:
            self.rows.append(dict(row))
        board = self._open_board()
        if board is not None:
            for name, value in row.items():
                if name not in ("step", "seconds"):
                    board.add_scalar(_board_name(name), value, int(row["step"]))

    def flush(self) -> None:
        """Write what there is."""
        storage.write_bytes(storage.join(self._uri, METRICS), _to_csv(self.rows))
        if self._board is not None:
            self._board.flush()
            if self._board_folder is not None:
                for path in self._board_folder.iterdir():
                    target = storage.join(self._uri, "tensorboard", path.name)
                    storage.write_bytes(target, path.read_bytes())

    def close(self) -> None:
        """Write what there is and let go of the files."""
        self.flush()
        if self._board is not None:
            self._board.close()
        if self._board_folder is not None:
            shutil.rmtree(self._board_folder, ignore_errors=True)

    def _open_board(self) -> Any:
        if self._board is not None:
            return self._board
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            # A bare machine with torch alone trains as well; metrics.csv holds the same.
            return None
        folder = storage.join(self._uri, "tensorboard")
        if storage.is_s3(self._uri):
            # An object store cannot append: the file grows here and is sent whole.
            self._board_folder = Path(tempfile.mkdtemp(prefix="carn-tensorboard-"))
            folder = str(self._board_folder)
        purge = self._first_step + 1 if self._first_step else None
        # Named by second and host: a part of a run must not write over the one before it.
        suffix = f".{self._first_step}"
        self._board = SummaryWriter(logdir=folder, purge_step=purge, filename_suffix=suffix)
        return self._board


def read_metrics(uri: str) -> list[Row]:
    """The rows of a run's metrics.csv, those of it that have a value; empty where there is none."""
    try:
        content = storage.read_bytes(storage.join(uri, METRICS)).decode()
    except MissingObjectError:
        return []
    return [
        {name: float(value) for name, value in row.items() if value}
        for row in csv.DictReader(io.StringIO(content))
    ]


def loss_terms(rows: Iterable[Row]) -> list[str]:
    """The columns that are neither of every run nor of validation, in the order of the alphabet."""
    names = {name for row in rows for name in row} - set(FIRST_COLUMNS)
    return sorted(name for name in names if not name.startswith(_VALIDATION))


def _to_csv(rows: list[Row]) -> bytes:
    names = dict.fromkeys(name for row in rows for name in row)
    by_condition = [name for name in names if name.startswith(f"{_VALIDATION}") and "/" in name]
    columns = [*FIRST_COLUMNS, *loss_terms(rows), *VALIDATION_COLUMNS, *by_condition]
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        whole = {"step": int(row["step"])}
        writer.writerow({name: repr(value) for name, value in row.items()} | whole)
    return buffer.getvalue().encode()


def _board_name(name: str) -> str:
    if name in FIRST_COLUMNS:
        return f"run/{name}"
    if name.startswith(_VALIDATION):
        return f"validation/{name.removeprefix(_VALIDATION)}"
    return f"train/{name}"
