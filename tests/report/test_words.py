"""Numbers and counts as words."""

import math

import pytest

from report.statistics.interval import Interval
from report.words import bounds, count, gigabytes, joined, printable, sentence, shortened, times


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
