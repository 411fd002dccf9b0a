"""Data sets: ``embedded``, ``hub``, a folder or a JSON Lines file, tokenised once and cached by content.

From a request to tokenised data: which corpus, which tokenizer, one cache entry for the pair. What makes documents, a
tokenizer, arrays or batches has a module of its own here. Torch-free; libraries are imported when something must be built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_cases.architectures import TASKS
from bench_cases.data import cache, folder, tokenized, tokenizer
from bench_cases.data.documents import Corpus, DataError, DataUnavailable, limit
from bench_cases.data.tokenizer import TokenizerSpec

__all__ = ["DataError", "DataRequest", "DataUnavailable", "fingerprint", "load_data"]

EMBEDDED_VERSION = 2  # equal to embedded.VERSION (a test says so); the generator is imported only to build


@dataclass(frozen=True)
class DataRequest:
    """Which documents, for which architecture and task; raises `DataError` for what contradicts itself.

    ``source``: ``embedded``, ``hub``, ``hub:REPO[@REVISION]`` (a data set of the hub or a local folder in its layout), a folder
    with ``eurlex.jsonl[.gz]`` or ``openwebtext.jsonl[.gz]``, or one ``.jsonl[.gz]`` file. ``text``: ``eurlex`` (labelled) or
    ``openwebtext``; None takes it from the task. ``tokenizer``: a folder or a hub id; None takes what the source brings for
    ``arch``, else a byte-level BPE is trained on the training split. ``max_documents`` bounds the training split,
    ``validation_documents`` each other split; None takes all. ``seq_len``: tokens of a row, for which embedded text may have to
    be longer.
    """

    source: str
    arch: str
    task: str
    text: str | None = None
    tokenizer: str | None = None
    max_documents: int | None = None
    validation_documents: int | None = None
    text_field: str = "text"
    label_field: str = "labels"
    seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in folder.TEXTS:
            raise DataError(f"task {self.task!r} names no data: text must be one of {', '.join(folder.TEXTS)}")

    @property
    def kind(self) -> str:
        return self.text or (TASKS[self.task].text if self.task in TASKS else "")

    @property
    def stretch(self) -> int:
        """How many times longer than usual the embedded web pages are, a power of two: 64 of them hold some 46,300 tokens, and
        a run's validation documents must hold a row."""
        long = self.kind == "openwebtext" and (self.seq_len or 0) > 46_000
        return 1 << ((self.seq_len or 1) // 40_000).bit_length() if long else 1

    @property
    def flavour(self) -> str:
        """Which special tokens a trained BPE has; one of `tokenizer.FLAVOURS`."""
        return "roberta" if self.arch == "roberta" or self.task == "mlm" else "gpt2"


def load_data(source: str, *, cache_dir: Path | None = None, **options: Any) -> tokenized.TokenizedData:
    """The tokenised documents of a `DataRequest` (``options``: its fields), from the cache where it can.

    Raises DataError (bad content or arguments) and DataUnavailable (the hub cannot be reached).
    """
    request = DataRequest(source, **options)
    recipe = _recipe(request, cache_dir)

    def build(work: Path) -> dict:
        corpus = recipe.corpus()
        corpus = replace(corpus, documents=limit(corpus.documents, request.max_documents, request.validation_documents))
        made = tokenizer.open_tokenizer(recipe.tokenizer, recipe.training_texts(corpus))
        arrays, meta = tokenized.tokenize(corpus, made)
        tokenized.save(work, arrays)
        if hasattr(made.backend, "to_str"):  # a fast one stands beside the data it made
            (work / "tokenizer.json").write_text(made.backend.to_str(), "utf-8")
        return meta

    where, meta = cache.obtain("tokenized", recipe.key, build, cache_dir)
    data = tokenized.open_saved(where, meta["data"])
    if request.task == "mlm" and data.special.mask is None:
        raise DataError(f"tokenizer {data.tokenizer_id} has no mask token; masked LM needs one")
    return data


def fingerprint(source: str, **options: Any) -> str:
    """sha256 (hex) that names the data ``load_data`` would return, without tokenising anything.

    Of the file contents for folders and files, of the generator's version for ``embedded``, of
    repository, revision and number of documents for ``hub``. Same arguments as `load_data`, but for its cache.
    """
    return cache.key(_recipe(DataRequest(source, **options), None).key)


@dataclass(frozen=True)
class _Recipe:
    """What would be built: the corpus's maker and the tokenizer, and the ``key`` of both in the cache."""

    key: dict[str, Any]
    corpus: Callable[[], Corpus]
    tokenizer: TokenizerSpec
    training_texts: Callable[[Corpus], list[str]]


def _recipe(request: DataRequest, cache_dir: Path | None) -> _Recipe:
    identity: dict[str, Any]
    texts: Callable[[Corpus], list[str]] = _train_texts
    spec = _asked_tokenizer(request)
    if request.source == "embedded":
        name = {"eurlex": "law", "openwebtext": "web"}[request.kind]
        # The generator rests on numpy's bit stream; a stable one by promise, but the key costs nothing.
        identity = {"source": "embedded", "version": EMBEDDED_VERSION, "corpus": name, "numpy": version("numpy")}
        if request.stretch > 1:
            identity["stretch"] = request.stretch
        generator = f"embedded-{EMBEDDED_VERSION}-numpy-{version('numpy')}"
        spec = spec or tokenizer.trained(request.flavour, generator, tokenizer.EMBEDDED_VOCABULARY)
        corpus, texts = partial(_embedded, name, request.stretch), _texts_of_both
    elif request.source == "hub" or request.source.startswith("hub:"):
        from bench_cases.data import hub

        wanted = hub.Wanted.parse(request.source, request.kind, request.max_documents, request.validation_documents)
        identity, corpus = wanted.identity(), partial(hub.corpus, wanted, cache_dir)
        if spec is None and request.arch in hub.TOKENIZERS:
            spec = tokenizer.on_hub(hub.TOKENIZERS[request.arch])
    else:
        path, given = folder.find(request.source, request.kind), Path(request.source).expanduser()
        fields = (request.kind, request.text_field, request.label_field)
        identity = folder.identity(path, *fields)
        corpus = partial(folder.corpus, path, *fields, own_file=given.is_file(), file_sha256=identity["file_sha256"])
        if spec is None and (given / request.arch).is_dir():
            spec = tokenizer.in_folder(given / request.arch)
    if spec is None:
        digest = cache.key({**identity, "max_documents": request.max_documents})
        spec = tokenizer.trained(request.flavour, digest, tokenizer.VOCABULARY)
    bounds = {"max_documents": request.max_documents, "validation_documents": request.validation_documents}
    return _Recipe({"corpus": identity, "tokenizer": spec.identity, **bounds}, corpus, spec, texts)


def _asked_tokenizer(request: DataRequest) -> TokenizerSpec | None:
    if request.tokenizer is None:
        return None
    path = Path(request.tokenizer).expanduser()
    if path.is_dir():
        return tokenizer.in_folder(path)
    if request.tokenizer.startswith((".", "/", "~")) or request.tokenizer.count("/") > 1:
        raise DataError(f"--tokenizer {request.tokenizer}: no such folder; allowed are a folder or a hub id")
    return tokenizer.on_hub(request.tokenizer)


def _embedded(name: str, stretch: int = 1) -> Corpus:
    from bench_cases.data import embedded

    return embedded.corpus(name, stretch)


def _texts_of_both(built: Corpus) -> list[str]:
    """One vocabulary for both corpora of the project, from a part of each: law and web models are the same size."""
    corpora = (built if built.name == name else _embedded(name) for name in ("law", "web"))
    return [document.text for corpus in corpora for document in corpus.documents[:300]]


def _train_texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents if document.split == "train"]
