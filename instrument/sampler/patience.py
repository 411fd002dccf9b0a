"""Asking a library that may never answer.

A call into a driver that hangs cannot be interrupted, so questions are asked on a daemon thread,
which a process does not wait for at its exit. Whoever asks waits a moment, takes what is there, and
asks nothing again that took too long: the thread that is stuck in it is left behind and replaced,
once per question at most.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Question = Callable[[], Any]


@dataclass
class _Round:
    """Questions under way, filled in by the asking thread."""

    questions: dict[str, Question]
    answers: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    current: tuple[str, float] | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Patience:
    """Answers within ``wait_s``; a question that takes longer than ``limit_s`` is never asked again."""

    def __init__(self, *, wait_s: float = 0.25, limit_s: float = 1.0) -> None:
        self.wait_s = wait_s
        self.limit_s = limit_s
        self.given_up: dict[str, str] = {}
        self.cpu_s = 0.0
        self._round: _Round | None = None
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, questions: dict[str, Question], *, wait_s: float | None = None) -> tuple[dict[str, Any], dict[str, str]]:
        """Answers by question, and the reason of each one that has none. Never raises, never waits longer."""
        if self._stuck():
            name = self._round.current[0] if self._round.current else "the first question"
            return {}, {question: f"waiting for {name}" for question in questions}
        now = _Round({name: ask for name, ask in questions.items() if name not in self.given_up})
        if now.questions:
            self._round = now
            self._start()
            self._queue.put(now)
            now.done.wait(self.wait_s if wait_s is None else wait_s)
        answers, reasons = dict(now.answers), dict(now.reasons)
        for name in questions:
            if name not in answers and name not in reasons:
                reasons[name] = self.given_up.get(name) or f"no answer within {self.wait_s if wait_s is None else wait_s:g} s"
        return answers, reasons

    def close(self) -> None:
        """Let the thread go when it is idle; one that is stuck is left to the end of the process."""
        self._queue.put(None)

    def _stuck(self) -> bool:
        """Whether the thread still is at an earlier round; gives up on its question after ``limit_s``."""
        if self._round is None or self._round.done.is_set():
            return False
        current = self._round.current
        if current is None or time.monotonic() - current[1] < self.limit_s:
            return True
        self.given_up[current[0]] = f"no answer within {self.limit_s:g} s; not asked again"
        self._queue.put(None)
        self._queue, self._thread, self._round = queue.SimpleQueue(), None, None
        return False

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, args=(self._queue,), name="ddb-nvml", daemon=True)
            self._thread.start()

    def _work(self, rounds: queue.SimpleQueue) -> None:
        while (now := rounds.get()) is not None:
            for name, question in now.questions.items():
                if rounds is not self._queue:  # replaced while it was stuck: nobody waits for the rest
                    return
                began_s = time.monotonic()
                now.current = (name, began_s)
                try:
                    now.answers[name] = question()
                except Exception as error:
                    now.reasons[name] = str(error) or type(error).__name__
                took_s = time.monotonic() - began_s
                if took_s > self.limit_s:
                    self.given_up[name] = f"took {took_s:.1f} s; not asked again"
            now.done.set()
            self.cpu_s = time.thread_time()
