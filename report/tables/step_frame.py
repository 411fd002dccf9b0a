"""Step logs of several runs as one long frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd

from instrument.results.schemas import RunRecord

IDENTITY = ("case", "dtype_config", "seed")


def long_frame(
    runs: Iterable[RunRecord], columns: tuple[str, ...], of_run: Callable[[RunRecord], dict[str, np.ndarray | str | bool | int]]
) -> pd.DataFrame:
    """One row a step: the run's identity and what ``of_run`` gives (arrays of one length, or constants).

    Words are categories: a hundred thousand rows repeat some tens of them.
    """
    pieces = []
    for run in runs:
        values = {name: getattr(run, name) for name in IDENTITY if name in columns} | of_run(run)
        length = next(len(value) for value in values.values() if isinstance(value, np.ndarray))
        pieces.append({name: value if isinstance(value, np.ndarray) else [value] * length for name, value in values.items()})
    return pd.DataFrame({name: _joined([piece[name] for piece in pieces]) for name in columns})


def _joined(parts: list) -> np.ndarray | pd.Categorical:
    parts = [part for part in parts if len(part)]
    if not parts:
        return np.empty(0)
    if all(isinstance(part, list) and isinstance(part[0], str) for part in parts):
        words = list(dict.fromkeys(part[0] for part in parts))
        codes = np.concatenate([np.full(len(part), words.index(part[0]), dtype=np.int16) for part in parts])
        return pd.Categorical.from_codes(codes, categories=words)
    return np.concatenate([np.asarray(part) for part in parts])
