"""One daemon thread a process for small jobs that come round: syncing logs, heartbeats. Torch-free.

A job that takes long (a sync on a slow disk) delays the other jobs, never the thread that trains.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

_jobs: dict[object, tuple[float, float, Callable[[], None]]] = {}
"""Key -> period, when due (`time.monotonic`), what to do."""
_changed = threading.Condition()
_thread: threading.Thread | None = None


def every(period_s: float, job: Callable[[], None]) -> object:
    """Call ``job`` every ``period_s`` seconds until `cancel`; returns the key to cancel with.

    ``job`` must not raise: its owner keeps what went wrong.
    """
    global _thread
    key = object()
    with _changed:
        _jobs[key] = (period_s, time.monotonic() + period_s, job)
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_run, name="ddb-background", daemon=True)
            _thread.start()
        _changed.notify()
    return key


def cancel(key: object) -> None:
    """Call that job no more; one that is running now may still end after this."""
    with _changed:
        _jobs.pop(key, None)


def _run() -> None:
    while True:
        with _changed:
            soonest_s = min((due_s for _, due_s, _ in _jobs.values()), default=None)
            now_s = time.monotonic()
            if soonest_s is None or soonest_s > now_s:
                _changed.wait(None if soonest_s is None else soonest_s - now_s)
                continue
            due = {key: (period_s, now_s + period_s, job) for key, (period_s, due_s, job) in _jobs.items() if due_s <= now_s}
            _jobs.update(due)
        for _, _, job in due.values():
            job()


def _in_a_forked_child() -> None:
    """A fork copies the jobs and not the thread; the jobs are the parent's."""
    global _thread, _changed
    _thread, _changed = None, threading.Condition()
    _jobs.clear()


os.register_at_fork(after_in_child=_in_a_forked_child)
