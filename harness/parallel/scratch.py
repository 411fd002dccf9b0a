"""Where ranks other than the first write: every rank executes the whole run, and the results folder is rank 0's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from harness.parallel.context import DistributedContext
from harness.parallel.ranks import Ranks
from harness.run import checkpoint_files
from harness.run.resume import ResumeState
from instrument.results import files


@contextmanager
def folder_of(ranks: Ranks, out: Path) -> Iterator[Path]:
    """``out`` for rank 0; for another a folder of its own that is gone at the end. What killed ranks left is deleted."""
    files.sweep(Path(tempfile.gettempdir()))
    if ranks.is_first:
        yield out
        return
    with files.temporary_folder(f"ddb-rank{ranks.rank}") as scratch:
        yield scratch


def resumed_by_all(
    team: DistributedContext, out: Path, run_id: str, find: Callable[[], tuple[ResumeState | None, list[str]]]
) -> tuple[ResumeState | None, list[str]]:
    """What rank 0 found to go on from (`harness.run.resume.find`), for every rank: its records as rank 0 read them, the
    state from the checkpoint's own files, which all ranks must be able to read. Its tensors are mapped and not loaded: who
    needs a slice of each pays for that."""
    if team.ranks.world == 1:
        return find()
    found, skipped = find() if team.ranks.is_first else (None, [])
    told = found and (out.absolute(), replace(found, state=None), found.step)
    told, skipped = team.broadcast((told, skipped))
    if told is None or team.ranks.is_first:
        return found, skipped
    folder, resumption, step = told
    state, _ = checkpoint_files.read(folder / "runs" / run_id, run_id, step)
    return replace(resumption, state=state), skipped
