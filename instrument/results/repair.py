"""Mend a results folder from what is intact in it. Nothing intact is deleted, and what is cut is kept beside.

The runs' own files are the truth. Lines that are no JSON go from ``<file>`` to ``<file>.torn``; rows of a step that repeat
byte for byte go; a ``run.json`` that cannot be read is written again from the index; the index is rebuilt from the rows. A
run that a living process executes is left alone. A folder in order is only read. First come the states of files, which lines
are records and what can still be separated (`states`), then the repair.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from instrument.results import files
from instrument.results.claims import RunClaimed, claim, owner_of
from instrument.results.folder import finished_run, index_content, indexed_rows
from instrument.results.layout import INDEX, INDEX_LOCK, LOGS, RUNS, SIDE_FILES, STEP_LOGS, TRACES, RunFiles
from instrument.results.lines import json_object, read_one, record
from instrument.results.log import Appender
from instrument.results.schemas import UNREADABLE, Record, RunRecord, StepRecord, decode, encode, is_safe
from instrument.terminal import count

SEAM = re.compile(rb'\0+|(?<=\}).(?=\{"schema":)|(?<=\})[^}]\Z', re.DOTALL)
"""Where two lines run together, or the last ends: a newline that flipped into another byte, or zeros that a power cut left."""
CUT_SHORT = "Input data was truncated"
"""msgspec's message for the beginning of a JSON value."""
TORN = ".torn"


@dataclass
class FileState:
    """One file: how many lines are intact, what was wrong, what was done. ``foreign``: JSON objects that are no records of the
    file's kind (another version's, or a flipped bit in a name: left where they are). ``torn``: pieces that end in mid-line, as
    a dead writer leaves them, which are no loss: no `append` of them returned. ``lost`` counts other pieces, or the file where
    it is one record, that nothing here brings back. ``rejoined``: records won back from lines that ran together. ``repeated``:
    rows of a step that stood there before, byte for byte."""

    file: str
    intact: int = 0
    torn: int = 0
    lost: int = 0
    rejoined: int = 0
    repeated: int = 0
    foreign: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class SortedLines:
    """``kept``: the lines that stay, in order; ``cut``: what is no JSON; ``state`` counts them. ``seen``: steps and their rows.
    ``in_order``: the file is as it should be."""

    state: FileState
    kept: list[bytes] = field(default_factory=list)
    cut: list[bytes] = field(default_factory=list)
    seen: set[tuple[int, bytes]] = field(default_factory=set)
    in_order: bool = True

    @property
    def content(self) -> bytes:
        return b"".join(line + b"\n" for line in self.kept)


def sort_lines(content: bytes, kind: type[Record] | None, file: str = "") -> SortedLines:
    """Sort the log ``file`` of ``kind`` (None: any JSON objects)."""
    found = SortedLines(state := FileState(file))
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for line in lines:
        if _keep(line, kind, found):
            continue
        pieces = [piece for piece in SEAM.split(line) if piece]
        won_back = sum(_keep(piece, kind, found) for piece in pieces) if pieces != [line] else 0
        state.rejoined += won_back
        for piece in pieces:
            if not won_back or not _is_object(piece):
                found.cut.append(piece)
                torn = _is_cut_short(piece)
                state.torn, state.lost = state.torn + torn, state.lost + (not torn)
    found.in_order = found.content == content
    return found


def _keep(line: bytes, kind: type[Record] | None, found: SortedLines) -> bool:
    """Put a line among the kept; False when it is no JSON object."""
    try:
        record = decode(line, kind) if kind is not None else msgspec.json.decode(line, type=dict)
    except UNREADABLE:
        if not _is_object(line):
            return False
        found.kept.append(line)
        found.state.foreign += 1
        return True
    if isinstance(record, StepRecord):
        if (record.step, line) in found.seen:
            found.state.repeated += 1
            return True
        found.seen.add((record.step, line))
    found.kept.append(line)
    found.state.intact += 1
    return True


def _is_object(line: bytes) -> bool:
    with suppress(*UNREADABLE):
        json_object(line)
        return True
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


def states(run: RunFiles) -> Iterator[tuple[FileState, SortedLines | None]]:
    """Every file of a run that holds records, with its lines sorted where it is a log."""
    row = finished_run(run.out, run.run_id)
    for path in (run.log("steps"), *sorted(run.path.glob("*.jsonl"))):
        name, is_steps = run.name(path), path == run.log("steps")
        if path.is_symlink() or (path.exists() and not files.plain_inside(run.out, path)):
            yield FileState(name, foreign=1, notes=["is a link or no plain file: not read"]), None
        elif path.exists():
            kind = "steps" if is_steps else path.name.partition(".")[0]  # hardware.until-50.jsonl is hardware's, too
            found = sort_lines(path.read_bytes(), LOGS.get(kind), name)
            steps = len({step for step, _ in found.seen})
            if is_steps and row is not None and steps < row.steps_done:
                found.state.lost = max(found.state.lost, row.steps_done - steps)
                here = f"{steps} {'is' if steps == 1 else 'are'} here"
                found.state.notes.append(f"run.json says {count(row.steps_done, 'step')}, and {here}")
            yield found.state, found
        elif is_steps and row is not None and row.steps_done:
            notes = [f"is missing, and run.json says {count(row.steps_done, 'step')}"]
            yield FileState(name, lost=row.steps_done, notes=notes), None
    for path in (run.row, run.forensics):
        if path.exists() or path.is_symlink():
            yield object_state(run.out, run.name(path)), None


def object_state(out: Path, name: str) -> FileState:
    """A file that is one JSON object; it is read and not changed."""
    path, state = out / name, FileState(name)
    if not files.plain_inside(out, path):
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


@dataclass
class Repair:
    """What `repair_folder` found and did. ``changed``: files written or removed; ``in_use``: run ids left alone;
    ``runs``: with a row; ``unfinished``: ids of runs without one."""

    folder: str
    files: list[FileState] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    runs: int = 0
    unfinished: list[str] = field(default_factory=list)

    @property
    def is_damaged(self) -> bool:
        """Whether something is lost or cannot be read: exit 4."""
        return any(state.lost or state.foreign for state in self.files)

    def as_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self), "damaged": self.is_damaged}


def repair_folder(out: Path) -> Repair:
    """Mend the folder; raises OSError where it cannot be written. A second call changes no byte."""
    done = Repair(str(out))
    runs = _runs(out, done)
    for run in runs:
        with suppress(RunClaimed):
            if owner_of(out, run.run_id) is None:
                _repair_run(run, done)
                continue
        done.in_use.append(run.run_id)
    for name in SIDE_FILES:
        if (out / name).exists() or (out / name).is_symlink():
            done.files.append(object_state(out, name))
    _repair_index(out, done)
    for place in _places(out):
        done.changed += [str(path.relative_to(out)) for path in files.sweep(place)]
    rows = indexed_rows(out)
    done.runs, done.unfinished = len(rows), [run.run_id for run in runs if run.run_id not in rows]
    return done


def _runs(out: Path, done: Repair) -> list[RunFiles]:
    """The runs that have a folder or a log, by id; what has no safe name is reported and left alone."""
    logs = {path.name.removeprefix("run_").removesuffix(".jsonl"): path for path in (out / STEP_LOGS).glob("run_*.jsonl")}
    places = logs | {path.name: path for path in (out / RUNS).glob("*")}
    runs = []
    for name, path in sorted(places.items()):
        if is_safe(name) and not path.is_symlink():
            runs.append(RunFiles(out, name))
        else:
            why = "is a link: not followed" if path.is_symlink() else "is no safe name of a run: left alone"
            done.files.append(FileState(path.relative_to(out).as_posix(), foreign=1, notes=[why]))
    return runs


def _repair_run(run: RunFiles, done: Repair) -> None:
    """Look first; only a run with something to mend is claimed, and looked at again."""
    seen = list(states(run))
    if _row_to_mend(run) is None and all(found is None or found.in_order for _, found in seen):
        done.files += [state for state, _ in seen]
        return
    with claim(run.out, run.run_id):
        if (row := _row_to_mend(run)) is not None:
            _keep_aside(run.row, [run.row.read_bytes()])
            files.replace(run.row, encode(row) + b"\n")
            done.changed.append(run.name(run.row))
        for state, found in states(run):
            done.files.append(state)
            if found is not None:
                _mend_log(run.out / state.file, found, state, done)
    with suppress(OSError):  # a claim makes the folder of a run that is a log alone
        os.rmdir(run.path)


def _row_to_mend(run: RunFiles) -> RunRecord | None:
    """The index's row of a run whose ``run.json`` is there and cannot be read; the index was written after it."""
    if not files.plain_inside(run.out, run.row) or finished_run(run.out, run.run_id) is not None:
        return None
    return indexed_rows(run.out).get(run.run_id)


def _mend_log(path: Path, found: SortedLines, state: FileState, done: Repair) -> None:
    if found.in_order:
        return
    before, after = path.read_bytes(), found.content
    if found.cut:
        _keep_aside(path, found.cut)
        state.notes.append(f"what is no JSON is in {path.name}{TORN}")
    if before.startswith(after):  # only the end goes
        files.truncate(path, len(after))
    else:
        files.replace(path, after)
    done.changed.append(state.file)


def _repair_index(out: Path, done: Repair) -> None:
    path = out / INDEX
    if path.is_symlink() or (path.exists() and not files.plain_inside(out, path)):
        done.files.append(FileState(INDEX, foreign=1, notes=["is a link or no plain file: not read"]))
        return
    before = path.read_bytes() if path.exists() else b""
    state = FileState(INDEX, intact=len(indexed_rows(out)))
    if before != index_content(out):
        with files.locked(out / INDEX_LOCK):
            before = path.read_bytes() if path.exists() else b""
            after = index_content(out)
            if gone := _not_in(before, after):
                _keep_aside(path, gone)
                state.notes.append(f"lines of no run, now in {INDEX}{TORN}: {len(gone)}")
            files.replace(path, after)
        state.intact = after.count(b"\n")
        state.notes.append(f"rebuilt, rows: {state.intact}")
        done.changed.append(INDEX)
    done.files.append(state)


def _not_in(before: bytes, after: bytes) -> list[bytes]:
    """Lines of the old index that say what no line of the new one says."""
    new = set(after.splitlines())

    def rewritten(line: bytes) -> bytes:
        try:
            return encode(decode(line, RunRecord))
        except UNREADABLE:
            return line

    return [line for line in dict.fromkeys(before.split(b"\n")) if line and rewritten(line) not in new]


def _keep_aside(path: Path, pieces: list[bytes]) -> None:
    """Append to ``<file>.torn`` before anything is cut; a repair that died in between does not do so twice."""
    aside = path.with_name(path.name + TORN)
    content = b"".join(piece.rstrip(b"\n") + b"\n" for piece in pieces)
    if not aside.exists() or not aside.read_bytes().endswith(content):
        lines = Appender(aside)
        lines.append(content)
        lines.close()


def _places(out: Path) -> list[Path]:
    """The folders in which dead writers may have left temporary files."""
    places = [out, out / RUNS, out / STEP_LOGS, out / TRACES, *sorted((out / RUNS).glob("*"))]
    return [place for place in places if place.is_dir() and not place.is_symlink()]
