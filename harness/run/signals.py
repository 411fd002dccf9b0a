"""SIGTERM, SIGINT and SIGHUP request a stop after the current step: spot machines and batch systems send them half a minute or
more before they take the machine away, and a terminal that closes sends the last. A second signal ends the process at once.
Torch-free."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from harness.run.heartbeat import HeartbeatSender

if TYPE_CHECKING:
    from harness.parallel.context import DistributedContext

Item = TypeVar("Item")
SAME_SIGNAL_S = 0.1
"""Equal signals within this time are one: whoever signals a whole process group (`timeout`, a batch system) reaches a run
twice, directly and through its supervisor, which passes the signal on."""


def interrupt_on_signals() -> None:
    """SIGTERM, and SIGHUP unless the caller of this process ignores it (``nohup``), end the process as Ctrl-C does: rows are
    written, exit code 75."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.default_int_handler)


class Stopped(Exception):
    """A run was asked to stop, and has reached a place where it can."""


class Stop:
    """``requested``: who asked for a stop (``SIGTERM``), or None. ``patient``: there is a checkpoint to write first; until then
    a signal ends the run at once, by `KeyboardInterrupt`. ``heartbeat``: code that checks for a stop is alive."""

    def __init__(self, *, patient: bool = False, heartbeat: HeartbeatSender | None = None) -> None:
        self.requested: str | None = None
        self.patient = patient
        self.heartbeat = heartbeat or HeartbeatSender()
        self._received_s = -math.inf

    @property
    def requested_here(self) -> str | None:
        """Who asked this very process."""
        return self.requested

    def request(self, who: str) -> None:
        """Ask to stop; the first who asks is remembered."""
        self.requested = self.requested or who

    def check(self) -> None:
        """Raise `Stopped` when a stop was requested."""
        self.heartbeat.alive()
        if self.requested is not None:
            raise Stopped(self.requested)

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """``items``, with a `check` before each."""
        for item in items:
            self.check()
            yield item

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle the signals, but for one that the caller of this process had ignored (``nohup``). Only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        for number in (s for s, handler in before.items() if handler is not signal.SIG_IGN):
            signal.signal(number, self._receive)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def obey_the_matrix(self) -> None:
        """In a process of the matrix, to its end: SIGTERM requests a stop, however often it comes (a batch system sends it to
        every process, and the matrix passes it on); Ctrl-C and a closed terminal are left to the matrix, which kills where it
        must."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: self.request("SIGTERM"))

    def _receive(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if name == self.requested_here and time.monotonic() - self._received_s < SAME_SIGNAL_S:
            return
        if not self.patient or self.requested_here is not None:
            raise KeyboardInterrupt
        self._received_s = time.monotonic()
        self.request(name)
        # Not through a screen: the handler may have interrupted its drawing.
        with suppress(BrokenPipeError):
            os.write(2, f"\n{name}: finishing the step, then a checkpoint; a second signal leaves at once\n".encode())


class StopTogether(Stop):
    """Any rank may request a stop; all ranks stop after the same step. ``requested`` stays None, and the ranks exchange their
    requests at the log points only, so that none leaves its step elsewhere than the others."""

    def __init__(self, context: DistributedContext) -> None:
        super().__init__()
        self._context = context
        self._requested_here: str | None = None

    @property
    def requested_here(self) -> str | None:
        return self._requested_here

    def request(self, who: str) -> None:
        self._requested_here = self._requested_here or who

    def check(self) -> None:
        """Raise `Stopped` on every rank when any was asked to; all must call it."""
        who = next((who for who in self._context.gather(self._requested_here) if who), None)
        if who is not None:
            raise Stopped(who)

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """``items``: an evaluation is finished first."""
        yield from items
