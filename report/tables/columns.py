"""Where a run stands: its task column, its kind of task, its place in the order of series."""

from __future__ import annotations

from collections.abc import Iterable

from bench_cases import CASES, DTYPE_CONFIGS, TASKS
from instrument.results.schemas import RunRecord

TASK_COLUMNS = ("LM-Decoder", "LM-Encoder", "Cls-Multi", "Cls-Single")
REFERENCE = "fp32_true"


def column_of(run: RunRecord) -> str | None:
    """The task column, or None for a task that this version does not know."""
    task = TASKS.get(run.task)
    if task is None:
        return None
    if task.head == "classification":
        return "Cls-Multi" if task.loss == "bce_with_logits" else "Cls-Single"
    return {"causal_lm": "LM-Decoder", "masked_lm": "LM-Encoder"}[task.head]


def is_lm(run: RunRecord) -> bool:
    """Whether a run trains a language model; the others classify."""
    return (column_of(run) or "").startswith("LM-")


def series_order(configs: Iterable[str]) -> list[str]:
    """Configurations in the registry's order; unknown ids last, by name."""
    return _in_order(configs, DTYPE_CONFIGS)


def case_order(cases: Iterable[str]) -> list[str]:
    """Cases in the registry's order; unknown ids last, by name."""
    return _in_order(cases, CASES)


def is_control(config: str) -> bool:
    """Whether a configuration is run to explain another's death, not to be recommended."""
    return any(config in declared.controls for declared in DTYPE_CONFIGS.values())


def _in_order(ids: Iterable[str], registry: dict) -> list[str]:
    place = {name: index for index, name in enumerate(registry)}
    return sorted(set(ids), key=lambda name: (place.get(name, len(place)), name))
