"""The collator: four tasks, the same stored documents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench_cases.collate import COLLATORS, IGNORE, Rows
from bench_cases.data import load_data
from bench_cases.data.batches import Batches

_DATA = {}


def data_of(arch, task="multi_cls"):
    if (arch, task) not in _DATA:
        _DATA[arch, task] = load_data("embedded", arch=arch, task=task)
    return _DATA[arch, task]


def documents(arch, task, chosen, seq_len=512, loss_reduction="mean"):
    rows = Rows(data_of(arch), seq_len, arch == "gpt2", loss_reduction, np.asarray(chosen), np.random.default_rng(0))
    return COLLATORS[task].make(rows)


CHOSEN = st.lists(st.integers(0, 1_599), min_size=1, max_size=8)


@settings(deadline=None, max_examples=40)
@given(chosen=CHOSEN, seq_len=st.integers(4, 700), arch=st.sampled_from(["gpt2", "roberta"]))
def test_real_and_padded_tokens_make_all_tokens(chosen, seq_len, arch):
    data, batch = data_of(arch), documents(arch, "multi_cls", chosen, seq_len)
    real = torch.arange(batch.seq_len) < batch.lengths[:, None]
    padding = batch.input_ids == data.special.pad
    assert torch.equal(padding, ~real), "the pad token stands on padding and nowhere else"
    assert batch.real_tokens + int(padding.sum()) == batch.tokens == batch.input_ids.numel()
    assert int(batch.lengths.max()) == batch.seq_len <= seq_len, "padded to the longest, not further"
    assert torch.equal(batch.last_token, batch.lengths - 1)
    if arch == "gpt2" or not padding.any():
        assert batch.attention_mask is None
    else:
        assert batch.attention_mask.shape == (len(chosen), 1, 1, batch.seq_len)
        assert torch.equal(batch.attention_mask[:, 0, 0], real)


@settings(deadline=None, max_examples=30)
@given(chosen=CHOSEN, seq_len=st.integers(4, 700))
def test_rows_are_the_documents(chosen, seq_len):
    for arch in ("gpt2", "roberta"):
        data, batch = data_of(arch), documents(arch, "single_cls", chosen, seq_len)
        for document, ids, length in zip(chosen, batch.input_ids, batch.lengths, strict=True):
            text = data.tokens[data.offsets[document] : data.offsets[document + 1]].tolist()
            if arch == "gpt2":
                assert ids[:length].tolist() == text[:seq_len]
            else:
                assert ids[:length].tolist() == [data.special.bos, *text[: seq_len - 2], data.special.eos]


@pytest.mark.parametrize("arch", ["gpt2", "roberta"])
def test_the_last_document_is_read_to_its_end(arch):
    data, framed = data_of(arch), arch == "roberta"
    batch = documents(arch, "single_cls", [len(data.offsets) - 2], seq_len=10_000)
    text = data.tokens[data.offsets[-2] :].tolist()
    assert batch.input_ids[0].tolist() == ([data.special.bos, *text, data.special.eos] if framed else text)


def test_both_label_modes_from_one_stored_document():
    data = data_of("roberta")
    chosen = [0, 5, 17, 1_000]
    multi, single = documents("roberta", "multi_cls", chosen), documents("roberta", "single_cls", chosen)
    assert torch.equal(multi.input_ids, single.input_ids), "the same document, tokenised once"
    flat, offsets = multi.label_lists
    for i, document in enumerate(chosen):
        labels = data.labels[data.label_offsets[document] : data.label_offsets[document + 1]].tolist()
        assert multi.targets[i].nonzero().ravel().tolist() == labels == flat[offsets[i] : offsets[i + 1]].tolist()
        # The single-label target is the document's own label with the most uses in training.
        assert single.targets[i] == data.classes[min(labels)] >= 0
    assert multi.targets.dtype == torch.float32 and multi.targets.shape == (4, data.n_labels)
    assert single.targets.dtype == torch.int64


def test_label_order_is_by_training_frequency():
    data = data_of("gpt2")
    train = set(data.splits["train"].tolist())
    uses = np.zeros(data.n_labels, int)
    for document in train:
        uses[data.labels[data.label_offsets[document] : data.label_offsets[document + 1]]] += 1
    keys = [(-n, name) for n, name in zip(uses, data.label_names, strict=True)]
    assert keys == sorted(keys) and uses.min() >= 1


def test_normalisers():
    data, chosen = data_of("gpt2"), [1, 2, 3]
    assert documents("gpt2", "multi_cls", chosen).n_targets == 3 * data.n_labels
    assert documents("gpt2", "multi_cls", chosen, loss_reduction="label_sum").n_targets == 3
    assert documents("gpt2", "single_cls", chosen).n_targets == 3


def lm(arch, task, **options):
    return Batches(
        data_of(arch, task), task, **{"causal": arch == "gpt2", "seq_len": 128, "batch_size": 8, "seed": 0, **options}
    )


def test_causal_targets_are_shifted_here():
    batch = lm("gpt2", "clm").step(3)
    assert batch.input_ids.shape == batch.targets.shape == (8, 128) and batch.attention_mask is None
    assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
    assert batch.n_targets == batch.tokens == batch.real_tokens == 8 * 128
    framing = lm("roberta", "clm", causal=True).step(
        1
    )  # packed text has no frame, whatever the tokenizer puts around documents
    assert framing.input_ids.shape == (8, 128) and torch.equal(framing.input_ids[:, 1:], framing.targets[:, :-1])


def test_packed_text_is_the_documents_with_an_end_between():
    data, made = data_of("gpt2", "clm"), lm("gpt2", "clm")
    stream = np.concatenate(
        [np.append(data.tokens[data.offsets[i] : data.offsets[i + 1]], data.special.eos) for i in data.splits["validation"]]
    )
    got = torch.cat([b.input_ids for b in made.evaluation(None, 50)]).ravel().numpy()
    np.testing.assert_array_equal(got, stream[: len(got)])
    assert len(stream) - len(got) <= 128


def unmasked(batch):
    return torch.where(batch.targets == IGNORE, batch.input_ids, batch.targets)


def test_masked_tokens_in_the_right_shares():
    data, made = data_of("roberta", "mlm"), lm("roberta", "mlm", batch_size=64, seq_len=512)
    ordinary = chosen = masked = kept = other = 0
    for step in range(1, 9):
        batch = made.step(step)
        original, at = unmasked(batch), batch.targets != IGNORE
        special = torch.from_numpy(data.is_special)[original]
        assert not (at & special).any(), "special tokens are never masked"
        assert (original[:, 0] == data.special.bos).all() and (original[:, -1] == data.special.eos).all()
        assert at.any(1).all() and batch.n_targets == int(at.sum())
        replaced = batch.input_ids[at]
        is_mask, is_same = replaced == data.special.mask, replaced == original[at]
        drawn = replaced[~is_mask & ~is_same]
        assert int(drawn.max()) < data.valid_vocab and not torch.from_numpy(data.is_special)[drawn].any()
        ordinary += int((~special).sum())
        chosen += int(at.sum())
        masked, kept, other = masked + int(is_mask.sum()), kept + int(is_same.sum()), other + len(drawn)
    assert chosen / ordinary == pytest.approx(0.15, abs=0.003)
    assert masked / chosen == pytest.approx(0.8, abs=0.01)
    assert kept / chosen == pytest.approx(0.1, abs=0.01) and other / chosen == pytest.approx(0.1, abs=0.01)


def test_random_replacements_reach_the_whole_vocabulary():
    data, made = data_of("roberta", "mlm"), lm("roberta", "mlm", batch_size=64, seq_len=512)
    seen = set()
    for step in range(1, 13):
        batch = made.step(step)
        at = (batch.targets != IGNORE) & (batch.input_ids != batch.targets) & (batch.input_ids != data.special.mask)
        seen |= set(batch.input_ids[at].tolist())
    assert len(seen) > 0.85 * len(data.ordinary_ids)
    assert min(seen) < 40 and max(seen) > data.valid_vocab - 40


def test_every_row_has_a_target_however_short():
    made = lm("roberta", "mlm", seq_len=4, batch_size=64)
    for step in range(1, 30):
        batch = made.step(step)
        ordinary = ~torch.from_numpy(made.data.is_special)[unmasked(batch)]
        assert torch.equal((batch.targets != IGNORE).any(1), ordinary.any(1))
        assert not ((batch.targets != IGNORE) & ~ordinary).any()


def test_masks_are_keyed_by_seed_and_step():
    one, two = lm("roberta", "mlm"), lm("roberta", "mlm", seed=1)
    patterns = {tuple((m.step(s).targets != IGNORE).ravel().tolist()) for m in (one, two) for s in (1, 2, 3)}
    assert len(patterns) == 6


@pytest.mark.parametrize(
    "arch,task,reduction",
    [
        ("gpt2", "clm", "mean"),
        ("roberta", "mlm", "mean"),
        ("gpt2", "multi_cls", "mean"),
        ("gpt2", "multi_cls", "label_sum"),
        ("roberta", "multi_cls", "mean"),
        ("roberta", "single_cls", "mean"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 20])
def test_micro_batches_are_the_rows_of_the_batch(arch, task, reduction, size):
    made = Batches(
        data_of(arch, task), task, causal=arch == "gpt2", seq_len=512, batch_size=8, seed=0, loss_reduction=reduction
    )
    batch = made.step(2)
    assert torch.equal(batch.last_token, batch.lengths - 1)
    parts = batch.micro_batches(size)
    for name in ("input_ids", "targets", "last_token", "lengths"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    for name in ("n_targets", "tokens", "real_tokens", "samples"):
        assert sum(getattr(part, name) for part in parts) == getattr(batch, name)
    if batch.attention_mask is not None:
        assert torch.equal(torch.cat([part.attention_mask for part in parts]), batch.attention_mask)
    if batch.label_lists is not None:
        assert torch.equal(torch.cat([part.label_lists[0] for part in parts]), batch.label_lists[0])
        assert all(int(part.label_lists[1][-1]) == len(part.label_lists[0]) for part in parts)
    assert {part.seq_len for part in parts} == {batch.seq_len}
    assert batch.to("cpu") is batch
