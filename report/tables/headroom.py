"""Headroom by layer over steps: how many doublings a module's largest value is from its dtype's largest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from instrument.results.contents import Folder
from kernels.float_formats import float_format

COLUMNS = ("step", "module", "order", "direction", "dtype", "absmax", "headroom_bits", "underflow_frac")


def headroom(folder: Folder, run_id: str) -> pd.DataFrame | None:
    """One row a read window and module, or None when activations were not recorded.

    ``headroom_bits`` is log2(largest number of the dtype / absmax): 0 at the edge, nan for a dtype that
    is not known, inf for a module that gave zeros only. A row that lacks something is left out.
    """
    rows = [row for read in folder.activations(run_id) if (row := headroom_row(read)) is not None]
    if not rows:
        return None
    data = pd.DataFrame(rows, columns=list(COLUMNS))
    return data.sort_values(["step", "order"], kind="stable", ignore_index=True)


def headroom_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """One reading with its headroom; None when it lacks a step, a module, an order or a direction."""
    try:
        absmax = row.get("absmax")
        absmax = math.nan if absmax is None else float(absmax)
        return {
            "step": int(row["step"]),
            "module": str(row["module"]),
            "order": int(row["order"]),
            "direction": str(row["direction"]),
            "dtype": row.get("dtype"),
            "absmax": absmax,
            "headroom_bits": _bits(row.get("dtype"), absmax),
            "underflow_frac": row.get("flush_frac"),
        }
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _bits(dtype: str | None, absmax: float) -> float:
    known = float_format(dtype)
    largest = known.max if known else math.nan
    with np.errstate(divide="ignore"):
        return float(np.log2(largest) - np.log2(absmax)) if not math.isnan(absmax) else math.nan
