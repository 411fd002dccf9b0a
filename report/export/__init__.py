"""A folder's results in the formats of other tools."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from instrument.results.contents import Folder

Export = Callable[[Folder, Path], list[Path]]
EXPORTERS = {
    "csv": "tables:export_csv",
    "latex": "latex:export_latex",
    "appendix": "latex:export_appendix",
    "tensorboard": "trackers:export_tensorboard",
    "wandb": "trackers:export_wandb",
    "bencher": "tables:export_bencher",
}
"""Format -> module of this package and its function."""


def exporter(name: str) -> Export:
    """The function that writes format ``name`` into a folder and returns its files. Imported late: most formats need a
    library of their own."""
    module, function = EXPORTERS[name].split(":")
    return getattr(import_module(f"report.export.{module}"), function)
