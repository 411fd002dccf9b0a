"""A results folder, read once and checked; step logs are read when asked for, then kept.

A log becomes numpy columns in one pass with one decoder call a chunk, about 3 us a line. Only a chunk that does not decode
is read again line by line, to find out which lines are bad and to keep the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import numpy as np

from instrument.results.folder import read_rows
from instrument.results.layout import MACHINE, RunFiles
from instrument.results.lines import (
    Defect,
    chunks,
    defect,
    json_object,
    read_lines,
    read_one,
    record,
    stored,
    too_large,
)
from instrument.results.measurements import HardwareRecord
from instrument.results.schemas import (
    KINDS,
    SCHEMA,
    UNREADABLE,
    EvaluationRecord,
    EventRecord,
    Record,
    RunRecord,
    StepRecord,
    is_safe,
)
from instrument.terminal import count


class NoResults(Exception):
    """There is nothing to report on; ``missing``: there is no such folder, rather than an empty one."""

    def __init__(self, message: str, *, missing: bool, defects: tuple[Defect, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing
        self.defects = defects


def load(path: Path) -> Folder:
    """The folder ``path``; raises `NoResults` when it is missing or holds no valid row."""
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise NoResults(f"{path} {what}; give a results folder, such as results/nvidia-h200", missing=True)
    runs, defects = read_rows(path)
    if not runs:
        found = f"; the first of {count(len(defects), 'defect')}: {defects[0]}" if defects else ""
        raise NoResults(
            f"{path} holds no valid run: neither runs/*/run.json nor results.jsonl has one{found}",
            missing=False,
            defects=tuple(defects),
        )
    return Folder(path, runs, defects)


class Folder:
    """Rows and logs of one device. ``runs`` holds one valid row per run id, in order of run id.

    ``machine``, ``kernels``, ``overhead``, ``fit``, ``kernel_check``: the side files as plain data, None where there is none
    (``machine``: an empty dict). Nothing here writes.
    """

    def __init__(self, path: Path, runs: tuple[RunRecord, ...], defects: list[Defect]) -> None:
        self.path = path
        self.runs = runs
        self._defects = defects
        self._read: dict[tuple[str, str], Any] = {}
        self.machine: dict[str, Any] = self._object(MACHINE) or {}
        self.kernels = self._object("kernels.json")
        self.overhead = self._object("overhead.json")
        self.fit = self._object("fit.json")
        self.kernel_check = self._object("kernel_check.json")

    @property
    def device(self) -> str:
        return self.runs[0].device

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """What every figure of these data must carry: ``TINY PRESET``, ``CPU``, ..."""
        return marks_of(self.runs)

    @cached_property
    def by_id(self) -> dict[str, RunRecord]:
        return {run.run_id: run for run in self.runs}

    @property
    def defects(self) -> tuple[Defect, ...]:
        """Everything wrong with the folder; reads the logs that were not read yet."""
        for run in self.runs:
            for log in (self.steps, self.evaluations, self.events, self.hardware, self.forensics, self.activations):
                log(run.run_id)
            self.predictions(run.case)
        return tuple(sorted(self._defects, key=lambda d: (d.file, d.line or 0, d.what)))

    def steps(self, run_id: str) -> dict[str, np.ndarray]:
        """Columns of the run's `StepRecord` rows by field, in order of step; each step once."""
        return self._once("steps", run_id, self._read_steps)

    def evaluations(self, run_id: str) -> list[EvaluationRecord]:
        return self._lines("evaluations", run_id, lambda line: record(line, EvaluationRecord))

    def events(self, run_id: str) -> list[EventRecord]:
        return self._lines("events", run_id, lambda line: record(line, EventRecord))

    def hardware(self, run_id: str) -> dict[str, np.ndarray] | None:
        """Columns of the run's `HardwareRecord` rows (text and lists as objects); None when nothing was sampled."""
        columns = self._once("hardware", run_id, lambda run: self._log(run, "hardware", read_columns, HardwareRecord))
        return columns if len(columns["time_s"]) else None

    def activations(self, run_id: str) -> list[dict[str, Any]]:
        """The rows of ``activations.jsonl`` as plain data, empty when activations were not recorded."""
        return self._lines("activations", run_id, json_object)

    def forensics(self, run_id: str) -> dict[str, Any]:
        """What a failed run's own investigation found, as plain data; empty when there is none."""
        return self._once("forensics", run_id, lambda run: self._object(run.name(run.forensics)) or {})

    def predictions(self, case: str) -> dict[str, Any] | None:
        """What the fp32 runs of a case predicted, as plain data; None when nobody asked them."""
        name = f"predictions/{case}.json"
        return self._once("predictions", case, lambda _: self._object(name)) if is_safe(case) else None

    def _once(self, what: str, of: str, read: Callable[[RunFiles], Any]) -> Any:
        """What ``read`` gives for a run, read when it is first asked for."""
        if (what, of) not in self._read:
            self._read[what, of] = read(RunFiles(self.path, of))
        return self._read[what, of]

    def _lines(self, log: str, run_id: str, parse: Callable[[bytes], Any]) -> list[Any]:
        return self._once(log, run_id, lambda run: self._log(run, log, read_lines, parse))

    def _log(self, run: RunFiles, log: str, read: Callable[..., tuple[Any, list[Defect]]], how: Any) -> Any:
        path = run.log(log)
        rows, defects = read(path, how, run.name(path))
        self._defects += defects
        return rows

    def _read_steps(self, run: RunFiles) -> dict[str, np.ndarray]:
        """A row says how many steps it did; a log that holds another number lost some."""
        path = run.log("steps")
        name = run.name(path)
        columns, defects = read_columns(path, StepRecord, name)
        columns = _each_step_once(columns, name, defects)
        found, done = len(columns["step"]), self.by_id[run.run_id].steps_done
        if found != done and not defects:
            what = "is missing" if not stored(path, name)[0].exists() else f"holds {count(found, 'step')}"
            defects.append(defect(name, None, f"{what}, and its row says {done}"))
        self._defects += defects
        return columns

    def _object(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the folder, or None."""
        try:
            content, defects = read_one(self.path / name, json_object, name)
        except OSError as error:
            content, defects = None, [defect(name, None, error)]
        self._defects += defects
        return content


def _each_step_once(columns: dict[str, np.ndarray], name: str, defects: list[Defect]) -> dict[str, np.ndarray]:
    """Rows by step; of a step that comes twice the first row counts, so nothing is averaged twice."""
    steps = columns["step"]
    if len(steps) < 2 or (np.diff(steps) > 0).all():
        return columns
    kept_steps, first = np.unique(steps, return_index=True)
    repeats = len(steps) - len(kept_steps)
    what = (
        f"{count(repeats, 'row repeats', 'rows repeat')} a step; the first row of each counts"
        if repeats
        else "steps out of order; sorted"
    )
    defects.append(defect(name, None, what))
    return {field: column[first] for field, column in columns.items()}


def marks_of(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """The marks that any of these rows earns, in a fixed order."""
    tests = {
        "TINY PRESET": lambda run: run.preset == "tiny",
        "EMBEDDED DATA": lambda run: run.data_source == "embedded",
        "CPU": is_cpu,
        "IMPORTED": lambda run: bool(run.flags.get("imported")),
        "SIMULATED": lambda run: bool(run.flags.get("simulated")),
    }
    return tuple(mark for mark, earned in tests.items() if any(earned(run) for run in runs))


def is_cpu(run: RunRecord) -> bool:
    """Whether a run was made on a processor: its settings say so, or its device's name."""
    return run.config.get("device") == "cpu" or run.device.startswith("cpu")


NOT_COLUMNS = ("schema", "nonfinite")
NUMPY_TYPES = {int: np.int64, bool: np.bool_, float: np.float64, int | None: np.float64, float | None: np.float64}


def read_columns(path: Path, kind: type[Record], name: str) -> tuple[dict[str, np.ndarray], list[Defect]]:
    """Columns of a log by field, and what was wrong with it under the file name ``name``.

    ``int`` and ``bool`` fields are int64 and bool; fields that may be null are float64 with nan for
    null, and with nan or +-inf where the line's ``nonfinite`` map names it; all others are objects.
    Columns are read-only. A file that is not there has no rows; one that is there as ``.gz`` only is read from that.
    """
    dtypes = column_dtypes(kind)
    pieces: list[dict[str, np.ndarray]] = []
    defects: list[Defect] = []
    for chunk in chunks(path, name, defects):
        rows = _decode_chunk(chunk.lines, kind)
        if rows is None:
            rows = list(chunk.rows(lambda line: record(line, kind), defects))
        pieces.append({field: _column(rows, field, dtype) for field, dtype in dtypes.items()})
        _restore(rows, pieces[-1])
    return {
        field: _compact(np.concatenate([piece[field] for piece in pieces])) if pieces else np.empty(0, dtype)
        for field, dtype in dtypes.items()
    }, defects


def column_dtypes(kind: type[Record]) -> dict[str, np.dtype]:
    """The numpy type of every field of a record that becomes a column."""
    hints = get_type_hints(kind)
    fields = (field for field in kind.__struct_fields__ if field not in NOT_COLUMNS)
    return {field: np.dtype(NUMPY_TYPES.get(hints[field], object)) for field in fields}


def _decode_chunk(chunk: list[bytes], kind: type[Any]) -> list[Any] | None:
    """All rows at once; None unless all are good."""
    try:
        rows = msgspec.json.Decoder(kind).decode_lines(b"".join(chunk))
    except UNREADABLE:
        return None
    good = len(rows) == len(chunk) and all(row.schema <= SCHEMA and (not row.nonfinite or _honest(row)) for row in rows)
    return rows if good and not any(map(too_large, rows)) else None


def _honest(row: Any) -> bool:
    """Whether the ``nonfinite`` map names only known kinds, at fields that are null."""
    return all(kind in KINDS and getattr(row, field, 0) is None for field, kind in row.nonfinite.items())


def _column(rows: list[Record], field: str, dtype: np.dtype) -> np.ndarray:
    values = [getattr(row, field) for row in rows]
    if not dtype.hasobject:
        return np.array(values, dtype=dtype)
    column = np.empty(len(values), dtype=object)  # numpy would make lists of equal length a table
    for index, value in enumerate(values):
        column[index] = value
    return column


def _restore(rows: list[Record], columns: dict[str, np.ndarray]) -> None:
    """Put non-finite numbers back where a row's map names them (`decode` has done so already for some)."""
    for index, row in enumerate(rows):
        for field, kind in getattr(row, "nonfinite", {}).items():
            if field in columns and columns[field].dtype == np.float64:
                columns[field][index] = math.nan if kind == "nan" else float(kind)


def _compact(column: np.ndarray) -> np.ndarray:
    """A column that never changes (all nan, above all) takes no memory: a broadcast of one value."""
    if column.dtype != object and len(column):
        same = np.isnan(column).all() if np.isnan(column[0]) else (column == column[0]).all()
        if same:
            column = np.broadcast_to(column[:1].copy(), column.shape)
    column.flags.writeable = False
    return column
