"""What commands write to a terminal or a pipe: counted nouns, colours of statuses, tables, sentences for errors of the
operating system, and what happens when the reader goes away (``| head``, a closed terminal) or the disk is full. Torch-free.

A command that only reports ends there, quietly, with the status that a shell shows for a program that SIGPIPE killed (5
on a full disk, with a sentence). A command that makes something (runs, a dossier) continues in silence: its results go
to files, and its exit status stays that of its results.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text


def count(n: int, one: str, many: str | None = None) -> str:
    """``1 run``, ``3 runs``, ``1,000 runs``; ``many`` where it is not ``one`` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


STATUS_STYLES = {"completed": "green", "diverged": "bold red", "unsupported": "dim", "preempted": "yellow"}
"""Rich's style of a run's status; those of failures are yellow."""


def printable(text: object) -> str:
    """Text from a file for a terminal: control characters, escape sequences and marks that turn the reading direction cannot
    act there."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


@cache
def _console_class() -> type[Console]:
    from rich import console, errors

    class PrintableConsole(console.Console):
        """Nothing that a text holds acts on the terminal: no control character, no link, no broken markup."""

        def render_str(self, text: str, **given: Any) -> Text:
            try:
                return super().render_str(text, **given)
            except errors.MarkupError:
                return super().render_str(text, **given | {"markup": False})

        def _render_buffer(self, buffer: Iterable[Segment]) -> str:
            return super()._render_buffer(
                part if part.control else part._replace(text=_lines(part.text), style=part.style and part.style.update_link())
                for part in buffer
            )

    return PrintableConsole


def _lines(text: str) -> str:
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def rich_console(**given: Any) -> Console:
    """A console of rich, by its arguments; `printable` holds for all that it prints. Without colours for numbers and paths."""
    return _console_class()(**{"highlight": False, "emoji": False} | given)


def stderr_console() -> Console:
    """Standard error, 120 columns wide where it is no terminal."""
    return rich_console(stderr=True, width=None if sys.stderr.isatty() else 120)


def plain_table(*columns: str, right: Container[str] = (), fold: Container[str] = (), title: str | None = None) -> Table:
    """A table of rich without borders; the columns in ``fold`` break, the others end in an ellipsis."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    for name in columns:
        breaks = name in fold
        justify = "right" if name in right else "left"
        table.add_column(name, justify=justify, no_wrap=not breaks, overflow="fold" if breaks else "ellipsis")
    return table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Two columns: what, and the finding as it is, markup included."""
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in facts:
        table.add_row(name, escape(text))
    return table


def print_section(console: Console, title: str, *content: Any, note: str = "") -> None:
    """An empty line, the title with its note, and the content, indented by 2."""
    from rich.padding import Padding
    from rich.text import Text

    console.print()
    console.print(Text.assemble((title, "bold"), (f"  {note}" if note else "", "dim")))
    for part in content:
        console.print(Padding.indent(part, 2))


FIXABLE = {
    getattr(errno, name)
    for name in (
        "ENOSPC EDQUOT EROFS EIO ESTALE EFBIG EACCES EPERM ENOTDIR EISDIR EEXIST ENAMETOOLONG ELOOP EINVAL EMFILE ENFILE "
        "ENOLCK EBUSY ETXTBSY ENOTEMPTY EXDEV EMLINK EDEADLK ENXIO ENODEV EINTR"
    ).split()
}


def sentence_of(error: BaseException) -> str | None:
    """``cannot use PATH: Not a directory``; None for any other error, a missing file above all: a fault of ours."""
    if not isinstance(error, OSError) or error.errno not in FIXABLE or not isinstance(error.filename, str | bytes):
        return None
    return f"cannot use {os.fsdecode(error.filename)}: {error.strerror or os.strerror(error.errno or 0)}"


READER_GONE = 141
"""128 + SIGPIPE."""
NO_ROOM = 5
"""As for any other file that the disk refuses."""


class Reader:
    """Whoever reads standard output and standard error. ``needed``: nothing is worth doing without them."""

    def __init__(self) -> None:
        self.needed = True


class ClosableStream:
    """A stream, that discards everything after its first error; raises ``SystemExit`` where the reader was needed."""

    def __init__(self, stream: Any, reader: Reader) -> None:
        self._stream, self._reader = stream, reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._close(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._close(error)

    def _close(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what is left in the buffer goes there too, when the interpreter ends
        os.close(nowhere)
        gone = error.errno in (errno.EPIPE, errno.EIO)
        if not gone and self._stream is not sys.__stderr__ and sys.__stderr__ is not None:
            print(f"standard output cannot be written: {error.strerror}", file=sys.__stderr__)
        if self._reader.needed:
            raise SystemExit(READER_GONE if gone else NO_ROOM)


@contextmanager
def reader_may_leave() -> Iterator[Reader]:
    """Within the block a reader who leaves is no error, and a stream that was closed before discards what is written."""
    reader, before = Reader(), (sys.stdout, sys.stderr)
    with open(os.devnull, "w") as nowhere:
        streams = [ClosableStream(stream or nowhere, reader) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            yield reader
        finally:
            try:
                for stream in streams:
                    stream.flush()
            finally:
                sys.stdout, sys.stderr = before
