"""``python -m benchmarks report``: 126 simulated runs x 1,000 steps, and what a dossier of them costs.

Every arm is a fresh process, whose wall time and memory are measured. The arms alternate within each repetition, so that a
busy minute hits all of them. Ratios are taken within a repetition.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

from benchmarks.simulated_results import simulate

ROOT = Path(__file__).resolve().parents[1]
LOOK_EVERY_S = 0.05


class BenchFailed(RuntimeError):
    """A measured command ended with an error; carries the end of its standard error."""


@dataclass(frozen=True)
class Spent:
    """``peak_bytes``: the largest sum over the process and its children of memory that is theirs
    (proportional set size: pages that forked workers share count once), looked at every 50 ms."""

    wall_s: float
    peak_bytes: int


def spend(*arguments: str) -> Spent:
    """Run ``python ARGUMENTS`` to its end; raises `BenchFailed` when it does not exit with 0."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "MPLBACKEND": "Agg",
    }
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    peak_bytes = 0
    while child.poll() is None:
        peak_bytes = max(peak_bytes, _tree_bytes(child.pid))
        time.sleep(LOOK_EVERY_S)
    wall_s = time.perf_counter() - began
    stderr = child.stderr.read().decode(errors="replace")
    if child.returncode:
        raise BenchFailed(f"{' '.join(arguments[:3])} ended with {child.returncode}: {stderr.strip()[-300:]}")
    return Spent(wall_s, peak_bytes)


def _tree_bytes(pid: int) -> int:
    """Proportional memory of a process and its descendants; those that are gone count nothing."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            memory = process.memory_full_info()
            total += getattr(memory, "pss", 0) or memory.uss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass
    return total


STEPS, MORE = 1_000, 10
PLAIN = (str(ROOT / "benchmarks" / "plain_script.py"),)
EIGHT = (
    "-c",
    """import sys
from pathlib import Path
from instrument.results.contents import load
from report.plots.draw import draw_all
from report.tables import all_tables
draw_all(all_tables(load(Path(sys.argv[1]))), Path(sys.argv[2]), ("svg", "png"), 300, lambda letter: None)""",
)
"""The figures A to H and their CSV alone, without verdicts and page: what the plain script is compared with."""


@dataclass(frozen=True)
class Measured:
    """One figure over ``n`` repetitions, in ``unit`` (``s``, ``bytes``, ``ratio``), with its target."""

    name: str
    unit: str
    n: int
    median: float
    least: float
    most: float
    at_most: float | None

    @property
    def met(self) -> bool | None:
        return None if self.at_most is None else self.median <= self.at_most


def measured(name: str, unit: str, values: list[float], at_most: float | None) -> Measured:
    """A figure from its repetitions."""
    return Measured(name, unit, len(values), median(values), min(values), max(values), at_most)


def bench_command(repeats: int, as_json: bool) -> int:
    """Measure, print a table on standard error, and as JSON the rows on standard output. A missed target is a result: the
    exit code is 0."""
    with tempfile.TemporaryDirectory(prefix="report-bench-") as place:
        rows = measure(Path(place), repeats)
    show(rows)
    if as_json:
        json.dump({"schema": 1, "rows": [asdict(row) | {"met": row.met} for row in rows]}, sys.stdout)
        sys.stdout.write("\n")
    return 0


def measure(place: Path, repeats: int, *, seeds: int = 3, steps: int = STEPS) -> list[Measured]:
    """All figures; ``place`` is an empty folder that takes the simulated runs and what is built of them."""
    once, tenfold = place / "once", place / "tenfold"
    _progress(f"simulating {42 * seeds} runs x {steps:,} and x {MORE * steps:,} steps")
    simulate(once, seeds=seeds, steps=steps)
    simulate(tenfold, seeds=seeds, steps=MORE * steps)
    page, full, eight, plain, larger = [], [], [], [], []
    for number in range(1, repeats + 1):
        _progress(f"repetition {number} of {repeats}")
        page.append(_built(once, place / "page", "--no-pdf"))
        plain.append(spend(*PLAIN, str(once), str(place / "plain")))
        eight.append(spend(*EIGHT, str(once), str(place / "eight")))
        full.append(_built(once, place / "full"))
        larger.append(_built(tenfold, place / "larger", "--no-pdf"))
    size_bytes = (place / "page" / "dossier" / "index.html").stat().st_size
    return [
        measured("HTML", "s", [arm.wall_s for arm in page], 15.0),
        measured("HTML, memory", "bytes", [float(arm.peak_bytes) for arm in page], 600e6),
        measured("HTML, size", "bytes", [float(size_bytes)], 6e6),
        measured(
            "PDF besides", "s", [with_pdf.wall_s - without.wall_s for with_pdf, without in zip(full, page, strict=True)], 10.0
        ),
        measured("10x the rows", "ratio", _ratios(larger, page), 11.0),
        measured("8 figures / plain script", "ratio", _ratios(eight, plain), 0.3),
        measured("dossier / plain script", "ratio", _ratios(page, plain), None),
        measured("plain script", "s", [arm.wall_s for arm in plain], None),
    ]


def _built(folder: Path, out: Path, *options: str) -> Spent:
    return spend("-m", "report", "build", str(folder), "--out", str(out), *options)


def _ratios(ours: list[Spent], theirs: list[Spent]) -> list[float]:
    return [a.wall_s / b.wall_s for a, b in zip(ours, theirs, strict=True)]


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def show(rows: list[Measured]) -> None:
    """The rows as a table on standard error."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Report, 126 simulated runs x 1,000 steps", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("figure", "median, range", "n", "target", ""):
        table.add_column(Text(name), justify="left" if name in ("figure", "") else "right", no_wrap=True)
    for row in rows:
        bounded = row.at_most is not None
        spread = f", {_with_unit(row.least, row.unit)} to {_with_unit(row.most, row.unit)}" if row.n > 1 else ""
        table.add_row(
            row.name,
            _with_unit(row.median, row.unit) + spread,
            str(row.n),
            f"≤ {_with_unit(row.at_most, row.unit)}" if bounded else "",
            ("met" if row.met else "missed") if bounded else "",
        )
    Console(stderr=True, highlight=False).print(table)


def _with_unit(value: float, unit: str) -> str:
    return {"s": f"{value:.1f} s", "bytes": f"{value / 1e6:,.0f} MB", "ratio": f"{value:.2f}x"}[unit]
