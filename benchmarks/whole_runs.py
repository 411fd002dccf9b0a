"""Whole commands as processes of their own: ``--help`` against torch's import, one tiny run broken down, the tiny matrix of
6 cases x 7 configurations.

Linux counts into a process's peak what its parent held when it was started. So a command is not started from here, where
torch may be loaded, but from a launcher: a bare interpreter of some MB that starts it, waits, and reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from harness.figures import Figure, summarize

ROOT = Path(__file__).resolve().parents[1]
"""Where ``python -m harness`` finds the package, installed or not."""

LAUNCHER = """
import os, sys, time
started = time.perf_counter()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as report:
    print([time.perf_counter() - started, os.waitstatus_to_exitcode(status),
           usage.ru_maxrss, usage.ru_utime + usage.ru_stime], file=report)
"""


class ChildFailed(RuntimeError):
    """A measured command that ended badly; the message ends with its standard error."""


@dataclass(frozen=True)
class Finished:
    """``peak_rss_bytes``: the largest resident set of any single process of the command's tree that
    was waited for (``wait4``), not their sum. ``cpu_s``: processor time of that whole tree, which other
    work on the machine lengthens less than the wall time."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    stdout: str


def run_python(*arguments: str) -> Finished:
    """Run ``python arguments`` and wait; raises `ChildFailed` when its exit code is not 0."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, str(report), sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        printed = done.stderr.decode(errors="replace").strip()[-600:]
        if not report.exists():
            raise ChildFailed(f"python {' '.join(arguments)} could not be measured: {printed}")
        wall_s, code, peak_kib, cpu_s = json.loads(report.read_text())
    if code != 0:
        raise ChildFailed(f"python {' '.join(arguments)} ended with exit code {code}: {printed}")
    return Finished(wall_s, cpu_s, peak_kib * 1024, done.stdout.decode(errors="replace"))


TARGET_RATIO = 0.15
HEAVY = ("torch", "numpy")
PROBE = f"""
import runpy, sys
sys.argv = ["harness", "--help"]
try:
    runpy.run_module("harness", run_name="__main__")
except SystemExit:
    pass
print("\\nheavy:", *[name for name in {HEAVY!r} if name in sys.modules])
"""


def measure_help(repeats: int) -> list[Figure]:
    """Interleaved, each a fresh process; the first pair warms the disk cache and is not counted."""
    helps_s, imports_s = [], []
    for repeat in range(repeats + 1):
        help_s = run_python("-m", "harness", "--help").wall_s
        import_s = run_python("-c", "import torch").wall_s
        if repeat:
            helps_s.append(help_s)
            imports_s.append(import_s)
    heavy = heavy_imports()
    ratios = [one / other for one, other in zip(helps_s, imports_s, strict=True)]
    return [
        summarize("help", "help_s", helps_s, "s", note="python -m harness --help"),
        summarize("help", "import_torch_s", imports_s, "s", note="python -c 'import torch'"),
        summarize("help", "help_over_import_torch", ratios, "ratio", at_most=TARGET_RATIO, note="per pair"),
        summarize(
            "help",
            "heavy_imports",
            [len(heavy)],
            "count",
            at_most=0,
            note=f"of {', '.join(HEAVY)}: {', '.join(heavy) or 'none'}",
        ),
    ]


def heavy_imports() -> list[str]:
    """Which of `HEAVY` a process holds after ``--help``."""
    last = run_python("-c", PROBE).stdout.rstrip("\n").rpartition("\n")[2]
    if not last.startswith("heavy:"):
        raise ChildFailed(f"--help did not end as expected: {last!r}")
    return last.removeprefix("heavy:").split()


RUN_TARGET_WALL_S = 12.0
TARGET_PEAK_RSS_BYTES = 1.5e9
RUN_COMMAND = ("case", "gpt2_multi_cls", "amp_fp16", "--preset", "tiny", "--data", "embedded", "--device", "cpu")
PARTS = ("data", "model", "steps", "evaluation")


def measure_run(repeats: int) -> list[Figure]:
    """The first run fills the data cache where it is empty, and counts as the others do."""
    runs = [one_run() for _ in range(repeats)]
    command = " ".join(RUN_COMMAND)
    figures = [
        summarize("run", f"{part}_s", [run[f"{part}_s"] for run in runs], "s", note=note)
        for part, note in (
            ("startup", "interpreter, imports, and what the parts leave over"),
            ("data", "from the record"),
            ("model", "from the record"),
            ("steps", "from the record"),
            ("evaluation", "from the record"),
        )
    ]
    return [
        *figures,
        summarize("run", "cpu_s", [run["cpu_s"] for run in runs], "s", note="processor time"),
        summarize("run", "wall_s", [run["wall_s"] for run in runs], "s", at_most=RUN_TARGET_WALL_S, note=command),
        summarize(
            "run",
            "peak_rss_bytes",
            [run["peak_rss_bytes"] for run in runs],
            "bytes",
            at_most=TARGET_PEAK_RSS_BYTES,
            note="wait4",
        ),
    ]


def one_run() -> dict[str, float]:
    """Seconds of each part and peak memory of one run into a temporary folder."""
    with tempfile.TemporaryDirectory() as out:
        finished = run_python("-m", "harness", *RUN_COMMAND, "--json", "--out", out)
    record = json.loads(finished.stdout)
    if record["status"] != "completed":
        raise ChildFailed(f"the measured run ended {record['status']}: {record['error']}")
    return break_down(record["flags"]["timings_s"], finished.wall_s) | {
        "cpu_s": finished.cpu_s,
        "peak_rss_bytes": finished.peak_rss_bytes,
    }


def break_down(timings_s: dict[str, float], wall_s: float) -> dict[str, float]:
    """Parts that add up to the wall time; start-up is what the record's parts leave over, so that
    nothing is counted twice and nothing is lost."""
    parts = {f"{part}_s": timings_s[part] for part in PARTS}
    return {"startup_s": wall_s - sum(parts.values()), **parts, "wall_s": wall_s}


MATRIX_TARGET_WALL_S = 200.0
RUNS = 42
MATRIX_COMMAND = ("matrix", "--preset", "tiny", "--data", "embedded", "--device", "cpu", "--no-follow-up")


def measure_matrix(repeats: int) -> list[Figure]:
    """``repeats`` whole matrices, each into a folder of its own."""
    runs, rows = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as out:
            runs.append(run_python("-m", "harness", *MATRIX_COMMAND, "--out", out))
            rows.append(statuses(Path(out) / "results.jsonl"))
    ended = [f"{count} {status}" for status, count in sorted(rows[-1].items())]
    return [
        summarize(
            "matrix", "wall_s", [run.wall_s for run in runs], "s", at_most=MATRIX_TARGET_WALL_S, note=" ".join(MATRIX_COMMAND)
        ),
        summarize("matrix", "rows", [sum(counts.values()) for counts in rows], "count", at_least=RUNS, note=", ".join(ended)),
    ]


def statuses(results: Path) -> Counter[str]:
    """How many rows of an index ended in each status."""
    with results.open(encoding="utf-8") as lines:
        return Counter(json.loads(line)["status"] for line in lines)
