"""What a program does when whoever reads its words goes away (``| head``): a pipe that nobody reads refuses to be written to.

A command that only tells something ends there, quietly, with the status that a shell shows for a program that SIGPIPE
killed. A command that makes something (runs, a dossier) goes on in silence: its results go to files, its hours have been
paid for, and its exit status stays that of its results. Torch-free.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

READER_GONE = 141
"""128 + SIGPIPE."""


class Reader:
    """Whoever reads standard output and standard error. ``needed``: nothing is worth doing without them."""

    def __init__(self) -> None:
        self.needed = True


class Words:
    """A stream, that a closed pipe turns into one into nothing; raises ``SystemExit`` where the reader was needed."""

    def __init__(self, stream: Any, reader: Reader) -> None:
        self._stream, self._reader = stream, reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream's."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._close()
            return len(text)

    def flush(self) -> None:
        """As a stream's."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._close()

    def _close(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what is left in the buffer goes there too, when the interpreter ends
        os.close(nowhere)
        if self._reader.needed:
            raise SystemExit(READER_GONE)


@contextmanager
def reader_may_leave() -> Iterator[Reader]:
    """Within the block a reader who leaves is no error."""
    reader, before = Reader(), (sys.stdout, sys.stderr)
    streams = [stream and Words(stream, reader) for stream in before]  # None: closed from the beginning
    sys.stdout, sys.stderr = streams
    try:
        yield reader
    finally:
        try:
            for stream in streams:
                if stream is not None:
                    stream.flush()
        finally:
            sys.stdout, sys.stderr = before
