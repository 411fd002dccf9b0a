"""SIGTERM and SIGINT as a wish to stop, heard between two steps: spot machines and batch systems ask so, half a
minute or more before they take the machine away. A second signal leaves at once.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from harness.supervisor.heartbeat import HeartbeatSender

Item = TypeVar("Item")
TOGETHER_S = 0.1
"""Equal signals that come as close together are one: whoever signals a whole group (`timeout`, a batch system) reaches a run
twice, by itself and by its supervisor, who passes it on."""


class Stopped(Exception):
    """A run was asked to stop, and has got to a place where it can."""


class Stop:
    """``requested``: who asked (``SIGTERM``), or None. ``patient``: there is something to finish first; until then
    a signal leaves at once, by `KeyboardInterrupt`. ``pulse``: whoever looks for a wish to stop is alive."""

    def __init__(self, *, patient: bool = False, pulse: HeartbeatSender | None = None) -> None:
        self.requested: str | None = None
        self.patient = patient
        self.pulse = pulse or HeartbeatSender()
        self._heard_s = -math.inf

    @property
    def heard(self) -> str | None:
        """Who asked this very process."""
        return self.requested

    def request(self, who: str) -> None:
        """Ask to stop; the first who asks is remembered."""
        self.requested = self.requested or who

    def check(self) -> None:
        """Raise `Stopped` when asked to."""
        self.pulse.beat()
        if self.requested is not None:
            raise Stopped(self.requested)

    def between(self, items: Iterable[Item]) -> Iterator[Item]:
        """``items``, with a `check` before each."""
        for item in items:
            self.check()
            yield item

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Hear both signals, but for one that the caller of this process had ignored (``nohup``). Only a main
        thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
        for number in (s for s, handler in before.items() if handler is not signal.SIG_IGN):
            signal.signal(number, self._heard)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def obey_the_matrix(self) -> None:
        """In a run's process, to its end: SIGTERM asks, however often it comes (a batch system sends it to every
        process, and the matrix passes it on); Ctrl-C is the matrix' to hear, which kills when it has to."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: self.request("SIGTERM"))

    def _heard(self, number: int, frame: object) -> None:
        again = signal.Signals(number).name == self.heard and time.monotonic() - self._heard_s < TOGETHER_S
        if again:
            return
        if not self.patient or self.heard is not None:
            raise KeyboardInterrupt
        self._heard_s = time.monotonic()
        self.request(signal.Signals(number).name)
        # Not through a screen: the handler may have come in the middle of its drawing.
        with suppress(BrokenPipeError):
            os.write(2, f"\n{self.heard}: finishing the step, then a checkpoint; a second signal leaves at once\n".encode())
