"""One stage as a process of its own: its time limit, its end, and what a killed campaign left running."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.run.signals import Stop
from instrument.results.files import make_folder

POLL_S, BEAT_S = 0.1, 5.0
PR_SET_PDEATHSIG = 1
ROOMS = ("harness", "kernels", "report")
PACKAGE = __package__.partition("harness")[0]
"""What stands before a room's name: nothing in a clone, ``ddbench.`` where the wheel is installed."""
"""What a stage runs with ``python -m``."""


@dataclass(frozen=True)
class Ended:
    """``cut``: None, or why it was asked to end: ``limit`` (its own), ``call`` (no minutes left), ``signal``."""

    exit_code: int
    seconds: float
    cut: str | None
    last_words: str


def run(
    module_and_arguments: Sequence[str],
    files: Path,
    *,
    limit_s: float,
    call_s: float,
    grace_s: float,
    stop: Stop,
    beat: Callable[[int, float], None],
    echo: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Run ``python -m ...`` with its standard output in ``files``.out and the rest in ``files``.log (added to).

    It is asked to end (SIGTERM) behind ``limit_s`` or ``call_s`` seconds, whichever comes first, or when ``stop`` is
    requested, and killed with all its processes ``grace_s`` later. ``beat(pid, seconds)`` is called every few seconds,
    ``echo`` with every line of the log.
    """
    make_folder(files.parent)
    out, log = files.with_name(files.name + ".out"), files.with_name(files.name + ".log")
    began_s, cut, asked_s = time.monotonic(), None, None
    with out.open("wb") as output, log.open("ab") as words, log.open("rb") as tail:
        tail.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", PACKAGE + module_and_arguments[0], *module_and_arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=words,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        beat(process.pid, 0.0)
        beaten_s = began_s
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                seconds = time.monotonic() - began_s
                _echo(tail, echo)
                if time.monotonic() - beaten_s > BEAT_S:
                    beaten_s = time.monotonic()
                    beat(process.pid, seconds)
                if cut is None and (cut := _why_cut(seconds, limit_s, call_s, stop)):
                    asked_s = seconds
                    process.terminate()
                elif asked_s is not None and seconds - asked_s > grace_s:
                    break
        finally:
            _kill_group(process.pid)  # what it left behind, too; an error of ours must not leave a GPU busy
            process.wait()
        _echo(tail, echo)
    return Ended(process.returncode, time.monotonic() - began_s, cut, last_line(log))


def _why_cut(seconds: float, limit_s: float, call_s: float, stop: Stop) -> str | None:
    if stop.requested:
        return "signal"
    if seconds > min(limit_s, call_s):
        return "call" if call_s <= limit_s else "limit"
    return None


def end_orphan(pid: int | None, grace_s: float) -> bool:
    """End what a killed call's stage left running: it was told to stop when its parent died (Linux), and is given time
    for its checkpoint. Returns whether there was anything. Another process that came by the same number leads no session of
    its own or runs something else."""
    if pid is None or not _leads_session(pid):
        return False
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        words = process.cmdline()
        if "-m" not in words or words[words.index("-m") + 1].removeprefix(PACKAGE) not in ROOMS:
            return False
        process.terminate()
        psutil.wait_procs([process], timeout=grace_s)
    _kill_group(pid)
    return True


def last_line(log: Path) -> str:
    """The end of what a stage said."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _echo(tail, echo: Callable[[str], None]) -> None:
    """Pass on the lines that are whole."""
    while line := tail.readline():
        if not line.endswith(b"\n"):
            tail.seek(-len(line), os.SEEK_CUR)
            return
        echo(line.decode(errors="replace").rstrip())


def _leads_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end_with_parent() -> None:
    """In the child, before its program: when the campaign is killed, ask to stop. On other systems than Linux the next call
    asks (`end_orphan`)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
