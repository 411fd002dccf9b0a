"""What a results folder's files hold: how many lines are intact, and what is wrong. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from harness.repair.lines import UNREADABLE, SortedLines, sort_lines
from harness.run_folder import finished_run
from instrument.count import count
from instrument.files import plain_inside
from instrument.records import EvaluationRecord, EventRecord, Record, RunRecord, StepRecord, decode
from instrument.sampler.record import HardwareRecord
from instrument.watch.module_log import ModuleRecord

KINDS: dict[str, type[Record]] = {
    "evaluations": EvaluationRecord,
    "events": EventRecord,
    "hardware": HardwareRecord,
    "activations": ModuleRecord,
}
"""By a log's name up to its first dot: ``hardware.until-50.jsonl`` is one of the hardware's, too."""


@dataclass
class FileState:
    """One file: how many lines are intact, what was wrong, what was done. ``lost`` counts lines, or the
    file where it is one record, that nothing here brings back; pieces of lines that were never whole
    (``torn``) are no loss: no writer was told that they are safe."""

    file: str
    intact: int = 0
    torn: int = 0
    lost: int = 0
    rejoined: int = 0
    repeated: int = 0
    foreign: int = 0
    notes: list[str] = field(default_factory=list)


def states(out: Path, run_id: str) -> Iterator[tuple[FileState, SortedLines | None]]:
    """Every file of a run that holds records, with its lines sorted where it is a log."""
    row = finished_run(out, run_id)
    folder = out / "runs" / run_id
    logs = [out / "training_logs" / f"run_{run_id}.jsonl", *sorted(folder.glob("*.jsonl"))]
    for path in logs:
        name = str(path.relative_to(out))
        kind = StepRecord if path is logs[0] else KINDS.get(path.name.partition(".")[0])
        if path.is_symlink() or (path.exists() and not plain_inside(out, path)):
            yield FileState(name, foreign=1, notes=["is a link or no plain file: not read"]), None
        elif path.exists():
            found = sort_lines(path.read_bytes(), kind)
            state = FileState(
                name,
                intact=found.intact,
                torn=found.torn,
                lost=found.damaged,
                rejoined=found.rejoined,
                repeated=found.repeated,
                foreign=found.foreign,
            )
            if kind is StepRecord and row is not None and found.steps < row.steps_done:
                state.lost = max(state.lost, row.steps_done - found.steps)
                state.notes.append(
                    f"run.json says {count(row.steps_done, 'step')}, and "
                    f"{found.steps} {'is' if found.steps == 1 else 'are'} here"
                )
            yield state, found
        elif kind is StepRecord and row is not None and row.steps_done:
            notes = [f"is missing, and run.json says {count(row.steps_done, 'step')}"]
            yield FileState(name, lost=row.steps_done, notes=notes), None
    for path in (folder / "run.json", folder / "forensics.json"):
        if path.exists() or path.is_symlink():
            yield object_state(out, str(path.relative_to(out))), None


def object_state(out: Path, name: str) -> FileState:
    """A file that is one JSON object; it is read and not changed."""
    path, state = out / name, FileState(name)
    if not plain_inside(out, path):
        state.foreign, state.notes = 1, ["is a link or no plain file: not read"]
        return state
    try:
        content = path.read_bytes()
        if path.name == "run.json":
            if decode(content, RunRecord).run_id != path.parent.name:
                state.foreign, state.notes = 1, ["holds another run's row"]
                return state
        elif not isinstance(msgspec.json.decode(content), dict):
            raise ValueError("no JSON object")
        state.intact = 1
    except UNREADABLE as error:
        state.lost, state.notes = 1, [f"cannot be read ({' '.join(str(error).split())[:120]}); left as it is"]
    return state
