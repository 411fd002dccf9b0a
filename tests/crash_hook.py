"""The crash sweep's hook: after `crash_at(n)` the process dies just before its n-th file operation.

An operation is what changes a disk, whoever asks for it: a regular file made, emptied or cut, renamed, linked,
deleted, its mode changed; a folder made or deleted; a sync; a write, which counts as two, the second being its middle.
Only the main thread's count, so that n means the same in every process, and not the interpreter's own caches.
Nothing is installed, and nothing costs anything, until `crash_at` is called.
"""

from __future__ import annotations

import os
import stat
import sys
import threading

CRASHED = 86
"""Exit code of a process that the crash sweep killed: `os._exit`, no clean-up."""
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
"""Audit events; ``os.replace``, ``os.unlink``, ``os.ftruncate`` and ``os.fchmod`` raise those of their namesakes."""

_at = _operations = 0
_installed = False


def crash_at(nth: int) -> None:
    """Die before the ``nth`` file operation from now; 0: never."""
    global _at, _operations
    _at, _operations = nth, 0
    if nth and not _installed:
        _install()


def operations() -> int:
    """How many there were since `crash_at`, which must not have been given 0."""
    return _operations


def _install() -> None:
    """For the rest of this process: an audit hook cannot be taken out again."""
    global _installed
    _installed, write, fsync = True, os.write, os.fsync

    def counted_write(fd: int, data: bytes) -> int:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            _operation()
            _operation(lambda: write(fd, memoryview(data)[: len(data) // 2]))
        return write(fd, data)

    def counted_fsync(fd: int) -> None:
        _operation()
        fsync(fd)

    os.write, os.fsync = counted_write, counted_fsync  # type: ignore[assignment]
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple) -> None:
    if not _at:
        return
    if event == "open":
        path, _, flags = arguments
        if flags & (os.O_CREAT | os.O_TRUNC) and isinstance(path, (str, bytes)) and not _is_no_file_of_ours(os.fsdecode(path)):
            _operation()
    elif event in CHANGES and not _is_no_file_of_ours(str(arguments[0])):
        _operation()


def _is_no_file_of_ours(path: str) -> bool:
    return path.startswith(("/dev/", "/proc/")) or "__pycache__" in path


def _operation(half=lambda: None) -> None:
    global _operations
    if not _at or threading.current_thread() is not threading.main_thread():
        return
    _operations += 1
    if _operations == _at:
        half()
        os._exit(CRASHED)
