"""A user's folder (``eurlex.jsonl[.gz]``, ``openwebtext.jsonl[.gz]``, tokenizer folders) or single file."""

from __future__ import annotations

from pathlib import Path

from . import cache, jsonl
from .documents import Corpus
from .errors import DataError

TEXTS = ("eurlex", "openwebtext")


def find(source: str, text: str) -> Path:
    """The file that holds ``text`` (``eurlex`` or ``openwebtext``) at ``source``."""
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(jsonl.SUFFIXES):
            raise DataError(f"--data {source}: a data file must end in {' or '.join(jsonl.SUFFIXES)}")
        return path
    if not path.is_dir():
        raise DataError(
            f"--data {source}: no such folder or file; allowed are embedded, hub, hub:REPO, a folder, "
            f"or a {' or '.join(jsonl.SUFFIXES)} file"
        )
    names = [text + suffix for suffix in jsonl.SUFFIXES]
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        other = [t for t in TEXTS if t != text and any((path / (t + s)).is_file() for s in jsonl.SUFFIXES)]
        has = f"; it has {other[0]}, which serves other tasks" if other else ""
        raise DataError(f"--data {source}: the folder lacks {' or '.join(names)}{has}")
    if len(found) > 1:
        raise DataError(f"--data {source}: the folder holds both {' and '.join(names)}; keep one")
    return found[0]


def tokenizer_folder(source: str, arch: str) -> Path | None:
    """The folder's own tokenizer for an architecture, if it brings one."""
    folder = Path(source).expanduser() / arch
    return folder if folder.is_dir() else None


def identity(path: Path, text: str, text_field: str, label_field: str) -> dict[str, object]:
    """What the corpus is made from: the file's bytes and the names of the fields that are read."""
    try:
        digest = cache.file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return {
        "file_sha256": digest,
        "text": text,
        "text_field": text_field,
        "label_field": label_field if text == "eurlex" else None,
    }


def corpus(path: Path, text: str, text_field: str, label_field: str, *, own_file: bool, file_sha256: str) -> Corpus:
    """``own_file``: a single file of the user, whose lines need no id."""
    fields = jsonl.Fields(text_field, label_field if text == "eurlex" else None, id_required=text == "eurlex" and not own_file)
    documents = jsonl.read(path, fields)
    if cache.file_sha256(path) != file_sha256:
        raise DataError(f"{path}: changed while it was read; try again when nothing writes to it")
    return Corpus(text, path.name, documents, file_sha256)
