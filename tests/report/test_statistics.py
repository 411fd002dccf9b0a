"""Every interval against scipy, a closed form, or its coverage in simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from report.statistics import (
    Interval,
    block_bootstrap,
    coefficient_of_variation,
    exponential,
    kendall_tau,
    mean_interval,
    rank_with_ties,
    rolling_median,
    share_interval,
    spikes,
)


def mean(values):
    return values.mean(axis=-1)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_mean_interval_is_scipys_t_interval(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    found = mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.low == pytest.approx(expected.low) and found.high == pytest.approx(expected.high)
    assert found.value == pytest.approx(values.mean()) and found.n == n


@pytest.mark.filterwarnings("error")
def test_one_value_has_no_interval_and_none_has_no_value():
    one, none = mean_interval([2.0]), mean_interval([])
    assert one.value == 2.0 and not one.known and not one.above(0) and not one.below(3)
    assert math.isnan(none.value) and none.n == 0 and not none.known


def test_an_interval_lies_above_or_below_a_bound_that_it_does_not_touch():
    interval = Interval(2.0, 1.0, 4.0, 3)
    assert interval.above(0.9) and not interval.above(1.0) and interval.below(4.1) and not interval.below(4.0)
    assert interval.negated() == Interval(-2.0, -4.0, -1.0, 3)
    assert not Interval(2.0, 1.0, math.nan, 3).known and not Interval(2.0, math.nan, 4.0, 3).below(9.0)


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="1 of 2"):
        mean_interval([1.0, math.inf])


@pytest.mark.parametrize("n", [3, 5])
def test_the_t_interval_covers_what_it_says_where_a_percentile_bootstrap_does_not(n):
    random = np.random.default_rng(0)
    samples = random.normal(1.0, 1.0, (2_000, n))
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in map(mean_interval, samples)])
    resampled = samples[:, random.integers(0, n, (400, n))].mean(axis=-1)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    assert 0.935 < covered < 0.965
    assert np.mean((low <= 1.0) & (high >= 1.0)) < 0.90


def ratio(over, under):
    return exponential(mean_interval(np.log(over) - np.log(under)))


def test_a_ratio_is_the_geometric_mean_of_pairs_and_its_inverse_is_the_inverse():
    over, under = [2.0, 8.0, 4.5], [1.0, 2.0, 1.5]
    there, back = ratio(over, under), ratio(under, over)
    assert there.value == pytest.approx(stats.gmean([2.0, 4.0, 3.0]))
    assert there.low == pytest.approx(1 / back.high) and there.high == pytest.approx(1 / back.low)


def test_pairing_removes_what_seeds_share():
    seeds = np.array([1.0, 2.0, 4.0])
    assert ratio(3 * seeds, seeds).low == pytest.approx(3.0)  # a factor of 4 between seeds, none between pairs


@pytest.mark.parametrize(("hits", "n"), [(0, 3), (3, 3), (1, 3), (2, 5), (0, 1)])
def test_a_share_has_scipys_exact_interval(hits, n):
    found = share_interval(hits, n)
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.value, found.n) == (hits / n, n) and share_interval(0, 0).n == 0
    for wrong in (-1, n + 1):
        with pytest.raises(ValueError, match="is no share"):
            share_interval(wrong, n)


def test_the_block_bootstrap_covers_the_mean_of_dependent_steps_where_single_steps_do_not():
    """An AR(1) series with correlation 0.6: resampling single steps gives an interval half as wide as it should be."""
    random = np.random.default_rng(1)
    n, repeats = 400, 150
    shocks = random.normal(size=(repeats, n + 50))
    series = np.zeros_like(shocks)
    for step in range(1, n + 50):
        series[:, step] = 0.6 * series[:, step - 1] + shocks[:, step]
    hits = {block: 0 for block in (1, 15)}
    for values in series[:, 50:]:
        for block in hits:
            found = block_bootstrap(values, mean, block=block, draws=300)
            hits[block] += found.low <= 0.0 <= found.high
    assert hits[15] / repeats > 0.87 and hits[1] / repeats < 0.75


@pytest.mark.parametrize("at", [0, 14])
def test_every_value_can_be_drawn_the_first_and_the_last_too(at):
    assert block_bootstrap(np.eye(15)[at], mean).high > 0


@pytest.mark.filterwarnings("error")
def test_the_bootstrap_is_the_same_each_time_and_silent_on_short_series():
    values = np.random.default_rng(2).normal(size=200)
    assert block_bootstrap(values, mean) == block_bootstrap(values, mean)
    assert (
        not block_bootstrap(values[:14], mean).known and block_bootstrap(values[:15], mean).known
    )  # 5 blocks of ceil(15^(1/3))
    assert block_bootstrap([*values, math.inf], mean) == block_bootstrap(values, mean)
    narrow, wide = block_bootstrap(values, mean, confidence=0.5), block_bootstrap(values, mean)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high and wide.n == 200
    assert block_bootstrap(np.full(3, np.nan), mean).n == 0


def test_the_coefficient_of_variation_is_scipys():
    values = np.random.default_rng(3).uniform(1, 2, 50)
    assert float(coefficient_of_variation(values)) == pytest.approx(stats.variation(values, ddof=1))


def test_the_rolling_median_is_numpys_window_by_window():
    values = np.random.default_rng(4).normal(size=120)
    values[30] = math.nan
    expected = [np.nanmedian(values[max(0, i - 49) : i + 1]) for i in range(120)]
    assert rolling_median(values).tolist() == pytest.approx(expected)


def test_a_spike_is_found_where_it_is_and_not_in_its_own_shadow():
    values = np.ones(100)
    values[[40, 41, 70]] = [6.0, 5.0, math.inf]
    values[9] = 50.0  # nine steps before it are too few to judge by
    assert np.flatnonzero(spikes(values)).tolist() == [40]


def test_the_tenth_value_before_it_is_enough_to_judge_a_spike_by():
    for at, found in ((10, [10]), (9, [])):
        values = np.ones(60)
        values[at] = 5.001
        assert np.flatnonzero(spikes(values)).tolist() == found
    assert not spikes(np.where(np.arange(60) == 30, 5.0, 1.0)).any()  # five times the median is none yet


def test_ranks_tie_where_the_seeds_do_not_separate_neighbours():
    scores = {"fast": [3.0, 3.1, 2.9], "slow": [1.0, 1.1, 0.9], "near": [2.95, 3.12, 2.88]}
    found = {r.name: (r.rank, r.tie_group) for r in rank_with_ties(scores)}
    assert found == {"fast": (1, 0), "near": (2, 0), "slow": (3, 1)}


def test_ties_do_not_chain_to_one_that_is_slower_than_the_leader():
    """b ties with a, and c with b, and c is slower than a."""
    scores = {"a": [1.00, 1.10, 1.20], "b": [0.80, 1.08, 1.00], "c": [0.80, 0.90, 1.00]}
    assert mean_interval(np.subtract(scores["a"], scores["c"])).above(0.0)
    assert not mean_interval(np.subtract(scores["b"], scores["c"])).above(0.0)
    assert {r.name: (r.tie_group, r.with_leader) for r in rank_with_ties(scores)} == {
        "a": (0, True),
        "b": (0, True),
        "c": (1, False),
    }


def test_pairing_separates_ranks_that_overlap():
    scores = {"a": [1.01, 2.01, 3.011], "b": [1.0, 2.0, 3.0]}
    assert [r.tie_group for r in rank_with_ties(scores)] == [0, 1]


def test_two_names_are_one_comparison():
    """A mean of 5 standard errors at n = 3: beyond the 4.3 of 95 %, not beyond the 6.2 of two comparisons together."""
    differences = [5 - math.sqrt(3), 5.0, 5 + math.sqrt(3)]
    assert [r.tie_group for r in rank_with_ties({"a": differences, "b": [0.0] * 3})] == [0, 1]
    assert [r.tie_group for r in rank_with_ties({"a": differences, "b": [0.0] * 3, "c": [-0.1] * 3})] == [0, 0, 0]


def test_one_seed_separates_no_ranks_and_unequal_seeds_are_refused():
    assert {r.tie_group for r in rank_with_ties({"a": [9.0], "b": [1.0]})} == {0}
    with pytest.raises(ValueError, match="same seeds"):
        rank_with_ties({"a": [1.0], "b": [1.0, 2.0]})


def test_tau_is_scipys_from_five_pairs_on_and_none_below():
    first, second = [1, 2, 3, 4, 5, 6, 7], [1, 3, 2, 4, 5, 7, 6]
    tau, low, high = kendall_tau(first, second)
    assert tau == pytest.approx(stats.kendalltau(first, second).statistic) and low < tau < high
    half = stats.norm.ppf(0.975) * math.sqrt(0.437 / 3)
    assert (low, high) == pytest.approx((math.tanh(math.atanh(tau) - half), math.tanh(math.atanh(tau) + half)))
    assert kendall_tau(first[:4], second[:4]) is None and kendall_tau(first[:5], second[:5]) is not None
    with pytest.raises(ValueError, match="7 and 6 scores are no pairs"):
        kendall_tau(first, second[:6])
    assert kendall_tau([1] * 5, second[:5]) is None


def test_a_perfect_tau_still_has_an_interval():
    tau, low, high = kendall_tau(range(5), range(5))
    assert tau == pytest.approx(1.0) and high >= tau and low < 0.6
    assert kendall_tau(range(5), range(5)[::-1])[2] > -0.6


def test_fiellers_interval_covers_the_tau_of_a_normal_population():
    random = np.random.default_rng(5)
    rho = 0.7
    truth = 2 / math.pi * math.asin(rho)
    pairs = random.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(600, 10))
    covered = np.mean([low <= truth <= high for _, low, high in (kendall_tau(*sample.T) for sample in pairs)])
    assert 0.92 < covered < 0.985
