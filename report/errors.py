"""Errors that a person can mend, one sentence each, and the exit codes."""

from __future__ import annotations


class UsageError(ValueError):
    """An option that contradicts itself or its folder; says what was given and what is allowed."""


class ImportRefused(ValueError):
    """There is nothing to import, or no place for it."""


class MissingTool(RuntimeError):
    """An optional package that is not installed; says how to get it."""


def need(module: str, extra: str, purpose: str):
    """Import an optional module, or raise `MissingTool` naming the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingTool(
            f"{purpose} needs {module.split('.')[0]}, which is not installed; "
            f"install it with: pip install 'datatype-dynamics-bench[{extra}]'"
        ) from error


OK = 0
USAGE = 2
BAD_DATA = 4
ENVIRONMENT = 5
INTERRUPTED = 75
