"""Monitors one child process: its heartbeats, its memory, and when it hangs. Torch-free; nothing here waits.

A run that hangs is asked for its stacks, then to end (SIGTERM: it may still write a checkpoint), and killed after a grace
period, which works with the interpreter's lock held, SIGTERM ignored or the process stopped. When the process has ended,
`failure` says why, from what was seen from outside: its memory, its last output, the kernel's count of out-of-memory kills.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness.failure import Evidence, Failure, of_exit, of_hang
from harness.run.heartbeat import OPENING, RUN_PHASES, STACKS_SIGNAL, Heartbeat, StackFile

HANG_AFTER_S = 900.0
PROBE_EVERY_S = 1.0
UNKILLABLE_AFTER_S = 30.0
"""A process that SIGKILL does not end waits in the kernel (for a driver or a disk), and nobody can end it."""
SUPERVISOR_ASLEEP_S = 10.0
"""Looks that are further apart than this: the supervisor itself slept (Ctrl-Z, a suspended machine) and received nothing."""


@dataclass(frozen=True)
class Rules:
    """When a run counts as hung (0: never), how long it may take to end after SIGTERM, and where the kernel counts its
    out-of-memory kills (None: the places of this machine). ``starting_factor``: until its first step is done, a run may
    download, compile and allocate in silence for that many times longer. ``patience_factor``: from then on it may always be
    silent for that many times its longest silence so far. ``heartbeats``: whether the process sends any."""

    hang_after_s: float = HANG_AFTER_S
    starting_factor: float = 4.0
    patience_factor: float = 4.0
    grace_s: float = 30.0
    for_stacks_s: float = 1.0
    oom_counters: Sequence[Path] | None = None
    heartbeats: bool = True

    @classmethod
    def asked(cls, hang_after_s: float) -> Rules:
        """As ``--hang-after`` has it. The grace period never exceeds the hang timeout."""
        return cls(hang_after_s=hang_after_s, grace_s=min(cls.grace_s, hang_after_s))


class ProcessMonitor:
    """Of the process ``pid``: call `alive` for its messages and `look` often; when it has ended, ask for its `failure`."""

    def __init__(self, rules: Rules, clock: Callable[[], float] = time.monotonic) -> None:
        self.rules, self._clock = rules, clock
        self.pid: int | None = None
        self.leads_group = False
        """Whether it leads a process group of its own, which is killed as a whole."""
        self.last = Heartbeat(RUN_PHASES[0], 0)
        self.opened = False
        """Whether it has begun to write the run's files."""
        self.hung = False
        self._oom_kills = OomKills(rules.oom_counters)
        self._rss_bytes: int | None = None
        self._peak_rss_bytes: int | None = None
        self._trained = False
        self._opened_after = 0
        self._alive_s = self._looked_s = self._memory_due_s = clock()
        self._due: list[tuple[float, int]] = []
        """Signals that end it: when, and which."""
        self._sent: list[str] = []
        self._killed_s: float | None = None
        self._silent_s = self._longest_s = 0.0
        self._limit_s = 0.0
        self._was_stopped = False

    @cached_property
    def stacks(self) -> StackFile:
        """Where the process writes its stacks, if it is given the path; first asked for before the process is started."""
        return StackFile()

    def begin(self, pid: int) -> None:
        """The process was started."""
        self.pid = pid
        self._alive_s = self._looked_s = self._clock()

    def alive(self, heartbeat: Heartbeat | None = None) -> None:
        """It sent something; ``heartbeat`` says where it is."""
        now_s = self._notice_sleep()
        if self._trained:
            self._longest_s = max(self._longest_s, now_s - self._alive_s)
        self._alive_s = now_s
        if heartbeat is not None:
            if not self.opened and RUN_PHASES.index(heartbeat.phase) >= RUN_PHASES.index(OPENING):
                self.opened, self._opened_after = True, heartbeat.steps_done
            self._trained |= self.opened and heartbeat.steps_done > self._opened_after
            self.last = heartbeat

    @property
    def given_up(self) -> bool:
        """Whether it outlived SIGKILL: no use to wait for its end."""
        return self._killed_s is not None and self._clock() - self._killed_s > UNKILLABLE_AFTER_S

    @property
    def limit_s(self) -> float:
        """How long it may be silent now; 0: for ever. A run whose steps take minutes is not hung in every one of them."""
        if not self._trained or not self.rules.hang_after_s:
            return self.rules.hang_after_s * self.rules.starting_factor
        return max(self.rules.hang_after_s, self._longest_s * self.rules.patience_factor)

    def look(self) -> None:
        """Read its memory once a second, notice that it hangs, and send the signals that are due."""
        now_s = self._notice_sleep()
        if self.pid is None:
            return
        if now_s >= self._memory_due_s:
            self._memory_due_s = now_s + PROBE_EVERY_S
            rss_bytes, peak_bytes = resident_bytes(self.pid)
            self._rss_bytes = rss_bytes or self._rss_bytes  # of a process that is gone there is nothing to read
            self._peak_rss_bytes = peak_bytes or self._peak_rss_bytes
        if not self.hung and self.limit_s and now_s - self._alive_s > self.limit_s:
            self.hung, self._limit_s = True, self.limit_s
            self._silent_s, self._was_stopped = now_s - self._alive_s, is_stopped(self.pid)
            self._due = [(now_s, STACKS_SIGNAL)]
            self.end(self.rules.grace_s, after_s=self.rules.for_stacks_s)
        while self._due and now_s >= self._due[0][0]:
            _, number = self._due.pop(0)
            self.send(number)
            self._sent.append(signal.Signals(number).name)
            self._killed_s = now_s if number == signal.SIGKILL else None

    def end(self, grace_s: float, after_s: float = 0.0) -> None:
        """Ask it to end (SIGTERM) ``after_s`` seconds from now, and kill it ``grace_s`` later; `look` does both."""
        asked_s = self._clock() + after_s
        self._due += [(asked_s, signal.SIGTERM), (asked_s + grace_s, signal.SIGKILL)]

    def _notice_sleep(self) -> float:
        """The time now; a silence while the supervisor itself slept does not count."""
        now_s = self._clock()
        if now_s - self._looked_s > SUPERVISOR_ASLEEP_S:
            self._alive_s += now_s - self._looked_s
        self._looked_s = now_s
        return now_s

    def send(self, number: int) -> None:
        """Send a signal to the process, SIGKILL to its whole group, if it is still there."""
        if self.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                (os.killpg if self.leads_group and number == signal.SIGKILL else os.kill)(self.pid, number)

    def failure(self, exit_code: int | None, steps_done: int, output: Path | None = None) -> Failure:
        """Why the process ended, which reported nothing. ``steps_done`` as its log has it, ``output`` is where it wrote."""
        if self.hung:
            return self.hang(steps_done)
        return of_exit(exit_code, self._evidence(steps_done, tail(output) if output else ""))

    def hang(self, steps_done: int | None = None) -> Failure:
        """Why a hung run was ended, whatever it still wrote. ``steps_done``: None for those of its last heartbeat."""
        evidence = self._evidence(self.last.steps_done if steps_done is None else steps_done)
        ended_by = next((name for name in reversed(self._sent) if name != STACKS_SIGNAL.name), "itself")
        return of_hang(evidence, self._limit_s, ended_by + (" (the process was stopped)" if self._was_stopped else ""))

    def _evidence(self, steps_done: int, output: str = "") -> Evidence:
        kills, counter = self._oom_kills.risen()
        return Evidence(
            phase=self.last.phase if self.rules.heartbeats else None,
            steps_done=steps_done,
            heartbeat_age_s=self._silent_s or self._clock() - self._alive_s,
            rss_bytes=self._rss_bytes,
            peak_rss_bytes=self._peak_rss_bytes,
            memory_limit_bytes=memory_limit_bytes(),
            oom_kills=kills,
            oom_counter=counter,
            stack=self.stacks.text(),
            output=output,
        )

    def close(self) -> None:
        """The process is gone."""
        if "stacks" in self.__dict__:
            self.stacks.close()


# -- what can be seen of a process from outside; None where it cannot be read -----------------

CGROUP_ROOT = Path("/sys/fs/cgroup")
VMSTAT = Path("/proc/vmstat")
TAIL_BYTES = 64 * 1024


class OomKills:
    """How many out-of-memory kills the kernel has counted since this object was made. The nearest control group that
    counts one is named; the whole machine's count comes last."""

    def __init__(self, counters: Sequence[Path] | None = None) -> None:
        counts = {path: read_count(path) for path in (oom_counters() if counters is None else counters)}
        self._before = {path: count for path, count in counts.items() if count is not None}

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
