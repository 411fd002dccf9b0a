"""The embedded corpus: the same bytes everywhere, with the shape of the real sets."""

import json
import time
from collections import Counter

import numpy as np
import pytest

from bench_cases import CASES, PRESETS
from bench_cases.data import EMBEDDED_VERSION, DataError, embedded, fingerprint, load_data
from bench_cases.data.batches import Batches

# A change here needs a new embedded.VERSION (and EMBEDDED_VERSION): cached data are keyed by it.
GOLDEN = {
    (2, "law"): "ffd276c2fb29c70cfaaebd230f979c0139f19f09adc14165028e3517881ed5d8",
    (2, "web"): "ec3e4201b77b6ca6cfc9fcbde82996a0d9bcfd6e51f6c35eaa1cf265e5e277d4",
}


@pytest.fixture(scope="module")
def corpora():
    start = time.perf_counter()
    made = {name: embedded.corpus(name) for name in ("law", "web")}
    print(f"\ngenerated in {time.perf_counter() - start:.2f} s")
    return made


@pytest.mark.parametrize("name", ["law", "web"])
def test_content_is_the_one_of_this_version(corpora, name):
    assert corpora[name].fingerprint == GOLDEN[embedded.VERSION, name]
    assert embedded.VERSION == EMBEDDED_VERSION


def test_lengths_are_like_eurlex(corpora):
    words = [len(d.text.split()) for d in corpora["law"].documents]
    p50, p95 = np.percentile(words, (50, 95))
    assert p50 == pytest.approx(392, rel=0.03) and p95 == pytest.approx(1_517, rel=0.03)


def test_labels_are_like_eurlex(corpora):
    law = corpora["law"].documents
    counts = [len(d.labels) for d in law]
    assert min(counts) == 1 and max(counts) <= 16
    assert np.mean(counts) == pytest.approx(5, abs=0.2)
    uses = Counter(label for d in law if d.split == "train" for label in d.labels)
    assert sum(n == 1 for n in uses.values()) >= 10, "the tail holds labels seen once"
    assert uses.most_common(1)[0][1] < 0.65 * sum(d.split == "train" for d in law)


def test_every_document_is_sound(corpora):
    for corpus in corpora.values():
        assert len({d.id for d in corpus.documents}) == len(corpus.documents)
        assert all(d.text.strip() and d.text.isascii() for d in corpus.documents)
        assert {d.split for d in corpus.documents} >= {"train", "validation"}
    assert all(d.labels and len(set(d.labels)) == len(d.labels) for d in corpora["law"].documents)


def test_labels_show_in_the_beginning(corpora):
    """The first hundred words name most of a document's labels."""
    named = total = 0
    for document in corpora["law"].documents[:300]:
        head = document.text.split()[:100]
        head = {word.strip(".,;:") for word in head}
        named += sum(label.split("/")[1] in head for label in document.labels)
        total += len(document.labels)
    assert named / total > 0.8


def test_no_preset_has_other_data_for_the_length_of_its_rows():
    for case in CASES.values():
        for preset in PRESETS.values():
            options = {"arch": case.architecture.id, "task": case.task.id, "max_documents": preset.documents}
            usual = fingerprint("embedded", **options)
            for seq_len in (preset.sequence_length(case.id), case.architecture.positions(preset.id), 46_000):
                assert fingerprint("embedded", **options, seq_len=seq_len) == usual
    assert fingerprint("embedded", arch="gpt2", task="multi_cls") == fingerprint(
        "embedded", arch="gpt2", task="multi_cls", seq_len=1 << 20
    )


@pytest.mark.parametrize("seq_len", [131_072, pytest.param(1 << 20, marks=pytest.mark.soak)])
def test_pages_are_long_enough_for_a_row_of_training_and_of_validation(seq_len, tmp_path):
    """With a preset's 64 validation documents, the usual vocabulary, and pages that differ from one another."""
    options = {"arch": "gpt2", "task": "clm", "max_documents": 80, "validation_documents": 64, "seq_len": seq_len}
    data = load_data("embedded", cache_dir=tmp_path, **options)
    usual = load_data("embedded", arch="gpt2", task="clm", max_documents=400, validation_documents=4)
    tokenizers = [json.loads((found.folder / "tokenizer.json").read_text()) for found in (data, usual)]
    assert tokenizers[0] == tokenizers[1]
    batches = Batches(data, "clm", causal=True, seq_len=seq_len, batch_size=1, seed=0)
    batch, (held_out, *_) = batches.step(1), batches.evaluation(64, 1)
    assert batch.input_ids.shape == held_out.input_ids.shape == (1, seq_len) and batch.real_tokens == seq_len
    (row,) = batch.input_ids.numpy()
    assert len(np.unique(row)) > 0.95 * len(np.unique(usual.tokens)) and (row == data.special.eos).sum() >= min(
        20, 2e7 / seq_len
    )
    pages = np.split(row, np.flatnonzero(row == data.special.eos))[1:-1]
    assert len({page.tobytes() for page in pages}) == len(pages)


def test_a_row_that_too_few_pages_do_not_hold_says_what_to_do():
    data = load_data("embedded", arch="gpt2", task="clm", max_documents=400, validation_documents=4, seq_len=46_000)
    with pytest.raises(DataError, match="holds no row for clm at sequence length 46000; give more documents or a shorter"):
        Batches(data, "clm", causal=True, seq_len=46_000, batch_size=1, seed=0)
