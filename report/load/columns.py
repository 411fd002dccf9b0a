"""A JSON Lines log as numpy columns, in one pass and one decoder call a chunk.

A valid chunk costs about 3 us a line. Only when a chunk does not decode is it read again line by
line, to find out which lines are bad and to keep the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import msgspec
import numpy as np

from instrument.results.schemas import KINDS, SCHEMA, AnyRecord, Record, RecordError, decode
from report.load.defect import Defect, defect
from report.load.inside import link_on_the_way
from report.load.packed import lines, stored

CHUNK_BYTES = 4 << 20
NOT_COLUMNS = ("schema", "nonfinite")
LARGEST = 2**63 - 1
UNREADABLE = (RecordError, ValueError, RecursionError)
"""What a hostile line makes the decoder raise: a broken schema, a number out of range, endless nesting."""


def read_columns(path: Path, kind: type[Record], name: str) -> tuple[dict[str, np.ndarray], list[Defect]]:
    """Columns of a log by field, and what was wrong with it under the file name ``name``.

    ``int`` and ``bool`` fields are int64 and bool; fields that may be null are float64 with nan for
    null, and with nan or +-inf where the line's ``nonfinite`` map names it; all others are objects.
    Columns are read-only. A file that is not there has no rows; one that is there as ``.gz`` only is read from that.
    """
    path, name = stored(path, name)
    dtypes = column_dtypes(kind)
    pieces: list[dict[str, np.ndarray]] = []
    defects = link_on_the_way(path, name)
    for first_line, chunk in () if defects else lines(path, name, defects, CHUNK_BYTES):
        rows = _decode_chunk(chunk, kind)
        if rows is None:
            rows = [row for _, row in _one_by_one(chunk, kind, first_line, name, defects)]
        pieces.append({field: _column(rows, field, dtype) for field, dtype in dtypes.items()})
        _restore(rows, pieces[-1])
    return {
        field: _compact(np.concatenate([piece[field] for piece in pieces])) if pieces else np.empty(0, dtype)
        for field, dtype in dtypes.items()
    }, defects


def column_dtypes(kind: type[Record]) -> dict[str, np.dtype]:
    """The numpy type of every field of a record that becomes a column."""
    hints = get_type_hints(kind)
    number = {
        int: np.dtype(np.int64),
        bool: np.dtype(bool),
        float: np.dtype(np.float64),
        int | None: np.dtype(np.float64),
        float | None: np.dtype(np.float64),
    }
    return {field: number.get(hints[field], np.dtype(object)) for field in kind.__struct_fields__ if field not in NOT_COLUMNS}


def read_records(path: Path, kind: type[AnyRecord], name: str) -> tuple[list[AnyRecord], list[Defect]]:
    """The valid records of a small file in order, and what was wrong with the others."""
    path, name = stored(path, name)
    defects = link_on_the_way(path, name)
    rows = [
        row
        for first_line, chunk in (() if defects else lines(path, name, defects, CHUNK_BYTES))
        for _, row in _one_by_one(chunk, kind, first_line, name, defects)
    ]
    return rows, defects


def _decode_chunk(chunk: list[bytes], kind: type[AnyRecord]) -> list[AnyRecord] | None:
    """All rows at once; None unless all are good."""
    try:
        rows = msgspec.json.Decoder(kind).decode_lines(b"".join(chunk))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    good = len(rows) == len(chunk) and all(row.schema <= SCHEMA and (not row.nonfinite or _honest(row)) for row in rows)
    return rows if good and not any(map(too_large, rows)) else None


def _one_by_one(
    chunk: list[bytes], kind: type[AnyRecord], first_line: int, name: str, defects: list[Defect]
) -> Iterator[tuple[int, AnyRecord]]:
    for number, line in enumerate(chunk, start=first_line):
        try:
            yield number, checked(decode(line, kind))
        except UNREADABLE as error:
            torn = "" if line.endswith(b"\n") else " (torn last line)"
            defects.append(defect(name, number, f"{error}{torn}"))


def checked(row: AnyRecord) -> AnyRecord:
    """The row, or `RecordError`: no count of ours needs more than 63 bits, and no column holds more."""
    if (field := too_large(row)) is not None:
        raise RecordError(f"{field} is too large for a 64-bit integer")
    return row


def too_large(row: Record) -> str | None:
    """The first field whose integer does not fit a column, or None."""
    return next(
        (
            field
            for field, value in zip(row.__struct_fields__, msgspec.structs.astuple(row), strict=True)
            if type(value) is int and not -LARGEST <= value <= LARGEST
        ),
        None,
    )


def _honest(row: Record) -> bool:
    """Whether the ``nonfinite`` map names only known kinds, at fields that are null."""
    return all(kind in KINDS and getattr(row, field, 0) is None for field, kind in row.nonfinite.items())


def _column(rows: list[Record], field: str, dtype: np.dtype) -> np.ndarray:
    values = [getattr(row, field) for row in rows]
    if not dtype.hasobject:
        return np.array(values, dtype=dtype)
    column = np.empty(len(values), dtype=object)  # numpy would make lists of equal length a table
    for index, value in enumerate(values):
        column[index] = value
    return column


def _restore(rows: list[Record], columns: dict[str, np.ndarray]) -> None:
    """Put non-finite numbers back where a row's map names them (`decode` has done so already for some)."""
    for index, row in enumerate(rows):
        for field, kind in getattr(row, "nonfinite", {}).items():
            if field in columns and columns[field].dtype == np.float64:
                columns[field][index] = math.nan if kind == "nan" else float(kind)


def _compact(column: np.ndarray) -> np.ndarray:
    """A column that never changes (all nan, above all) takes no memory: a broadcast of one value."""
    if column.dtype != object and len(column):
        same = np.isnan(column).all() if np.isnan(column[0]) else (column == column[0]).all()
        if same:
            column = np.broadcast_to(column[:1].copy(), column.shape)
    column.flags.writeable = False
    return column
