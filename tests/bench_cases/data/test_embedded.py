"""The embedded corpus: the same bytes everywhere, with the shape of the real sets."""

import time
from collections import Counter

import numpy as np
import pytest

from bench_cases.data import EMBEDDED_VERSION, embedded

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
