"""Labels keep their distance, their order and the frame."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from report.plots.direct_labels import spread

PLACES = st.lists(st.floats(0, 1), min_size=1, max_size=9)


@given(wanted=PLACES)
def test_they_stay_apart_in_order_and_inside(wanted):
    placed = spread(wanted, 0.1, 0.0, 1.0)
    assert placed.min() >= -1e-9 and placed.max() <= 1 + 1e-9
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(placed[order]) >= min(0.1, 1 / max(len(wanted) - 1, 1)) - 1e-9).all()


def test_those_with_room_do_not_move():
    assert spread([0.2, 0.5, 0.9], 0.1, 0, 1) == pytest.approx([0.2, 0.5, 0.9])


@pytest.mark.parametrize("wanted", [[0.5, 0.5, 0.5], [0.4, 0.42, 0.7], [0.3, 0.31, 0.36, 0.6]])
def test_the_moves_are_the_least(wanted):
    gaps = [{"type": "ineq", "fun": lambda x, i=i: x[i + 1] - x[i] - 0.1} for i in range(len(wanted) - 1)]
    best = minimize(lambda x: ((x - wanted) ** 2).sum(), np.linspace(0, 1, len(wanted)), constraints=gaps, tol=1e-12)
    assert spread(wanted, 0.1, 0, 1) == pytest.approx(best.x, abs=1e-4)


def test_nothing_to_place():
    assert len(spread([], 0.1, 0, 1)) == 0
