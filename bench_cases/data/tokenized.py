"""Tokenised documents as flat arrays: what every batch is cut from, and what the cache holds."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bench_cases.data.documents import SPLITS, Corpus, DataError
from bench_cases.data.tokenizer import SpecialTokens, Tokenizer

ARRAYS = ("tokens", "offsets", "labels", "label_offsets", "split", "classes")


@dataclass(frozen=True)
class TokenizedData:
    """Documents of one corpus under one tokenizer.

    ``tokens``: flat ids without special tokens, uint16 where the vocabulary allows, else int32; document i is
    ``tokens[offsets[i]:offsets[i + 1]]``. ``labels`` (int32) likewise by ``label_offsets``: indices into ``label_names``,
    ascending. Label 0 is the most frequent of the training split, so a document's single-label target is its smallest label,
    and nothing is stored twice; ``classes[label]`` is the class of that target, -1 for labels that are no training target.
    ``splits``: document indices by split. ``valid_vocab``: number of ids the tokenizer can give. ``fingerprint``: sha256 (hex)
    over the arrays, names and special tokens.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    label_offsets: np.ndarray
    split: np.ndarray
    classes: np.ndarray
    label_names: tuple[str, ...]
    special: SpecialTokens
    valid_vocab: int
    tokenizer_id: str
    fingerprint: str
    facts: dict[str, object]
    folder: Path | None = None

    @cached_property
    def splits(self) -> dict[str, np.ndarray]:
        return {name: np.flatnonzero(self.split == code) for code, name in enumerate(SPLITS)}

    @cached_property
    def is_special(self) -> np.ndarray:
        """(valid_vocab,) bool."""
        table = np.zeros(self.valid_vocab, bool)
        table[list(self.special.ids)] = True
        return table

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """Ids a random replacement is drawn from: no special token and no pad column of the embedding."""
        return np.flatnonzero(~self.is_special)

    @property
    def n_labels(self) -> int:
        return len(self.label_names)

    @property
    def n_classes(self) -> int:
        return int(self.classes.max()) + 1 if len(self.classes) else 0

    @cached_property
    def label_uses(self) -> np.ndarray:
        """(labels,) int64: how many training documents carry each label."""
        in_train = np.repeat(self.split == SPLITS.index("train"), np.diff(self.label_offsets))
        return np.bincount(self.labels[in_train], minlength=self.n_labels)

    def label_log_odds(self) -> np.ndarray:
        """(labels,) float64: each label's log-odds among the training documents, with half a document more of either kind, so
        that a label of all documents or of none has finite ones."""
        carried, documents = self.label_uses + 0.5, len(self.splits["train"])
        return np.log(carried) - np.log(documents + 1 - carried)

    @cached_property
    def single_targets(self) -> np.ndarray:
        """(documents,) int32: each document's single-label class, -1 where it has none."""
        counts = np.diff(self.label_offsets)
        first = np.full(len(counts), -1, np.int32)
        has = counts > 0
        first[has] = self.classes[self.labels[self.label_offsets[:-1][has]]]
        return first


def tokenize(corpus: Corpus, tokenizer: Tokenizer) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """(arrays by name, metadata) of a corpus; documents that hold no token are left out and counted."""
    encoded = tokenizer.encode([document.text for document in corpus.documents])
    kept = [i for i, ids in enumerate(encoded) if len(ids)]
    documents = [corpus.documents[i] for i in kept]
    encoded = [encoded[i] for i in kept]
    present = Counter(document.split for document in documents)
    for name in SPLITS[:2]:
        if not present[name]:
            raise DataError(f"{corpus.source}: no {name} documents among {len(documents)}; there must be at least one")
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.int32
    split = np.array([SPLITS.index(document.split) for document in documents], np.int8)

    train_uses = Counter(label for document in documents if document.split == "train" for label in set(document.labels))
    names = sorted(train_uses, key=lambda label: (-train_uses[label], label))
    index = {label: i for i, label in enumerate(names)}
    rows = [sorted({index[label] for label in document.labels if label in index}) for document in documents]
    unseen = sum(label not in index for document in documents for label in set(document.labels))
    label_counts = np.array([len(row) for row in rows], np.int64)
    labels = np.array([label for row in rows for label in row], np.int32)
    in_train = split == SPLITS.index("train")
    targets = np.unique([row[0] for row, train in zip(rows, in_train, strict=True) if row and train]).astype(np.int64)
    classes = np.full(len(names), -1, np.int32)
    classes[targets] = np.arange(len(targets))

    arrays = {
        "tokens": np.concatenate(encoded).astype(dtype),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "labels": labels,
        "label_offsets": np.concatenate([[0], np.cumsum(label_counts)]).astype(np.int64),
        "split": split,
        "classes": classes,
    }

    def by_split(values: np.ndarray) -> dict[str, int]:
        return {name: int(values[split == code].sum()) for code, name in enumerate(SPLITS)}

    has_class = np.array([bool(row) and classes[row[0]] >= 0 for row in rows])
    p50, p90, p95 = (int(p) for p in np.percentile(lengths, (50, 90, 95)))
    facts = {
        "corpus": corpus.name,
        "source": corpus.source,
        "corpus_sha256": corpus.fingerprint,
        "documents": {name: present[name] for name in SPLITS},
        "tokens": by_split(lengths),
        "tokens_p50": p50,
        "tokens_p90": p90,
        "tokens_p95": p95,
        "documents_without_tokens": len(corpus.documents) - len(documents),
        "labels": len(names),
        "classes": len(targets),
        "unseen_label_uses_dropped": unseen,
        "documents_without_labels": by_split(label_counts == 0) if names else {},
        "single_label_excluded": by_split(~has_class) if names else {},
        **corpus.facts,
    }
    meta = {
        "label_names": names,
        "special": vars(tokenizer.special) | {"ids": list(tokenizer.special.ids)},
        "valid_vocab": tokenizer.size,
        "tokenizer_id": tokenizer.id,
        "facts": facts,
    }
    meta["fingerprint"] = _content(arrays, meta)
    return arrays, meta


def _content(arrays: dict[str, np.ndarray], meta: dict) -> str:
    digest = hashlib.sha256()
    for name in ARRAYS:
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    digest.update("\0".join(meta["label_names"]).encode("utf-8", "surrogatepass"))
    digest.update(f"{sorted(meta['special'].items())} {meta['valid_vocab']}".encode())
    return digest.hexdigest()


def save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", arrays[name], allow_pickle=False)


def open_saved(folder: Path, meta: dict) -> TokenizedData:
    """Arrays are memory-mapped: runs of one matrix share their pages."""

    def array(name: str) -> np.ndarray:
        return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))

    special = SpecialTokens(**{**meta["special"], "ids": tuple(meta["special"]["ids"])})
    return TokenizedData(
        **{name: array(name) for name in ARRAYS},
        label_names=tuple(meta["label_names"]),
        special=special,
        valid_vocab=meta["valid_vocab"],
        tokenizer_id=meta["tokenizer_id"],
        fingerprint=meta["fingerprint"],
        facts=meta["facts"],
        folder=folder,
    )
