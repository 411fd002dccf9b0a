"""Rolling medians, and what stands out from them."""

from __future__ import annotations

import numpy as np
import pandas as pd

WINDOW_STEPS = 50
FEWEST_STEPS = 10
SPIKE_FACTOR = 5.0


def rolling_median(values: np.ndarray, window: int = WINDOW_STEPS, fewest: int = 1) -> np.ndarray:
    """Median of the last ``window`` values up to and with each one; nan while fewer than ``fewest``
    of them are finite."""
    finite = pd.Series(np.where(np.isfinite(values), values, np.nan))
    return finite.rolling(window, min_periods=fewest).median().to_numpy()


def spikes(values: np.ndarray) -> np.ndarray:
    """Which values exceed 5 times the median of the 50 before them (10 at least, itself left out).

    Non-finite values are no spikes: they are counted on their own.
    """
    before = np.full(len(values), np.nan)
    before[1:] = rolling_median(np.asarray(values, dtype=np.float64), fewest=FEWEST_STEPS)[:-1]
    with np.errstate(invalid="ignore"):
        return np.isfinite(values) & (values > SPIKE_FACTOR * before)
