"""Thinned lines keep every spike and every break."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from report.plots.decimate import BINS, decimate


def test_short_series_are_returned_whole():
    assert (decimate(np.arange(4 * BINS), np.zeros(4 * BINS)) == np.arange(4 * BINS)).all()


@pytest.mark.parametrize("log_x", [False, True])
@given(seed=st.integers(0, 10**6), n=st.integers(1_000, 6_000))
@settings(max_examples=25, deadline=None)
def test_one_planted_spike_survives_at_any_place(log_x, seed, n):
    random = np.random.default_rng(seed)
    y, at = random.normal(size=n), int(random.integers(n))
    y[at] = 100.0
    kept = decimate(np.arange(1, n + 1), y, log_x=log_x)
    assert at in kept and (np.diff(kept) > 0).all() and {0, n - 1} <= set(kept)
    assert len(kept) <= 4 * BINS


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_every_bin_keeps_its_extremes(seed):
    random = np.random.default_rng(seed)
    x = np.sort(random.choice(50_000, 5_000, replace=False))
    y = random.normal(size=5_000)
    kept = decimate(x, y, bins=40)
    bins = np.minimum(((x - x[0]) / (x[-1] - x[0]) * 40).astype(int), 39)
    for number in np.unique(bins):
        inside, shown = y[bins == number], y[kept][bins[kept] == number]
        assert shown.min() == inside.min() and shown.max() == inside.max()


def test_non_finite_points_and_points_asked_for_are_kept():
    y = np.sin(np.arange(5_000) / 50)
    y[[1_234, 4_000]] = np.nan, np.inf
    asked = np.zeros(5_000, bool)
    asked[77] = True
    assert {77, 1_234, 4_000} <= set(decimate(np.arange(5_000), y, keep=asked))


def test_a_series_that_is_nowhere_finite_is_kept():
    assert len(decimate(np.arange(1_000), np.full(1_000, np.nan))) == 1_000
