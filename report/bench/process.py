"""One command in a fresh process: how long it took, and how much memory its processes held together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
LOOK_EVERY_S = 0.05


class BenchFailed(RuntimeError):
    """A measured command ended with an error; carries the end of what it said."""


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
    told = child.stderr.read().decode(errors="replace")
    if child.returncode:
        raise BenchFailed(f"{' '.join(arguments[:3])} ended with {child.returncode}: {told.strip()[-300:]}")
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
