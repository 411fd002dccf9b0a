"""A JSON Lines log as numpy columns, in one pass and one decoder call a chunk.

A valid chunk costs about 3 us a line. Only when a chunk does not decode is it read again line by
line, to find out which lines are bad and to keep the others.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import numpy as np

from instrument.results.lines import Defect, chunks, record, too_large
from instrument.results.schemas import KINDS, SCHEMA, UNREADABLE, Record

NOT_COLUMNS = ("schema", "nonfinite")
NUMPY_TYPES = {int: np.int64, bool: np.bool_, float: np.float64, int | None: np.float64, float | None: np.float64}


def read_columns(path: Path, kind: type[Record], name: str) -> tuple[dict[str, np.ndarray], list[Defect]]:
    """Columns of a log by field, and what was wrong with it under the file name ``name``.

    ``int`` and ``bool`` fields are int64 and bool; fields that may be null are float64 with nan for
    null, and with nan or +-inf where the line's ``nonfinite`` map names it; all others are objects.
    Columns are read-only. A file that is not there has no rows; one that is there as ``.gz`` only is read from that.
    """
    dtypes = column_dtypes(kind)
    pieces: list[dict[str, np.ndarray]] = []
    defects: list[Defect] = []
    for chunk in chunks(path, name, defects):
        rows = _decode_chunk(chunk.lines, kind)
        if rows is None:
            rows = list(chunk.rows(lambda line: record(line, kind), defects))
        pieces.append({field: _column(rows, field, dtype) for field, dtype in dtypes.items()})
        _restore(rows, pieces[-1])
    return {
        field: _compact(np.concatenate([piece[field] for piece in pieces])) if pieces else np.empty(0, dtype)
        for field, dtype in dtypes.items()
    }, defects


def column_dtypes(kind: type[Record]) -> dict[str, np.dtype]:
    """The numpy type of every field of a record that becomes a column."""
    hints = get_type_hints(kind)
    fields = (field for field in kind.__struct_fields__ if field not in NOT_COLUMNS)
    return {field: np.dtype(NUMPY_TYPES.get(hints[field], object)) for field in fields}


def _decode_chunk(chunk: list[bytes], kind: type[Any]) -> list[Any] | None:
    """All rows at once; None unless all are good."""
    try:
        rows = msgspec.json.Decoder(kind).decode_lines(b"".join(chunk))
    except UNREADABLE:
        return None
    good = len(rows) == len(chunk) and all(row.schema <= SCHEMA and (not row.nonfinite or _honest(row)) for row in rows)
    return rows if good and not any(map(too_large, rows)) else None


def _honest(row: Any) -> bool:
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
