"""The campaign as it is committed: what the dossier can be built from again, small; and a campaign that continues from it.

Step logs and the like are gzipped, weights and checkpoints are left out, and of the traces one is kept: a replayed overflow.
`report build` reads the packed folder as it reads a results folder.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.campaign.stages import FOLDER
from instrument.results.files import copy, make_folder, placing_folder, plain_inside, replace, replacing, sync_file
from instrument.results.layout import INDEX, SIDE_FILES, RunFiles, runs_of
from instrument.terminal import count

CAMPAIGN = "campaign.json"
LIMIT_BYTES = 15_000_000
LARGEST_TRACE_BYTES = 6_000_000
PLAIN = (
    INDEX,
    *SIDE_FILES,
    "kernel_check.json",
    "fit.json",
    CAMPAIGN,
    "summary.json",
    "dossier/index.html",
    "dossier/dossier.pdf",
)
PLAIN_LOGS = ("evaluations", "events")
LOGS = ("training_logs/run_*.jsonl", "runs/*/activations.jsonl", "runs/*/hardware.jsonl")
DISPENSABLE = (
    "runs/*-s[1-9]*-*/activations.jsonl.gz",
    "runs/*-s[1-9]*-*/hardware.jsonl.gz",
    "runs/*/activations.jsonl.gz",
    "runs/*/hardware.jsonl.gz",
)
"""Left out, in this order, when the folder would be larger than `LIMIT_BYTES`: later seeds first, since the figures of modules
and hardware show the lowest. What was left out is said."""


class PackTooLarge(Exception):
    """More than may be committed, whatever is left out."""


@dataclass(frozen=True)
class Packed:
    """``left_out``: what did not fit, for people."""

    folder: Path
    files: int
    size_bytes: int
    left_out: tuple[str, ...]


def pack(results: Path, out: Path, limit_bytes: int = LIMIT_BYTES) -> Packed:
    """Write the committed form of ``results`` as ``out``, in place of what was there, all or nothing. Raises
    `PackTooLarge`, and OSError."""
    with placing_folder(out) as folder:
        for path, name in _chosen(results):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".gz") and path.suffix != ".gz":
                with (
                    path.open("rb") as source,
                    target.open("wb") as file,
                    gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped,
                ):  # same bytes each time
                    shutil.copyfileobj(source, zipped)
            else:
                shutil.copyfile(path, target)
        left_out = _make_room(folder, limit_bytes)
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        if size > limit_bytes:
            largest = max(files, key=lambda path: path.stat().st_size)
            raise PackTooLarge(
                f"{size / 1e6:.1f} MB, and {limit_bytes / 1e6:.0f} MB are allowed; the largest file is "
                f"{largest.relative_to(folder)} with {largest.stat().st_size / 1e6:.1f} MB"
            )
        for path in files:
            sync_file(path)
    return Packed(out, len(files), size, left_out)


def _chosen(results: Path) -> Iterator[tuple[Path, str]]:
    """(file, name in the pack) of all that belongs there."""
    names = [
        *PLAIN,
        *(run.name(path) for run in runs_of(results) for path in (run.row, run.forensics, *map(run.log, PLAIN_LOGS))),
    ]
    names += [
        str(path.relative_to(results))
        for pattern in (f"{FOLDER}/*.json", "predictions/*.json")
        for path in sorted(results.glob(pattern))
    ]
    for name in names:
        if plain_inside(results, results / name):
            yield results / name, name
    for pattern in LOGS:
        for path in sorted(results.glob(pattern)):
            if plain_inside(results, path):
                yield path, f"{path.relative_to(results)}.gz"
    if (trace := overflow_trace(results)) is not None:
        yield trace, f"traces/{trace.name}"


def overflow_trace(results: Path) -> Path | None:
    """The trace of one replayed failure: an overflow's where there is one (the campaign drives a run into one), of the
    smallest file."""
    ranked = []
    for path in sorted([*results.glob("traces/*.json.gz"), *results.glob(f"{FOLDER}/overflow/traces/*.json.gz")]):
        run_id = path.name.rpartition("-step")[0]
        try:
            row = json.loads(RunFiles(path.parents[1], run_id).row.read_bytes())
            cause = (row.get("first_nonfinite") or {}).get("cause")
        except (OSError, ValueError, AttributeError):
            continue
        size = path.stat().st_size
        if cause is not None and size <= LARGEST_TRACE_BYTES and plain_inside(results, path):
            ranked.append((cause != "overflow", size, path.name, path))
    return min(ranked)[-1] if ranked else None


def _make_room(folder: Path, limit_bytes: int) -> tuple[str, ...]:
    left_out = []
    for pattern in DISPENSABLE:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        found = sorted(folder.glob(pattern))
        if size <= limit_bytes or not found:
            continue
        freed = sum(path.stat().st_size for path in found)
        for path in found:
            path.unlink()
        left_out.append(f"{count(len(found), 'file')} {pattern} ({freed / 1e6:.1f} MB)")
    return tuple(left_out)


def unpack(packed: Path, results: Path) -> bool:
    """Where ``results`` has no campaign and ``packed`` has one, continue from that: on another machine of its kind, say. Logs
    are plain files again. A run that was stopped after a checkpoint starts over, since weights are not packed. Returns
    whether there was one."""
    if (results / CAMPAIGN).exists() or not plain_inside(packed, packed / CAMPAIGN):
        return False
    make_folder(results)
    for path in sorted(packed.rglob("*")):
        name = path.relative_to(packed)
        if not plain_inside(packed, path) or name.parts[0] == "dossier" or str(name) == CAMPAIGN:
            continue
        if path.name.endswith(".jsonl.gz"):
            with gzip.open(path, "rb") as zipped, replacing(results / name.with_suffix("")) as plain, plain.open("wb") as file:
                shutil.copyfileobj(zipped, file)
        else:
            copy(path, results / name)
    copy(packed / CAMPAIGN, results / CAMPAIGN)  # last: a cut before it starts the copy again
    return True


def merge_documents(results: Path, stem: str, target: str) -> None:
    """One file for the dossier from the kernels' parts, each of which a process of its own wrote."""
    parts = [json.loads(path.read_bytes()) for path in sorted((results / FOLDER).glob(f"{stem}-*.json"))]
    if parts:
        whole = {**parts[0], "rows": [row for part in parts for row in part["rows"]]}
        whole |= {name: sum(part[name] for part in parts) for name in ("judged", "not_right") if name in parts[0]}
        replace(results / target, json.dumps(whole, indent=1, allow_nan=False).encode() + b"\n")
