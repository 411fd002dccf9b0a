"""One run read whole, or two to compare: what is broken is `RunUnreadable`, with its file and line. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instrument.results import lines
from instrument.results.layout import LOGS, RunFiles, RunNotFound, locate
from instrument.results.measurements import ForensicsRecord
from instrument.results.schemas import AnyRecord, RecordError, RunRecord, StepRecord
from kernels.float_formats import FLOAT_FORMATS


class RunUnreadable(Exception):
    """A run whose files break their schema."""


def run_record(run: RunFiles) -> RunRecord | None:
    """The run's terminal row; None when it has not ended."""
    return _one(run.row, RunRecord)


def failure_of(run: RunFiles, record: RunRecord | None) -> ForensicsRecord | None:
    """What its replay found; None where there was none, and for what an earlier run of the same id left."""
    found = _one(run.forensics, ForensicsRecord)
    if found is None or record is None or record.status != "diverged" or found.first_nonfinite.step != record.divergence_step:
        return None
    return found


def records(run: RunFiles, log: str) -> list:
    """The lines of one of the run's `LOGS`; none where there is no such file."""
    try:
        return list(lines.read(run.log(log), LOGS[log]))
    except FileNotFoundError:
        return []
    except RecordError as error:
        raise RunUnreadable(str(error)) from error


def _one(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    found, defects = lines.read_one(path, lambda content: lines.record(content, kind), path.name)
    if defects:
        raise RunUnreadable(f"{path}: {defects[0].what}")
    return found


SAME_EXPERIMENT = "case seed loss_reduction batch_size seq_len n_params data_source weights_source init_sha256".split()
"""Fields of the row that two runs share when their steps are pairs: same start, same batches."""
SAME_BATCHES = ("data_fingerprint", "documents", "bucket_by_length")
"""Settings that decide the batches. ``data_sha256`` is over all of a run's steps: it can only be compared
when both were to run equally many."""
NAMED = ("case", "dtype_config", "seed", "preset", "instrument", "attention_backend", "autocast")


@dataclass(frozen=True)
class Run:
    """One run: its place, its row, its steps by number and its modules' magnitudes in windows."""

    place: RunFiles
    record: RunRecord
    steps: dict[int, StepRecord]
    modules: tuple[Any, ...]

    @property
    def epsilon(self) -> float:
        """Of the coarsest dtype in which the run stores weights or computes."""
        config = self.record.config.get("config", {})
        names = {config.get(part) for part in ("weights", "compute", "head", "loss")}
        names |= {"tf32"} if config.get("tf32") else set()
        known = [FLOAT_FORMATS[name].eps for name in names if name in FLOAT_FORMATS]
        if not known:
            raise RunUnreadable(f"{self.place.row}: its config names no dtype, so what rounding alone can do is unknown")
        return max(known)

    @property
    def settings(self) -> dict[str, Any]:
        """All that was decided for the run, flat, by dotted name."""
        r = self.record
        named = {name: getattr(r, name) for name in NAMED}
        switches: dict[str, Any] = {key: r.flags.get(key) for key in ("switches", "fp16_products") if key in r.flags}
        decided = named | dict(flat({**r.config, **switches}))
        return {name: value for name, value in decided.items() if name not in ("config.id", "case.id")}  # named already

    @property
    def environment(self) -> dict[str, Any]:
        return {"device": self.record.device} | dict(flat(self.record.env))


def load(names: Sequence[str], out: Path | None) -> tuple[Run, Run]:
    """Both runs; raises `RunNotFound` for a name that is none, and for a run that has not ended."""
    first, second = (_load(locate(name, out)) for name in names)
    return first, second


def _load(place: RunFiles) -> Run:
    record = run_record(place)
    if record is None:
        raise RunNotFound(
            f"{place.run_id} has not ended (no {place.row}): there is nothing to compare yet; `inspect` shows how far it is"
        )
    if type(record.config.get("untimed_steps", 0)) is not int or not isinstance(record.config.get("config", {}), dict):
        raise RunUnreadable(f"{place.row}: its config is not one that this program writes")
    steps = {step.step: step for step in records(place, "steps")}
    return Run(place, record, steps, tuple(records(place, "activations")))


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
