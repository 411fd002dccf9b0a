"""What the figures show, as DataFrames: pure functions of a results folder."""

from instrument.results.contents import Folder
from report.tables import (
    a_stability,
    b_efficiency,
    c_throughput,
    d_grad_norm,
    e_logits,
    f_padding,
    g_loss,
    h_rank,
    headroom,
    machine,
)
from report.tables.selection import TASK_COLUMNS, series_order
from report.tables.table import Table

__all__ = ["TABLES", "TASK_COLUMNS", "Table", "all_tables", "series_order"]

TABLES = {
    "A": a_stability,
    "B": b_efficiency,
    "C": c_throughput,
    "D": d_grad_norm,
    "E": e_logits,
    "F": f_padding,
    "G": g_loss,
    "H": h_rank,
}
SECTION_TABLES = {
    "kernel_time": machine.kernel_time,
    "overhead": machine.overhead,
    "step_times": machine.step_times,
    "hardware": machine.hardware,
    "headroom": headroom.table,
    "lm_loss": g_loss.lm_loss,
}
"""The further figures of the dossier."""


def all_tables(folder: Folder, heartbeat: tuple[str, ...] = ()) -> dict[str, Table]:
    """Every figure's table by its letter, in order. ``heartbeat``: configurations that D shows beside its own."""
    return {
        letter: module.table(folder, heartbeat) if letter == "D" else module.table(folder) for letter, module in TABLES.items()
    }
