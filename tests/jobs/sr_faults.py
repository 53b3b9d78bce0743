"""Faults at named places of a job's processes, by a sitecustomize.py that these processes import.

A test writes what is to go wrong with `prepare` and starts the job in the environment it returns.
Every Python process below it (the driver, Ray's workers) then wraps the functions that are named.
Nothing but the standard library is imported here: it runs before anything else does.
"""

import fnmatch
import functools
import importlib.abc
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal

SCRIPT = "super_resolve.py"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens at some calls of a function.

    Attributes:
        function: "module:qualified.name".
        do: `kill` (SIGKILL) the process that calls; `power_cut`: the driver first, then that
            process; `wait` until the test says `go`.
        when: before the call; after it; or half: it is called with half of the bytes first.
        said: pattern of the call's arguments that can be told in words, such as "Case_1 3".
        skip: calls, over all processes, that pass first.
        times: how many calls it happens to.
    """

    function: str
    do: Literal["kill", "power_cut", "wait"] = "kill"
    when: Literal["before", "after", "half"] = "before"
    said: str = "*"
    skip: int = 0
    times: int = 1


def prepare(folder: Path, faults: Sequence[Fault]) -> dict[str, str]:
    """Environment variables that make a job fail so; `folder` is new, one for each run."""
    folder.mkdir()
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    (folder / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('sr_faults', {str(Path(__file__))!r})\n"
        "sys.modules['sr_faults'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"module.install({str(folder)!r})\n"
    )
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *([before] if before else [])])}


def count(folder: Path, index: int = 0) -> int:
    """How often a fault, by its index, has struck."""
    return len(list(folder.glob(f"struck-{index}-*")))


def go(folder: Path) -> None:
    """Let all that waits go on."""
    (folder / "go").touch()


# ---------------------------------------------------------------------- in the job's processes


def install(folder: str) -> None:
    """Wrap what the faults name as soon as its module is imported."""
    if any(Path(argument).name == SCRIPT for argument in sys.orig_argv):
        (Path(folder) / "driver").write_text(str(os.getpid()))
    faults = [Fault(**fields) for fields in json.loads((Path(folder) / "faults.json").read_text())]
    sys.meta_path.insert(0, _Finder(Path(folder), faults))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, folder: Path, faults: Sequence[Fault]) -> None:
        self._folder = folder
        self._faults = faults

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        wanted = [
            (index, fault)
            for index, fault in enumerate(self._faults)
            if fault.function.partition(":")[0] == name
        ]
        if not wanted:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_wrap(module: Any) -> None:
            run(module)
            for index, fault in wanted:
                _wrap(module, fault, self._folder, index)

        spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(module: Any, fault: Fault, folder: Path, index: int) -> None:
    *owners, name = fault.function.partition(":")[2].split(".")
    owner = functools.reduce(getattr, owners, module)
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        said = " ".join(filter(None, (_said(value) for value in arguments)))
        if not fnmatch.fnmatchcase(said, fault.said):
            return function(*arguments, **named)
        if fault.when == "after":  # its turn comes when it has been survived
            result = function(*arguments, **named)
            if _is_turn(fault, folder, index):
                _strike(fault, folder, index)
            return result
        if not _is_turn(fault, folder, index):
            return function(*arguments, **named)
        if fault.when == "half":
            halves = (v[: len(v) // 2] if isinstance(v, bytes) else v for v in arguments)
            function(*halves, **named)
        _strike(fault, folder, index)
        return function(*arguments, **named)

    setattr(owner, name, wrapped)


def _said(value: Any) -> str:
    if isinstance(value, str | int | Path):
        return str(value)
    for name in ("task.name", "name", "spec.uri"):
        try:
            return str(functools.reduce(getattr, name.split("."), value))
        except AttributeError:
            continue
    return ""


def _is_turn(fault: Fault, folder: Path, index: int) -> bool:
    """Whether this call, counted over all processes, is one that the fault strikes."""
    number = 0
    while True:
        try:
            (folder / f"call-{index}-{number}").touch(exist_ok=False)
        except FileExistsError:
            number += 1
            continue
        return fault.skip <= number < fault.skip + fault.times


def _strike(fault: Fault, folder: Path, index: int) -> None:
    (folder / f"struck-{index}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if fault.do == "wait":
        while not (folder / "go").exists():
            time.sleep(0.02)
        return
    if fault.do == "power_cut":
        driver = int((folder / "driver").read_text())
        if driver != os.getpid():
            os.kill(driver, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
