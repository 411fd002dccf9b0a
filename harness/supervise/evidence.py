"""What can be learnt about a process from outside: its memory, its last output, and the kernel's count of out-of-memory kills.
Torch-free. What cannot be read is None."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
VMSTAT = Path("/proc/vmstat")
TAIL_BYTES = 64 * 1024


class OomKills:
    """How many out-of-memory kills the kernel has counted since this object was made. The nearest control group that
    counts one is named; the whole machine's count comes last."""

    def __init__(self, counters: Sequence[Path] | None = None) -> None:
        self._before = {
            path: count
            for path in (oom_counters() if counters is None else counters)
            if (count := read_count(path)) is not None
        }

    def risen(self) -> tuple[int | None, str | None]:
        """(how many, the file that says so); (0, None), and (None, None) where nothing can be read."""
        for path, before in self._before.items():
            now = read_count(path)
            if now is not None and now > before:
                return now - before, str(path)
        return (0 if self._before else None), None


def oom_counters() -> list[Path]:
    """The files with a count of out-of-memory kills, this process' control group first."""
    return [*(folder / name for folder in memory_groups() for name in ("memory.events", "memory.oom_control")), VMSTAT]


def memory_groups() -> list[Path]:
    """The folders of this process' control groups for memory (v2 or v1), innermost first."""
    found: list[Path] = []
    for line in (_text(Path("/proc/self/cgroup")) or "").splitlines():
        number, kinds, path = line.split(":", 2)
        if number == "0" or "memory" in kinds.split(","):
            root = CGROUP_ROOT if number == "0" else CGROUP_ROOT / "memory"
            inner = root / path.strip("/")
            found += [folder for folder in (inner, *inner.parents) if folder == root or folder.is_relative_to(root)]
    return list(dict.fromkeys(found))


def memory_limit_bytes() -> int | None:
    """The tightest limit of this process' control groups."""
    texts = [_text(folder / name) for folder in memory_groups() for name in ("memory.max", "memory.limit_in_bytes")]
    limits = [int(text) for text in texts if text and text.strip().isdecimal()]
    return min((limit for limit in limits if limit < 1 << 60), default=None)  # v1 says "none" by a huge number


def read_count(path: Path) -> int | None:
    """The ``oom_kill`` line of a file."""
    found = re.search(r"^oom_kill (\d+)$", _text(path) or "", re.MULTILINE)
    return int(found[1]) if found else None


def resident_bytes(pid: int) -> tuple[int | None, int | None]:
    """(memory now, its peak so far) of a living process."""
    text = _text(Path(f"/proc/{pid}/status")) or ""
    now, peak = (re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE) for name in ("VmRSS", "VmHWM"))
    return int(now[1]) * 1024 if now else None, int(peak[1]) * 1024 if peak else None


def is_stopped(pid: int) -> bool:
    """Whether a process stands still on a signal (SIGSTOP, a debugger)."""
    return re.search(r"^State:\s+[Tt]", _text(Path(f"/proc/{pid}/status")) or "", re.MULTILINE) is not None


def tail(path: Path) -> str:
    """The end of a file; empty where there is none, and for a link."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return ""
    with open(fd, "rb") as file:
        size_bytes = os.fstat(fd).st_size
        return os.pread(file.fileno(), TAIL_BYTES, max(0, size_bytes - TAIL_BYTES)).decode(errors="replace")


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
