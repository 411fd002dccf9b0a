"""What a run's process tells its supervisor: about once a second where its main thread is, early on a draft of its row, and its
stacks when it crashes or is asked for them. Torch-free.

Stacks go through a temporary file of the supervisor's, which works while the interpreter's lock is held and after a crash.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.failure import failure_of
from instrument.results.schemas import RunRecord, encode

PERIOD_S = 1.0
OPENING = "opening"
"""From this phase on the run's files are this process' own."""
RUN_PHASES = ("starting", "data", "build", OPENING, "evaluation", "counting", "training", "checkpoint", "forensics", "closing")


@dataclass(frozen=True)
class Heartbeat:
    """The main thread is alive, in ``phase`` (one of `RUN_PHASES`), after ``steps_done`` steps."""

    phase: str
    steps_done: int


@dataclass(frozen=True)
class Draft:
    """The run's row as far as it is known (an encoded `RunRecord`), in case the process ends without writing one, and the
    results folder it belongs to."""

    row: bytes
    out: str


class HeartbeatSender:
    """Keeps track of the run's phase, and sends messages with ``send``; without one nothing is sent, at no cost."""

    def __init__(self, send: Callable[[object], None] | None = None) -> None:
        self._send = send
        self.phase, self.steps_done = RUN_PHASES[0], 0
        self.device: str | None = None
        """The run's, once it is known."""
        self._due_s, self._stepped = 0.0, False

    def enter(self, phase: str, steps_done: int | None = None) -> None:
        """The run enters a phase; sent at once, so that the supervisor knows in which one it ended."""
        if phase != self.phase:
            self.phase, self._due_s = phase, 0.0
        self.alive(steps_done)

    def alive(self, steps_done: int | None = None) -> None:
        """The main thread is alive; sent about once a second."""
        if steps_done is not None:
            if self.phase == "training" and steps_done > self.steps_done and not self._stepped:
                self._stepped, self._due_s = True, 0.0  # at once: from here on a hang is noticed sooner
            self.steps_done = steps_done
        if self._send is None or (now_s := time.monotonic()) < self._due_s:
            return
        self._due_s = now_s + PERIOD_S
        self._send(Heartbeat(self.phase, self.steps_done))

    def draft(self, row: Callable[[], RunRecord], out: Path) -> None:
        """Leave a row with the supervisor."""
        if self._send is not None:
            self._send(Draft(encode(row()), str(out)))

    def failed(self, error: Exception) -> None:
        """Send what ended a run that could not write its row itself."""
        if self._send is not None:
            self._send(failure_of(error, self.device, self.phase))


STACKS_SIGNAL = signal.SIGUSR1
"""Asks a run's process for the stacks of all its threads; it continues afterwards."""
MAX_STACK_BYTES = 64 * 1024


class StackFile:
    """The supervisor's end: it stays open when the process has removed the name, so that nothing is left on the disk."""

    def __init__(self) -> None:
        fd, name = tempfile.mkstemp(prefix="ddb-stack-")
        self.path, self._fd = Path(name), fd

    def text(self) -> str:
        """What the process has written."""
        return os.pread(self._fd, MAX_STACK_BYTES, 0).decode(errors="replace")

    def close(self) -> None:
        """Remove it."""
        self.path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_stacks_to(path: Path) -> None:
    """In the run's process: write stacks to a `StackFile` on a crash, and whenever `STACKS_SIGNAL` comes."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    path.unlink(missing_ok=True)
    faulthandler.enable(file=fd, all_threads=True)
    faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True, chain=False)
