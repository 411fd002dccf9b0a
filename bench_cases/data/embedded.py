"""The corpus inside the project: law-like and web-like text from a fixed seed, with no network.

Law documents take after EUR-Lex: lengths (words p50 about 392, p95 about 1,517), labels per document (mean 5, 1 to 16) and a
long tail of labels, some seen once. A document draws a domain, which may lie in a sector (a label of its own), then labels
mostly of that domain with Zipf weights, and names its labels' terms from the title on, so that a model that sees 128 tokens can
learn them. Web pages draw a theme and fill sentence templates with its words.

The text has nothing to do with a run's seed: every seed trains on the same corpus.
"""

from __future__ import annotations

import re

import numpy as np

from bench_cases.data import embedded_words as words
from bench_cases.data.documents import Corpus, Document, content_sha256

# Raise with any change of the output (a test holds the content hashes). Cached data are keyed by it,
# so that a run that finds its data in the cache need not generate them again.
VERSION = 2
SEED = 20_240_517

LAW_SPLITS = {"train": 1_600, "validation": 240, "test": 160}
WEB_SPLITS = {"train": 640, "validation": 80}
# Share of documents with 1, 2, ... 16 labels, after the 3,000 real documents of NUMERICS.
LABELS_PER_DOCUMENT = (10, 138, 413, 537, 629, 843, 208, 124, 58, 25, 10, 5, 4, 3, 3, 3)
SECTOR_SHARE = 0.5  # how often a document names its sector where it could name its domain
TERM_NOISE = 0.08  # share of terms that belong to no label of the document

_NUMBERS = [str(n) for n in range(1, 61)] + [f"{n}/{y}" for n in (90, 362, 411, 1765, 2377) for y in range(81, 99, 2)]
_YEARS = [str(y) for y in range(1978, 2014)]


def corpus(name: str, stretch: int = 1) -> Corpus:
    """``name`` is ``law`` (labelled) or ``web`` (text only), whose pages are ``stretch`` times longer: another corpus.
    Deterministic; a quarter of a second, times ``stretch``."""
    documents = _law() if name == "law" else _web(stretch)
    name = name if stretch == 1 else f"{name}-{stretch}"
    return Corpus(name, "embedded", documents, content_sha256(documents), {"generator_version": VERSION})


class _Table:
    """Strings by number, so that whole corpora are drawn as integer arrays."""

    def __init__(self) -> None:
        self.strings: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, text: str) -> int:
        if text not in self._index:
            self._index[text] = len(self.strings)
            self.strings.append(text)
        return self._index[text]

    def many(self, texts: list[str]) -> np.ndarray:
        return np.array([self.add(text) for text in texts], dtype=np.int32)


def _compile(templates: tuple[str, ...], slots: str, table: _Table) -> np.ndarray:
    """Templates as rows of table indices, (n, longest) int32: slot k of ``slots`` is -2-k, padding is -1."""
    rows = [
        [-2 - slots.index(word) if word in slots else table.add(word) for word in t.replace("\n", " \n").split(" ") if word]
        for t in templates
    ]
    out = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _zipf(n: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def _lengths(rng: np.random.Generator, n: int, median: float, sigma: float, low: int, high: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median), sigma, n), low, high).astype(np.int64)


def _sentences(rng, lengths: np.ndarray, openings: list[np.ndarray], body: np.ndarray, weights: np.ndarray):
    """For every document its openings (one of each kind) and body sentences until its length is reached.

    Returns (stream, owner): table indices and slots, and the document of each, both flat int32.
    """
    n = len(lengths)
    width = max(block.shape[1] for block in (*openings, body))
    library = np.concatenate([np.pad(b, ((0, 0), (0, width - b.shape[1])), constant_values=-1) for b in (*openings, body)])
    first = np.cumsum([0] + [len(b) for b in openings])
    size = (library != -1).sum(1)
    opened = (
        np.stack([start + rng.integers(0, len(b), n) for start, b in zip(first[:-1], openings, strict=True)], 1)
        if openings
        else np.zeros((n, 0), int)
    )
    mean = float((size[first[-1] :] * weights).sum())
    count = np.maximum(1, np.rint((lengths - size[opened].sum(1)) / mean)).astype(np.int64)
    drawn = first[-1] + np.searchsorted(np.cumsum(weights)[:-1], rng.random(count.sum()), side="right")
    owner_drawn = np.repeat(np.arange(n), count)
    chosen = np.concatenate([opened.ravel(), drawn])
    owner = np.concatenate([np.repeat(np.arange(n), opened.shape[1]), owner_drawn])
    order = np.argsort(owner, kind="stable")
    rows = library[chosen[order]]
    real = rows != -1
    return rows[real], np.repeat(owner[order], size[chosen[order]])


def _texts(stream: np.ndarray, owner: np.ndarray, n: int, table: _Table) -> list[str]:
    strings = np.array(table.strings, dtype=object)[stream]
    bounds = np.searchsorted(owner, np.arange(n + 1))
    texts = [" ".join(strings[bounds[i] : bounds[i + 1]]) for i in range(n)]
    return [re.sub(r" (?=[\n,.;)?:])|(?<=[\n($]) ", "", text).strip() for text in texts]


def _law_labels(rng, n: int, sectors: np.ndarray, terms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(domain (n,), labels (n, 16) in mention order, number of labels (n,)).

    ``sectors``: each domain's sector, or -1. The sector is the first label; the others are drawn without
    replacement in proportion to their weight (Gumbel top-k).
    """
    domains = len(sectors)
    domain = rng.choice(domains, n, p=_zipf(domains, 0.6))
    other = (domain + rng.integers(1, domains, n)) % domains
    weight = np.full((n, domains, terms), 1e-9)
    weight[np.arange(n), other] = 0.06 * _zipf(terms, 1.2)
    weight[np.arange(n), domain] = _zipf(terms, 1.9)
    score = np.log(weight.reshape(n, -1)) + rng.gumbel(size=(n, domains * terms))
    share = np.array(LABELS_PER_DOCUMENT, dtype=np.float64)
    labels = np.argsort(-score, axis=1)[:, : len(share)]
    inside = np.flatnonzero(sectors[domain] >= 0)
    labels[inside, 1:] = labels[inside, :-1]
    labels[inside, 0] = domains * terms + sectors[domain[inside]]
    return domain, labels, rng.choice(len(share), n, p=share / share.sum()) + 1


def _law() -> list[Document]:
    rng = np.random.default_rng([SEED, 1])
    splits = [name for name, size in LAW_SPLITS.items() for _ in range(size)]
    n, table = len(splits), _Table()
    names = [(domain, term) for domain, terms in words.DOMAINS.items() for term in terms.split()]
    terms = len(names) // len(words.DOMAINS)
    sectors = np.array([next((i for i, s in enumerate(words.SECTORS.values()) if d in s), -1) for d in words.DOMAINS])
    names += [("sector", sector) for sector in words.SECTORS]
    ids = [f"{domain}/{term}" for domain, term in names]
    term_index = table.many([term for _, term in names])
    domain, labels, count = _law_labels(rng, n, sectors, terms)

    slots = "TNYMD"
    blocks = [_compile(t, slots, table) for t in (words.LAW_HEADS, words.LAW_PREAMBLES, words.LAW_SENTENCES)]
    lengths = _lengths(rng, n, 440, 0.823, 60, 3_500)
    stream, owner = _sentences(rng, lengths, blocks[:2], blocks[2], _zipf(len(blocks[2]), 0.5))

    at = np.flatnonzero(stream == -2)
    doc = owner[at]
    place = np.arange(len(at)) - np.searchsorted(doc, np.arange(n))[doc]
    # The first mentions go round the labels in order; later ones are drawn.
    pick = np.where(place < count[doc], place, (rng.random(len(at)) * count[doc]).astype(np.int64))
    label = labels[doc, pick]
    stray = rng.random(len(at)) < TERM_NOISE
    label[stray] = domain[doc[stray]] * terms + rng.integers(0, terms, stray.sum())
    stream[at] = term_index[label]
    for slot, strings in (("N", _NUMBERS), ("Y", _YEARS), ("M", words.MONTHS.split())):
        hole = stream == -2 - slots.index(slot)
        stream[hole] = rng.choice(table.many(strings), hole.sum())

    hole = np.flatnonzero(stream == -2 - slots.index("D"))
    within = domain[owner[hole]]
    above = (sectors[within] >= 0) & (rng.random(len(within)) < SECTOR_SHARE)
    stream[hole] = np.where(above, table.many(list(words.SECTORS))[sectors[within]], table.many(list(words.DOMAINS))[within])

    texts = _texts(stream, owner, n, table)
    return [
        Document(f"law-{i:05d}", texts[i], tuple(sorted(ids[j] for j in labels[i, : count[i]])), splits[i]) for i in range(n)
    ]


def _web(stretch: int) -> list[Document]:
    rng = np.random.default_rng([SEED, 2])
    splits = [name for name, size in WEB_SPLITS.items() for _ in range(size)]
    n, table = len(splits), _Table()
    themes = np.stack([table.many(nouns.split()) for nouns in words.WEB_THEMES.values()])
    slots = "TAVWPNY"
    body = _compile(words.WEB_SENTENCES, slots, table)
    lengths = _lengths(rng, n, 560 * stretch, 0.8, 60 * stretch, 3_400 * stretch)
    stream, owner = _sentences(rng, lengths, [], body, _zipf(len(body), 0.4))

    theme = rng.integers(0, len(themes), n)
    at = np.flatnonzero(stream == -2)
    # One noun in six comes from another theme; within a theme some nouns are commoner than others.
    of = np.where(rng.random(len(at)) < 1 / 6, rng.integers(0, len(themes), len(at)), theme[owner[at]])
    stream[at] = themes[of, rng.choice(themes.shape[1], len(at), p=_zipf(themes.shape[1], 0.7))]
    lists = (words.WEB_ADJECTIVES, words.WEB_VERBS, words.WEB_NAMES, words.WEB_PLACES)
    fills = (*map(str.split, lists), _NUMBERS[:60], _YEARS)
    for slot, strings in zip(slots[1:], fills, strict=True):
        hole = stream == -2 - slots.index(slot)
        stream[hole] = rng.choice(table.many(strings), hole.sum(), p=_zipf(len(strings), 0.7))
    texts = _texts(stream, owner, n, table)
    return [Document(f"web-{i:05d}", texts[i], (), splits[i]) for i in range(n)]
