"""Files without a record schema: plain JSON objects, read tolerantly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from report.load.columns import UNREADABLE
from report.load.defect import Defect, defect
from report.load.inside import link_on_the_way
from report.load.packed import lines, stored

CHUNK_BYTES = 4 << 20


def read_object(path: Path, name: str) -> tuple[dict[str, Any] | None, list[Defect]]:
    """The JSON object in a file, or None; what is there and is none is a defect."""
    if links := link_on_the_way(path, name):
        return None, links
    try:
        content = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None, []
    except (*UNREADABLE, OSError) as error:
        return None, [defect(name, None, f"not JSON: {error}")]
    if not isinstance(content, dict):
        return None, [defect(name, None, f"is a {type(content).__name__} and not an object")]
    return content, []


def read_objects(path: Path, name: str) -> tuple[list[dict[str, Any]], list[Defect]]:
    """The JSON objects in a log's lines; a line that is none is a defect."""
    rows: list[dict[str, Any]] = []
    path, name = stored(path, name)
    if defects := link_on_the_way(path, name):
        return rows, defects
    numbered = (
        (number, line)
        for first, chunk in lines(path, name, defects, CHUNK_BYTES)
        for number, line in enumerate(chunk, start=first)
    )
    for number, line in numbered:
        try:
            row = msgspec.json.decode(line)
        except UNREADABLE as error:
            defects.append(defect(name, number, f"not JSON: {error}"))
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            defects.append(defect(name, number, f"is a {type(row).__name__} and not an object"))
    return rows, defects
