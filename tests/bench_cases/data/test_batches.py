"""Batches: a pure function of (data, task, seed, step)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench_cases.data import DataError, load_data
from bench_cases.data.batches import Batches

TASKS = [
    ("gpt2", "clm"),
    ("roberta", "mlm"),
    ("gpt2", "multi_cls"),
    ("roberta", "multi_cls"),
    ("gpt2", "single_cls"),
    ("roberta", "single_cls"),
]
_DATA = {}


def batches(arch, task, **options):
    key = arch, task
    if key not in _DATA:
        _DATA[key] = load_data("embedded", arch=arch, task=task)
    return Batches(_DATA[key], task, **{"causal": arch == "gpt2", "seq_len": 256, "batch_size": 8, "seed": 0, **options})


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "targets", "last_token", "lengths"))


@pytest.mark.parametrize("arch,task", TASKS)
def test_random_access_equals_sequence(arch, task):
    forward = batches(arch, task)
    run = [forward.step(s) for s in range(1, 6)]
    resumed = batches(arch, task)
    assert all(same(resumed.step(s), run[s - 1]) for s in (5, 2, 4, 1, 3))
    assert not same(run[0], run[1]) and not same(run[0], batches(arch, task, seed=1).step(1))


@pytest.mark.parametrize("arch,task", TASKS)
def test_the_hash_pins_the_batches(arch, task):
    one = batches(arch, task)
    assert one.sha256(20) == batches(arch, task).sha256(20)
    others = [batches(arch, task, seed=1), batches(arch, task, batch_size=4), batches(arch, task, seq_len=128)]
    assert len({one.sha256(20), one.sha256(21), *(other.sha256(20) for other in others)}) == 5


@settings(deadline=None, max_examples=25)
@given(batch_size=st.integers(1, 3_000), seed=st.integers(0, 5), bucket=st.booleans())
def test_each_epoch_visits_every_row_once_and_no_batch_is_short(batch_size, seed, bucket):
    made = batches("gpt2", "multi_cls", batch_size=batch_size, seed=seed, bucket_by_length=bucket)
    n = len(made._train)
    steps = -(-3 * n // batch_size)
    order = made._order(1, steps)
    assert len(order) == steps * batch_size
    for epoch in range(3):
        assert len(set(order[epoch * n : (epoch + 1) * n])) == n
    np.testing.assert_array_equal(made._order(2, 2), order[batch_size : 2 * batch_size] if steps > 1 else made._order(2, 2))
    assert not np.array_equal(order[:n], order[n : 2 * n])


def test_buckets_save_padding_with_the_same_documents():
    plain, bucketed = (batches("roberta", "multi_cls", seq_len=512, bucket_by_length=b) for b in (False, True))
    padding = [
        1 - sum(m.step(s).real_tokens for s in range(1, 101)) / sum(m.step(s).tokens for s in range(1, 101))
        for m in (plain, bucketed)
    ]
    print(f"\npadding {padding[0]:.1%} without buckets, {padding[1]:.1%} with")
    assert padding[1] < 0.3 * padding[0]


@pytest.mark.parametrize("arch,task", TASKS)
def test_evaluation_is_fixed(arch, task):
    one = list(batches(arch, task).evaluation(21, 8))
    two = list(batches(arch, task, seed=7).evaluation(21, 5))
    assert [b.samples for b in one] == [8, 8, 5] and [b.samples for b in two] == [5, 5, 5, 5, 1]
    rows = [
        [
            (tuple(i[:n].tolist()), tuple(t.reshape(-1).tolist()))
            for b in run
            for i, t, n in zip(b.input_ids, b.targets, b.lengths, strict=True)
        ]
        for run in (one, two)
    ]
    assert rows[0] == rows[1]


def test_evaluation_takes_all_rows():
    made = batches("roberta", "single_cls")
    assert sum(b.samples for b in made.evaluation(None, 64)) == len(made._validation)


def test_documents_without_a_class_are_rows_of_the_multi_label_task_only():
    data = batches("gpt2", "single_cls").data
    without = data.splits["validation"][:3]
    counts = np.diff(data.label_offsets)
    kept = ~np.isin(np.repeat(np.arange(len(counts)), counts), without)
    counts[without] = 0
    data = replace(data, labels=data.labels[kept], label_offsets=np.append(0, np.cumsum(counts)))
    rows = {
        task: sum(b.samples for b in Batches(data, task, causal=True, seq_len=64, batch_size=8, seed=0).evaluation(None, 64))
        for task in ("single_cls", "multi_cls")
    }
    assert rows["multi_cls"] == len(data.splits["validation"]) == rows["single_cls"] + 3


def test_what_cannot_be_batched():
    with pytest.raises(DataError, match="no collator 'x'"):
        Batches(None, "x", causal=True, seq_len=8, batch_size=1, seed=0)
    with pytest.raises(DataError, match="holds no row for clm at sequence length 10000000"):
        batches("gpt2", "clm", seq_len=10_000_000)
    batches("gpt2", "clm")
    with pytest.raises(DataError, match="needs labels"):
        Batches(_DATA["gpt2", "clm"], "multi_cls", causal=True, seq_len=64, batch_size=2, seed=0)


@pytest.mark.parametrize("arch,task", TASKS)
def test_real_documents_end_to_end(shared_data, arch, task):
    data = load_data(str(shared_data), arch=arch, task=task, max_documents=40, validation_documents=8)
    made = Batches(data, task, causal=arch == "gpt2", seq_len=512, batch_size=4, seed=0)
    for batch in [made.step(1), made.step(30), *made.evaluation(4, 4)]:
        assert 0 < batch.real_tokens <= batch.tokens == batch.input_ids.numel()
        assert int(batch.input_ids.max()) < data.valid_vocab and batch.n_targets > 0
