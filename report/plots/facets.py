"""Which panels a figure has: one per case, tasks down, architectures across."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes


def cases_in_rows(data: pd.DataFrame) -> list[list[str]]:
    """Cases as a grid of two columns: language models in the first row, then a row per classification
    task (``gpt2_multi_cls`` beside ``roberta_multi_cls``), in the table's order."""
    rows: dict[str, list[str]] = {}
    for case in data.drop_duplicates("case").to_dict("records"):
        lm = case.get("kind") == "LM" or str(case.get("column", "")).startswith("LM-")
        rows.setdefault("" if lm else case["case"].removeprefix(f"{case['arch']}_"), []).append(case["case"])
    return [row[i : i + 2] for row in rows.values() for i in range(0, len(row), 2)]


def panels(grid: np.ndarray, rows: list[list]) -> list[tuple[Axes, object]]:
    """Each frame with what it shows, row by row; frames left over are taken away."""
    pairs = []
    for axes_row, row in zip(grid, rows, strict=True):
        pairs += zip(axes_row, row, strict=False)
        for spare in axes_row[len(row) :]:
            spare.axis("off")
    return pairs


def label_lowest(grid: np.ndarray, words: str) -> None:
    """``words`` under the lowest frame in use of each column."""
    for column in grid.T:
        used = [axes for axes in column if axes.axison]
        if used:
            used[-1].set_xlabel(words)
            used[-1].tick_params(labelbottom=True)
