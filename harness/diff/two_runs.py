"""Two finished runs with their logs, and whether they may be compared step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.inspect.locate import FoundRun, RunNotFound, RunUnreadable, locate
from harness.inspect.run_files import module_rows, records, run_record
from instrument.records import RunRecord, StepRecord

SAME_EXPERIMENT = (
    "case",
    "seed",
    "loss_reduction",
    "batch_size",
    "seq_len",
    "n_params",
    "data_source",
    "weights_source",
    "init_sha256",
)
"""Fields of the row that two runs share when their steps are pairs: same start, same batches."""
SAME_BATCHES = ("data_fingerprint", "documents", "bucket_by_length")
"""Settings that decide the batches. ``data_sha256`` is over all of a run's steps: it can only be compared
when both were to run equally many."""
NAMED = ("case", "dtype_config", "seed", "preset", "instrument", "attention_backend", "autocast")
EPSILONS = {"fp32": 2.0**-23, "tf32": 2.0**-10, "fp16": 2.0**-10, "bf16": 2.0**-7}


@dataclass(frozen=True)
class Run:
    """One run: its place, its row, its steps by number and its modules' magnitudes in windows."""

    place: FoundRun
    record: RunRecord
    steps: dict[int, StepRecord]
    modules: tuple[Any, ...]

    @property
    def epsilon(self) -> float:
        """Of the coarsest dtype in which the run stores weights or computes."""
        config = self.record.config.get("config", {})
        names = {config.get(part) for part in ("weights", "compute", "head", "loss")}
        names |= {"tf32"} if config.get("tf32") else set()
        known = [EPSILONS[name] for name in names if name in EPSILONS]
        if not known:
            raise RunUnreadable(f"{self.place.path / 'run.json'}: its config names no dtype, so rounding cannot be told apart")
        return max(known)

    @property
    def settings(self) -> dict[str, Any]:
        """All that was decided for the run, flat, by dotted name."""
        r = self.record
        named = {name: getattr(r, name) for name in NAMED}
        switches = {key: r.flags.get(key) for key in ("switches", "fp16_products") if key in r.flags}
        decided = named | dict(flat({**r.config, **switches}))
        return {name: value for name, value in decided.items() if name not in ("config.id", "case.id")}  # named already

    @property
    def environment(self) -> dict[str, Any]:
        """The machine and the versions, flat."""
        return {"device": self.record.device} | dict(flat(self.record.env))


def load(names: Sequence[str], out: Path | None) -> tuple[Run, Run]:
    """Both runs; raises `RunNotFound` for a name that is none, and for a run that has not ended."""
    first, second = (_load(locate(name, out)) for name in names)
    return first, second


def _load(place: FoundRun) -> Run:
    record = run_record(place)
    if record is None:
        raise RunNotFound(
            f"{place.run_id} has not ended (no {place.path / 'run.json'}): there is nothing to compare yet; "
            f"`inspect` shows how far it is"
        )
    steps = {step.step: step for step in records(place.steps_file, StepRecord)}
    return Run(place, record, steps, tuple(module_rows(place)))


def flat(values: dict[str, Any], prefix: str = "") -> Any:
    """Pairs of dotted name and plain value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Names with different values; absent is None."""
    names = [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
    return [{"name": name, "a": a.get(name), "b": b.get(name)} for name in names]


def why_not_paired(a: Run, b: Run) -> list[dict[str, Any]]:
    """What keeps the steps of two runs from being pairs; empty when they are. An unknown start is no same start."""
    rows = differences(*({name: getattr(run.record, name) for name in SAME_EXPERIMENT} for run in (a, b)))
    rows += differences(*({name: run.record.config.get(name) for name in SAME_BATCHES} for run in (a, b)))
    if not rows and a.record.max_steps == b.record.max_steps:
        rows = differences(*({"data_sha256": run.record.data_sha256} for run in (a, b)))
    if not rows and a.record.init_sha256 is None:
        rows = [{"name": "init_sha256", "a": None, "b": None}]
    return rows
