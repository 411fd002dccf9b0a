"""Fewer points, the same picture: every spike stays."""

from __future__ import annotations

import numpy as np

BINS = 90


def decimate(
    x: np.ndarray, y: np.ndarray, *, bins: int = BINS, log_x: bool = False, keep: np.ndarray | None = None
) -> np.ndarray:
    """Sorted indices of the points to draw: of every bin of ``x`` the first, the last, the
    smallest and the largest ``y``, and every non-finite one (where a line must break), plus the
    positions where ``keep`` is true.

    A bin is at most about two points of print wide, so the polyline through what is left covers the
    same ink. ``x`` must be ascending; short series are returned whole.
    """
    n = len(x)
    if n <= 4 * bins:
        return np.arange(n)
    place = np.log(np.maximum(x, 1)) if log_x else np.asarray(x, dtype=float)
    span = place[-1] - place[0]
    bin_of = np.minimum(((place - place[0]) / (span or 1.0) * bins).astype(np.int64), bins - 1)
    starts = np.flatnonzero(np.r_[True, np.diff(bin_of) > 0])
    counts = np.diff(np.r_[starts, n])
    finite = np.isfinite(y)
    kept = ~finite
    kept[starts] = kept[starts + counts - 1] = True
    for fill, extreme in ((np.inf, np.minimum), (-np.inf, np.maximum)):
        filled = np.where(finite, y, fill)
        hits = np.flatnonzero(filled == np.repeat(extreme.reduceat(filled, starts), counts))
        kept[hits[np.r_[True, np.diff(bin_of[hits]) > 0]]] = True
    if keep is not None:
        kept |= keep
    return np.flatnonzero(kept)
