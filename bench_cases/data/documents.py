"""What every source returns: documents with a split, in a corpus that knows its content hash; and the two errors of data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its label ids (empty for language modelling) and its split."""

    id: str
    text: str
    labels: tuple[str, ...]
    split: str


@dataclass(frozen=True)
class Corpus:
    """Documents of one source. ``fingerprint`` is the sha256 (hex) of what they were made from."""

    name: str
    source: str
    documents: Sequence[Document]
    fingerprint: str
    facts: dict[str, object] = field(default_factory=dict)


def content_sha256(documents: Iterable[Document]) -> str:
    """sha256 (hex) over ids, texts, labels and splits, in order; lengths keep the fields apart."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.id, document.text, document.split, *document.labels):
            raw = part.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
        digest.update(b"\xff" * 8)
    return digest.hexdigest()


def split_by_hash(keys: Sequence[str], *, validation: float) -> list[str]:
    """A split for each key, a pure function of the set of keys (its order does not matter).

    The keys are ranked by their sha256; the first share is validation. Ranking (not a threshold on the hash) gives exact
    shares, and at least one validation document as soon as there are two documents, so that a handful can be tried.
    """
    ranked = sorted(range(len(keys)), key=lambda i: (hashlib.sha256(keys[i].encode("utf-8", "surrogatepass")).digest(), i))
    chosen = set(ranked[: max(1, round(len(keys) * validation))] if len(keys) > 1 else ())
    return ["validation" if place in chosen else "train" for place in range(len(keys))]


def limit(documents: Sequence[Document], max_documents: int | None, validation_documents: int | None) -> list[Document]:
    """The first ``max_documents`` training documents and the first ``validation_documents`` of each other split."""
    taken, kept = dict.fromkeys(SPLITS, 0), []
    for document in documents:
        bound = max_documents if document.split == "train" else validation_documents
        if bound is None or taken[document.split] < bound:
            taken[document.split] += 1
            kept.append(document)
    return kept


class DataError(Exception):
    """Bad content: the message names what was given, what is allowed and where (``file:line``)."""


class DataUnavailable(Exception):
    """The data exist somewhere else and cannot be reached; the message names the ways out."""
