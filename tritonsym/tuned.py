"""Tables of measurements on a machine: the fastest path for a layer or function, and the tiles of its kernels.

A table is a JSON file named after its GPU, or its CPU and the number of threads, {"version": .., "entries": {key:
{"path": .., "tiles": [[..], ..]}}}. Tables shipped with the library are in `kernels/tuned`; `tritonsym.tune` and
`advise` write the user's tables, which take precedence, to the cache directory (XDG_CACHE_HOME).
"""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tritonsym.plan import Problem

Tiles = tuple[tuple[int, ...], ...]

#: The version of the keys (`plan.Problem.key`) and of the meaning of a tile's numbers: raise it when either changes, so
#: that older tables are ignored.
VERSION = 3


def table_name(target: str) -> str:
    """The name of the table for a target: 'cpu-...-2-threads', 'nvidia-h200' for a GPU that is present, or 'sm_90'."""
    if target == "cpu":
        name = f"cpu {device_name(torch.device('cpu'))} {torch.get_num_threads()} threads"
    elif target.startswith("cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name(torch.device(target))
    else:
        return target
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def user_file(name: str) -> Path:
    """The file of the user's table, which need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError:  # no home, as in some containers
        folder = Path(tempfile.gettempdir())
    return folder / "tritonsym" / f"{name}.json"


def shipped_file(name: str) -> Path:
    """The file of the table shipped with the library, which need not exist."""
    from tritonsym import kernels

    return Path(str(kernels.__file__)).parent / "tuned" / f"{name}.json"


@lru_cache(maxsize=64)
def table(name: str) -> dict[str, Any]:
    """The shipped entries, overridden by the user's; read once, and again after `plan.forget`."""
    return {**read(shipped_file(name)), **read(user_file(name))}


def read(file: Path) -> dict[str, Any]:
    """The entries of a file; none if it is missing or, with a warning, corrupt or of another version."""
    try:
        content = json.loads(file.read_text())
        version, entries = content["version"], content["entries"]
        if version == VERSION and all("path" in e and "tiles" in e for e in entries.values()):
            return dict(entries)
        reason = f"its version is {version!r}, not {VERSION!r}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it cannot be read ({type(error).__name__}: {error})"
    warnings.warn(f"tritonsym ignores the table {file}: {reason}; tritonsym.tune writes a new one", stacklevel=2)
    return {}


def find(problem: Problem) -> tuple[str, Tiles] | None:
    """The path and tiles measured for this problem, if they can run on its target."""
    entry = table(table_name(problem.target)).get(problem.key)
    if entry is None:
        return None
    try:
        tiles = tuple(tuple(map(int, tile)) for tile in entry["tiles"])
    except (TypeError, ValueError):
        return None
    if problem.target == "cpu":
        return (entry["path"], ()) if entry["path"] in ("reference", "shift") else None
    return (entry["path"], tiles) if problem.runs(entry["path"], tiles) else None


def record(file: Path, entries: dict[str, Any]) -> None:
    """Add entries to a table. Several processes may do so at once; a reader sees the old table or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        merged = {**read(file), **entries}
        write(file, json.dumps({"version": VERSION, "entries": merged}, indent=1, sort_keys=True) + "\n")


def write(file: Path, text: str) -> None:
    """Replace a file's text atomically."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as temporary:
            temporary.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        with suppress(ImportError):  # Windows has no fcntl: there the last of two writers wins
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed or the process dies
        yield
