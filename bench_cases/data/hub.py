"""Real data from the Hugging Face hub: downloaded once into our own cache, as JSON Lines.

Never a silent fallback: a hub that cannot be reached is an error that names the other sources. ``datasets``
refuses repositories with loading scripts since version 4; the hub keeps a parquet copy of most of them on a
branch of its own, which is tried second (same rows, same order).

One quick question to the hub before a library that would retry for minutes starts.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bench_cases.data import cache
from bench_cases.data.documents import SPLITS, Corpus, DataError, DataUnavailable, Document
from bench_cases.lookup import first_line

WAYS_OUT = "--data embedded needs no network, --data DIR takes a folder with eurlex.jsonl[.gz] and openwebtext.jsonl[.gz]"
_TIMEOUT_S = 10.0


def offline() -> bool:
    """Whether the user wants the hub's libraries to stay off the network (they may still have their own cache)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def commit_of(kind: str, name: str, revision: str) -> str | None:
    """The commit that ``revision`` of a ``dataset`` or ``model`` repository names; None when offline by choice.

    Raises DataError when the hub knows no such repository, DataUnavailable when it does not answer.
    """
    if offline():
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    try:
        ask = api.dataset_info if kind == "dataset" else api.model_info
        return ask(name, revision=revision, timeout=_TIMEOUT_S).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(f"the hub has no {kind} {name!r} with revision {revision!r}, or it is not public") from error
    except Exception as error:  # httpx, OS and library errors alike mean: no answer
        raise unavailable(name, error) from error


def unavailable(name: str, error: Exception) -> DataUnavailable:
    """The error for ``name``, with the first line of what went wrong and the ways out."""
    return DataUnavailable(f"{name!r} cannot be loaded from the hub ({first_line(error)}); {WAYS_OUT}")


PARQUET_BRANCH = "refs/convert/parquet"
SHUFFLE_SEED, SHUFFLE_BUFFER = 20_240_517, 10_000
OPENWEBTEXT_DOCUMENTS, OPENWEBTEXT_VALIDATION = 40_000, 1_000
TOKENIZERS = {"gpt2": "openai-community/gpt2", "roberta": "FacebookAI/roberta-base"}


@dataclass(frozen=True)
class Repository:
    """A data set as we know it. ``labels`` is the expected number of labels, None where not checked."""

    name: str
    config: str | None
    labels: int | None = None


# The first of each kind is the default; the others are taken by name only, as ``hub:NAME``.
KNOWN = {
    "eurlex": (Repository("coastalcph/lex_glue", "eurlex", labels=100), Repository("NLP-AUEB/eurlex", "eurlex57k")),
    "openwebtext": (Repository("Skylion007/openwebtext", None),),
}
_TEXT_COLUMNS = ("text",)
_LABEL_COLUMNS = ("labels", "eurovoc_concepts", "label")
_ID_COLUMNS = ("celex_id", "id")


@dataclass(frozen=True)
class Wanted:
    """One download: what is asked for, before any network. ``documents``: (training, validation)
    documents to take from a stream, None for a set that is downloaded whole."""

    repository: Repository
    revision: str
    text: str
    documents: tuple[int, int] | None

    @classmethod
    def parse(cls, source: str, text: str, max_documents: int | None, validation_documents: int | None) -> Wanted:
        """``source``: ``hub``, ``hub:REPO`` or ``hub:REPO@REVISION``; REPO may be a local folder."""
        name, _, revision = source.removeprefix("hub").removeprefix(":").partition("@")
        known = {repository.name: repository for repository in KNOWN[text]}
        if source.startswith("hub:") and not name:
            raise DataError(f"--data {source}: a repository must follow 'hub:', such as hub:{KNOWN[text][0].name}")
        default = KNOWN[text][0]
        other = Repository(name, default.config if Path(name).is_dir() else None)
        repository = known.get(name, other) if name else default
        count = (max_documents or OPENWEBTEXT_DOCUMENTS, validation_documents or OPENWEBTEXT_VALIDATION)
        return cls(repository, revision or "main", text, count if text == "openwebtext" else None)

    def identity(self) -> dict[str, Any]:
        repository = self.repository
        out: dict[str, Any] = {
            "hub": repository.name,
            "config": repository.config,
            "revision": self.revision,
            "text": self.text,
        }
        if self.documents:
            out |= {"documents": list(self.documents), "shuffle": [SHUFFLE_SEED, SHUFFLE_BUFFER]}
        if self.local:  # a local folder can change under its name
            files = sorted(p for p in Path(repository.name).rglob("*") if p.is_file())
            out["files"] = [[p.relative_to(repository.name).as_posix(), cache.file_sha256(p)] for p in files]
        return out

    @property
    def local(self) -> bool:
        return Path(self.repository.name).is_dir()


def corpus(wanted: Wanted, cache_dir: Path | None) -> Corpus:
    """From our cache, else downloaded. Raises DataUnavailable when the hub cannot be reached."""
    folder, meta = cache.obtain("hub", wanted.identity(), lambda work: _download(wanted, work), cache_dir)
    documents = []
    with gzip.open(folder / "documents.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            documents.append(Document(row["id"], row["text"], tuple(row["labels"]), row["split"]))
    return Corpus(
        wanted.text, f"hub:{wanted.repository.name}", documents, meta["files"]["documents.jsonl.gz"]["sha256"], meta["data"]
    )


def _download(wanted: Wanted, work: Path) -> dict:
    commit = None if wanted.local else commit_of("dataset", wanted.repository.name, wanted.revision)
    read = _eurlex if wanted.text == "eurlex" else _openwebtext
    counts = dict.fromkeys(SPLITS, 0)
    excluded = 0
    # mtime 0: the same rows give the same bytes, and so the same hash.
    with (work / "documents.jsonl.gz").open("xb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        for document in _guarded(wanted, read(wanted)):
            if not document.text.strip():
                excluded += 1
                continue
            counts[document.split] += 1
            row = {"id": document.id, "text": document.text, "labels": document.labels, "split": document.split}
            file.write((json.dumps(row) + "\n").encode())
    facts = {"repository": wanted.repository.name, "revision": wanted.revision, "commit": commit}
    return facts | {"downloaded": counts, "empty_documents_excluded": excluded}


def _guarded(wanted: Wanted, documents: Iterable[Document]) -> Iterator[Document]:
    try:
        yield from documents
    except (DataError, DataUnavailable, GeneratorExit):
        raise
    except Exception as error:
        raise unavailable(wanted.repository.name, error) from error


def _first_that_loads(wanted: Wanted, **options: Any) -> Any:
    """The repository as it is, else (script-only, or a broken main branch) its parquet copy."""
    from datasets import load_dataset

    repository = wanted.repository
    try:
        revision = None if wanted.local else wanted.revision
        return load_dataset(repository.name, repository.config, revision=revision, **options)
    except (RuntimeError, ValueError, FileNotFoundError) as first:
        # Only data layout and script errors come here; a network that fails goes up at once.
        if wanted.local or isinstance(first, ConnectionError):
            raise
        try:
            return load_dataset(repository.name, revision=PARQUET_BRANCH, data_dir=repository.config, **options)
        except Exception as second:
            raise first from second


def _eurlex(wanted: Wanted) -> Iterator[Document]:
    sets = _first_that_loads(wanted)
    if "train" not in sets:
        raise DataError(f"hub:{wanted.repository.name}: no train split; it has {', '.join(sets)}")
    have, features = sets["train"].column_names, sets["train"].features
    text, label = _column(have, _TEXT_COLUMNS, wanted), _column(have, _LABEL_COLUMNS, wanted)
    identifier = next((name for name in _ID_COLUMNS if name in have), None)
    # Those of a ClassLabel, alone or in a list; None where labels are strings already.
    names = getattr(getattr(features[label], "feature", features[label]), "names", None)
    expected = wanted.repository.labels
    if expected is not None and not wanted.local and names is not None and len(names) != expected:
        raise DataError(f"hub:{wanted.repository.name}: {len(names)} labels, {expected} expected; has the data set changed?")
    for split in SPLITS:
        if split not in sets:
            continue
        for i, row in enumerate(sets[split]):
            given = row[label] if isinstance(row[label], list) else [row[label]]
            # Some real documents end with no label: a row of negatives, and no single-label target.
            labels = tuple(sorted({names[x] if names is not None else str(x) for x in given if x is not None}))
            yield Document(str(row[identifier]) if identifier else f"{split}-{i}", row[text], labels, split)


def _openwebtext(wanted: Wanted) -> Iterator[Document]:
    stream = _first_that_loads(wanted, split="train", streaming=True)
    assert wanted.documents is not None
    training, validation = wanted.documents
    # The set has no validation split: the first documents of the shuffled stream are taken for it.
    rows = islice(stream.shuffle(seed=SHUFFLE_SEED, buffer_size=SHUFFLE_BUFFER), training + validation)
    for i, row in enumerate(rows):
        if i == 0:
            text = _column(list(row), _TEXT_COLUMNS, wanted)
        yield Document(f"owt-{i}", row[text], (), "validation" if i < validation else "train")


def _column(have: list[str], names: tuple[str, ...], wanted: Wanted) -> str:
    found = next((name for name in names if name in have), None)
    if found is None:
        raise DataError(f"hub:{wanted.repository.name}: no column {' or '.join(map(repr, names))}; it has {', '.join(have)}")
    return found
