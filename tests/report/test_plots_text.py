"""What files say is safe to draw, and numbers read well."""

import numpy as np
import pytest

from report.plots.text import clean, power_of_ten, rate, short


@pytest.mark.parametrize(
    "given,shown",
    [
        ("plain", "plain"),
        ("a\x00b\x1bc", "abc"),
        ("\u202egnp.exe", "gnp.exe"),
        ("two\nlines\tand tabs", "two lines and tabs"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        ("", ""),
        (7, "7"),
    ],
)
def test_clean(given, shown):
    assert clean(given) == shown


def test_a_megabyte_is_cut_and_says_so():
    assert clean("x" * 10**6) == "x" * 59 + "…" and clean("y" * 60) == "y" * 60
    assert clean("\x00" * 10**6 + "hidden") == "…"


@pytest.mark.parametrize(
    "value,three,two",
    [
        (0.0123, "0.0123", "0.012"),
        (4.56, "4.56", "4.6"),
        (456, "456", "456"),
        (4380, "4,380", "4.4k"),
        (65504, "65.5k", "66k"),
        (654_321, "654k", "654k"),
        (1.2e6, "1.2M", "1.2M"),
        (3.1e12, "3.1e+12", "3.1e+12"),
        (np.inf, "∞", "∞"),
        (-np.inf, "-∞", "-∞"),
        (np.nan, "NaN", "NaN"),
        (0, "0", "0"),
    ],
)
def test_short(value, three, two):
    assert short(value) == three and short(value, 2) == two


@pytest.mark.parametrize(
    "value,label",
    [(1e-3, "10⁻³"), (0.01, "0.01"), (1, "1"), (1000, "1,000"), (1e5, "10⁵"), (3, ""), (0, ""), (-1, ""), (np.inf, "")],
)
def test_power_of_ten(value, label):
    assert power_of_ten(value) == label


@pytest.mark.parametrize("value,words", [(3.71, "3.7"), (37.2, "37"), (1240, "1,240")])
def test_rate(value, words):
    assert rate(value) == words
