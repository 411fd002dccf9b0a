"""The cases: architecture x task x loss. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench_cases.architectures import CLM, GPT2, MLM, MULTI_CLS, ROBERTA, SINGLE_CLS, Architecture, Task
from bench_cases.lookup import check, check_choices, check_id, index

REDUCTIONS = ("mean", "label_sum")
PRIORS = ("none", "log_odds")
BCE = "bce_with_logits"


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates at which the fp32 reference is healthy: it ends well below its start.

    ``tiny``: two layers from scratch (tried on the embedded and on real data). ``scratch``: the
    full size from scratch; ``pretrained``: the full size from weights.
    """

    tiny: float
    scratch: float
    pretrained: float

    def __post_init__(self) -> None:
        for name in ("tiny", "scratch", "pretrained"):
            value = getattr(self, name)
            check(0 < value < 1, "learning rate", f"{name} {value} is not between 0 and 1")

    def of(self, preset: str, weights: str) -> float:
        """The rate for a preset id and a source of weights."""
        if weights != "scratch":
            return self.pretrained
        return self.tiny if preset == "tiny" else self.scratch


@dataclass(frozen=True)
class Case:
    """One case of the matrix; ``id`` is ``{arch}_{task}``, with a suffix for a variant.

    ``loss_reduction``: ``mean`` over all targets, or ``label_sum``: sum over a document's labels, mean over documents
    (multi-label only). ``head_prior``: what the bias of a classification head's last layer begins with; ``log_odds``: the
    labels' log-odds in the training split, so that the first gradients are about the documents and not about how rare labels
    are (Lin et al. 2017, arXiv:1708.02002, section 4.1). ``spelled``: the arguments by which a command line names a case from
    outside the project, whose id says nothing to it; empty for those in `CASES`.
    """

    id: str
    scenario: str
    architecture: Architecture
    task: Task
    lr: LearningRates
    loss_reduction: str = "mean"
    weight_decay: float = 0.01
    head_prior: str = "none"
    in_default_matrix: bool = True
    spelled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        owner = f"case {self.id!r}"
        stem = f"{self.architecture.id}_{self.task.id}"
        check_id(self.id, owner)
        check(self.id.startswith(stem), owner, f"id must begin with {stem!r}")
        check_choices(self, owner, loss_reduction=REDUCTIONS, head_prior=PRIORS)
        bce, head, arch, causal = self.task.loss == BCE, self.task.head, self.architecture.id, self.architecture.causal
        check(self.loss_reduction == "mean" or bce, owner, f"label_sum needs the loss {BCE}")
        check(self.head_prior == "none" or bce, owner, f"a prior of log-odds needs the loss {BCE}")
        check(head != "causal_lm" or causal, owner, f"a causal LM needs a causal architecture, and {arch!r} is none")
        masked = f"a masked LM needs a bidirectional architecture, and {arch!r} is causal"
        check(head != "masked_lm" or not causal, owner, masked)
        check(self.weight_decay >= 0, owner, f"weight_decay {self.weight_decay} is negative")


GPT2_MULTI_CLS = Case("gpt2_multi_cls", "C", GPT2, MULTI_CLS, LearningRates(3e-3, 1e-4, 5e-5), head_prior="log_odds")
ROBERTA_MULTI_CLS = Case("roberta_multi_cls", "D", ROBERTA, MULTI_CLS, LearningRates(2e-3, 1e-4, 3e-5), head_prior="log_odds")

CASES: dict[str, Case] = index(
    [
        Case("gpt2_clm", "A", GPT2, CLM, LearningRates(4e-3, 6e-4, 1e-4)),
        Case("roberta_mlm", "B", ROBERTA, MLM, LearningRates(2e-3, 4e-4, 5e-5)),
        GPT2_MULTI_CLS,
        ROBERTA_MULTI_CLS,
        Case("gpt2_single_cls", "E", GPT2, SINGLE_CLS, LearningRates(1e-3, 1e-4, 5e-5)),
        Case("roberta_single_cls", "F", ROBERTA, SINGLE_CLS, LearningRates(1e-3, 1e-4, 3e-5)),
        *(
            replace(case, id=f"{case.id}_labelsum", loss_reduction="label_sum", in_default_matrix=False)
            for case in (GPT2_MULTI_CLS, ROBERTA_MULTI_CLS)
        ),
    ]
)
