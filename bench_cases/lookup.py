"""Registries of declarations: ids that are checked, looked up, and answered with the nearest ones when unknown; objects in a
person's own file by ``path/to/file.py:NAME``.

Also what a missing package means to a person, for every command line. Imports nothing of ours.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Declared = TypeVar("Declared")


class UnknownId(LookupError):
    """An id that no registry holds; the message lists the nearest ones."""

    def __str__(self) -> str:  # KeyError-style quoting of the message would hide it
        return str(self.args[0])


class BadDeclaration(ValueError):
    """A declaration whose fields contradict each other; raised when it is made."""


def lookup(kind: str, wanted: str, registry: Mapping[str, Declared]) -> Declared:
    """The entry ``wanted`` of ``registry``; raises `UnknownId` naming the nearest ids.

    ``kind`` is what a person calls such an entry ("case", "dtype configuration").
    """
    try:
        return registry[wanted]
    except KeyError:
        pass
    near = difflib.get_close_matches(wanted, registry, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}; all" if near else "allowed"
    raise UnknownId(f"unknown {kind} {wanted!r} ({hint}: {', '.join(registry)})")


def load_object(name: str) -> Any:
    """The object ``NAME`` of ``path/to/file.py:NAME``. The file is run: it is the caller's own code."""
    path, _, attribute = name.rpartition(":")
    file = Path(path)
    if not attribute:
        raise BadDeclaration(f"{name} names a file and no case in it; the form is path/to/file.py:NAME")
    if not file.is_file():
        raise UnknownId(f"no file {path!r} (from {name!r}; the form is path/to/file.py:NAME)")
    module_name = f"own_{file.stem}_{abs(hash(file.resolve())):x}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None  # a file that is there
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise BadDeclaration(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        return getattr(sys.modules[module_name], attribute)
    except AttributeError:
        raise UnknownId(f"{path} has no {attribute!r}") from None


def index(entries) -> dict:
    """Entries by their ``id``, in the order written; raises `BadDeclaration` on a repeat."""
    table = {}
    for entry in entries:
        if entry.id in table:
            raise BadDeclaration(f"id {entry.id!r} is declared twice")
        table[entry.id] = entry
    return table


def check_id(identifier: str, owner: str) -> None:
    """An id becomes part of file names: ASCII letters, digits and underscores, at most 80."""
    check(
        re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,79}", identifier) is not None,
        owner,
        "id must be 1 to 80 letters, digits and underscores, and must not begin with a digit",
    )


def check(condition: bool, owner: str, message: str) -> None:
    """Raise `BadDeclaration` naming the declaration unless ``condition`` holds."""
    if not condition:
        raise BadDeclaration(f"{owner}: {message}")


def check_choices(entry: Any, owner: str, **allowed: tuple[str, ...]) -> None:
    """Each named field of ``entry`` is one of the values ``allowed`` for it."""
    for name, values in allowed.items():
        check((value := getattr(entry, name)) in values, owner, f"{name} {value!r} is none of {values}")


def first_line(error: BaseException) -> str:
    """Kind and first line of a library's message, for messages of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:240]}" if lines else type(error).__name__


OURS = ("bench_cases", "ddbench", "harness", "instrument", "kernels", "report")


def missing_package(error: BaseException) -> str | None:
    """One sentence for the import of a package that is not installed; None for any other error, ours included."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not package or package in OURS:
        return None
    return (
        f"the package {package} is not installed in this Python; install it, or from a clone all that the program needs: "
        "pip install -c constraints.txt -e . (or make run, in an environment of its own)"
    )
