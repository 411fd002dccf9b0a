"""Going on where a run stopped: which checkpoint, which lines of its logs, and everything that looks back.

A run with a checkpoint and no terminal row, a ``preempted`` one, or one of a death from outside (`supervise.death.GOES_ON`)
goes on from its newest usable checkpoint;
log lines behind that are dropped, since they are written again, the same. What is not part of the settings hash
may differ from the part before: a log window or an instrument level holds from the checkpoint on, and the row's
``instrument`` is the last part's, ``flags["resumed"]`` has the others'.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness.run import checkpoint_files
from harness.run.checkpoint_files import CheckpointError, Progress
from harness.settings import RunSettings
from harness.training import Training
from instrument.environment import capture
from instrument.replay.snapshot import NamedState
from instrument.results.files import remove, remove_folder, sync_file, truncate
from instrument.results.folder import OF_THE_OLD_RUN, OutputError, RunFolder, finished_run, require_no_links
from instrument.results.log import JsonlLog
from instrument.results.ranges import ModuleRecord
from instrument.results.schemas import (
    AnyRecord,
    EvaluationRecord,
    EventRecord,
    RecordError,
    RunRecord,
    StepRecord,
    decode,
    require_safe,
)

SAME_MACHINE = {"cpu": ("torch_version", "cpu", "cpu_capability"), "cuda": ("torch_version", "gpu")}
"""What must be as it was when the checkpoint was written: a row has one environment, and its numbers with it."""


@dataclass(frozen=True)
class ResumeState:
    """A checkpoint and what its run had logged up to it. ``skipped``: why newer ones were not used."""

    state: NamedState
    progress: Progress
    steps: list[StepRecord]
    evaluations: list[EvaluationRecord]
    events: list[EventRecord]
    skipped: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The step behind which the run goes on."""
        return self.state.step

    @property
    def resumed_behind(self) -> list[int]:
        """The steps behind which the run has been continued, this time included."""
        return [*self.progress.resumed_behind, self.step]

    @property
    def scaler_skips(self) -> int:
        """Skipped steps so far."""
        return sum(event.kind == "scaler_skip" for event in self.events)

    def restore(self, training: Training) -> None:
        """Put the state into a freshly prepared training; raises `CheckpointError`."""
        try:
            training.restore(self.state)
        except ValueError as error:
            raise CheckpointError(f"checkpoint-{self.step}: {error}") from error


def log_paths(run_id: str) -> dict[str, str]:
    """A run's logs that a checkpoint pins, by their paths in the results folder."""
    return {
        "steps": f"training_logs/run_{run_id}.jsonl",
        **{name: f"runs/{run_id}/{name}.jsonl" for name in ("evaluations", "events", "activations")},
    }


def log_bytes(out: Path, run_id: str) -> dict[str, int]:
    """How long the logs are now, down to the disk."""
    sizes = {}
    for path in (out / name for name in log_paths(run_id).values()):
        if path.exists():  # without instruments there is no activations.jsonl
            sync_file(path)
            sizes[str(path.relative_to(out))] = path.stat().st_size
    return sizes


def find(settings: RunSettings, out: Path, facts: dict[str, Any]) -> tuple[ResumeState | None, list[str]]:
    """What the run can go on from, and why newer checkpoints or all of them were skipped. ``facts`` has the
    hashes of its initial weights and batches now."""
    row = finished_run(out, settings.run_id)
    if row is not None and row.status != "preempted" and not died_from_outside(row):
        return None, []
    folder, skipped = out / "runs" / settings.run_id, []
    for step in checkpoint_files.steps(folder):
        try:
            state, progress = checkpoint_files.read(folder, settings.run_id, step)
            _refuse_another(settings, progress, facts)
            return ResumeState(state, progress, *_logged(settings.run_id, out, step, progress), skipped), skipped
        except CheckpointError as error:
            skipped.append(f"checkpoint-{step}: {error}")
    return None, skipped


def died_from_outside(row: RunRecord) -> bool:
    """Killed or hung: its checkpoint is as good as that of a run whose machine went away without a row."""
    death = row.flags.get("death")
    return isinstance(death, dict) and death.get("goes_on") is True


def _refuse_another(settings: RunSettings, progress: Progress, facts: dict[str, Any]) -> None:
    for name in ("init_sha256", "data_sha256"):
        if getattr(progress, name) != facts[name]:
            raise CheckpointError(f"it began from other {'weights' if name == 'init_sha256' else 'batches'} ({name} differs)")
    here = machine(settings)
    for name, before in progress.environment.items():
        if before != here.get(name):
            raise CheckpointError(f"{name} was {before} and is {here.get(name)}")


def machine(settings: RunSettings) -> dict[str, Any]:
    """What of this machine a checkpoint holds on to."""
    here = capture(torch.device(settings.device))
    return {name: here.get(name) for name in SAME_MACHINE[settings.device]}


def _logged(run_id: str, out: Path, step: int, progress: Progress) -> tuple[list, list, list]:
    """Steps, evaluations and events up to the checkpoint; raises `CheckpointError` when a line is missing."""
    paths = log_paths(run_id)
    kinds = {"steps": StepRecord, "evaluations": EvaluationRecord, "events": EventRecord, "activations": ModuleRecord}
    found = {}
    for name, path in paths.items():
        size = progress.log_bytes.get(path, 0)
        try:
            found[name] = _records(out / path, kinds[name], size) if size else []
        except (OSError, RecordError) as error:
            raise CheckpointError(f"{path} is not what it was: {error}") from error
    if [record.step for record in found["steps"]] != list(range(1, step + 1)):
        raise CheckpointError(f"{paths['steps']} does not have steps 1 to {step}")
    return found["steps"], found["evaluations"], found["events"]


def _records(path: Path, kind: type[AnyRecord], size_bytes: int) -> list[AnyRecord]:
    """The records in the first ``size_bytes`` of a log; raises `OSError` or `RecordError`."""
    with path.open("rb") as file:
        data = file.read(size_bytes)
    if len(data) < size_bytes:
        raise RecordError(f"{size_bytes - len(data)} bytes are missing")
    return [decode(line, kind) for line in data.splitlines()]


class ContinuedFolder(RunFolder):
    """The folder of a run that goes on: its logs up to the checkpoint, everything later removed."""

    def __init__(self, out: Path, run_id: str, resumption: ResumeState) -> None:
        require_safe(run_id)
        require_no_links(out, run_id)
        self.out = out
        self.path = out / "runs" / run_id
        try:
            checkpoint_files.discard(self.path, keep=resumption.step)
            if (self.path / "hardware.jsonl").exists():  # the sampler begins another
                (self.path / "hardware.jsonl").replace(self.path / f"hardware.until-{resumption.step}.jsonl")
            for name in set(OF_THE_OLD_RUN) - {"activations.jsonl"}:
                remove(self.path / name)
            remove_folder(self.path / "snapshot")
            for path in log_paths(run_id).values():
                if (out / path).exists():
                    truncate(out / path, resumption.progress.log_bytes.get(path, 0))
            self.steps, self.evaluations, self.events = (
                JsonlLog(out / log_paths(run_id)[name]) for name in ("steps", "evaluations", "events")
            )
        except OSError as error:
            raise _cannot_write(error, out) from error


def start_over(out: Path, run_id: str) -> RunFolder:
    """The folder of a run that begins at step 1."""
    discard(out, run_id)
    for earlier in (out / "runs" / run_id).glob("hardware.until-*.jsonl"):
        remove(earlier)
    return RunFolder(out, run_id)


def discard(out: Path, run_id: str) -> None:
    """Remove what a run could go on from."""
    try:
        checkpoint_files.discard(out / "runs" / run_id)
    except OSError as error:
        raise _cannot_write(error, out) from error


def _cannot_write(error: OSError, out: Path) -> OutputError:
    return OutputError(f"cannot write {error.filename or out}: {error.strerror}; choose another folder with --out")
