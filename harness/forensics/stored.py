"""``runs/<run_id>/snapshot/``: the state that a failed run's replay started from, on disk; and why a finished run cannot
be replayed from it.

``tensors.safetensors`` holds weights (tied ones once), buffers, optimizer states and random states;
``snapshot.json`` the rest and a checksum. Never a pickle: reading a result must not run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness.training import Training
from instrument.replay.snapshot import NamedState, Snapshot
from instrument.results.files import open_plain, placing_folder, read_plain, remove_folder
from instrument.results.lines import json_object


class NothingToReplay(Exception):
    """A run that did not fail, or that kept nothing to replay its failure from."""


class SnapshotError(Exception):
    """A stored snapshot that is damaged or of another run."""


class RebuildError(Exception):
    """A run that cannot be made again here; says what differs."""


SCHEMA = 2
"""2: the facts have a checksum of their own."""
MOST_BYTES = 8_000_000_000
FOLDER, TENSORS, FACTS = "snapshot", "tensors.safetensors", "snapshot.json"


@dataclass(frozen=True)
class Stored:
    """``file``: the folder's name in the run's folder, or None and ``why`` nothing was kept."""

    file: str | None
    nbytes: int
    why: str | None = None


def store(snapshot: Snapshot, run_folder: Path, run_id: str, *, most_bytes: int = MOST_BYTES) -> Stored:
    """Keep a snapshot in its run's folder, in place of an older one. Never raises: a failed run is a
    result also without its snapshot."""
    folder = run_folder / FOLDER
    remove_folder(folder)
    if snapshot.nbytes > most_bytes:
        sizes = f"{snapshot.nbytes / 1e9:.1f} GB is larger than the {most_bytes / 1e9:.1f} GB that are kept"
        return Stored(None, snapshot.nbytes, f"the snapshot of {sizes}")
    try:
        with placing_folder(folder) as writing:
            write_state(snapshot.named(), writing, run_id)
    except (OSError, TypeError, ValueError) as error:  # a full disk, an optimizer that keeps odd things
        return Stored(None, snapshot.nbytes, f"the snapshot could not be written: {error}")
    return Stored(FOLDER, snapshot.nbytes)


def read_state(run_folder: Path, run_id: str) -> NamedState:
    """The stored state of a run; raises `NothingToReplay` or `SnapshotError`."""
    try:
        return read_folder(run_folder / FOLDER, run_id)[0]
    except FileNotFoundError as error:
        when = "when a run under --instrument light or full ends in a non-finite value"
        kept = f"one of up to {MOST_BYTES / 1e9:.0f} GB is kept {when}"
        raise NothingToReplay(f"{run_id} has no stored snapshot ({error.filename} is missing): {kept}") from error


def read_folder(folder: Path, run_id: str) -> tuple[NamedState, dict[str, Any]]:
    """The state in a folder and what was written ``more``; raises `FileNotFoundError` or `SnapshotError`."""
    try:
        facts = json_object(read_plain(folder / FACTS))
        with open_plain(folder / TENSORS) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if facts["schema"] not in (1, SCHEMA):
            raise SnapshotError(f"{folder / FACTS} has schema {facts['schema']}; this version reads up to {SCHEMA}")
        if facts["schema"] == SCHEMA and facts.pop("facts_sha256") != _digest(facts):
            raise SnapshotError(f"{folder / FACTS} has changed since it was written (its checksum differs)")
        if facts["run_id"] != run_id:
            raise SnapshotError(f"{folder} is the snapshot of {facts['run_id']}, not of {run_id}")
        if facts["tensors_sha256"] != sha256:
            raise SnapshotError(f"{folder / TENSORS} has changed since it was written (its checksum differs)")
        return _state(facts["state"], load_file(folder / TENSORS)), facts.get("more", {})
    except FileNotFoundError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise SnapshotError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def load(run_folder: Path, training: Training) -> Snapshot:
    """The stored snapshot of this training's run, to be restored into it; raises `SnapshotError`."""
    state = read_state(run_folder, training.settings.run_id)
    try:
        return Snapshot.from_named(state, training.model, training.optimizer, training.precision.scaler)
    except ValueError as error:
        raise SnapshotError(f"{run_folder / FOLDER}: {error}") from error


def write_state(state: NamedState, folder: Path, run_id: str, more: dict[str, Any] | None = None) -> None:
    """Write a state, and ``more`` plain facts with it, into an empty folder that `instrument.results.files` places."""
    save_tensors(state.tensors, folder / TENSORS)
    with (folder / TENSORS).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {
        "schema": SCHEMA,
        "run_id": run_id,
        "tensors_sha256": sha256,
        "state": {field.name: getattr(state, field.name) for field in fields(state) if field.name != "tensors"},
        "more": more or {},
    }
    facts["facts_sha256"] = _digest(facts)
    (folder / FACTS).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, not in one step; raises `OSError` for a full disk, which safetensors wraps."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)  # as every other result file; safetensors lets the owner alone read


def _digest(facts: dict[str, Any]) -> str:
    """SHA-256 of facts as JSON, whatever their order and layout."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _state(facts: dict[str, Any], tensors: dict) -> NamedState:
    groups = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        for group in facts.pop("groups")
    ]  # betas are a tuple, which JSON has not
    return NamedState(**facts, groups=groups, tensors=tensors)
