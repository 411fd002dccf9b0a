"""Architectures: what model is built, torch-free. The builders live in `bench_cases.models`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench_cases.lookup import check, check_id, index


@dataclass(frozen=True)
class Architecture:
    """One model family.

    ``sizes`` maps a preset id to overrides of the library's default configuration; a preset
    that is absent takes the default (``hub_id``'s own size). ``max_positions`` is the number
    of tokens a sequence may hold at the default size; ``position_offset`` the rows of the
    position table that no token uses (RoBERTa's positions start behind its pad id).
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

    def positions(self, preset: str) -> int:
        """How many tokens a sequence may hold at a preset's size."""
        override = self.sizes.get(preset, {}).get(self.position_key)
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
