"""Levels by enumeration and by an independent implementation; powers by simulation."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from report.significance import (
    UNTESTED,
    Test,
    above,
    above_unpaired,
    all_of,
    any_of,
    below,
    more_often,
    rate_above,
    rate_below,
    shown_of_family,
)


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.35], [-1.0, 2.0, 0.3, 0.4, 9.0]])
@pytest.mark.parametrize("bound", [0.0, 0.15])
def test_paired_differences_are_students(values, bound):
    expected = stats.ttest_1samp(values, bound, alternative="greater").pvalue
    assert above(values, bound).p == pytest.approx(expected)
    assert below(values, bound).p == pytest.approx(1 - expected)


def test_two_seeds_show_no_difference_and_equal_values_are_as_sure_as_their_rounding():
    assert above([5.0, 5.1], 0.0).p == above([5.0], 0.0).p == above([], 0.0).p == 1.0
    assert above([5.0, 5.0, 5.0], 0.0).p == 0.0 and above([0.0, 0.0, 0.0], 0.0).p == 1.0
    assert above([0.01, 0.01, 0.01], 0.0, resolution=0.006).p == pytest.approx(stats.t.sf(0.01 * math.sqrt(3) / 0.006, 2))


def test_other_seeds_are_compared_by_welchs_test():
    first, second = (0.7, 0.71, 0.69, 0.72), (0.5, 0.65, 0.4)
    expected = stats.ttest_ind(np.array(first) - 0.1, second, equal_var=False, alternative="greater").pvalue
    assert above_unpaired(first, second, 0.1).p == pytest.approx(expected)
    assert above_unpaired(first, second[:2], 0.1) is UNTESTED
    assert [above_unpaired((bound,) * 3, (0.0,) * 3, 0.125).p for bound in (0.25, 0.0625)] == [0.0, 1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
def test_what_is_no_number_or_too_large_to_square_shows_nothing(value):
    assert not above([1.0, 1.0, value], 0.0).shown and not below([-1.0, -1.0, -value], 0.0).shown


@pytest.mark.parametrize(("hits", "n"), [(0, 3), (1, 3), (3, 3), (2, 10)])
def test_rates_are_binomial(hits, n):
    assert rate_above(hits, n).p == pytest.approx(stats.binomtest(hits, n, 0.1, alternative="greater").pvalue)
    assert rate_below(hits, n).p == pytest.approx(stats.binomtest(hits, n, 0.1, alternative="less").pvalue)


@pytest.mark.parametrize("counts", list(product(range(4), [3], range(5), [4])))
def test_two_groups_are_fishers(counts):
    hits, n, other, m = counts
    table = [[hits, n - hits], [other, m - other]]
    assert more_often(*counts).p == pytest.approx(stats.fisher_exact(table, alternative="greater").pvalue)


def test_statements_combine_at_their_level():
    assert all_of([Test(0.01), Test(0.2)]).p == 0.2 and any_of([Test(0.01), Test(0.2)]).p == 0.02
    assert all_of([]) is any_of([]) is UNTESTED and any_of([Test(0.9), Test(0.8)]).p == 1.0


def test_a_family_is_holms_and_no_member_is_shown_beyond_its_own_interval():
    family = {"a": Test(0.005), "b": Test(0.018), "c": Test(0.024), "d": Test(0.5)}
    assert shown_of_family(family) == {"a"}  # "b" is above 0.04/3, and what comes after it is not asked
    assert shown_of_family({**family, "b": Test(0.013), "c": Test(0.019)}) == {"a", "b", "c"}
    assert shown_of_family({"a": Test(0.03)}) == set()  # its 95 % interval holds the margin
    assert shown_of_family({}) == set()


@pytest.mark.parametrize("effect", [1.0, 2.0])
def test_as_many_seeds_as_are_asked_for_show_the_effect_with_a_power_of_80_percent(effect):
    values = np.array([-1.0, 0.0, 1.0]) + effect  # standard deviation 1
    n = above(values, 0.0).seeds_needed
    worlds = np.random.default_rng(3).normal(effect, 1.0, (4_000, n))
    power = np.mean([above(world, 0.0).shown for world in worlds])
    fewer = np.mean([above(world[:-1], 0.0).shown for world in worlds])
    assert 0.75 <= power <= 0.93 and fewer < power
    assert above(-values, 0.0).seeds_needed is None


def test_seeds_for_rates_are_counted_exactly():
    assert rate_below(0, 3).seeds_needed == 36 and 0.9**36 <= 0.025 < 0.9**35
    assert rate_above(3, 3).seeds_needed == 2 and rate_above(0, 3).seeds_needed is None  # 0.1^2 <= 0.025 < 0.1
    assert more_often(3, 3, 0, 3).seeds_needed == 4 and more_often(0, 3, 3, 3).seeds_needed is None


def test_seeds_of_joined_statements_are_those_of_the_last_or_of_the_first_that_decides():
    """All of them wait for the slowest; any of k needs the fastest, at a k-th of the level."""
    tests = Test(0.5, lambda level: 5), Test(0.5, lambda level: 9 if level == 0.025 else 30), Test(0.5)
    assert all_of(tests[:2]).seeds_needed == 9 and all_of(tests).seeds_needed is None
    assert any_of(tests).seeds_needed == 5 and any_of(tests[1:]).seeds_needed == 30 and any_of(tests[2:]).seeds_needed is None


@pytest.mark.parametrize("seeds", [3, 4, 7, 20, 300])
@pytest.mark.parametrize("n", [2, 4])
def test_seeds_are_the_fewest_whose_t_quantiles_reach_the_effect(seeds, n):
    """Two seeds show nothing, and yet say how many more would."""
    shown = sum(stats.t.ppf((0.975, 0.8), seeds - 1)) / math.sqrt(seeds)
    for least, needed in ((1 + 1e-9, seeds), (1 - 1e-9, seeds + 1)):
        noise = np.array([-1.0, 1.0] * (n // 2))
        test = above(shown * least * noise.std(ddof=1) + noise, 0.0)
        assert test.seeds_needed == needed and (n > 2 or test.p == 1.0)
