"""Which runs are compared, and in which order: one settings variant a case, one run a (case, configuration, seed).

A folder may hold a case twice, with another learning rate say. Averaging the two would compare what differs in more than the
configuration; so the variant with the most runs (then with the most steps) is shown and the others are named."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bench_cases import CASES, DTYPE_CONFIGS, TASKS
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count

TASK_COLUMNS = ("LM-Decoder", "LM-Encoder", "Cls-Multi", "Cls-Single")
REFERENCE = "fp32_true"
ROW_SETTINGS = tuple("preset data_source weights_source loss loss_reduction batch_size micro_batch seq_len max_steps".split())
"""Settings that stand in the row itself; the others stand in its ``config``."""
HASHES = {"init_sha256": "initial weights", "data_sha256": "batches"}
MACHINE = {
    **{"gpu": "GPU", "torch_version": "torch", "cuda_version": "CUDA", "cpu": "processor", "cpu_capability": "CPU capability"},
    **{f"{name}_version": name for name in ("transformers", "triton", "bitsandbytes", "numpy")},
}
"""Fields of ``env`` that decide what the same settings compute; the processor's where there is no GPU."""


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


def in_order(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Runs by case, configuration (in the registries' orders) and seed."""
    runs = list(runs)
    cases = {case: at for at, case in enumerate(case_order(run.case for run in runs))}
    configs = {config: at for at, config in enumerate(series_order(run.dtype_config for run in runs))}
    return sorted(runs, key=lambda run: (cases[run.case], configs[run.dtype_config], run.seed, run.run_id))


def by_cell(runs: Iterable[RunRecord]) -> dict[tuple[str, str], list[RunRecord]]:
    """Runs by case and configuration, in order."""
    cells: dict[tuple[str, str], list[RunRecord]] = {}
    for run in in_order(runs):
        cells.setdefault((run.case, run.dtype_config), []).append(run)
    return cells


def one_a_cell(runs: Iterable[RunRecord], has: Callable[[RunRecord], object]) -> list[RunRecord]:
    """In order, the lowest seed of every case and configuration among the runs that ``has`` takes."""
    firsts = (next((run for run in cell if has(run)), None) for cell in by_cell(runs).values())
    return [run for run in firsts if run is not None]


def is_control(config: str) -> bool:
    """Whether a configuration is run to explain another's divergence, not to be recommended."""
    return any(config in declared.controls for declared in DTYPE_CONFIGS.values())


def _in_order(ids: Iterable[str], registry: dict) -> list[str]:
    place = {name: index for index, name in enumerate(registry)}
    return sorted(set(ids), key=lambda name: (place.get(name, len(place)), name))


@dataclass(frozen=True)
class Selection:
    """``runs`` to compare, and ``excluded`` with (run_id, reason)."""

    runs: tuple[RunRecord, ...]
    excluded: tuple[tuple[str, str], ...]

    def reference(self, run: RunRecord) -> RunRecord | None:
        """The fp32_true run of the same case and seed."""
        return self._references.get((run.case, run.seed))

    @cached_property
    def _references(self) -> dict[tuple[str, int], RunRecord]:
        return {(run.case, run.seed): run for run in self.runs if run.dtype_config == REFERENCE}

    def of_case(self, case: str) -> list[RunRecord]:
        """The case's runs."""
        return [run for run in self.runs if run.case == case]


def select(folder: Folder, keep: Callable[[RunRecord], bool] = lambda run: True) -> Selection:
    """The main variant of every case among the runs that ``keep`` takes; the others are not mentioned."""
    chosen: list[RunRecord] = []
    unknown = [run for run in folder.runs if column_of(run) is None]
    excluded = [(run.run_id, f"task {run.task!r} is not known to this version") for run in unknown]
    kept = [run for run in folder.runs if column_of(run) is not None and keep(run)]
    keys = _keys(kept)
    for case in sorted({run.case for run in kept}):
        runs = [run for run in kept if run.case == case]
        variants = Counter(keys[run.run_id] for run in runs)
        steps = {keys[run.run_id]: run.max_steps for run in runs}
        main = min(variants, key=lambda key: (-variants[key], -steps[key], key))
        seen: dict[tuple[str, int], str] = {}
        prints: dict[tuple[str, str, Any], str] = {}
        for run in runs:
            if keys[run.run_id] != main:
                shown = f"the {count(variants[main], 'run')} shown of its case"
                excluded.append((run.run_id, f"other settings than {shown}: {_difference(keys[run.run_id], main)}"))
            elif (run.dtype_config, run.seed) in seen:
                excluded.append((run.run_id, f"a second run of what {seen[run.dtype_config, run.seed]} did"))
            elif original := next((prints[mark] for mark in fingerprints(folder, run) if mark in prints), None):
                excluded.append((run.run_id, f"a copy of {original}, the same to the last bit: it counts once"))
            else:
                seen[run.dtype_config, run.seed] = run.run_id
                prints |= dict.fromkeys(fingerprints(folder, run), run.run_id)
                chosen.append(run)
    return Selection(tuple(chosen), tuple(excluded))


def fingerprints(folder: Folder, run: RunRecord) -> list[tuple[str, str, Any]]:
    """What no two seeds of a configuration share: the hash of the trained weights, and the log of losses, norms and times."""
    steps = folder.steps(run.run_id)
    log = b"".join(steps[name].tobytes() for name in ("loss", "grad_norm", "step_time_s"))
    found = {"weights": run.final_weights_sha256, "log": log}
    return [(run.dtype_config, what, value) for what, value in found.items() if value]


def is_bucketed(run: RunRecord) -> bool:
    """Whether batches were made of documents of like length."""
    return bool(run.config.get("bucket_by_length"))


def settings_of(run: RunRecord) -> dict[str, Any]:
    """Everything that was set, but for the configuration and the seed."""
    rest = {name: value for name, value in run.config.items() if name not in ("config", "seed", "case", *ROW_SETTINGS)}
    return {**{name: getattr(run, name) for name in ROW_SETTINGS}, **rest, "case": run.config.get("case")}


def _keys(runs: Iterable[RunRecord]) -> dict[str, str]:
    """Run id -> its settings as text; runs that share one ``config`` object are read once."""
    known: dict[tuple, str] = {}
    found = {}
    for run in runs:
        like = (id(run.config), *(getattr(run, name) for name in ROW_SETTINGS))
        if like not in known:
            known[like] = json.dumps(settings_of(run), sort_keys=True, default=str)
        found[run.run_id] = known[like]
    return found


def _difference(key: str, main: str) -> str:
    """What differs between two variants, briefly."""
    this, that = json.loads(key), json.loads(main)
    changed = [name for name in sorted({*this, *that}) if this.get(name) != that.get(name)]
    parts = [f"{name} {_short(this.get(name))} instead of {_short(that.get(name))}" for name in changed[:3]]
    return ", ".join(parts) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..." + text[-6:]


def incomparable_reason(run: RunRecord, reference: RunRecord) -> str | None:
    """Why a row must not be compared with its reference, or None. A hash that neither row has is
    no reason (imported logs have none); one that only one of them has is."""
    for field, what in HASHES.items():
        if getattr(run, field) != getattr(reference, field):
            return f"{what} differ from those of {reference.run_id}"
    if run.attention_backend != reference.attention_backend:
        return f"attention backend {run.attention_backend} against {reference.attention_backend} of {reference.run_id}"
    for name, (ours, theirs) in _switches(run, reference).items():
        if ours != theirs:
            return f"switch {name} is {ours}, and {theirs} in {reference.run_id}"
    for field, what in MACHINE.items():
        if _decides(field, run) and run.env.get(field) != reference.env.get(field):
            return f"{what} {run.env.get(field)} against {reference.env.get(field)} of {reference.run_id}"
    return None


ALIKE = ("device", "preset", "batch_size", "micro_batch", "seq_len", "weights_source", "data_source", "attention_backend")
"""Fields in which the runs of cases that one claim joins must agree, beside the machine's."""


def unlike_reason(runs: Sequence[RunRecord], but: Sequence[str] = ()) -> str | None:
    """Why runs of several cases must not be joined in one claim, or None; ``but``: fields that may differ."""
    for field in ALIKE:
        values = {getattr(run, field) for run in runs}
        if field not in but and len(values) > 1:
            return f"{field.replace('_', ' ')} {' against '.join(sorted(map(str, values)))}"
    for field, what in MACHINE.items():
        values = {str(run.env.get(field)) for run in runs if _decides(field, run)}
        if len(values) > 1:
            return f"{what} {' against '.join(sorted(values))}"
    return None


def _decides(field: str, run: RunRecord) -> bool:
    return run.env.get("gpu") is None or not field.startswith("cpu")


def _switches(run: RunRecord, reference: RunRecord) -> dict[str, tuple[object, object]]:
    """Global switches of both rows. TF32 is left out where a configuration is about it, and what
    was verified differs by what a configuration needs."""
    ours, theirs = run.flags.get("switches") or {}, reference.flags.get("switches") or {}
    about_tf32 = any(config.tf32 for row in (run, reference) if (config := DTYPE_CONFIGS.get(row.dtype_config)))
    left_out = {"verified", *(["fp32_precision"] if about_tf32 else [])}
    return {name: (ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs} - left_out)}
