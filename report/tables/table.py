"""What a figure draws: data, words and what was left out. Computed here, drawn elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd


@dataclass(frozen=True)
class Table:
    """One figure's content.

    ``name``: the file's stem. ``data``: exactly what is drawn (base units), the CSV. ``summary``:
    one row per series or facet where the figure needs words. ``title`` states the finding.
    ``excluded``: (run_id, reason). ``empty``: why there is nothing to draw, else None.
    """

    letter: str
    name: str
    data: pd.DataFrame
    title: str
    caption: str
    summary: pd.DataFrame = field(default_factory=pd.DataFrame)
    excluded: tuple[tuple[str, str], ...] = ()
    marks: tuple[str, ...] = ()
    empty: str | None = None


def frame(rows: list[dict], columns: tuple[str, ...]) -> pd.DataFrame:
    """Rows as a frame with these columns, also when there is no row."""
    return pd.DataFrame(rows, columns=list(columns))
