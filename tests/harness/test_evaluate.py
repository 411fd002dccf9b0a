"""Scores against scikit-learn on dense arrays and against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.evaluate import _f1, tuned_micro_f1


def micro(scores, truths, threshold):
    predicted = scores >= threshold
    true_positives = (predicted & truths).sum()
    return 2 * true_positives / (predicted.sum() + truths.sum())


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_the_tuned_threshold_is_the_best_of_all(seed, rows, columns):
    random = np.random.default_rng(seed)
    scores = random.integers(-3, 4, (rows, columns)).astype(np.float32)  # many ties
    truths = random.random((rows, columns)) < 0.3
    got = tuned_micro_f1(scores, truths)
    if not truths.any():
        assert got == {"f1_micro_tuned": None, "tuned_threshold": None}
        return
    best = max(micro(scores, truths, t) for t in np.unique(scores))
    assert got["f1_micro_tuned"] == pytest.approx(best, abs=1e-12)
    logit = np.log(got["tuned_threshold"] / (1 - got["tuned_threshold"]))
    assert micro(scores, truths, logit - 1e-6) == pytest.approx(best, abs=1e-12)


def test_multi_label_leaves_absent_labels_out_of_macro_and_counts_them():
    truths = np.array([[1, 0, 0], [1, 1, 0]], dtype=np.float32)
    scores = np.array([[2.0, -1.0, 3.0], [1.0, -2.0, -1.0]], dtype=np.float32)
    got = _f1(scores, truths)
    assert got["labels_absent"] == 1
    assert got["f1_macro"] == pytest.approx((1.0 + 0.0) / 2)
    assert got["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_micro_f1_is_counted_over_all_labels_one_label_included(seed, rows, columns):
    random = np.random.default_rng(seed)
    scores, truths = random.standard_normal((rows, columns)), random.random((rows, columns)) < 0.4
    if truths.any():
        assert _f1(scores, truths.astype(np.float32))["f1_micro"] == pytest.approx(micro(scores, truths, 0.0))


def test_single_label_micro_is_accuracy():
    scores = np.eye(4, dtype=np.float32)[[0, 1, 2, 2]]
    got = _f1(scores, np.array([0, 1, 1, 2]))
    assert got["f1_micro"] == 0.75 and got["labels_absent"] == 1
    assert got["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_scores_that_are_not_finite_give_no_threshold():
    assert tuned_micro_f1(np.array([[np.nan, 1.0]]), np.array([[True, False]]))["tuned_threshold"] is None
