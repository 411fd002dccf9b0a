"""``runs/<run_id>/checkpoint-<step>/``: everything a run needs to go on behind ``step``, on disk.

The state is written as a failed run's snapshot is (`harness.forensics.stored`): safetensors, JSON and checksums,
never a pickle. A folder appears under its name only when it is whole and on the disk; two are kept.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError

from harness.forensics.stored import SnapshotError, read_folder, write_state
from instrument.replay.snapshot import NamedState
from instrument.results.files import placing_folder, remove_folder, require_there, sweep

KEPT = 2
PREFIX = "checkpoint-"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the reason is the message."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a run was, beside its state. ``log_bytes``: sizes of its logs, by their paths in the results folder.
    ``resumed_behind``: the steps behind which it has been continued before. ``taps``: `ModuleTaps.left`."""

    init_sha256: str
    data_sha256: str
    environment: dict[str, Any]
    instrument: str
    log_bytes: dict[str, int]
    timings_s: dict[str, float]
    resumed_behind: list[int]
    taps: dict[str, Any] | None


def write(run_folder: Path, run_id: str, state: NamedState, progress: Progress) -> Path:
    """Write the checkpoint behind the state's step and drop what is older than the last two. Raises `OSError`
    (a full disk, a run's folder that is gone: it is not made again), and then nothing has changed."""
    require_there(run_folder)
    folder = run_folder / f"{PREFIX}{state.step}"
    sweep(run_folder)
    try:
        with placing_folder(folder) as writing:
            write_state(state, writing, run_id, msgspec.to_builtins(progress))
    except SafetensorError as error:  # how safetensors reports what the system told it
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(folder)) from error
    for step in steps(run_folder)[KEPT:]:
        remove_folder(run_folder / f"{PREFIX}{step}")
    return folder


def steps(run_folder: Path) -> list[int]:
    """The steps of the checkpoints that are there, newest first, whole or not."""
    names = (path.name.removeprefix(PREFIX) for path in run_folder.glob(f"{PREFIX}*") if path.is_dir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def read(run_folder: Path, run_id: str, step: int) -> tuple[NamedState, Progress]:
    """A checkpoint; raises `CheckpointError` when it is damaged or another run's."""
    try:
        state, more = read_folder(run_folder / f"{PREFIX}{step}", run_id)
        if state.step != step:
            raise CheckpointError(f"it holds the state behind step {state.step}")
        return state, msgspec.convert(more, Progress)
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from error
    except (OSError, SnapshotError, msgspec.ValidationError) as error:
        raise CheckpointError(str(error)) from error


def discard(run_folder: Path, keep: int | None = None) -> None:
    """Remove a run's checkpoints, or those newer than the one behind step ``keep``."""
    sweep(run_folder)
    for step in steps(run_folder):
        if keep is None or step > keep:
            remove_folder(run_folder / f"{PREFIX}{step}")
