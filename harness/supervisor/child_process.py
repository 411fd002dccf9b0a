"""Starts a child process, receives its messages, monitors it, ends it, and says why it ended. Torch-free.

Its users differ in how they start it and in what they do with what it sends: the matrix' pool (`ForkServerProcess`), a single
case (`ForkedProcess`), the trials of ``fit`` (`ForkServerProcess`) and the stages of a campaign (`CommandProcess`).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

from harness.failure import Failure
from harness.run.heartbeat import Draft, Heartbeat
from harness.run.signals import Stop
from harness.supervisor.process_monitor import ProcessMonitor, Rules
from instrument.results.files import make_folder
from instrument.results.schemas import StepRecord

NO_HEARTBEATS = Rules(hang_after_s=0.0, heartbeats=False)
STARTS = 3
"""Tries to start a process: a fork server that was killed is started again by the next try."""
PF_EXITING = 0x4
"""Linux sets it in a process' flags (``/proc/PID/stat``) before it closes its files."""
PR_SET_PDEATHSIG = 1
POLL_S = 0.1


class ChildProcess:
    """A started process and what is known of it; as a context manager it is killed at the end.

    ``results``: what it sent beside the messages of a run under way, which are kept apart: ``draft`` and ``last_step``."""

    pid: int

    def __init__(self, monitor: ProcessMonitor | None, reports: Connection | None = None) -> None:
        self.monitor = monitor or ProcessMonitor(NO_HEARTBEATS)
        self.reports = reports
        self.connected = reports is not None
        self.results: list[Any] = []
        self.draft: Draft | None = None
        self.last_step: StepRecord | None = None
        self.monitor.begin(self.pid)

    def running(self) -> bool:
        """Whether it has not ended."""
        raise NotImplementedError

    def exit_code(self) -> int | None:
        """Waits for its end; negative for a signal, None where nobody can know or nobody can end it."""
        raise NotImplementedError

    def receive(self) -> None:
        """Take the messages that are there."""
        while self.connected and self.reports.poll():
            try:
                message = self.reports.recv()
            except (EOFError, ConnectionResetError):
                self.connected = False
                return
            self.monitor.alive(message if isinstance(message, Heartbeat) else None)
            if isinstance(message, Draft):
                self.draft = message
            elif isinstance(message, StepRecord):
                self.last_step = message
            elif not isinstance(message, Heartbeat):
                self.results.append(message)

    def result(self, timeout_s: float) -> Any:
        """Waits for the first message that is a result; None where none comes in time or before its end."""
        until_s = time.monotonic() + timeout_s
        while not self.results and self.connected and (left_s := until_s - time.monotonic()) > 0:
            if self.reports.poll(left_s):
                self.receive()
        return self.results[0] if self.results else None

    def failure(self, steps_done: int = 0, output: Path | None = None) -> Failure:
        """Why it ended, for a process that reported nothing. Waits for its end."""
        return self.monitor.failure(self.exit_code(), steps_done, output)

    def close(self) -> None:
        """Release what is kept for it; it has ended, or nobody can end it."""
        if self.reports is not None:
            self.reports.close()
        self.connected = False
        self.monitor.close()

    def kill(self) -> None:
        """Kill it, with its process group if it leads one; wait for its end, and release what is kept for it."""
        if self.running() or self.monitor.leads_group:  # what it left running, too
            self.monitor.send(signal.SIGKILL)
        self.exit_code()
        self.close()

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_) -> None:
        self.kill()


class ForkServerProcess(ChildProcess):
    """Calls ``target(*arguments, reports)`` in a process forked from a server that has the modules ``preload`` imported and
    nothing initialised: it starts in milliseconds. Sends objects through ``reports``."""

    def __init__(
        self, target: Callable, arguments: Sequence[Any], preload: Sequence[str], monitor: ProcessMonitor | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        for tries_left in reversed(range(STARTS)):
            here, there = context.Pipe(duplex=False)
            self.process = context.Process(target=target, args=(*arguments, there), daemon=True)
            try:
                self.process.start()
                break
            except (EOFError, ConnectionError):  # the fork server has just been killed
                here.close()
                if not tries_left:
                    raise
            finally:
                there.close()
        self.pid = self.process.pid
        super().__init__(monitor, here)

    def running(self) -> bool:
        return self.process.is_alive()

    def exit_code(self) -> int | None:
        """None as well where its parent, the fork server, was killed: `multiprocessing` says 255 then."""
        if not self.monitor.given_up:
            self.process.join()
        if self.process.exitcode != 255:
            return self.process.exitcode
        server = getattr(multiprocessing.forkserver._forkserver, "_forkserver_pid", None)
        return None if server is None or is_ending(server) else 255


class ForkedProcess(ChildProcess):
    """Calls ``target(send)`` in a fork of this very process, before anything heavy is imported; it is killed when this process
    ends. ``target`` returns the exit code, and sends objects with ``send``."""

    def __init__(self, target: Callable[[Callable[[object], None]], int], monitor: ProcessMonitor) -> None:
        here, there = Pipe(duplex=False)
        parent, self._exit_code = os.getpid(), None
        self.pid = os.fork()
        if self.pid == 0:
            here.close()
            end_with_parent(signal.SIGKILL, parent)

            def send(message: object) -> None:
                with suppress(BrokenPipeError):  # the parent is gone, and this process is about to be killed
                    there.send(message)

            sys.exit(target(send))
        there.close()
        super().__init__(monitor, here)

    def running(self) -> bool:
        if self._exit_code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._exit_code = os.waitstatus_to_exitcode(status) if ended else None
        return self._exit_code is None

    def exit_code(self) -> int | None:
        while self.running() and not self.monitor.given_up:
            time.sleep(0.01)
        return self._exit_code


class CommandProcess(ChildProcess):
    """Executes a command in a session of its own; it is asked to end (SIGTERM) when this process ends (on Linux)."""

    def __init__(self, command: Sequence[str], stdout: IO, stderr: IO) -> None:
        parent = os.getpid()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=lambda: end_with_parent(signal.SIGTERM, parent),
        )
        self.pid = self.process.pid
        super().__init__(None)
        self.monitor.leads_group = True

    def running(self) -> bool:
        return self.process.poll() is None

    def exit_code(self) -> int | None:
        return self.process.wait()


def run_command(
    command: Sequence[str], files: Sequence[Path], limits_s: Mapping[str, float], grace_s: float, stop: Stop, started: Callable
) -> tuple[int, str | None]:
    """Execute a command with its standard output in the first of ``files`` and the rest in the second (added to).

    It is asked to end at the first of ``limits_s`` or when ``stop`` is requested, and killed with all its processes ``grace_s``
    later. Calls ``started(pid)``. Returns its exit code, and None or what cut it: the name of a limit or of a signal."""
    began_s, cut, limit = time.monotonic(), None, min(limits_s, key=limits_s.__getitem__)
    make_folder(files[1].parent)
    with files[0].open("wb") as out, files[1].open("ab") as log, CommandProcess(command, stdout=out, stderr=log) as child:
        started(child.pid)
        while child.running():
            if cut is None and (stop.requested or time.monotonic() - began_s > limits_s[limit]):
                cut = stop.requested or limit
                child.monitor.end(grace_s)
            child.monitor.look()
            time.sleep(POLL_S)
    if not files[0].stat().st_size:  # most print nothing
        files[0].unlink()
    return child.exit_code(), cut


def end_with_parent(number: int, parent: int) -> None:
    """In a child: have the kernel send it signal ``number`` when its ``parent`` ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it ended before
            os.kill(os.getpid(), number)


def is_ending(pid: int) -> bool:
    """Whether a process is gone or on its way: on a busy machine its pipes are closed for a while before it is a zombie."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return state in "ZX" or bool(int(numbers[5]) & PF_EXITING)
