"""The run table: its rows and cells as text, the row numbers that claims cite as a paper cites its sources, and the commands
that make the rows again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from instrument.results.schemas import RunRecord
from report.harness_commands import command, is_foreign, matrix_commands
from report.tables.selection import in_order
from report.text import clean, short

ABSENT = "–"
HEADS = tuple(
    "#, case, configuration, seed, status, diverged at, val. loss, F1 micro, samples/s, real tokens/s, step p50 (ms), "
    "MFU bf16 (%), memory (GB), energy (kJ), skips, run".split(", ")
)


class Citation(NamedTuple):
    """``text`` is ``12`` or a range, ``12–18``; ``anchor`` the first row's place in the page."""

    text: str
    anchor: str


class RowNumbers:
    """The number of every run in the run table, from 1."""

    def __init__(self, runs: Iterable[RunRecord]) -> None:
        self._number = {run.run_id: at for at, run in enumerate(in_order(runs), start=1)}

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._number

    def __getitem__(self, run_id: str) -> int:
        return self._number[run_id]

    def cite(self, run_ids: Iterable[str]) -> list[Citation]:
        """The rows as numbers in order, neighbours joined to ranges; ids that are no row are left out."""
        numbers = sorted({self._number[run_id] for run_id in run_ids if run_id in self._number})
        ranges: list[list[int]] = []
        for number in numbers:
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        return [Citation(str(low) if low == high else f"{low}–{high}", f"row-{low}") for low, high in ranges]


class Cell(NamedTuple):
    """``value``: what sorting compares, as text (empty: absent, None: sort by the text itself)."""

    text: str
    value: str | None = None
    kind: str = "number"


def run_rows(runs: Sequence[RunRecord], numbers: RowNumbers) -> list[dict]:
    """One row a run, in the order of the citations: number, state, cells, link to the files; ``first_of_case`` where paper
    puts the case's name over its rows."""
    ordered = in_order(runs)
    return [
        {
            "number": numbers[run.run_id],
            "case": clean(run.case, 40),
            "first_of_case": at == 0 or ordered[at - 1].case != run.case,
            "status": run.status,
            "cells": _cells(run, numbers[run.run_id]),
            "run": clean(run.run_id, 80),
            "href": run_href(run.run_id),
        }
        for at, run in enumerate(ordered)
    ]


def run_href(run_id: str) -> str | None:
    """The run's folder as seen from the page; None for an id that is no plain name (it could lead anywhere)."""
    plain = all(c.isascii() and (c.isalnum() or c in "._-") for c in run_id) and ".." not in run_id
    return f"../runs/{run_id}/run.json" if plain else None


def _cells(run: RunRecord, number: int) -> list[Cell]:
    memory = next((size for size in (run.peak_allocated_bytes, run.peak_rss_bytes) if size is not None), None)
    return [
        Cell(str(number), str(number)),
        Cell(clean(run.case, 40), kind="name case"),
        Cell(clean(run.dtype_config, 40), kind="name"),
        Cell(str(run.seed), str(run.seed)),
        Cell(f"{run.status}, stalled" if run.stalled else run.status, kind="status"),
        _number(run.divergence_step, "{:,.0f}"),
        _number(run.val_loss, "{:.4g}"),
        _number(run.f1_micro, "{:.3f}"),
        _number(run.samples_per_s, "{:,.1f}"),
        _number(run.real_tokens_per_s, "{:,.0f}"),
        _number(run.step_time_p50_s, "{:,.1f}", 1e3),
        _number(run.mfu_bf16_peak, "{:.1f}", 100),
        _number(memory, "{:.2f}", 1e-9),
        _number(run.energy_j, "{:,.1f}", 1e-3),
        _number(run.scaler_skips, "{:,.0f}"),
    ]


def _number(value: float | None, form: str, scale: float = 1.0) -> Cell:
    if value is None:
        return Cell(ABSENT, "")
    if not math.isfinite(value):
        return Cell(short(value), "")
    return Cell(form.format(value * scale), repr(float(value)))


def commands(runs: Sequence[RunRecord], numbers: RowNumbers) -> dict:
    """``matrix``: lines that make all of them again, each with the rows that it makes; ``rows``: number and command of every
    row that this program's harness can make again; ``foreign``: the citations of those that it did not make; ``unnamed``: of
    those whose case has no name on its command line."""
    found = [(run, command(run)) for run in in_order(runs)]
    return {
        "matrix": [
            {"command": line, "rows": numbers.cite(run.run_id for run in made)}
            for line, made in matrix_commands([run for run, line in found if line])
        ],
        "rows": [{"number": numbers[run.run_id], "command": line} for run, line in found if line],
        "foreign": numbers.cite(run.run_id for run, line in found if not line and is_foreign(run)),
        "unnamed": numbers.cite(run.run_id for run, line in found if not line and not is_foreign(run)),
    }
