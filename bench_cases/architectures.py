"""What a case is composed of: architectures (which model), tasks (what is predicted, from which data, under which loss) and
presets (how large a run is). Declarations, torch-free; `bench_cases.models` builds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench_cases.lookup import check, check_choices, check_id, index


@dataclass(frozen=True)
class Architecture:
    """One model family.

    ``sizes`` maps a preset id to overrides of the library's default configuration; a preset that is absent takes the default
    (``hub_id``'s own size). ``max_positions`` is the number of tokens a sequence may hold at the default size;
    ``position_offset`` the rows of the position table that no token uses (RoBERTa's positions start after its pad id).
    ``build`` names the builder as ``module:function``, so that a declaration imports no torch.
    """

    id: str
    name: str
    causal: bool
    hub_id: str
    max_positions: int
    position_key: str = "max_position_embeddings"
    position_offset: int = 0
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    build: str = "bench_cases.transformers_models:build_transformers"
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; None: the one the data bring for ``id``."""

    def __post_init__(self) -> None:
        owner = f"architecture {self.id!r}"
        check_id(self.id, owner)
        check(self.max_positions > 0, owner, f"max_positions {self.max_positions} is not positive")
        module, _, function = self.build.partition(":")
        check(bool(module and function), owner, f"build {self.build!r} is not 'module:function'")

    @property
    def size_keys(self) -> tuple[str, ...]:
        """The sizes that it declares; none for a model from outside, whose own configuration says them."""
        return tuple(dict.fromkeys(key for sizes in self.sizes.values() for key in sizes))

    def positions(self, preset: str, changed: Mapping[str, int] = {}) -> int:
        """How many tokens a sequence may hold at a preset's size, with ``changed`` sizes."""
        override = {**self.sizes.get(preset, {}), **changed}.get(self.position_key)
        return self.max_positions if override is None else override - self.position_offset


GPT2 = Architecture(
    id="gpt2",
    name="GPT-2",
    causal=True,
    hub_id="openai-community/gpt2",
    max_positions=1024,
    position_key="n_positions",
    sizes={"tiny": {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 512}},
)
ROBERTA = Architecture(
    id="roberta",
    name="RoBERTa",
    causal=False,
    hub_id="FacebookAI/roberta-base",
    max_positions=512,
    position_offset=2,
    sizes={
        "tiny": {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_size": 128,
            "intermediate_size": 512,
            "max_position_embeddings": 514,
        }
    },
)

ARCHITECTURES: dict[str, Architecture] = index([GPT2, ROBERTA])


LOSSES = ("cross_entropy", "bce_with_logits")
HEADS = ("causal_lm", "masked_lm", "classification")
METRICS = ("perplexity", "f1")


@dataclass(frozen=True)
class Task:
    """One task. ``collate`` names an entry of `bench_cases.collate`'s table, ``head`` one of
    `bench_cases.models`; ``text`` is the data set (``openwebtext`` or ``eurlex``)."""

    id: str
    name: str
    text: str
    collate: str
    head: str
    loss: str
    metric: str

    def __post_init__(self) -> None:
        owner = f"task {self.id!r}"
        check_id(self.id, owner)
        check_choices(self, owner, loss=LOSSES, head=HEADS, metric=METRICS)


CLM = Task("clm", "causal LM", "openwebtext", "clm", "causal_lm", "cross_entropy", "perplexity")
MLM = Task("mlm", "masked LM", "openwebtext", "mlm", "masked_lm", "cross_entropy", "perplexity")
MULTI_CLS = Task("multi_cls", "multi-label", "eurlex", "multi_cls", "classification", "bce_with_logits", "f1")
SINGLE_CLS = Task("single_cls", "single-label", "eurlex", "single_cls", "classification", "cross_entropy", "f1")

TASKS: dict[str, Task] = index([CLM, MLM, MULTI_CLS, SINGLE_CLS])


@dataclass(frozen=True)
class Preset:
    """Sizes of a run; each can be changed on the command line.

    ``seq_len_of`` and ``max_steps_of`` override ``seq_len`` and ``max_steps`` for a case id. ``untimed_steps`` are left out
    of every throughput and step-time figure (allocator, kernel selection, compile). ``threads`` is the
    number of CPU threads, or 0 for all cores: fixed where results must be the same bit for bit
    on machines with different core counts. ``validation_documents`` bounds the evaluation set.
    """

    id: str
    batch_size: int
    micro_batch: int
    seq_len: int
    max_steps: int
    warmup_steps: int
    untimed_steps: int
    documents: int
    validation_documents: int
    threads: int
    seeds: tuple[int, ...]
    seq_len_of: Mapping[str, int] = field(default_factory=dict)
    max_steps_of: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        owner = f"preset {self.id!r}"
        for name in ("batch_size", "micro_batch", "seq_len", "max_steps", "documents", "validation_documents"):
            check(getattr(self, name) > 0, owner, f"{name} is not positive")
        check(self.batch_size % self.micro_batch == 0, owner, "micro_batch must divide batch_size")
        check(0 <= self.untimed_steps < self.max_steps, owner, "untimed_steps must be below max_steps")

    def sequence_length(self, case_id: str) -> int:
        """Tokens per sequence of a case."""
        return self.seq_len_of.get(case_id, self.seq_len)

    def steps(self, case_id: str) -> int:
        """Optimizer steps of a case."""
        return self.max_steps_of.get(case_id, self.max_steps)


# Some 280 labels take more updates than 60; a document's first words name most of them, so that as many tokens do for the time.
_TINY_MULTI_LABEL = [f"{arch}_multi_cls{sum}" for arch in ("gpt2", "roberta") for sum in ("", "_labelsum")]


PRESETS: dict[str, Preset] = index(
    [
        Preset(
            "tiny",
            batch_size=8,
            micro_batch=4,
            seq_len=128,
            max_steps=60,
            warmup_steps=6,
            untimed_steps=3,
            documents=2_400,
            validation_documents=64,
            threads=1,
            seeds=(0,),
            seq_len_of=dict.fromkeys(_TINY_MULTI_LABEL, 32),
            max_steps_of=dict.fromkeys(_TINY_MULTI_LABEL, 240),
        ),
        Preset(
            "full",
            batch_size=32,
            micro_batch=16,
            seq_len=512,
            max_steps=1_000,
            warmup_steps=100,
            untimed_steps=20,
            documents=100_000,
            validation_documents=512,
            threads=0,
            seeds=(0, 1, 2),
            seq_len_of={"gpt2_clm": 1_024},
        ),
    ]
)
