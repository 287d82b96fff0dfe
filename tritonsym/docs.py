"""``python -m tritonsym docs``: the public names and the files, from their docstrings."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tritonsym
from tritonsym import functional, nn, testing

WIDTH = 100


def public() -> Iterator[tuple[str, str, Any]]:
    """All public names: the module, the name there, and what it means."""
    for module in (tritonsym, nn, functional, testing):
        for name in module.__all__:
            if name != "__version__" and not inspect.ismodule(getattr(module, name)):
                yield module.__name__, name, getattr(module, name)


def _table(rows: Iterable[tuple[str, str | None]]) -> str:
    """Names and the first sentence of their docstrings; those for one, two and three axes in one line."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, doc in rows:
        sentence = re.split(r"(?<=[\w)`])\.(?: |$)", " ".join((doc or "").split("\n\n")[0].split()))[0]
        stem, axes = re.fullmatch(r"(.*?)([123]d)?", name).groups("")  # type: ignore[union-attr]
        lines.setdefault((stem, sentence), []).append(axes)
    table = {stem + "/".join(axes): sentence for (stem, sentence), axes in lines.items()}
    width = max(map(len, table))
    rest = " " * (width + 2)
    return "\n".join(
        textwrap.fill(text or "-", WIDTH, initial_indent=name.ljust(width + 2), subsequent_indent=rest)
        for name, text in table.items()
    )


def names() -> str:
    """Tables of all public names."""
    sections: dict[str, list[tuple[str, str | None]]] = {}
    for module, name, value in public():
        sections.setdefault(module, []).append((name, inspect.getdoc(value)))
    return "\n\n".join(f"{module}\n\n{_table(rows)}" for module, rows in sections.items())


def files() -> str:
    """A table of the library's files, by their place in the package."""
    rows = []
    for package in ("tritonsym", "tritonsym.kernels", "tritonsym.perf"):
        spec = find_spec(package)
        assert spec and spec.origin
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            name = Path(*package.split(".")[1:], path.relative_to(folder)).as_posix()
            rows.append((name, ast.get_docstring(ast.parse(path.read_text()))))
    return _table(rows)


def whole(name: str) -> str:
    """All about one public name, 'TiedConv2d' or 'nn.TiedConv2d'.

    Raises:
        ValueError: there is no such name.
    """
    found = {f"{module}.{own}": value for module, own, value in public() if f".{module}.{own}".endswith(f".{name}")}
    if not found:
        raise ValueError(f"docs: no public name {name!r}; python -m tritonsym docs lists them")
    full, value = next(iter(found.items()))
    return f"{full}{inspect.signature(value)}\n\n{inspect.getdoc(value)}"
