"""What a figure draws: data, title, caption and what was left out. Computed here, drawn elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.tables.selection import column_of
from report.text import shortened


@dataclass(frozen=True)
class Table:
    """One figure's content.

    ``name``: the file's stem. ``data``: exactly what is drawn (base units), the CSV. ``summary``: one row per series or facet
    where the figure needs text. ``title`` states the finding. ``excluded``: (run_id, reason). ``empty``: why there is nothing
    to draw, else None."""

    letter: str
    name: str
    data: pd.DataFrame
    title: str
    caption: str
    summary: pd.DataFrame = field(default_factory=pd.DataFrame)
    excluded: tuple[tuple[str, str], ...] = ()
    marks: tuple[str, ...] = ()
    empty: str | None = None

    @classmethod
    def without_data(cls, name: str, columns: Iterable[str], title: str, why: str, marks: tuple[str, ...], **more) -> Table:
        """The table of a figure that has nothing to draw, under its name for a letter."""
        return cls(name, name, pd.DataFrame(columns=list(columns)), title, "", marks=marks, empty=why, **more)


def identity(run: RunRecord) -> dict[str, object]:
    """What a row says of its run; `frame` takes the columns that its table has."""
    names = ("case", "arch", "loss_reduction", "dtype_config", "seed", "run_id")
    return {name: getattr(run, name) for name in names} | {"column": column_of(run)}


def frame(rows: list[dict], columns: tuple[str, ...]) -> pd.DataFrame:
    """Rows as a frame with these columns and no others, also when there is no row."""
    return pd.DataFrame(rows, columns=list(columns))


def long_frame(
    runs: Iterable[RunRecord], columns: tuple[str, ...], of_run: Callable[[RunRecord], dict[str, np.ndarray | str | bool | int]]
) -> pd.DataFrame:
    """One row a step: the run's identity and what ``of_run`` gives (arrays of one length, or constants).

    Text is categorical: a hundred thousand rows repeat some tens of them."""
    pieces = []
    for run in runs:
        values = {name: getattr(run, name) for name in ("case", "dtype_config", "seed") if name in columns} | of_run(run)
        length = next(len(value) for value in values.values() if isinstance(value, np.ndarray))
        pieces.append({name: value if isinstance(value, np.ndarray) else [value] * length for name, value in values.items()})
    return pd.DataFrame({name: _joined([piece[name] for piece in pieces]) for name in columns})


def _joined(parts: list) -> np.ndarray | pd.Categorical:
    parts = [part for part in parts if len(part)]
    if not parts:
        return np.empty(0)
    if all(isinstance(part, list) and isinstance(part[0], str) for part in parts):
        categories = list(dict.fromkeys(part[0] for part in parts))
        codes = np.concatenate([np.full(len(part), categories.index(part[0]), dtype=np.int16) for part in parts])
        return pd.Categorical.from_codes(codes, categories=categories)
    return np.concatenate([np.asarray(part) for part in parts])


def data_text(folder: Folder, runs: Sequence[RunRecord]) -> str:
    """Device, runs, seeds, preset, data and weights in one sentence."""
    if not runs:
        return f"{folder.device}: no runs."
    seeds = sorted({run.seed for run in runs})
    facts = [
        f"{shortened(sorted({run.preset for run in runs}))} preset",
        f"data {shortened(sorted({run.data_source for run in runs}))}",
        f"weights {shortened(sorted({run.weights_source for run in runs}))}",
    ]
    return (
        f"{folder.device}, {count(len(runs), 'run')}, {count(len(seeds), 'seed')} "
        f"({shortened(map(str, seeds), 5)}), {', '.join(facts)}."
    )
