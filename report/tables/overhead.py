"""What measuring costs: the instruments' own benchmark (``overhead.json``, by ``python -m harness bench overhead``)."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from instrument.results.contents import Folder
from instrument.terminal import count
from report.tables.table import Table, frame
from report.text import number, objects, printable, sentence

NAME = "overhead"
ARMS = ("bare", "light", "full")
"""Instruments off, as they are by default, and all on: the figure; the table has every arm."""
BARE = ARMS[0]
COLUMNS = ("arm", "round", "step_time_s", "ratio")
SUMMARY = ("arm", "ratio", "low", "high", "cpu_ratio", "cpu_low", "cpu_high", "at_most", "n", "note")
CPU_SUFFIX = "_cpu"
FIELDS = {"ratio": "median", "low": "low95", "high": "high95"}
"""Column -> field of a row of the benchmark."""
EMPTY = "not measured: overhead.json is not in this folder; python -m harness bench overhead --out DIR writes it."


def table(folder: Folder) -> Table:
    """Step times of the bare loop beside those with instruments, round by round; ``summary``: every arm's ratio to
    the bare loop's step of the same round, with its 95 % interval, by the wall clock and in processor time."""
    document = folder.overhead or {}
    marks = _marks(folder, document)
    summary = ratios(document)
    data = _rounds(document)
    if data.empty and summary.empty:
        return Table.without_data(NAME, COLUMNS, "Instrumentation on beside off", EMPTY, marks, summary=summary)
    empty = None if len(data) else "overhead.json holds ratios and no step times of single rounds."
    return Table(NAME, NAME, data, _title(summary), _caption(document, data), summary, marks=marks, empty=empty)


def ratios(document: dict[str, Any]) -> pd.DataFrame:
    """The rows in unit ``ratio``, wall clock and processor time of an arm side by side; nan where there is none."""
    rows = [row for row in objects(document.get("rows")) if row.get("unit") == "ratio" and isinstance(row.get("name"), str)]
    by_name = {row["name"]: row for row in rows}
    found = []
    for name, row in by_name.items():
        if name.endswith(CPU_SUFFIX) and name.removesuffix(CPU_SUFFIX) in by_name:
            continue
        cpu = by_name.get(name + CPU_SUFFIX, {})
        found.append(
            {
                "arm": name,
                **{key: _number(row.get(field)) for key, field in FIELDS.items()},
                **{f"cpu_{key}": _number(cpu.get(field)) for key, field in FIELDS.items()},
                "at_most": _number(row.get("at_most")),
                "n": _number(row.get("n")),
                "note": row.get("note"),
            }
        )
    return frame(found, SUMMARY)


def _rounds(document: dict[str, Any]) -> pd.DataFrame:
    """Seconds of a step by arm and round; a round in which any shown arm has no time is left out."""
    times = document.get("wall_s") if isinstance(document.get("wall_s"), dict) else {}
    lists = {arm: times[arm] for arm in ARMS if isinstance(times.get(arm), list)}
    if BARE not in lists or len(lists) < 2:
        return frame([], COLUMNS)
    rows = []
    for at in range(min(map(len, lists.values()))):
        seconds = {arm: _number(values[at]) for arm, values in lists.items()}
        if all(value > 0 for value in seconds.values()):
            rows += [
                {"arm": arm, "round": at + 1, "step_time_s": value, "ratio": value / seconds[BARE]}
                for arm, value in seconds.items()
            ]
    return frame(rows, COLUMNS)


def _title(summary: pd.DataFrame) -> str:
    """The ratio of each instrumented arm, and whether the interval is clear of 1."""
    parts = []
    for row in summary[summary["arm"].isin(ARMS)].to_dict("records"):
        span = f" [{row['low']:.3f}, {row['high']:.3f}]" if math.isfinite(row["low"]) and math.isfinite(row["high"]) else ""
        unresolved = " (not resolved from 1)" if span and row["low"] <= 1 <= row["high"] else ""
        parts.append(f"{row['ratio']:.3f}{span} times as long with {row['arm']}{unresolved}")
    return sentence("A step takes " + ", ".join(parts)) if parts else "Not decided: no ratio of an instrumented step."


def _caption(document: dict[str, Any], data: pd.DataFrame) -> str:
    what = printable(document.get("what") or "model not recorded")
    n = data["round"].nunique() if len(data) else 0
    device = printable(document.get("device") or "device not recorded")
    return (
        f"{device}, {count(n, 'round')}; {what}. Every arm has its own copy of the model and takes its step in rotation, in an "
        "order reversed from round to round. Left: the step's time. Right: its ratio to the bare loop's step of the same "
        "round; line at the median, bar: its 95 % interval where recorded."
    )


def _marks(folder: Folder, document: dict[str, Any]) -> tuple[str, ...]:
    """This benchmark has a model and data of its own: of the folder's marks only what is true of it stays."""
    processor = str(document.get("device", "")).startswith("cpu")
    made_up = bool(document.get("simulated")) or (not document and "SIMULATED" in folder.marks)
    return (*(["CPU"] if processor else []), *(["SIMULATED"] if made_up else []))


def _number(value: object) -> float:
    """A plain finite number, else nan."""
    known = number(value)
    return math.nan if known is None else known
