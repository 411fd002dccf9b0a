"""Scores against their definitions by brute force, and whatever finite logits a model gives."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench_cases import CASES, DTYPE_CONFIGS
from bench_cases.collate import Batch
from bench_cases.models import build_model
from harness.evaluate import _f1, _quality, evaluate, tuned_micro_f1
from harness.precision import Precision
from harness.run.execute import load_run_data, make_batches, model_request
from harness.training import uninformed_loss
from instrument.results.schemas import EvaluationRecord, decode, encode


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
    got = _quality(scores, truths, None)
    assert got["labels_absent"] == 1
    assert got["f1_macro"] == pytest.approx((1.0 + 0.0) / 2)
    assert got["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def f1_by_hand(predicted, truths, columns):
    """(micro, macro over ``columns``) of boolean arrays, by their definitions, 0 for 0 / 0; scikit-learn's code is not used."""

    def f1(p, t):
        wrong = (p != t).sum()
        return 2 * (p & t).sum() / (2 * (p & t).sum() + wrong) if (p | t).any() else 0.0

    return f1(predicted, truths), sum(f1(predicted[:, c], truths[:, c]) for c in columns) / len(columns)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.4]))
@settings(max_examples=60, deadline=None)
def test_f1_is_as_defined_without_positives_and_with_one_label_too(seed, rows, columns, share):
    random = np.random.default_rng(seed)
    scores, truths = random.standard_normal((rows, columns)), random.random((rows, columns)) < share
    present = np.flatnonzero(truths.any(axis=0))
    expected = f1_by_hand(scores > 0, truths, present if len(present) else range(columns))
    assert _f1(scores, truths.astype(np.float32)) == pytest.approx(expected)


def test_single_label_micro_is_accuracy():
    scores = np.eye(4, dtype=np.float32)[[0, 1, 2, 2]]
    got = _quality(scores, np.array([0, 1, 1, 2]), np.array([False, True, False, False]))
    assert got["f1_micro"] == 0.75 and got["labels_absent"] == 1
    assert got["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert got["f1_micro_majority"] == 0.5 and got["f1_macro_majority"] == pytest.approx((2 / 3) / 3)


@pytest.mark.parametrize("task", ["multi_cls", "single_cls"])
def test_the_majority_answer_is_the_best_constant_one_on_the_training_rows(plan, task):
    settings = plan(f"gpt2_{task}", "fp32_true", documents=300)
    batches = make_batches(settings, data := load_run_data(settings))
    answer, documents = batches.majority_answer(), batches._train
    if task == "single_cls":
        truths = [int(data.single_targets[d]) for d in documents]
        assert answer.sum() == 1 and truths.count(int(answer.argmax())) == max(map(truths.count, set(truths)))
        return
    truths = np.zeros((len(documents), data.n_labels), bool)
    for row, d in enumerate(documents):
        truths[row, data.labels[data.label_offsets[d] : data.label_offsets[d + 1]]] = True
    assert (data.label_uses == truths.sum(0)).all()
    by_use = np.argsort(-truths.sum(0), kind="stable")
    constants = [np.isin(np.arange(data.n_labels), by_use[:k]) for k in range(1, data.n_labels + 1)]
    scores = [f1_by_hand(np.broadcast_to(c, truths.shape), truths, [0])[0] for c in constants]
    assert f1_by_hand(np.broadcast_to(answer, truths.shape), truths, [0])[0] == pytest.approx(max(scores))


@pytest.mark.parametrize("case", ["gpt2_multi_cls", "roberta_multi_cls_labelsum"])
def test_a_multi_label_head_begins_with_the_labels_log_odds(plan, case):
    settings = plan(case, "fp32_true", documents=300)
    data = load_run_data(settings)
    model, batches = build_model(model_request(settings, data)), make_batches(settings, data)
    documents = batches._train
    share = (np.stack([batches._make(documents, np.array([i]), None).targets[0] for i in range(len(documents))]) == 1).mean(0)
    bias = model.head.out_proj.bias.detach().double().sigmoid().numpy()
    assert bias == pytest.approx(share, abs=1 / len(documents)) and ((bias > 0) & (bias < 1)).all()
    assert settings.as_config()["case"]["head_prior"] == "log_odds"
    assert "head_prior" not in plan("gpt2_clm", "fp32_true").as_config()["case"]  # runs without one keep their ids
    labels = data.n_labels if case.endswith("labelsum") else 1
    assert uninformed_loss(settings.case, data.n_labels) == pytest.approx(labels * math.log(2))
    assert uninformed_loss(CASES["gpt2_clm"], 0) == 0


def test_scores_that_are_not_finite_give_no_threshold():
    assert tuned_micro_f1(np.array([[np.nan, 1.0]]), np.array([[True, False]]))["tuned_threshold"] is None


class Says(torch.nn.Module):
    """A model whose logits are the ones given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, *_):
        return self.logits


LARGEST = {torch.float32: 3.4028234663852886e38, torch.bfloat16: 3.3895313892515355e38, torch.float16: 65504.0}
AWKWARD = (0.0, -0.0, 1e-45, -1e-45, 6e-8, 1.0, -1.0, 88.8, -104.0, 709.8, -709.8, -745.2, 65504.0, -65504.0, 1e30, -1e30)


@pytest.mark.parametrize("case", ["gpt2_multi_cls", "gpt2_multi_cls_labelsum", "gpt2_single_cls", "gpt2_clm", "roberta_mlm"])
@given(data=st.data(), dtype=st.sampled_from(list(LARGEST)))
@settings(max_examples=40, deadline=None)
def test_no_finite_logit_breaks_an_evaluation(case, data, dtype):
    """Up to the largest float32, zeros of both signs and subnormals among them: a row that can be written and read again."""
    largest, task = LARGEST[dtype], CASES[case].task
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    value = st.sampled_from([*(v for v in AWKWARD if abs(v) <= largest), largest, -largest]) | st.floats(
        -largest, largest, allow_nan=False, width=32
    )
    shape = (rows, 2, columns) if task.metric == "perplexity" else (rows, columns)
    drawn = data.draw(st.lists(value, min_size=math.prod(shape), max_size=math.prod(shape)))
    logits = torch.tensor(drawn, dtype=torch.float32).clamp(-largest, largest).to(dtype).view(shape)
    assert logits.isfinite().all()
    hot = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    targets = (
        torch.tensor(hot).view(rows, columns).float() if task.id == "multi_cls" else torch.zeros(shape[:-1], dtype=torch.int64)
    )
    batch = SimpleNamespace(
        targets=targets, n_targets=targets.numel(), samples=rows, input_ids=None, attention_mask=None, last_token=None
    )
    batch.to = lambda device: batch
    precision = SimpleNamespace(device=torch.device("cpu"), forward=nullcontext)
    majority = np.arange(columns) == 0 if task.metric == "f1" else None
    record = evaluate(Says(logits), [batch], CASES[case], precision, valid_vocab=columns, step=1, majority=majority)
    assert record.val_loss >= 0 and not math.isnan(record.val_loss)
    written = decode(encode(record), EvaluationRecord)
    assert written == decode(encode(written), EvaluationRecord) and written.val_loss == record.val_loss
    for name in ("f1_micro", "f1_macro", "f1_micro_tuned", "tuned_threshold", "f1_micro_majority"):
        assert (score := getattr(record, name)) is None or 0 <= score <= 1


class Logits(torch.nn.Module):
    """The same logits for every row, through dropout."""

    def __init__(self):
        super().__init__()
        self.row, self.drop = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5])), torch.nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask, last_token):
        return self.drop(self.row.expand(len(input_ids), 3))


def test_nothing_is_dropped_in_an_evaluation_and_training_continues_with_dropout():
    """The loss of 4 + 2 documents is that of the bare logits in float64, divided by all of them, not batch by batch."""
    model, config = Logits(), DTYPE_CONFIGS["fp32_true"]
    batches = [
        Batch(torch.zeros(n, 1, dtype=torch.int64), torch.tensor(targets), None, None, *[torch.zeros(n)] * 2, n, n, n, 1, n)
        for n, targets in ((4, [0, 0, 1, 2]), (2, [0, 1]))
    ]
    precision = Precision(config, torch.device("cpu"), threads=1)
    record = evaluate(model, batches, CASES["gpt2_single_cls"], precision, valid_vocab=None, step=7)
    exact = -torch.log_softmax(model.row.detach().double(), 0)
    assert record.val_loss == pytest.approx(exact[[0, 0, 1, 2, 0, 1]].mean().item(), rel=1e-6)
    assert (record.step, record.samples, record.targets, record.f1_micro, record.perplexity) == (7, 6, 6, 0.5, None)
    assert model.training and model.drop.training


def test_pad_columns_of_the_vocabulary_are_left_out_of_the_evaluation():
    """The last 3 of 8 columns are there for alignment: no token has them, however large their logits are."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 8), torch.randint(0, 5, (2, 3))
    logits[..., 5:] = 50.0
    rows = torch.zeros(2, 3, dtype=torch.int64)
    batch = Batch(rows, targets, None, None, torch.zeros(2), torch.zeros(2), 2, 6, 6, 3, 6)
    precision = Precision(DTYPE_CONFIGS["fp32_true"], torch.device("cpu"), threads=1)
    record = evaluate(Says(logits), [batch], CASES["gpt2_clm"], precision, valid_vocab=5, step=0)
    exact = -torch.log_softmax(logits[..., :5].double(), -1).gather(-1, targets.unsqueeze(-1)).mean().item()
    assert record.val_loss == pytest.approx(exact, rel=1e-6) and record.perplexity == pytest.approx(math.exp(exact), rel=1e-6)
