"""The figures by letter, drawn in two processes where the machine has them, and their files."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from instrument.results.files import make_folder, replace, sweep
from report.plots import (
    a_stability_matrix,
    b_efficiency_frontier,
    c_throughput,
    d_grad_norm_heartbeat,
    e_logit_magnitude,
    f_padding_tax,
    g_loss_scale_inversion,
    h_rank_correlation,
    machine,
)
from report.plots.elements import name_frames
from report.plots.style import empty_figure, theme
from report.plots.write import freeze_layout, inline, picture, standalone, write_csv
from report.tables.table import Table

DRAW: dict[str, Callable[..., Figure]] = {
    "A": a_stability_matrix.draw,
    "B": b_efficiency_frontier.draw,
    "C": c_throughput.draw,
    "D": d_grad_norm_heartbeat.draw,
    "E": e_logit_magnitude.draw,
    "F": f_padding_tax.draw,
    "G": g_loss_scale_inversion.draw,
    "H": h_rank_correlation.draw,
    "headroom": e_logit_magnitude.draw_headroom,
    "lm_loss": g_loss_scale_inversion.draw_lm_loss,
    "hardware": machine.draw_hardware,
    "step_times": machine.draw_step_times,
    "kernel_time": machine.draw_kernel_time,
    "overhead": machine.draw_overhead,
}
WORKERS = 2
SLOWEST_FIRST = ("G", "D", "step_times", "E", "B", "F", "C", "hardware")
"""By how long they take: the pool ends sooner when the long ones start first."""


def draw(table: Table) -> Figure:
    """The table's figure; one that says why where there is nothing to draw."""
    if table.empty or table.data.empty:
        return empty_figure(table.title, table.empty or "no runs", table.marks)
    return DRAW[table.letter](table)


@dataclass(frozen=True)
class Drawn:
    """A drawn table: its SVG as a page takes it, and the files written."""

    letter: str
    svg: str
    files: tuple[str, ...]


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
    left = dict.fromkeys(letters)
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=gc.disable) as pool:
            for future in as_completed([pool.submit(_draw_forked, letter) for letter in letters]):
                del left[(figure := future.result()).letter]
                yield figure
    except BrokenProcessPool:  # the kernel killed a worker, for its memory say: one process needs the least
        sweep(folder)
        yield from (draw_one(tables[letter], folder, formats, dpi) for letter in left)


class _Job:
    """What forked workers find in memory."""

    tables: dict[str, Table]
    rest: tuple[Path, tuple[str, ...], int]


def _draw_forked(letter: str) -> Drawn:
    return draw_one(_Job.tables[letter], *_Job.rest)


def draw_one(table: Table, folder: Path, formats: tuple[str, ...], dpi: int) -> Drawn:
    """One figure: drawn once, written in every format."""
    with theme(table.name):
        figure = draw(table)
        freeze_layout(figure)
        name_frames(figure)
        kinds = sorted({"svg", *formats}, key=lambda kind: (kind == "eps", kind))
        pictures = {kind: picture(figure, kind, dpi) for kind in kinds}
    svg = pictures["svg"].decode()
    pictures["svg"] = standalone(svg).encode()
    for kind in formats:
        replace(folder / f"{table.name}.{kind}", pictures[kind])
    write_csv(table.data, folder / f"{table.name}.csv")
    svg = inline(svg, table.letter.lower(), f"{table.letter}: {table.title}")
    return Drawn(table.letter, svg, tuple(f"{table.name}.{kind}" for kind in (*formats, "csv")))
