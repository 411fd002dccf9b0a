"""A folder's results in the formats of other tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from instrument.results.contents import Folder

FORMATS = ("csv", "latex", "appendix", "tensorboard", "wandb", "bencher")

Export = Callable[[Folder, Path], list[Path]]


def exporter(name: str) -> Export:
    """The function that writes format ``name`` into a folder and returns its files. Imported late:
    most formats need a library of their own."""
    if name == "csv":
        from report.export.csv_files import export
    elif name == "latex":
        from report.export.latex import export
    elif name == "appendix":
        from report.export.appendix import export
    elif name == "tensorboard":
        from report.export.tensorboard_events import export
    elif name == "wandb":
        from report.export.wandb_replay import export
    else:
        from report.export.bencher import export
    return export
