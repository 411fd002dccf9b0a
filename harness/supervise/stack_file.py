"""Where a run's process writes its stacks when it dies or is asked to: a temporary file of its supervisor's. It works
when the interpreter's lock is held and when the process has crashed, and touches no results folder. Torch-free."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
from pathlib import Path

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
