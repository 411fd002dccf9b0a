"""Benchmark figures for a person, on standard error."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from harness.bench.figure import Figure
from instrument.count import count

CONSOLE = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 180)


def show_machine(machine: dict[str, object], repeats: int | None) -> None:
    """One line: where, under which load, and how often where something is timed."""
    timed = "" if repeats is None else f"; {count(repeats, 'repetition')}; 95 %: t-interval of the mean"
    CONSOLE.print(
        f"{machine['cpu']}, {count(machine['usable_cores'], 'core')}, {machine['memory_bytes'] / 1e9:.1f} GB, "
        f"torch {machine['torch']}; load {machine['load_1min']:.1f} before the start{timed}"
    )


def show(name: str, figures: list[Figure]) -> None:
    """One benchmark's table."""
    table = Table(title=f"bench {name}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("figure", "median", "min", "max", "95 %", "target", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right", no_wrap=column != "")
    for figure in figures:
        table.add_row(*cells(figure))
    CONSOLE.print(table)
    CONSOLE.print()


def cells(figure: Figure) -> list[str]:
    """A table row: name, median, min, max, interval, target, verdict and note."""

    def text(value: float) -> str:
        return spelled(value, figure.unit)

    interval = "-" if figure.low95 is None else f"{text(figure.low95)} .. {text(figure.high95)}"
    target = "-"
    if figure.at_most is not None:
        target = f"<= {text(figure.at_most)}"
    elif figure.at_least is not None:
        target = f">= {text(figure.at_least)}"
    verdict = {None: "", True: "[green]met[/]  ", False: "[red]missed[/]  "}[figure.met]
    return [
        figure.name,
        text(figure.median),
        text(figure.minimum),
        text(figure.maximum),
        interval,
        target,
        verdict + figure.note.replace("[", r"\["),
    ]


def spelled(value: float, unit: str) -> str:
    """A value with its unit: the only place where bytes become GB."""
    if unit == "bytes":
        return f"{value / 1e9:.3f} GB"
    if unit == "us":
        return f"{value:.1f} us"
    if unit == "count":
        return f"{value:g}"
    return f"{value:.3f}" + ("" if unit == "ratio" else f" {unit}")
