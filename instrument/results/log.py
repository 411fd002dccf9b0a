"""Logs: append-only files of lines, and of records, one strict-JSON line each. Torch-free.

An append is one full write under the file's lock, so that writers in any process never mix lines. A line
that a dead writer left without its end is ended when the file is opened, so that only that line is lost; a
write that fails (a full disk) is taken back, so that earlier lines stay whole.

What an append returned from survives the death of the process. It survives the death of the *machine* after
at most `SYNC_EVERY_S`: a background thread syncs, so that the training thread never waits for a disk, and
`close` syncs. A file that was deleted meanwhile is an error at the next append.

One daemon thread a process runs these syncs and other small jobs that come round, such as heartbeats (`run_every`). A job
that takes long (a sync on a slow disk) delays the other jobs, never the thread that trains.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from instrument.results.files import NO_LOCKS, make_folder, sync_folder
from instrument.results.schemas import Record, encode

SYNC_EVERY_S = 5.0


class Appender:
    """An append-only file of lines. ``fresh`` starts it over. Raises OSError, the file's name in it."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        make_folder(path.parent)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | (os.O_TRUNC if fresh else 0), 0o644)
        self._unsynced = True  # its name in the folder, too
        self._folder_synced = False
        self._failure: OSError | None = None
        self._closing = threading.Lock()
        self.locks = True
        """Whether this file system has locks; without them lines rely on O_APPEND alone."""
        self._end_torn_line()
        self._job = run_every(SYNC_EVERY_S, self._sync_quietly)

    def append(self, line: bytes) -> None:
        """Add one line, its newline included. When this returns, the line outlives the process."""
        if self._failure is not None:
            raise self._failure
        self._lock()
        try:
            _append_or_nothing(self._fd, line)
        except OSError as error:
            raise _named(error, self.path) from error
        finally:
            self._unlock()
        self._unsynced = True

    def sync(self) -> None:
        """Bring all lines to the disk; raises OSError also for a file that somebody deleted."""
        with self._closing:
            self._sync()

    def close(self) -> None:
        """Sync and close; a second call does nothing. Raises what a sync in the background met."""
        cancel_job(self._job)
        with self._closing:
            if self._fd < 0:
                return
            try:
                self._sync()
            finally:
                os.close(self._fd)
                self._fd = -1
        if self._failure is not None:
            raise self._failure

    def _sync_quietly(self) -> None:
        """On the background thread: what went wrong is raised by the next call on the training thread."""
        with self._closing:
            try:
                if self._fd >= 0:
                    self._sync()
            except OSError as error:
                self._failure = self._failure or error

    def _sync(self) -> None:
        if os.fstat(self._fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "deleted while it was being written", str(self.path))
        if not self._unsynced:
            return
        self._unsynced = False  # before the sync: a line that comes meanwhile needs another one
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._unsynced = True
            raise _named(error, self.path) from error
        if not self._folder_synced:
            sync_folder(self.path.parent)
            self._folder_synced = True

    def _end_torn_line(self) -> None:
        """End what a dead writer left without a newline: the next line must not run on from it."""
        self._lock()
        try:
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                _append_or_nothing(self._fd, b"\n")
        finally:
            self._unlock()

    def _lock(self) -> None:
        if self.locks:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise _named(error, self.path) from error
                self.locks = False

    def _unlock(self) -> None:
        with suppress(OSError):  # the line is written; closing the file unlocks it
            if self.locks:
                fcntl.flock(self._fd, fcntl.LOCK_UN)


class JsonlLog(Appender):
    """An append-only file of one kind of record; a context."""

    def write(self, record: Record) -> None:
        """Append one line. When this returns, the record outlives the process."""
        self.append(encode(record) + b"\n")

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _append_or_nothing(fd: int, data: bytes) -> None:
    """Write all of ``data`` at the end of a locked file, or leave the file as it was."""
    written = os.write(fd, data)
    if written == len(data):
        return
    try:
        while written < len(data):
            written += os.write(fd, data[written:])
    except BaseException:
        os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise


def _named(error: OSError, path: Path) -> OSError:
    """The error with its file's name: those of descriptors have none."""
    return type(error)(error.errno, error.strerror, str(path))


_jobs: dict[object, tuple[float, float, Callable[[], None]]] = {}
"""Key -> period, when due (`time.monotonic`), what to do."""
_changed = threading.Condition()
_thread: threading.Thread | None = None


def run_every(period_s: float, job: Callable[[], None]) -> object:
    """Call ``job`` every ``period_s`` seconds until `cancel_job`; returns the key to cancel with.

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


def cancel_job(key: object) -> None:
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
