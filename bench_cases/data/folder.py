"""A user's folder (``eurlex.jsonl[.gz]``, ``openwebtext.jsonl[.gz]``, tokenizer folders) or single file.

The lines are JSON; every way in which one can be wrong has an error that names the file and the line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_cases.data import cache
from bench_cases.data.documents import SPLITS, Corpus, DataError, Document, split_by_hash

LONGEST_LINE_BYTES = 64 << 20
SUFFIXES = (".jsonl", ".jsonl.gz")
_SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def lines(path: Path) -> Iterator[tuple[str, dict]]:
    """("file:line", object) for every line that is not blank."""
    where = str(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE_BYTES + 1), b""), 1):
                where = f"{path}:{number}"
                if len(raw) > LONGEST_LINE_BYTES:
                    raise DataError(f"{where}: is longer than {LONGEST_LINE_BYTES >> 20} MiB, the most that a line may have")
                if raw.strip():
                    yield where, _object(raw, where, first=number == 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{where}: not a whole gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _object(raw: bytes, where: str, *, first: bool) -> dict:
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; only UTF-8 text is allowed"
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); every line must be one JSON object") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {_kind(value)}; every line must be one JSON object")
    return value


def read(path: Path, text_field: str = "text", label_field: str | None = None, id_required: bool = False) -> list[Document]:
    """All documents of a file; without a ``label_field`` texts only.

    A file gives a split on every line or on none; without one, a tenth of the documents (by rank of
    the hash of their ids, or of their texts where they have none) is the validation split.
    """
    documents: list[Document] = []
    first: tuple[str, str] | None = None  # where, and its split
    seen: dict[str, str] = {}
    for where, line in lines(path):
        text = _text(line, text_field, where)
        labels = () if label_field is None else _labels(line, label_field, where)
        identifier = _identifier(line, id_required, where)
        if identifier in seen:
            raise DataError(f"{where}: id {identifier!r} stands in {seen[identifier]} already; ids must differ")
        if identifier:
            seen[identifier] = where
        split = _split(line, where)
        first = first or (where, split)
        if bool(first[1]) != bool(split):
            raise DataError(f"{where}: {'a' if split else 'no'} 'split', unlike {first[0]}; give it on every line or on none")
        documents.append(Document(identifier, text, labels, split))
    if first is None:
        raise DataError(f"{path}: holds no documents; one JSON object a line is needed")
    if first[1]:
        return documents
    names = split_by_hash([d.id or d.text for d in documents], validation=0.1)
    return [replace(document, split=name) for document, name in zip(documents, names, strict=True)]


def _field(line: dict, name: str, where: str) -> object:
    if name not in line:
        raise DataError(f"{where}: lacks the field {name!r}; it has {', '.join(map(repr, line)) or 'none'}")
    return line[name]


def _text(line: dict, name: str, where: str) -> str:
    text = _field(line, name, where)
    if not isinstance(text, str):
        raise DataError(f"{where}: {name!r} is a JSON {_kind(text)}; a string is needed")
    if not text.strip():
        raise DataError(f"{where}: empty document ({name!r} holds no text)")
    return _encodable(text, name, where)


def _labels(line: dict, name: str, where: str) -> tuple[str, ...]:
    value = _field(line, name, where)
    labels = [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value
    if not isinstance(labels, list):
        raise DataError(f"{where}: {name!r} is a JSON {_kind(value)}; a list of strings or one string is needed")
    for label in labels:
        if not isinstance(label, str):
            raise DataError(
                f"{where}: label {json.dumps(label)} in {name!r} is a JSON {_kind(label)}; "
                f'label ids are strings (write "{label}")'
            )
        if not label.strip():
            raise DataError(f"{where}: empty label id in {name!r}")
        _encodable(label, name, where)
    if not labels:
        raise DataError(f"{where}: document without labels ({name!r} is empty); at least one is needed")
    return tuple(sorted(set(labels)))


def _encodable(text: str, name: str, where: str) -> str:
    r"""JSON can spell half a surrogate pair ("\ud800"), which no UTF-8 text holds."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name!r} holds half a surrogate pair at character {error.start + 1}; only UTF-8 text is allowed"
        ) from error
    return text


def _identifier(line: dict, required: bool, where: str) -> str:
    value = _field(line, "id", where) if required else line.get("id", "")
    if isinstance(value, str) and (value or not required):
        return _encodable(value, "id", where)
    if isinstance(value, int) and not isinstance(value, bool) and not required:
        return str(value)
    raise DataError(f"{where}: 'id' is {json.dumps(value)}; a string is needed")


def _split(line: dict, where: str) -> str:
    value = line.get("split")
    if value is None:
        return ""
    if not isinstance(value, str) or value not in _SPLIT_NAMES:
        raise DataError(f"{where}: split {json.dumps(value)} is none of {', '.join(SPLITS)}")
    return _SPLIT_NAMES[value]


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


TEXTS = ("eurlex", "openwebtext")


def find(source: str, text: str) -> Path:
    """The file that holds ``text`` (``eurlex`` or ``openwebtext``) at ``source``."""
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"--data {source}: a data file must end in {' or '.join(SUFFIXES)}")
        return path
    if not path.is_dir():
        raise DataError(
            f"--data {source}: no such folder or file; allowed are embedded, hub, hub:REPO, a folder, "
            f"or a {' or '.join(SUFFIXES)} file"
        )
    names = [text + suffix for suffix in SUFFIXES]
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        other = [t for t in TEXTS if t != text and any((path / (t + s)).is_file() for s in SUFFIXES)]
        has = f"; it has {other[0]}, which serves other tasks" if other else ""
        raise DataError(f"--data {source}: the folder lacks {' or '.join(names)}{has}")
    if len(found) > 1:
        raise DataError(f"--data {source}: the folder holds both {' and '.join(names)}; keep one")
    return found[0]


def identity(path: Path, text: str, text_field: str, label_field: str) -> dict[str, Any]:
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
    labelled = text == "eurlex"
    documents = read(path, text_field, label_field if labelled else None, id_required=labelled and not own_file)
    if cache.file_sha256(path) != file_sha256:
        raise DataError(f"{path}: changed while it was read; try again when nothing writes to it")
    return Corpus(text, path.name, documents, file_sha256)
