"""Data sets: ``embedded``, ``hub``, a folder or a JSON Lines file, tokenised once and cached by content.

This module imports nothing but the errors, so that a command line can name them at no cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench_cases.data.documents import DataError, DataUnavailable

if TYPE_CHECKING:
    from bench_cases.data.tokenized import TokenizedData

__all__ = ["DataError", "DataUnavailable", "fingerprint", "load_data"]


def load_data(
    source: str,
    *,
    arch: str,
    task: str,
    text: str | None = None,
    tokenizer: str | None = None,
    flavour: str | None = None,
    max_documents: int | None = None,
    validation_documents: int | None = None,
    text_field: str = "text",
    label_field: str = "labels",
    cache_dir: Path | None = None,
) -> TokenizedData:
    """The tokenised documents of ``source`` for one architecture and task, from the cache where it can.

    ``source``: ``embedded``, ``hub``, ``hub:REPO[@REVISION]`` (a data set of the hub or a local
    folder in its layout), a folder with ``eurlex.jsonl[.gz]`` or ``openwebtext.jsonl[.gz]``, or one
    ``.jsonl[.gz]`` file. ``text``: ``eurlex`` (labelled) or ``openwebtext``; None takes it from the task.
    ``tokenizer``: a folder or a hub id; None takes what the source brings for ``arch``, else a
    byte-level BPE is trained on the training split. ``flavour``: special tokens of such a BPE, ``gpt2``
    or ``roberta``; None is ``roberta`` for ``roberta`` and for ``mlm``. ``max_documents`` bounds the
    training split, ``validation_documents`` each other split.

    Raises DataError (bad content or arguments) and DataUnavailable (the hub cannot be reached).
    """
    from bench_cases.data.loading import Request, load

    return load(
        Request(source, arch, task, text, tokenizer, flavour, max_documents, validation_documents, text_field, label_field),
        cache_dir,
    )


def fingerprint(source: str, *, arch: str, task: str, **options: object) -> str:
    """sha256 (hex) that names the data ``load_data`` would return, without tokenising anything.

    Of the file contents for folders and files, of the generator's version for ``embedded``, of
    repository, revision and number of documents for ``hub``. Same arguments as `load_data`.
    """
    from bench_cases.data.loading import Request, identity

    options.pop("cache_dir", None)
    return identity(Request(source, arch, task, **options))  # type: ignore[arg-type]
