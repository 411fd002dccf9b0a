"""Presets: how large a run is. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench_cases.lookup import check, index


@dataclass(frozen=True)
class Preset:
    """Sizes of a run; each can be changed on the command line.

    ``seq_len_of`` overrides ``seq_len`` for a case id. ``untimed_steps`` are left out of every
    throughput and step-time figure (allocator, kernel selection, compile). ``threads`` is the
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

    def __post_init__(self) -> None:
        owner = f"preset {self.id!r}"
        for name in ("batch_size", "micro_batch", "seq_len", "max_steps", "documents", "validation_documents"):
            check(getattr(self, name) > 0, owner, f"{name} is not positive")
        check(self.batch_size % self.micro_batch == 0, owner, "micro_batch must divide batch_size")
        check(0 <= self.untimed_steps < self.max_steps, owner, "untimed_steps must be below max_steps")

    def sequence_length(self, case_id: str) -> int:
        """Tokens per sequence of a case."""
        return self.seq_len_of.get(case_id, self.seq_len)


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
