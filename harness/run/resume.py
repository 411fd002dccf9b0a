"""Resuming a run: which checkpoint, which lines of its logs, and what looks back at the steps before.

A run resumes from its newest usable checkpoint if it has no terminal row, a ``preempted`` one, or one of a failure from outside
(`harness.failure.RESUMABLE`). Log lines after the checkpoint are dropped, since they are written again, the same. What is not
part of the settings hash may change: a log window or an instrument level holds from the checkpoint on; the row's ``instrument``
is the last part's, ``flags["resumed"]`` has the others'.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.parallel.context import DistributedContext
from harness.run.checkpoints import CheckpointError, Progress, discard, machine_facts, read_checkpoint
from harness.run.progress import CHECKPOINT_PREFIX, checkpoint_steps
from harness.settings import RunSettings
from harness.training import Training
from instrument.replay.snapshot import NamedState
from instrument.results.files import open_plain, remove
from instrument.results.folder import OutputError, RunFolder, finished_run, log_paths, require_no_links
from instrument.results.layout import LOGS, RunFiles
from instrument.results.schemas import EvaluationRecord, EventRecord, RecordError, RunRecord, StepRecord, decode


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
        """The step after which the run resumes."""
        return self.state.step

    @property
    def resumed_after(self) -> list[int]:
        """The steps after which the run was resumed, this time included."""
        return [*self.progress.resumed_after, self.step]

    @property
    def scaler_skips(self) -> int:
        """Skipped steps so far."""
        return sum(event.kind == "scaler_skip" for event in self.events)

    def restore(self, training: Training) -> None:
        """Put the state into a freshly prepared training; raises `CheckpointError`."""
        try:
            training.restore(self.state)
        except ValueError as error:
            raise CheckpointError(f"{CHECKPOINT_PREFIX}{self.step}: {error}") from error


def find(settings: RunSettings, out: Path, facts: dict[str, Any]) -> tuple[ResumeState | None, list[str]]:
    """What the run resumes from, and why newer checkpoints or all of them were skipped. ``facts`` has the hashes of its
    initial weights and batches now."""
    row = finished_run(out, settings.run_id)
    if row is not None and row.status != "preempted" and not failed_from_outside(row):
        return None, []
    folder, skipped = RunFiles(out, settings.run_id).path, []
    for step in checkpoint_steps(folder):
        try:
            state, progress = read_checkpoint(folder, settings.run_id, step)
            _require_same_run(settings, progress, facts)
            return ResumeState(state, progress, *_logged(settings.run_id, out, step, progress), skipped), skipped
        except CheckpointError as error:
            skipped.append(f"{CHECKPOINT_PREFIX}{step}: {error}")
    return None, skipped


def find_on_rank_0(
    context: DistributedContext, settings: RunSettings, out: Path, facts: dict[str, Any]
) -> tuple[ResumeState | None, list[str]]:
    """As `find`, for every rank: the records as rank 0 read them, the state from the checkpoint's own files, which all ranks
    must be able to read. Its tensors are mapped and not loaded: a rank that needs a slice of each pays for that only."""
    if context.ranks.world == 1:
        return find(settings, out, facts)
    found, skipped = find(settings, out, facts) if context.ranks.is_first else (None, [])
    shared = found and (out.absolute(), replace(found, state=None), found.step)
    shared, skipped = context.broadcast((shared, skipped))
    if shared is None or context.ranks.is_first:
        return found, skipped
    folder, resume_state, step = shared
    state, _ = read_checkpoint(RunFiles(folder, settings.run_id).path, settings.run_id, step)
    return replace(resume_state, state=state), skipped


def failed_from_outside(row: RunRecord) -> bool:
    """Killed or hung: its checkpoint is as good as that of a run whose machine went away without a row."""
    death = row.flags.get("death")
    return isinstance(death, dict) and death.get("goes_on") is True


def _require_same_run(settings: RunSettings, progress: Progress, facts: dict[str, Any]) -> None:
    for name, what in (("init_sha256", "weights"), ("data_sha256", "batches")):
        if getattr(progress, name) != facts[name]:
            raise CheckpointError(f"it began from other {what} ({name} differs)")
    here = machine_facts(settings)
    for name, before in progress.environment.items():
        if before != here.get(name):
            raise CheckpointError(f"{name} was {before} and is {here.get(name)}")


def _logged(run_id: str, out: Path, step: int, progress: Progress) -> tuple[list, list, list]:
    """Steps, evaluations and events up to the checkpoint; raises `CheckpointError` when a line is missing."""
    paths, found = log_paths(run_id), {}
    for name, path in paths.items():
        found[name] = []
        if size_bytes := progress.log_bytes.get(path, 0):
            try:
                with open_plain(out / path) as file:
                    data = file.read(size_bytes)
                if len(data) < size_bytes:
                    raise RecordError(f"{size_bytes - len(data)} bytes are missing")
                found[name] = [decode(line, LOGS[name]) for line in data.splitlines()]
            except (OSError, RecordError) as error:
                raise CheckpointError(f"{path} is not what it was: {error}") from error
    if [record.step for record in found["steps"]] != list(range(1, step + 1)):
        raise CheckpointError(f"{paths['steps']} does not have steps 1 to {step}")
    return found["steps"], found["evaluations"], found["events"]


def folder_of(out: Path, run_id: str, resume_state: ResumeState | None) -> RunFolder:
    """The folder of a run that begins at step 1, or resumes: with its logs up to the checkpoint, everything later removed."""
    if resume_state is None:
        discard(out, run_id)
        for earlier in RunFiles(out, run_id).path.glob("hardware.until-*.jsonl"):
            remove(earlier)
        return RunFolder(out, run_id)
    require_no_links(out, run_id)
    discard(out, run_id, keep=resume_state.step)
    try:
        if (hardware := RunFiles(out, run_id).log("hardware")).exists():  # the sampler begins another
            hardware.replace(hardware.with_name(f"hardware.until-{resume_state.step}.jsonl"))
    except OSError as error:
        raise OutputError.of(error, out) from error
    return RunFolder(out, run_id, kept_bytes=resume_state.progress.log_bytes)
