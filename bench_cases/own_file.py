"""An object out of a Python file of the caller's own. Torch-free."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from bench_cases.lookup import BadDeclaration, UnknownId


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
