"""Tasks: what is predicted, from which data, under which loss. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from bench_cases.lookup import check, check_id, index

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
        check(self.loss in LOSSES, owner, f"loss {self.loss!r} is none of {LOSSES}")
        check(self.head in HEADS, owner, f"head {self.head!r} is none of {HEADS}")
        check(self.metric in METRICS, owner, f"metric {self.metric!r} is none of {METRICS}")


CLM = Task("clm", "causal LM", "openwebtext", "clm", "causal_lm", "cross_entropy", "perplexity")
MLM = Task("mlm", "masked LM", "openwebtext", "mlm", "masked_lm", "cross_entropy", "perplexity")
MULTI_CLS = Task("multi_cls", "multi-label", "eurlex", "multi_cls", "classification", "bce_with_logits", "f1")
SINGLE_CLS = Task("single_cls", "single-label", "eurlex", "single_cls", "classification", "cross_entropy", "f1")

TASKS: dict[str, Task] = index([CLM, MLM, MULTI_CLS, SINGLE_CLS])
