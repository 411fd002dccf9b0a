"""The comparison on a terminal of 80 columns: a table a case, a block a configuration, a row a device."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from report.compare.table import Comparison
from report.verdict.price import plain
from report.words import gigabytes, printable

STYLES = {"diverged": "red", "poor": "dark_orange", "failed": "red", "unjudged": "dim", "completed": "green"}
WORDS = {"completed": "ok", "unjudged": "not judged"}
NOTHING = "-"


def show(comparison: Comparison, console: Console) -> None:
    """Print it. ``vs fp32``: relative to fp32_true on the same device; ``vs first``: to the first device."""
    for case, rows in comparison.data.groupby("case", sort=False):
        priced = bool(rows["price_per_hour"].notna().any())
        title = f"[bold]{escape(printable(case))}[/] · {rows['column'].iloc[0]}"
        table = Table(title=title, title_justify="left", title_style="", header_style="dim", box=None, pad_edge=False)
        table.add_column("configuration", no_wrap=True, overflow="ellipsis", max_width=28)
        for head in ("state", "vs fp32", "vs first", "MFU", "memory", *(["cost/M"] if priced else [])):
            table.add_column(head, justify="right", no_wrap=True)
        for config, cells in rows.groupby("dtype_config", sort=False):
            table.add_row(escape(printable(config)))
            for cell in cells.to_dict("records"):
                table.add_row(f"  {escape(printable(cell['device']))}", *_cells(cell, priced))
        console.print(table)
        console.print()
    if comparison.data["price_per_hour"].notna().any():
        words = f"cost/M: {comparison.currency or 'price'} per million samples; per 10^9 real tokens: see --json"
        console.print(words, style="dim", markup=False)
    if comparison.differences:
        console.print("[bold]not the same on every device[/]")
    for line in comparison.differences:
        console.print(f"  {printable(line)}", markup=False)
    for note in comparison.notes:
        console.print(printable(note), style="dim", markup=False)


def _cells(cell: dict, priced: bool) -> list[str]:
    state = cell["line1"] if cell["state"] == "diverged" else WORDS.get(cell["state"], cell["state"])
    numbers = [
        _known(cell["relative"], "{:.2f}x"),
        _known(cell["over_first"], "{:.2f}x"),
        _known(100 * cell["mfu"], "{:.0f} %"),
        NOTHING if math.isnan(cell["peak_bytes"]) else gigabytes(cell["peak_bytes"]),
    ]
    if priced:
        numbers.append(NOTHING if math.isnan(cell["cost_per_million_samples"]) else plain(cell["cost_per_million_samples"]))
    return [f"[{STYLES.get(cell['state'], 'default')}]{escape(state)}[/]", *numbers]


def _known(value: float, form: str) -> str:
    return NOTHING if math.isnan(value) else form.format(value)
