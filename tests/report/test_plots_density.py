"""The violin's outline is a Gaussian kernel density."""

import numpy as np
import pytest
from scipy.stats import gaussian_kde

from report.plots.density import outline


@pytest.mark.parametrize(
    "make",
    [
        lambda r: r.normal(3, 0.4, 900),
        lambda r: r.exponential(1, 400),
        lambda r: np.r_[r.normal(0, 1, 300), r.normal(9, 0.5, 300)],
    ],
)
def test_it_agrees_with_scipy(make):
    values = make(np.random.default_rng(0))
    positions, density = outline(values)
    expected = gaussian_kde(values)(positions)
    assert positions[0] == values.min() and positions[-1] == values.max()
    assert density == pytest.approx(expected / expected.max(), abs=0.04)


@pytest.mark.parametrize("values", [[2.0], [5.0, 5.0, 5.0]])
def test_equal_values_are_a_stroke(values):
    positions, density = outline(np.array(values))
    assert (positions == values[0]).all() and (density == 1).all()


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        outline(np.array([]))
