"""A command run as a process of its own: its wall time and its peak memory.

Linux counts into a process's peak what its parent held when it was started. So the command is not
started from here, where torch may be loaded, but from a launcher: a bare interpreter of some MB that
starts it, waits, and reports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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
    """A measured command that ended badly; the message holds the end of what it said."""


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
        said = done.stderr.decode(errors="replace").strip()[-600:]
        if not report.exists():
            raise ChildFailed(f"python {' '.join(arguments)} could not be measured: {said}")
        wall_s, code, peak_kib, cpu_s = json.loads(report.read_text())
    if code != 0:
        raise ChildFailed(f"python {' '.join(arguments)} ended with exit code {code}: {said}")
    return Finished(wall_s, cpu_s, peak_kib * 1024, done.stdout.decode(errors="replace"))
