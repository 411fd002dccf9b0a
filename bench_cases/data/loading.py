"""From a request to tokenised data: which corpus, which tokenizer, one cache entry for the pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench_cases.data import cache, folder, tokenized, tokenizer
from bench_cases.data.documents import Corpus, DataError, limit
from bench_cases.data.tokenizer import TokenizerSpec

EMBEDDED_VERSION = 2  # equal to embedded.VERSION (a test says so); the generator is imported only to build
_TEXT_OF_TASK = {"clm": "openwebtext", "mlm": "openwebtext", "multi_cls": "eurlex", "single_cls": "eurlex"}


@dataclass(frozen=True)
class Request:
    """The arguments of `load_data`; see there."""

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
    def kind(self) -> str | None:
        return self.text or _TEXT_OF_TASK.get(self.task)

    @property
    def bpe_flavour(self) -> str:
        return self.flavour or ("roberta" if self.arch == "roberta" or self.task == "mlm" else "gpt2")


@dataclass(frozen=True)
class Plan:
    """What would be built: the corpus's identity and maker, and the tokenizer."""

    identity: dict[str, object]
    corpus: Callable[[], Corpus]
    tokenizer: TokenizerSpec
    training_texts: Callable[[Corpus], list[str]]


def identity(request: Request) -> str:
    return cache.key(_identity(request, plan(request)))


def load(request: Request, cache_dir: Path | None) -> tokenized.TokenizedData:
    planned = plan(request, cache_dir)

    def build(work: Path) -> dict:
        corpus = planned.corpus()
        documents = limit(corpus.documents, request.max_documents, request.validation_documents)
        corpus = Corpus(corpus.name, corpus.source, documents, corpus.fingerprint, corpus.facts)
        made = tokenizer.open_tokenizer(planned.tokenizer, planned.training_texts(corpus))
        arrays, meta = tokenized.tokenize(corpus, made)
        tokenized.save(work, arrays)
        tokenizer.keep(made, work)
        return meta

    where, meta = cache.obtain("tokenized", _identity(request, planned), build, cache_dir)
    data = tokenized.open_saved(where, meta["data"])
    if request.task == "mlm" and data.special.mask is None:
        raise DataError(f"tokenizer {data.tokenizer_id} has no mask token; masked LM needs one")
    return data


def _identity(request: Request, planned: Plan) -> dict[str, object]:
    return {
        "corpus": planned.identity,
        "tokenizer": planned.tokenizer.identity,
        "max_documents": request.max_documents,
        "validation_documents": request.validation_documents,
    }


def plan(request: Request, cache_dir: Path | None = None) -> Plan:
    if request.source == "embedded":
        return _embedded(request)
    if request.source == "hub" or request.source.startswith("hub:"):
        return _hub(request, cache_dir)
    return _folder(request)


def _explicit(request: Request) -> TokenizerSpec | None:
    if request.tokenizer is None:
        return None
    path = Path(request.tokenizer).expanduser()
    if path.is_dir():
        return tokenizer.in_folder(path, request.bpe_flavour)
    if request.tokenizer.startswith((".", "/", "~")) or request.tokenizer.count("/") > 1:
        raise DataError(f"--tokenizer {request.tokenizer}: no such folder; allowed are a folder or a hub id")
    return tokenizer.on_hub(request.tokenizer, request.bpe_flavour)


def _train_texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents if document.split == "train"]


def _trained_on(request: Request, corpus_identity: dict[str, object], vocabulary: int) -> TokenizerSpec:
    digest = cache.key({**corpus_identity, "max_documents": request.max_documents})
    return tokenizer.trained(request.bpe_flavour, [digest], vocabulary)


def _embedded(request: Request) -> Plan:
    name = {"eurlex": "law", "openwebtext": "web"}[request.kind]
    # The generator rests on numpy's bit stream; a stable one by promise, but the key costs nothing.
    corpus_identity = {"source": "embedded", "version": EMBEDDED_VERSION, "corpus": name, "numpy": version("numpy")}

    def corpus() -> Corpus:
        from bench_cases.data import embedded

        return embedded.corpus(name)

    def texts(built: Corpus) -> list[str]:
        from bench_cases.data import embedded

        # One vocabulary for both corpora, from a part of each: law and web models are the same size.
        law = built if name == "law" else embedded.corpus("law")
        web = built if name == "web" else embedded.corpus("web")
        return [d.text for c in (law, web) for d in c.documents[:300]]

    spec = _explicit(request) or tokenizer.trained(
        request.bpe_flavour, [f"embedded-{EMBEDDED_VERSION}-numpy-{version('numpy')}"], tokenizer.EMBEDDED_VOCABULARY
    )
    return Plan(corpus_identity, corpus, spec, texts)


def _folder(request: Request) -> Plan:
    path = folder.find(request.source, request.kind)
    own_file = Path(request.source).expanduser().is_file()
    corpus_identity = folder.identity(path, request.kind, request.text_field, request.label_field)
    spec = _explicit(request)
    if spec is None and (brought := folder.tokenizer_folder(request.source, request.arch)) is not None:
        spec = tokenizer.in_folder(brought, request.bpe_flavour)
    spec = spec or _trained_on(request, corpus_identity, tokenizer.VOCABULARY)

    def corpus() -> Corpus:
        return folder.corpus(
            path,
            request.kind,
            request.text_field,
            request.label_field,
            own_file=own_file,
            file_sha256=corpus_identity["file_sha256"],
        )

    return Plan(corpus_identity, corpus, spec, _train_texts)


def _hub(request: Request, cache_dir: Path | None) -> Plan:
    from bench_cases.data import hub

    wanted = hub.Wanted.parse(request.source, request.kind, request.max_documents, request.validation_documents)
    corpus_identity = wanted.identity()
    spec = _explicit(request)
    if spec is None and request.arch in hub.TOKENIZERS:
        spec = tokenizer.on_hub(hub.TOKENIZERS[request.arch], request.bpe_flavour)
    spec = spec or _trained_on(request, corpus_identity, tokenizer.VOCABULARY)
    return Plan(corpus_identity, lambda: hub.corpus(wanted, cache_dir), spec, _train_texts)
