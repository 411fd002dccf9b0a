"""What a run's files hold, to be repaired: which lines of a log are records, which are not, and what can still be
separated; how many lines of each file are intact or lost. Nothing here writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from instrument.results.files import plain_inside
from instrument.results.folder import finished_run
from instrument.results.layout import LOGS, RunFiles
from instrument.results.lines import json_object, read_one, record
from instrument.results.schemas import UNREADABLE, Record, RunRecord, StepRecord, decode
from instrument.terminal import count

SEAM = re.compile(rb'\0+|(?<=\}).(?=\{"schema":)', re.DOTALL)
"""Where two lines run together: a newline that flipped into another byte, or zeros that a power cut left."""
CUT_SHORT = "Input data was truncated"
"""msgspec's message for the beginning of a JSON value."""


@dataclass
class SortedLines:
    """``kept``: the lines that stay, in order. ``intact`` of them are records of the file's kind,
    ``foreign`` are JSON objects and no such records (another version's, or a flipped bit in a name: left
    where they are). ``cut``: what is no JSON, of it ``torn`` pieces that end in mid-line, as a dead writer
    leaves them, and ``damaged`` others. ``rejoined``: records won back from lines that ran together.
    ``repeated``: rows of a step that stood there before, byte for byte."""

    kept: list[bytes] = field(default_factory=list)
    cut: list[bytes] = field(default_factory=list)
    intact: int = 0
    foreign: int = 0
    torn: int = 0
    damaged: int = 0
    rejoined: int = 0
    repeated: int = 0
    steps: int = 0
    """Different steps among the records."""
    in_order: bool = True
    """Whether the file is as it should be."""

    @property
    def content(self) -> bytes:
        """The file as it should be."""
        return b"".join(line + b"\n" for line in self.kept)


def sort_lines(content: bytes, kind: type[Record] | None) -> SortedLines:
    """Sort a log of ``kind`` (None: any JSON objects)."""
    found, seen = SortedLines(), set[tuple[int, bytes]]()
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for line in lines:
        if _keep(line, kind, found, seen):
            continue
        pieces = [piece for piece in SEAM.split(line) if piece]
        won_back = sum(_keep(piece, kind, found, seen) for piece in pieces) if pieces != [line] else 0
        found.rejoined += won_back
        for piece in pieces:
            if not won_back or not _is_object(piece):
                found.cut.append(piece)
                torn = _is_cut_short(piece)
                found.torn, found.damaged = found.torn + torn, found.damaged + (not torn)
    found.steps = len({line[0] for line in seen})
    found.in_order = found.content == content
    return found


def _keep(line: bytes, kind: type[Record] | None, found: SortedLines, seen: set[tuple[int, bytes]]) -> bool:
    """Put a line among the kept; False when it is no JSON object."""
    try:
        record = decode(line, kind) if kind is not None else msgspec.json.decode(line, type=dict)
    except UNREADABLE:
        if not _is_object(line):
            return False
        found.kept.append(line)
        found.foreign += 1
        return True
    if isinstance(record, StepRecord):
        if (record.step, line) in seen:
            found.repeated += 1
            return True
        seen.add((record.step, line))
    found.kept.append(line)
    found.intact += 1
    return True


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except UNREADABLE:
        return False


def _is_cut_short(line: bytes) -> bool:
    """Whether a line is the beginning of an object and no more."""
    if not line.startswith(b"{"):
        return False
    for end in (b"", b"0"):  # a number that stops at its point or sign is reported as invalid, not as short
        try:
            msgspec.json.decode(line + end)
        except UNREADABLE as error:
            if str(error) == CUT_SHORT:
                return True
    return False


@dataclass
class FileState:
    """One file: how many lines are intact, what was wrong, what was done. ``lost`` counts lines, or the
    file where it is one record, that nothing here brings back; pieces of lines that were never whole
    (``torn``) are no loss: no `append` of them returned."""

    file: str
    intact: int = 0
    torn: int = 0
    lost: int = 0
    rejoined: int = 0
    repeated: int = 0
    foreign: int = 0
    notes: list[str] = field(default_factory=list)


def states(run: RunFiles) -> Iterator[tuple[FileState, SortedLines | None]]:
    """Every file of a run that holds records, with its lines sorted where it is a log."""
    row = finished_run(run.out, run.run_id)
    for path in (run.log("steps"), *sorted(run.path.glob("*.jsonl"))):
        name, is_steps = run.name(path), path == run.log("steps")
        if path.is_symlink() or (path.exists() and not plain_inside(run.out, path)):
            yield FileState(name, foreign=1, notes=["is a link or no plain file: not read"]), None
        elif path.exists():
            kind = "steps" if is_steps else path.name.partition(".")[0]  # hardware.until-50.jsonl is hardware's, too
            found = sort_lines(path.read_bytes(), LOGS.get(kind))
            counts = {field: getattr(found, field) for field in ("intact", "torn", "rejoined", "repeated", "foreign")}
            state = FileState(name, lost=found.damaged, **counts)
            if is_steps and row is not None and found.steps < row.steps_done:
                state.lost = max(state.lost, row.steps_done - found.steps)
                here = f"{found.steps} {'is' if found.steps == 1 else 'are'} here"
                state.notes.append(f"run.json says {count(row.steps_done, 'step')}, and {here}")
            yield state, found
        elif is_steps and row is not None and row.steps_done:
            notes = [f"is missing, and run.json says {count(row.steps_done, 'step')}"]
            yield FileState(name, lost=row.steps_done, notes=notes), None
    for path in (run.row, run.forensics):
        if path.exists() or path.is_symlink():
            yield object_state(run.out, run.name(path)), None


def object_state(out: Path, name: str) -> FileState:
    """A file that is one JSON object; it is read and not changed."""
    path, state = out / name, FileState(name)
    if not plain_inside(out, path):
        state.foreign, state.notes = 1, ["is a link or no plain file: not read"]
        return state
    is_row = path.name == "run.json"
    parse: Callable[[bytes], Any] = (lambda content: record(content, RunRecord)) if is_row else json_object
    found, defects = read_one(path, parse, name)
    if defects:
        state.lost, state.notes = 1, [f"cannot be read ({defects[0].what[:120]}); left as it is"]
    elif is_row and found is not None and found.run_id != path.parent.name:
        state.foreign, state.notes = 1, ["holds another run's row"]
    else:
        state.intact = 1
    return state
