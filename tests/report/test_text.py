"""Numbers and counts read well, and what files say is safe to draw."""

import math

import numpy as np
import pytest

from instrument.terminal import count, printable
from report.statistics import Interval
from report.text import bounds, clean, gigabytes, joined, log_tick, rate, sentence, short, shortened, times


def test_counts_and_lists_read_as_people_write_them():
    assert (count(1, "seed"), count(0, "seed"), count(2, "case")) == ("1 seed", "0 seeds", "2 cases")
    assert (joined([]), joined("a"), joined("ab"), joined("abc")) == ("", "a", "a and b", "a, b and c")
    assert shortened("abc") == "a, b and c" and shortened("abcde") == "a, b, c and 2 more"


@pytest.mark.parametrize(
    ("size", "words"),
    [(9_994_000_000, "9.99 GB"), (26_463_808_000, "26.5 GB"), (None, "not measured"), (math.nan, "not measured")],
)
def test_memory_is_decimal_gigabytes(size, words):
    assert gigabytes(size) == words


def test_an_interval_that_is_not_there_is_not_printed():
    assert times(Interval(2.0, 1.5, 2.5, 3)) == "2.00x [1.50, 2.50]"
    assert bounds(Interval(2.0, math.nan, math.nan, 1), ".1f") == "(one seed)"
    assert bounds(Interval(math.nan, math.nan, math.nan, 0), ".1f") == "(no interval)"


def test_a_sentence_begins_with_a_capital_unless_it_begins_with_an_identifier():
    assert [sentence(text) for text in ("no logit", "amp_bf16 dies", "Done!")] == ["No logit.", "amp_bf16 dies.", "Done!"]


def test_what_could_act_on_a_terminal_is_shown_as_a_question_mark():
    assert printable("a\x1b[2J\n\u202eb–") == "a?[2J??b–"


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
    [
        (1e-3, "10⁻³"),
        (0.01, "0.01"),
        (1, "1"),
        (1000, "1,000"),
        (1e5, "10⁵"),
        (2e5, "2×10⁵"),
        (3, "3"),
        (5e-4, "5×10⁻⁴"),
        (0, ""),
        (-1, ""),
        (np.inf, ""),
    ],
)
def test_log_tick(value, label):
    assert log_tick(value) == label


@pytest.mark.parametrize("value,words", [(3.71, "3.7"), (37.2, "37"), (1240, "1,240")])
def test_rate(value, words):
    assert rate(value) == words
