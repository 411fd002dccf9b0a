"""The rows of a results folder: ``runs/<run_id>/run.json`` is the truth, ``results.jsonl`` its index."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from instrument.results.lines import Defect, defect, read_one, read_records, record
from instrument.results.schemas import RunRecord, encode

INDEX = "results.jsonl"


def read_runs(path: Path) -> tuple[tuple[RunRecord, ...], list[Defect]]:
    """One valid row per run id, by run id, and everything that was left out with its reason."""
    true_rows, defects = _own_rows(path)
    index_rows, index_defects = _index_rows(path)
    defects += index_defects
    rows = dict(true_rows)
    for run_id, row in index_rows.items():
        if run_id not in rows:
            defects.append(
                defect(INDEX, None, f"run {run_id!r} has no readable runs/{run_id}/run.json; the index's row is used")
            )
            rows[run_id] = row
        elif encode(rows[run_id]) != encode(row):
            defects.append(defect(INDEX, None, f"the row of {run_id!r} differs from its run.json, which is used"))
    if true_rows and (path / INDEX).exists():
        defects += [
            defect(INDEX, None, f"run {run_id!r} is missing from the index; its run.json is used")
            for run_id in true_rows
            if run_id not in index_rows
        ]
    elif true_rows:
        defects.append(defect(INDEX, None, "there is no index; the rows were read from runs/*/run.json"))
    return _one_device(tuple(rows[run_id] for run_id in sorted(rows)), defects)


def _own_rows(path: Path) -> tuple[dict[str, RunRecord], list[Defect]]:
    """The rows in the runs' own folders, under the names of the folders."""
    rows: dict[str, RunRecord] = {}
    defects: list[Defect] = []
    for file in sorted((path / "runs").glob("*/run.json")):
        name = f"runs/{file.parent.name}/run.json"
        row, found = read_one(file, lambda content: record(content, RunRecord), name)
        defects += found
        if row is None:
            continue
        if row.run_id != file.parent.name:
            defects.append(defect(name, None, f"holds the row of run {row.run_id!r}, a copy: left out"))
        else:
            rows[row.run_id] = row
    return rows, defects


def _index_rows(path: Path) -> tuple[dict[str, RunRecord], list[Defect]]:
    """The index's rows; a run id that comes twice counts once."""
    records, defects = read_records(path / INDEX, RunRecord, INDEX)
    rows: dict[str, RunRecord] = {}
    if (path / INDEX).is_file() and (path / INDEX).stat().st_size == 0:
        defects.append(defect(INDEX, None, "is empty"))
    for row in records:
        if row.run_id in rows:
            defects.append(defect(INDEX, None, f"run {row.run_id!r} stands there more than once; counted once"))
        else:
            rows[row.run_id] = row
    return rows, defects


def _one_device(rows: tuple[RunRecord, ...], defects: list[Defect]) -> tuple[tuple[RunRecord, ...], list[Defect]]:
    """The rows of the device that most rows are from; a folder is one device's."""
    devices = Counter(row.device for row in rows)
    if len(devices) <= 1:
        return rows, defects
    main = min(devices, key=lambda device: (-devices[device], device))
    defects += [
        defect(f"runs/{row.run_id}/run.json", None, f"device is {row.device!r} in a folder of {main!r}: left out")
        for row in rows
        if row.device != main
    ]
    return tuple(row for row in rows if row.device == main), defects
