"""A benchmark's figure: its repetitions summarised, its target, whether that is met, and where it was measured; shown as a
table on standard error.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev

from instrument.terminal import count, plain_table, rich_console


@dataclass(frozen=True)
class Figure:
    """``n`` repetitions of one quantity in ``unit`` (``s``, ``us``, ``bytes``, ``ratio``, ``steps/s``, ``count``).

    ``low95`` and ``high95``: t-interval of the mean, null for fewer than two repetitions. A target
    is ``at_most`` or ``at_least``; ``met`` compares the median with it, null without a target.
    """

    bench: str
    name: str
    unit: str
    n: int
    median: float
    minimum: float
    maximum: float
    mean: float
    low95: float | None
    high95: float | None
    at_most: float | None
    at_least: float | None
    note: str

    @property
    def met(self) -> bool | None:
        if self.at_most is not None:
            return self.median <= self.at_most
        if self.at_least is not None:
            return self.median >= self.at_least
        return None

    def as_row(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return {**asdict(self), "met": self.met}


def summarize(
    bench: str,
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    note: str = "",
) -> Figure:
    """A figure from its repetitions; raises ValueError when there are none."""
    if not values:
        raise ValueError(f"{bench} {name}: nothing was measured")
    mean, half = fmean(values), half_width_95(values)
    interval = (None, None) if half is None else (mean - half, mean + half)
    middle = median(values), min(values), max(values), mean
    return Figure(bench, name, unit, len(values), *middle, *interval, at_most, at_least, note)


def half_width_95(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % t-interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))


CONSOLE = rich_console(stderr=True, width=None if sys.stderr.isatty() else 180)


def machine() -> dict[str, object]:
    """Where figures hold: processor, usable cores, memory, load before the start, versions."""
    import psutil

    from instrument.environment import cpu_name, version

    return {
        "cpu": cpu_name(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


def show_machine(machine: dict[str, object], repeats: int | None) -> None:
    """One line: where, under which load, and how often where something is timed."""
    timed = "" if repeats is None else f"; {count(repeats, 'repetition')}; 95 %: t-interval of the mean"
    CONSOLE.print(
        f"{machine['cpu']}, {count(machine['usable_cores'], 'core')}, {machine['memory_bytes'] / 1e9:.1f} GB, "
        f"torch {machine['torch']}; load {machine['load_1min']:.1f} before the start{timed}"
    )


def show(name: str, figures: list[Figure]) -> None:
    """One benchmark's table."""
    numbers = ("median", "min", "max", "95 %", "target")
    table = plain_table("figure", *numbers, "", right=numbers, fold=("",), title=f"bench {name}")
    for figure in figures:
        table.add_row(*cells(figure))
    CONSOLE.print(table)
    CONSOLE.print()


def cells(figure: Figure) -> list[str]:
    """A table row: name, median, min, max, interval, target, verdict and note."""

    def text(value: float) -> str:
        return spelled(value, figure.unit)

    interval = "-" if figure.low95 is None else f"{text(figure.low95)} .. {text(figure.high95)}"
    targets = {"<=": figure.at_most, ">=": figure.at_least}
    target = next((f"{sign} {text(value)}" for sign, value in targets.items() if value is not None), "-")
    verdict = {None: "", True: "[green]met[/]  ", False: "[red]missed[/]  "}[figure.met]
    spread = map(text, (figure.median, figure.minimum, figure.maximum))
    return [figure.name, *spread, interval, target, verdict + figure.note.replace("[", r"\[")]


def spelled(value: float, unit: str) -> str:
    """A value with its unit: the only place where bytes become GB."""
    if unit == "bytes":
        return f"{value / 1e9:.3f} GB"
    if unit == "us":
        return f"{value:.1f} us"
    if unit == "count":
        return f"{value:g}"
    return f"{value:.3f}" + ("" if unit == "ratio" else f" {unit}")
