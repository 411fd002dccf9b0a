"""Tokenizers: a folder, a hub id, or a byte-level BPE trained on the data at hand.

A `TokenizerSpec` names one without importing a library (the cache key needs no more); `open_tokenizer`
makes it work. Documents are encoded without special tokens: the collator adds them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench_cases.data import hub
from bench_cases.data.documents import DataError

VOCABULARY = 8_192
EMBEDDED_VOCABULARY = 2_048
_TRAINING_CHARACTERS = 20_000_000
# Each set of files is enough for a tokenizer; the first that is complete counts.
_COMPLETE = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
)
_OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids. ``bos`` (<s>) is None where sequences are not framed (GPT-2); ``eos`` then separates
    documents, and else closes the frame too. ``ids`` are all special ids, which are never masked."""

    pad: int
    bos: int | None
    eos: int
    mask: int | None
    ids: tuple[int, ...]


FLAVOURS = {
    "gpt2": (("<|endoftext|>", "<|pad|>"), SpecialTokens(pad=1, bos=None, eos=0, mask=None, ids=(0, 1))),
    "roberta": (("<s>", "<pad>", "</s>", "<unk>", "<mask>"), SpecialTokens(pad=1, bos=0, eos=2, mask=4, ids=(0, 1, 2, 3, 4))),
}
"""Special tokens of a trained BPE, in id order."""


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer. ``identity`` goes into the cache key; its ``kind`` is ``trained``, ``folder`` or ``hub``."""

    id: str
    identity: dict[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """``backend``: a ``tokenizers.Tokenizer`` or, where a library has no fast one, a transformers tokenizer."""

    id: str
    backend: Any
    special: SpecialTokens
    size: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array a text, without special tokens."""
        if not hasattr(self.backend, "encode_batch_fast"):
            return [np.asarray(self.backend(t, add_special_tokens=False)["input_ids"], np.int32) for t in texts]
        out: list[np.ndarray] = []
        for start in range(0, len(texts), 256):
            # Documents hold no special tokens of their own: "</s>" in a web page is text.
            encoded = self.backend.encode_batch_fast(list(texts[start : start + 256]), add_special_tokens=False)
            out += [np.asarray(e.ids, np.int32) for e in encoded]
        return out


def trained(flavour: str, corpus: str, vocabulary: int) -> TokenizerSpec:
    """``corpus``: fingerprint of the texts it is trained on."""
    asked = {"kind": "trained", "flavour": flavour, "vocabulary": vocabulary, "corpora": [corpus]}
    return TokenizerSpec(f"bpe-{flavour}-{vocabulary}", asked | {"tokenizers": version("tokenizers")})


def in_folder(folder: Path) -> TokenizerSpec:
    """Checks that the files are there: `transformers` builds an empty tokenizer when one is missing."""
    complete = next((names for names in _COMPLETE if all((folder / name).is_file() for name in names)), None)
    if complete is None:
        started = next((names for names in _COMPLETE if any((folder / name).is_file() for name in names)), None)
        missing = ", ".join(n for n in started if not (folder / n).is_file()) if started else "every tokenizer file"
        raise DataError(
            f"tokenizer folder {folder} lacks {missing}; "
            "it must hold tokenizer.json, or vocab.json and merges.txt, or vocab.txt, or tokenizer.model"
        )
    digest = hashlib.sha256()
    for name in sorted({*complete, *_OPTIONAL}):
        path = folder / name
        raw = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name} {len(raw)}\n".encode() + raw)
    return TokenizerSpec(str(folder), {"kind": "folder", "sha256": digest.hexdigest(), "transformers": version("transformers")})


def on_hub(repository: str) -> TokenizerSpec:
    return TokenizerSpec(repository, {"kind": "hub", "repository": repository, "transformers": version("transformers")})


def open_tokenizer(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """``texts`` are read only when a BPE must be trained."""
    return _train(spec, texts) if spec.identity["kind"] == "trained" else _pretrained(spec)


def _train(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    def sample() -> Iterable[str]:
        left = _TRAINING_CHARACTERS
        for text in texts:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return

    names, special = FLAVOURS[spec.identity["flavour"]]
    backend = Backend(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.identity["vocabulary"],
        special_tokens=list(names),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample(), trainer)
    backend.encode_special_tokens = True
    return Tokenizer(spec.id, backend, special, backend.get_vocab_size())


def _pretrained(spec: TokenizerSpec) -> Tokenizer:
    made = _from_library(spec)
    if made.pad_token_id is None:
        # A pad token of its own: with pad = eos a real end of text would count as padding.
        made.add_special_tokens({"pad_token": "<|pad|>"})
    eos = next((i for i in (made.sep_token_id, made.eos_token_id, made.bos_token_id) if i is not None), None)
    framed = made.cls_token_id is not None and made.sep_token_id is not None
    if eos is None:
        raise DataError(f"tokenizer {spec.id} has no end-of-text token (eos, sep or bos)")
    special = SpecialTokens(
        made.pad_token_id,
        made.cls_token_id if framed else None,
        eos,
        made.mask_token_id,
        tuple(sorted(set(made.all_special_ids))),
    )
    backend = made
    if getattr(made, "is_fast", False):
        backend = made.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
    tokenizer = Tokenizer(spec.id, backend, special, len(made))
    if len(set(tokenizer.encode(["The quick brown fox and the law."])[0])) < 4:
        raise DataError(f"tokenizer {spec.id} does not encode plain English; are its files complete?")
    return tokenizer


def _from_library(spec: TokenizerSpec):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec.id, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise anything from OSError to KeyError here
        if spec.identity["kind"] == "folder":
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DataError(f"tokenizer folder {spec.id} cannot be loaded: {line}") from error
        if hub.offline():
            raise hub.unavailable(spec.id, error) from error
    hub.commit_of("model", spec.id, "main")
    try:
        return AutoTokenizer.from_pretrained(spec.id, trust_remote_code=False)
    except Exception as error:
        raise hub.unavailable(spec.id, error) from error
