"""Draws the tables, in two processes where the machine has them, and writes their files."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from instrument.results.files import make_folder, replace
from report.dossier.inline_svg import inline, standalone
from report.plots.registry import DRAW
from report.plots.style import theme
from report.plots.write import picture, write_csv
from report.tables.table import Table

WORKERS = 2
SLOWEST_FIRST = ("G", "D", "step_times", "E", "B", "F", "C", "hardware")
"""By how long they take: the pool ends sooner when the long ones start first."""


@dataclass(frozen=True)
class Drawn:
    """A figure as the page needs it: the table's words, the inline SVG, the files written."""

    letter: str
    name: str
    title: str
    caption: str
    svg: str
    files: tuple[str, ...]
    n_excluded: int
    empty: str | None


def draw_all(
    tables: dict[str, Table], folder: Path, formats: tuple[str, ...], dpi: int, done: Callable[[str], None]
) -> dict[str, Drawn]:
    """Every table's figure in ``folder`` (a file per format, and the CSV); calls ``done`` with each
    letter as it is finished. The bytes do not depend on the number of processes."""
    make_folder(folder)
    drawn = {}
    for figure in _map(tables, folder, formats, dpi):
        done(figure.letter)
        drawn[figure.letter] = figure
    return {letter: drawn[letter] for letter in tables}


def _map(tables: dict[str, Table], folder: Path, formats: tuple[str, ...], dpi: int) -> Iterator[Drawn]:
    place = {letter: at for at, letter in enumerate(SLOWEST_FIRST)}
    letters = sorted(tables, key=lambda letter: place.get(letter, len(place)))
    workers = min(WORKERS, os.cpu_count() or 1)
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods() or len(letters) == 1:
        yield from (draw_one(tables[letter], folder, formats, dpi) for letter in letters)
        return
    # A forked child has the tables already: they need not be pickled. It draws a few figures and ends, so
    # it collects no garbage: looking for some is an eighth of its time.
    _Job.tables, _Job.rest = tables, (folder, formats, dpi)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=gc.disable) as pool:
        for future in as_completed([pool.submit(_draw_forked, letter) for letter in letters]):
            yield future.result()


class _Job:
    """What forked workers find in memory."""

    tables: dict[str, Table]
    rest: tuple[Path, tuple[str, ...], int]


def _draw_forked(letter: str) -> Drawn:
    return draw_one(_Job.tables[letter], *_Job.rest)


def draw_one(table: Table, folder: Path, formats: tuple[str, ...], dpi: int) -> Drawn:
    """One figure: drawn once, written in every format."""
    with theme(table.name):
        figure = DRAW[table.letter](table)
        kinds = sorted({"svg", *formats}, key=lambda kind: (kind == "eps", kind))
        pictures = {kind: picture(figure, kind, dpi) for kind in kinds}
    svg = pictures["svg"].decode()
    pictures["svg"] = standalone(svg).encode()
    for kind in formats:
        replace(folder / f"{table.name}.{kind}", pictures[kind])
    write_csv(table.data, folder / f"{table.name}.csv")
    return Drawn(
        table.letter,
        table.name,
        table.title,
        table.caption,
        inline(svg, table.letter.lower(), f"{table.letter}: {table.title}"),
        tuple(f"{table.name}.{kind}" for kind in (*formats, "csv")),
        len(table.excluded),
        table.empty,
    )
