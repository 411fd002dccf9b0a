"""Failed runs: what failed first, why, the largest values before it, what helps; grouped by producer and cause, with the
controls that ran beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench_cases import DTYPE_CONFIGS
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord, phase_text
from instrument.terminal import count
from report.tables.judgement import divergence_kind, divergence_text, is_unfinished
from report.text import objects

FAILED = ("diverged", "oom", "error", "hung")
CAUSES = {
    "overflow": "overflow: a value left the range of its dtype",
    "underflow_then_divide": "underflow, then a division: a denominator became exactly 0",
    "invalid": "an invalid operation, such as inf - inf or 0 / 0",
    "from_input": "a value that was non-finite before this run's first operation",
}
FAILURE_CAUSES = {
    "cuda_oom": "the GPU's memory ran out",
    "host_oom": "the machine's memory ran out",
    "host_oom_kill": "the kernel killed the process for want of memory",
    "killed": "the process was killed from outside",
    "illegal_access": "an illegal memory access on the GPU",
    "poisoned_context": "an error that the CUDA context does not outlive",
    "device_error": "an error of the device",
    "segfault": "the process crashed",
    "exit": "the process ended by itself",
    "import_failure": "a library could not be loaded",
    "bad_data": "the data",
    "exception": "an exception in Python",
    "hung": "no heartbeat",
    "node_lost": "its node went away",
}
"""``flags["death"]["cause"]`` of a run that ended without a result -> text."""
ENDS = {"oom": "ran out of memory", "hung": "hung", "error": "failed"}


@dataclass(frozen=True)
class Failure:
    """``cause`` as text or None; lists are plain data from ``runs/<run_id>/forensics.json``, empty when there is none."""

    run: RunRecord
    sentence: str
    cause: str | None
    remedies: tuple[dict[str, Any], ...] = ()
    chain: tuple[dict[str, Any], ...] = ()
    kernels: tuple[dict[str, Any], ...] = ()
    trace_file: str | None = None
    history: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Control:
    """A configuration that changes one thing, in the cases and seeds of a group: ids of the runs that survived, and that did
    not. Both empty: it was not run."""

    config: str
    survived: tuple[str, ...]
    failed: tuple[str, ...]


@dataclass(frozen=True)
class FailureGroup:
    """Failures of one configuration with one cause at one kind of producer. ``example``: the member of which most is known."""

    members: tuple[Failure, ...]
    example: Failure
    controls: tuple[Control, ...]


def failure_groups(folder: Folder) -> tuple[FailureGroup, ...]:
    """Every failure in its group; groups by how many they are."""
    found: dict[tuple, list[Failure]] = {}
    for failure in failures(folder):
        found.setdefault(_producer(failure.run), []).append(failure)
    groups = []
    for members in found.values():
        example = max(members, key=lambda known: sum(map(bool, (known.kernels, known.chain, known.remedies, known.history))))
        groups.append(FailureGroup(tuple(members), example, _controls(folder, [member.run for member in members])))
    return tuple(sorted(groups, key=lambda group: -len(group.members)))


def _producer(run: RunRecord) -> tuple:
    """What makes two failures the same: configuration, phase, op, tensor and cause; the module differs from model to model."""
    first, failure = run.first_nonfinite, run.flags.get("death")
    if first is not None:
        return run.dtype_config, run.status, first.phase, first.op, first.tensor, first.source_tensor, first.cause
    return run.dtype_config, run.status, str(failure.get("cause")) if isinstance(failure, dict) else divergence_kind(run)


def _controls(folder: Folder, failed: list[RunRecord]) -> tuple[Control, ...]:
    """What became of the declared controls of the failed runs' configuration, in the same cases and seeds."""
    declared = DTYPE_CONFIGS.get(failed[0].dtype_config)
    cells = {(run.case, run.seed) for run in failed}
    found = []
    for config in declared.controls if declared else ():
        runs = [run for run in folder.runs if run.dtype_config == config and (run.case, run.seed) in cells]
        ends = {good: tuple(run.run_id for run in runs if (run.status == "completed") is good) for good in (True, False)}
        found.append(Control(config, ends[True], ends[False]))
    return tuple(found)


def failures(folder: Folder) -> tuple[Failure, ...]:
    """A card for every run that ended in a failure, in order of run id."""
    return tuple(_card(folder, run) for run in folder.runs if run.status in FAILED)


def _card(folder: Folder, run: RunRecord) -> Failure:
    forensics = folder.forensics(run.run_id)
    text = {key: value for key in ("sentence", "trace_file") if isinstance(value := forensics.get(key), str)}
    return Failure(
        run,
        text.get("sentence") or failure_sentence(run),
        _cause(run),
        **{key: tuple(objects(forensics.get(key))) for key in ("remedies", "chain", "kernels", "history")},
        trace_file=text.get("trace_file"),
    )


def failure_sentence(run: RunRecord) -> str:
    """What happened, from the row alone."""
    if run.status != "diverged":
        end = "stopped from outside" if is_unfinished(run) else ENDS.get(run.status, run.status)
        return f"{end} after {count(run.steps_done, 'step')}" + (f": {run.error}" if run.error else "") + "."
    first = run.first_nonfinite
    if first is None:
        return f"{divergence_text(run)}: {run.error or 'the loss exploded with finite values'}."
    place = f"{first.module}.{first.tensor}" if first.module else first.tensor
    source = f", from {first.source_tensor}" if first.source_tensor else ""
    dtype = f" ({first.dtype})" if first.dtype else ""
    return f"{divergence_text(run)}: {place} became {first.kind}{dtype} {phase_text(first.phase)}{source}."


def _cause(run: RunRecord) -> str | None:
    if run.first_nonfinite:
        return CAUSES.get(run.first_nonfinite.cause)
    failure = run.flags.get("death")
    return FAILURE_CAUSES.get(str(failure.get("cause"))) if isinstance(failure, dict) else None
