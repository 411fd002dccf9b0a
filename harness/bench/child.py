"""A command run as a process of its own: its wall time and the peak memory of it and its children."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Where ``python -m harness`` finds the package, installed or not."""


class ChildFailed(RuntimeError):
    """A measured command that ended badly; the message holds the end of what it said."""


@dataclass(frozen=True)
class Finished:
    """``peak_rss_bytes``: the largest resident set of any single process of the command's tree that
    was waited for (``wait4``), not their sum."""

    wall_s: float
    peak_rss_bytes: int
    stdout: str


def run_python(*arguments: str, allowed_codes: tuple[int, ...] = (0,)) -> Finished:
    """Run ``python arguments`` and wait; raises `ChildFailed` on another exit code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        child = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                 env=environment)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
        wall_s = time.perf_counter() - started
        child.returncode = code = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
        out.seek(0)
        err.seek(0)
        if code not in allowed_codes:
            tail = err.read().decode(errors="replace").strip()[-600:]
            raise ChildFailed(f"python {' '.join(arguments)} ended with exit code {code}: {tail}")
        return Finished(wall_s, usage.ru_maxrss * 1024, out.read().decode(errors="replace"))
