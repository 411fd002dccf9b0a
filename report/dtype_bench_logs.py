"""Reading the logs of dtype-bench (an earlier benchmark of this matrix): bare NaN and Infinity, gzip."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instrument.results.lines import Defect, defect

ROW_FIELDS = tuple(
    "run_id model_arch task dtype_config seed completed nan_step peak_memory_gb samples_per_sec tokens_per_sec".split()
)
STEP_FIELDS = ("step", "loss", "grad_norm_l2", "grad_norm_max", "loss_scale", "max_logit", "memory_gb", "step_time_ms")


@dataclass
class Source:
    """What a dtype-bench folder holds: ``runs`` as (row, steps), and what could not be read."""

    runs: list[tuple[dict[str, Any], list[dict[str, Any]]]] = field(default_factory=list)
    defects: list[Defect] = field(default_factory=list)


def read_source(path: Path) -> Source:
    """All runs of every ``results.jsonl`` under ``path``, each once, with its step log."""
    source = Source()
    seen: set[str] = set()
    for index in sorted(path.rglob("results.jsonl")):
        name = str(index.relative_to(path))
        for line, row in _objects(index, name, ROW_FIELDS, source.defects):
            if row["run_id"] in seen:
                source.defects.append(defect(name, line, f"run {row['run_id']!r} stands there more than once; counted once"))
                continue
            seen.add(row["run_id"])
            log = _log_of(index.parent, str(row["run_id"]))
            if log is None:
                source.defects.append(defect(name, line, f"run {row['run_id']!r} has no log in training_logs/: left out"))
                continue
            steps = [step for _, step in _objects(log, str(log.relative_to(path)), STEP_FIELDS, source.defects)]
            source.runs.append((row, steps))
    return source


def _log_of(folder: Path, run_id: str) -> Path | None:
    if "/" in run_id or "\0" in run_id:
        return None
    files = (folder / "training_logs" / f"{run_id}.jsonl{suffix}" for suffix in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _objects(path: Path, name: str, fields: tuple[str, ...], defects: list[Defect]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The file's objects that have all ``fields``, with their line numbers."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)  # the standard library reads bare NaN and Infinity
                    missing = [field for field in fields if field not in row]
                except (ValueError, TypeError, RecursionError) as error:
                    defects.append(defect(name, number, f"not JSON: {error}"))
                    continue
                if missing:
                    defects.append(defect(name, number, f"has no {', '.join(missing)}"))
                else:
                    yield number, row
    except (OSError, EOFError, zlib.error) as error:
        defects.append(defect(name, number + 1, f"cannot be read on: {error}"))
