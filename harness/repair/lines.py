"""A log's bytes, sorted: what is a record, what is not, what can still be told apart. Nothing here writes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import msgspec

from instrument.records import Record, StepRecord, decode

UNREADABLE = (ValueError, RecursionError)
"""What a hostile line makes the decoder raise (`RecordError` is a ValueError): anything but a crash."""
SEAM = re.compile(rb'\0+|(?<=\}).(?=\{"schema":)', re.DOTALL)
"""Where two lines run together: a newline that flipped into another byte, or zeros that a power cut left."""
CUT_SHORT = "Input data was truncated"
"""msgspec's words for the beginning of a JSON value."""


@dataclass
class SortedLines:
    """``kept``: the lines that stay, in order. ``intact`` of them are records of the file's kind,
    ``foreign`` are JSON objects and no such records (another version's, or a flipped bit in a name: left
    where they are). ``cut``: what is no JSON, of it ``torn`` pieces that end in mid-line, as a dead writer
    leaves them, and ``damaged`` others. ``rejoined``: records won back from lines that ran together.
    ``repeated``: rows of a step that stood there before, byte for byte."""

    kept: list[bytes] = field(default_factory=list)
    cut: list[bytes] = field(default_factory=list)
    intact: int = 0
    foreign: int = 0
    torn: int = 0
    damaged: int = 0
    rejoined: int = 0
    repeated: int = 0
    steps: int = 0
    """Different steps among the records."""
    in_order: bool = True
    """Whether the file is as it should be."""

    @property
    def content(self) -> bytes:
        """The file as it should be."""
        return b"".join(line + b"\n" for line in self.kept)


def sort_lines(content: bytes, kind: type[Record] | None) -> SortedLines:
    """Sort a log of ``kind`` (None: any JSON objects)."""
    found, seen = SortedLines(), set()
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for line in lines:
        if _keep(line, kind, found, seen):
            continue
        pieces = [piece for piece in SEAM.split(line) if piece]
        won_back = sum(_keep(piece, kind, found, seen) for piece in pieces) if pieces != [line] else 0
        found.rejoined += won_back
        for piece in pieces:
            if not won_back or not _is_object(piece):
                found.cut.append(piece)
                torn = _is_cut_short(piece)
                found.torn, found.damaged = found.torn + torn, found.damaged + (not torn)
    found.steps = len({line[0] for line in seen})
    found.in_order = found.content == content
    return found


def _keep(line: bytes, kind: type[Record] | None, found: SortedLines, seen: set[tuple[int, bytes]]) -> bool:
    """Put a line among the kept; False when it is no JSON object."""
    try:
        record = decode(line, kind) if kind is not None else msgspec.json.decode(line, type=dict)
    except UNREADABLE:
        if not _is_object(line):
            return False
        found.kept.append(line)
        found.foreign += 1
        return True
    if isinstance(record, StepRecord):
        if (record.step, line) in seen:
            found.repeated += 1
            return True
        seen.add((record.step, line))
    found.kept.append(line)
    found.intact += 1
    return True


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except UNREADABLE:
        return False


def _is_cut_short(line: bytes) -> bool:
    """Whether a line is the beginning of an object and no more."""
    if not line.startswith(b"{"):
        return False
    for end in (b"", b"0"):  # a number that stops at its point or sign is told as invalid, not as short
        try:
            msgspec.json.decode(line + end)
        except UNREADABLE as error:
            if str(error) == CUT_SHORT:
                return True
    return False
