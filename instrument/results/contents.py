"""A results folder, read once and checked; step logs are read when asked for, then kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from instrument.results.columns import read_columns
from instrument.results.folder import read_rows
from instrument.results.hardware import HardwareRecord
from instrument.results.lines import Defect, defect, json_object, read_objects, read_one, read_records, stored
from instrument.results.schemas import EvaluationRecord, EventRecord, RunRecord, StepRecord, is_safe
from instrument.terminal import count


class NoResults(Exception):
    """There is nothing to report on; ``missing`` tells a folder that is not there from an empty one."""

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
        self._steps: dict[str, dict[str, np.ndarray]] = {}
        self._hardware: dict[str, dict[str, np.ndarray] | None] = {}
        self._small: dict[tuple[str, str], list] = {}
        self._forensics: dict[str, dict[str, Any]] = {}
        self._predictions: dict[str, dict[str, Any] | None] = {}
        self.machine: dict[str, Any] = self._side_file("machine.json") or {}
        self.kernels = self._side_file("kernels.json")
        self.overhead = self._side_file("overhead.json")
        self.fit = self._side_file("fit.json")
        self.kernel_check = self._side_file("kernel_check.json")

    @property
    def device(self) -> str:
        """The device slug of the rows."""
        return self.runs[0].device

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """What every figure of these data must carry: ``TINY PRESET``, ``CPU``, ..."""
        return marks_of(self.runs)

    @cached_property
    def by_id(self) -> dict[str, RunRecord]:
        """Rows by run id."""
        return {run.run_id: run for run in self.runs}

    @property
    def defects(self) -> tuple[Defect, ...]:
        """Everything wrong with the folder; reads the logs that were not read yet."""
        for run in self.runs:
            self.steps(run.run_id)
            self.evaluations(run.run_id)
            self.events(run.run_id)
            self.hardware(run.run_id)
            self.forensics(run.run_id)
            self.activations(run.run_id)
            self.predictions(run.case)
        return tuple(sorted(self._defects, key=lambda d: (d.file, d.line or 0, d.what)))

    def steps(self, run_id: str) -> dict[str, np.ndarray]:
        """Columns of the run's `StepRecord` rows by field, in order of step; each step once."""
        if run_id not in self._steps:
            name = f"training_logs/run_{run_id}.jsonl"
            columns, defects = read_columns(self.path / name, StepRecord, name)
            self._steps[run_id] = _each_step_once(columns, name, defects)
            self._check_length(run_id, name, len(self._steps[run_id]["step"]), defects)
            self._defects += defects
        return self._steps[run_id]

    def evaluations(self, run_id: str) -> list[EvaluationRecord]:
        """The run's evaluations in order."""
        return self._records(run_id, "evaluations", EvaluationRecord)

    def events(self, run_id: str) -> list[EventRecord]:
        """The run's events in order."""
        return self._records(run_id, "events", EventRecord)

    def hardware(self, run_id: str) -> dict[str, np.ndarray] | None:
        """Columns of the run's `HardwareRecord` rows (words and lists as objects); None when nothing was sampled."""
        if run_id not in self._hardware:
            name = f"runs/{run_id}/hardware.jsonl"
            columns, defects = read_columns(self.path / name, HardwareRecord, name)
            self._hardware[run_id] = columns if len(columns["time_s"]) else None
            self._defects += defects
        return self._hardware[run_id]

    def forensics(self, run_id: str) -> dict[str, Any]:
        """What a failed run's own investigation found, as plain data; empty when there is none."""
        if run_id not in self._forensics:
            self._forensics[run_id] = self._side_file(f"runs/{run_id}/forensics.json") or {}
        return self._forensics[run_id]

    def activations(self, run_id: str) -> list[dict[str, Any]]:
        """The rows of ``activations.jsonl`` as plain data, empty when activations were not recorded."""
        if (run_id, "activations") not in self._small:
            name = f"runs/{run_id}/activations.jsonl"
            self._small[run_id, "activations"], defects = read_objects(self.path / name, name)
            self._defects += defects
        return self._small[run_id, "activations"]

    def predictions(self, case: str) -> dict[str, Any] | None:
        """What the fp32 runs of a case predicted, as plain data; None when nobody asked them."""
        if case not in self._predictions:
            self._predictions[case] = self._side_file(f"predictions/{case}.json") if is_safe(case) else None
        return self._predictions[case]

    def _records(self, run_id: str, stem: str, kind: type) -> list:
        if (run_id, stem) not in self._small:
            name = f"runs/{run_id}/{stem}.jsonl"
            self._small[run_id, stem], defects = read_records(self.path / name, kind, name)
            self._defects += defects
        return self._small[run_id, stem]

    def _check_length(self, run_id: str, name: str, found: int, defects: list[Defect]) -> None:
        """A row tells how many steps it did; a log that holds another number lost some."""
        told = self.by_id[run_id].steps_done
        if found != told and not defects:
            what = "is missing" if not stored(self.path / name, name)[0].exists() else f"holds {count(found, 'step')}"
            defects.append(defect(name, None, f"{what}, and its row says {told}"))

    def _side_file(self, name: str) -> dict[str, Any] | None:
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
