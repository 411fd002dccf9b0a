"""The signs of life of a run's main thread: where it is, told to its supervisor about once a second. Torch-free.

Where a run's process writes its stacks when it dies or is asked to: a temporary file of its supervisor's. It works
when the interpreter's lock is held and when the process has crashed, and touches no results folder. Torch-free.
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

from harness.supervisor.failure import failure_of
from instrument.results.schemas import RunRecord, encode

SECONDS_BETWEEN_BEATS = 1.0
OPEN = "opening"
"""The phase from which on the run's files are this attempt's own."""
PHASES = ("starting", "data", "build", OPEN, "evaluation", "counting", "training", "checkpoint", "forensics", "closing")


@dataclass(frozen=True)
class Heartbeat:
    """The main thread was in ``phase``, behind ``steps_done`` steps."""

    phase: str
    steps_done: int


@dataclass(frozen=True)
class Draft:
    """The run's row as far as it is known (an encoded `RunRecord`), for the case that no better one is written, and the
    results folder it belongs to."""

    row: bytes
    out: str


class HeartbeatSender:
    """``say`` takes a message to the supervisor; without one nothing is told, at no cost."""

    def __init__(self, say: Callable[[object], None] | None = None) -> None:
        self._say = say
        self._phase, self._steps_done = PHASES[0], 0
        self._due_s, self._stepped = 0.0, False
        self.device: str | None = None
        """The run's, once it is known."""

    def at(self, phase: str, steps_done: int | None = None) -> None:
        """The run enters a phase; told at once, so that the supervisor knows which one ended it."""
        if phase != self._phase:
            self._phase, self._due_s = phase, 0.0
        self.beat(steps_done)

    def beat(self, steps_done: int | None = None) -> None:
        """The main thread is alive."""
        if steps_done is not None:
            if self._phase == "training" and steps_done > self._steps_done and not self._stepped:
                self._stepped, self._due_s = True, 0.0  # from here on a hang is noticed sooner
            self._steps_done = steps_done
        if self._say is None or (now_s := time.monotonic()) < self._due_s:
            return
        self._due_s = now_s + SECONDS_BETWEEN_BEATS
        self._say(Heartbeat(self._phase, self._steps_done))

    def fault(self, error: Exception) -> None:
        """Tell what ended the run where it could not write its row itself."""
        if self._say is not None:
            self._say(failure_of(error, self.device))

    def draft(self, row: Callable[[], RunRecord], out: object) -> None:
        """Leave a row with the supervisor."""
        if self._say is not None:
            self._say(Draft(encode(row()), str(out)))


ASK = signal.SIGUSR1
"""Asks a run's process for the stacks of all its threads; it goes on behind that."""
MOST_BYTES = 64 * 1024


class StackFile:
    """The supervisor's end. The process opens ``path`` and takes the name away, so nothing is left of it."""

    def __init__(self) -> None:
        fd, name = tempfile.mkstemp(prefix="ddb-stack-")
        self.path, self._fd = Path(name), fd

    def text(self) -> str:
        """What the process has written."""
        return os.pread(self._fd, MOST_BYTES, 0).decode(errors="replace")

    def close(self) -> None:
        """Remove it."""
        self.path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def write_stacks_to(path: Path) -> None:
    """In the run's process: on a crash, and whenever `ASK` comes."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    path.unlink(missing_ok=True)
    faulthandler.enable(file=fd, all_threads=True)
    faulthandler.register(ASK, file=fd, all_threads=True, chain=False)
