"""Data sets: ``embedded``, ``hub``, a folder or a JSON Lines file, tokenised once and cached by content.

From a request to tokenised data: which corpus, which tokenizer, one cache entry for the pair. What makes documents, a
tokenizer, arrays or batches has a module of its own here. Torch-free; libraries are imported when something must be built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_cases.data import cache, folder, tokenized, tokenizer
from bench_cases.data.documents import Corpus, DataError, DataUnavailable, limit
from bench_cases.data.tokenizer import TokenizerSpec

__all__ = ["DataError", "DataRequest", "DataUnavailable", "fingerprint", "load_data"]

EMBEDDED_VERSION = 2  # equal to embedded.VERSION (a test says so); the generator is imported only to build
TEXT_OF_TASK = {"clm": "openwebtext", "mlm": "openwebtext", "multi_cls": "eurlex", "single_cls": "eurlex"}


@dataclass(frozen=True)
class DataRequest:
    """Which documents, for which architecture and task; raises `DataError` for what contradicts itself.

    ``source``: ``embedded``, ``hub``, ``hub:REPO[@REVISION]`` (a data set of the hub or a local
    folder in its layout), a folder with ``eurlex.jsonl[.gz]`` or ``openwebtext.jsonl[.gz]``, or one
    ``.jsonl[.gz]`` file. ``text``: ``eurlex`` (labelled) or ``openwebtext``; None takes it from the task.
    ``tokenizer``: a folder or a hub id; None takes what the source brings for ``arch``, else a
    byte-level BPE is trained on the training split. ``flavour``: special tokens of such a BPE, ``gpt2``
    or ``roberta``; None is ``roberta`` for ``roberta`` and for ``mlm``. ``max_documents`` bounds the
    training split, ``validation_documents`` each other split.
    """

    source: str
    arch: str
    task: str
    text: str | None = None
    tokenizer: str | None = None
    flavour: str | None = None
    max_documents: int | None = None
    validation_documents: int | None = None
    text_field: str = "text"
    label_field: str = "labels"

    def __post_init__(self) -> None:
        for name in ("max_documents", "validation_documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} {value} is not a positive number")
        if self.kind not in folder.TEXTS:
            raise DataError(f"task {self.task!r} names no data: text must be one of {', '.join(folder.TEXTS)}")

    @property
    def kind(self) -> str:
        return self.text or TEXT_OF_TASK.get(self.task, "")

    @property
    def bpe_flavour(self) -> str:
        return self.flavour or ("roberta" if self.arch == "roberta" or self.task == "mlm" else "gpt2")


def load_data(source: str, *, cache_dir: Path | None = None, **options: Any) -> tokenized.TokenizedData:
    """The tokenised documents of a `DataRequest` (``options``: its fields), from the cache where it can.

    Raises DataError (bad content or arguments) and DataUnavailable (the hub cannot be reached).
    """
    request = DataRequest(source, **options)
    recipe = _recipe(request, cache_dir)

    def build(work: Path) -> dict:
        corpus = recipe.corpus()
        documents = limit(corpus.documents, request.max_documents, request.validation_documents)
        corpus = Corpus(corpus.name, corpus.source, documents, corpus.fingerprint, corpus.facts)
        made = tokenizer.open_tokenizer(recipe.tokenizer, recipe.training_texts(corpus))
        arrays, meta = tokenized.tokenize(corpus, made)
        tokenized.save(work, arrays)
        tokenizer.keep(made, work)
        return meta

    where, meta = cache.obtain("tokenized", _identity(request, recipe), build, cache_dir)
    data = tokenized.open_saved(where, meta["data"])
    if request.task == "mlm" and data.special.mask is None:
        raise DataError(f"tokenizer {data.tokenizer_id} has no mask token; masked LM needs one")
    return data


def fingerprint(source: str, **options: Any) -> str:
    """sha256 (hex) that names the data ``load_data`` would return, without tokenising anything.

    Of the file contents for folders and files, of the generator's version for ``embedded``, of
    repository, revision and number of documents for ``hub``. Same arguments as `load_data`.
    """
    options.pop("cache_dir", None)
    request = DataRequest(source, **options)
    return cache.key(_identity(request, _recipe(request, None)))


@dataclass(frozen=True)
class _Recipe:
    """What would be built: the corpus's identity and maker, and the tokenizer."""

    identity: dict[str, Any]
    corpus: Callable[[], Corpus]
    tokenizer: TokenizerSpec
    training_texts: Callable[[Corpus], list[str]]


def _identity(request: DataRequest, recipe: _Recipe) -> dict[str, object]:
    return {
        "corpus": recipe.identity,
        "tokenizer": recipe.tokenizer.identity,
        "max_documents": request.max_documents,
        "validation_documents": request.validation_documents,
    }


def _recipe(request: DataRequest, cache_dir: Path | None) -> _Recipe:
    if request.source == "embedded":
        return _embedded(request)
    if request.source == "hub" or request.source.startswith("hub:"):
        return _hub(request, cache_dir)
    return _folder(request)


def _embedded(request: DataRequest) -> _Recipe:
    name = {"eurlex": "law", "openwebtext": "web"}[request.kind]
    # The generator rests on numpy's bit stream; a stable one by promise, but the key costs nothing.
    identity = {"source": "embedded", "version": EMBEDDED_VERSION, "corpus": name, "numpy": version("numpy")}

    def corpus() -> Corpus:
        from bench_cases.data import embedded

        return embedded.corpus(name)

    def texts(built: Corpus) -> list[str]:
        from bench_cases.data import embedded

        # One vocabulary for both corpora, from a part of each: law and web models are the same size.
        law = built if name == "law" else embedded.corpus("law")
        web = built if name == "web" else embedded.corpus("web")
        return [d.text for c in (law, web) for d in c.documents[:300]]

    spec = _asked_tokenizer(request) or tokenizer.trained(
        request.bpe_flavour, [f"embedded-{EMBEDDED_VERSION}-numpy-{version('numpy')}"], tokenizer.EMBEDDED_VOCABULARY
    )
    return _Recipe(identity, corpus, spec, texts)


def _folder(request: DataRequest) -> _Recipe:
    path = folder.find(request.source, request.kind)
    own_file = Path(request.source).expanduser().is_file()
    fields = (request.kind, request.text_field, request.label_field)
    identity = folder.identity(path, *fields)
    spec = _asked_tokenizer(request)
    if spec is None and (brought := folder.tokenizer_folder(request.source, request.arch)) is not None:
        spec = tokenizer.in_folder(brought, request.bpe_flavour)
    spec = spec or _trained_on(request, identity)

    def corpus() -> Corpus:
        return folder.corpus(path, *fields, own_file=own_file, file_sha256=identity["file_sha256"])

    return _Recipe(identity, corpus, spec, _train_texts)


def _hub(request: DataRequest, cache_dir: Path | None) -> _Recipe:
    from bench_cases.data import hub

    wanted = hub.Wanted.parse(request.source, request.kind, request.max_documents, request.validation_documents)
    identity = wanted.identity()
    spec = _asked_tokenizer(request)
    if spec is None and request.arch in hub.TOKENIZERS:
        spec = tokenizer.on_hub(hub.TOKENIZERS[request.arch], request.bpe_flavour)
    return _Recipe(identity, lambda: hub.corpus(wanted, cache_dir), spec or _trained_on(request, identity), _train_texts)


def _asked_tokenizer(request: DataRequest) -> TokenizerSpec | None:
    if request.tokenizer is None:
        return None
    path = Path(request.tokenizer).expanduser()
    if path.is_dir():
        return tokenizer.in_folder(path, request.bpe_flavour)
    if request.tokenizer.startswith((".", "/", "~")) or request.tokenizer.count("/") > 1:
        raise DataError(f"--tokenizer {request.tokenizer}: no such folder; allowed are a folder or a hub id")
    return tokenizer.on_hub(request.tokenizer, request.bpe_flavour)


def _trained_on(request: DataRequest, identity: dict[str, Any]) -> TokenizerSpec:
    digest = cache.key({**identity, "max_documents": request.max_documents})
    return tokenizer.trained(request.bpe_flavour, [digest], tokenizer.VOCABULARY)


def _train_texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents if document.split == "train"]
