"""What would have happened with one thing changed: a failed run again from its stored snapshot.

The unchanged run goes first, as the control: only where it fails as it did can a remedy's survival say
anything. Then every change, all else equal: weights, states, batches, schedule. A cause is *confirmed*
only when a remedy that removes it survives the failed step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch

from harness.forensics.stored import NothingToReplay, RebuildError, SnapshotError, read_state
from harness.inspect.changes import Change, change_of, changes_of, confirms, enclosing_modules
from harness.inspect.rerun import ChangedRun, Rebuilt, rebuild, run_changed
from harness.precision import DTYPES, Unsupported
from harness.settings import SettingsError
from instrument.replay.snapshot import NamedState
from instrument.results.files import read_plain, replace
from instrument.results.measurements import ForensicsRecord, Remedy
from instrument.results.schemas import UNREADABLE, FirstNonfinite, RunRecord, decode, encode

STEPS, STEPS_BEYOND = 20, 5
MOST_TIMED_STEPS = 6
MOST_TIME_NOISE = 0.25
"""Where the unchanged run's timings before and after a change differ by more, the machine was too busy to compare them."""


@dataclass(frozen=True)
class Counterfactual:
    """What came of the changes that were tried. ``reproduced``: the unchanged run failed again at the same step and phase;
    ``time_noise``: largest relative difference between neighbouring timings of it, below which a time ratio
    means nothing; null when no change survived."""

    run_id: str
    sentence: str
    first_nonfinite: FirstNonfinite
    snapshot_step: int
    last_step: int
    reproduced: bool
    control_failed_at: int | None
    time_noise: float | None
    remedies: tuple[Remedy, ...]
    warnings: tuple[str, ...]

    @property
    def confirmed_by(self) -> list[str]:
        """The changes that confirm the cause."""
        return [remedy.change for remedy in self.remedies if remedy.confirms]


def try_changes(
    run_folder: Path,
    names: list[str],
    steps: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
    *,
    trust: bool = False,
) -> Counterfactual:
    """Try changes on a failed run and write the remedies into its ``forensics.json``.

    ``steps`` counts from the snapshot; None: `STEPS`, or as many as reach `STEPS_BEYOND` the failure. ``trust`` a run that
    somebody else made. Raises `NothingToReplay`, `SnapshotError`, `RebuildError`, `SettingsError` or `UnknownId`, each saying
    what to do.
    """
    record, forensics = _read(run_folder)
    first = forensics.first_nonfinite
    state = read_state(run_folder, record.run_id)
    last = last_step(state.step, first.step, record.max_steps, steps)
    progress("data and model")
    rebuilt = rebuild(record, trust=trust)
    changes = changes_of(names, rebuilt.settings.config, rebuilt.model, first)
    timed = list(range(state.step + 1, min(first.step, state.step + MOST_TIMED_STEPS) + 1))
    progress("unchanged")
    try:
        control = run_changed(rebuilt, None, state, first.step, timed)
    except Unsupported as error:
        raise RebuildError(f"{record.run_id} cannot be run again here: {error}") from error
    reproduced = control.failed_at == first.step and control.first is not None and control.first.phase == first.phase_surfaced
    tried = _Changes(rebuilt, state, first, last, timed, control, reproduced, progress, [control.step_time_s])
    remedies = [tried.remedy(change) for change in changes]
    if "all" in names:
        remedies += tried.enclosing(first.module, remedies)
    _keep(run_folder, remedies)
    replay = state.step, last, reproduced, control.failed_at, tried.time_noise()
    return Counterfactual(record.run_id, forensics.sentence, first, *replay, tuple(remedies), rebuilt.warnings)


def last_step(snapshot: int, failed: int, max_steps: int, steps: int | None) -> int:
    """The step to replay up to; raises `SettingsError` for one before the failure."""
    if steps is None:
        steps = max(STEPS, failed - snapshot + STEPS_BEYOND)
    if snapshot + steps < failed:
        where = f"the snapshot is of step {snapshot} and the run failed at step {failed}"
        raise SettingsError(f"--steps {steps} ends before the failure: {where}; give at least {failed - snapshot}")
    return min(snapshot + steps, max_steps)


@dataclass(frozen=True)
class _Changes:
    """What all changed runs have in common. ``control_times_s``: the unchanged run's timed steps, before the
    first change and again after every one that survived, so that a machine that slows down favours none."""

    rebuilt: Rebuilt
    state: NamedState
    first: FirstNonfinite
    last: int
    timed: list[int]
    control: ChangedRun
    reproduced: bool
    progress: Callable[[str], None]
    control_times_s: list[float]

    def time_noise(self) -> float | None:
        """How much the same steps' times differ from one timing to the next."""
        times_s = self.control_times_s
        return max((abs(b / a - 1) for a, b in zip(times_s, times_s[1:], strict=False)), default=None)

    def remedy(self, change: Change) -> Remedy:
        """One change, tried, or why it was not."""
        unknown = dict.fromkeys(("survives", "failed_at", "step_time_ratio", "bytes_ratio", "confirms"))
        untried = partial(Remedy, change=change.name, steps=0, **unknown)
        if change.why_not is not None:
            return untried(why=change.why_not)
        self.progress(change.name)
        try:
            run = run_changed(self.rebuilt, change, self.state, self.last, self.timed)
        except (Unsupported, RuntimeError) as error:  # a module whose neighbours do not take fp32 says so here
            return untried(why=f"could not be run: {str(error).splitlines()[0]}")
        if run.in_fp32 is not None and not run.in_fp32.calls:
            return untried(why=f"{change.module} only holds other modules: it is never called itself")
        survives = run.failed_at is None and run.applied > 0
        cause = confirms(change.name, self.first) if survives and self.reproduced else None
        time_ratio, too_noisy = self._time_ratio(run)
        notes = [*self._notes(change, run, cause), *([too_noisy] if too_noisy else [])]
        return Remedy(
            change=change.name,
            survives=survives,
            steps=(run.failed_at or self.last) - self.state.step,
            failed_at=run.failed_at,
            step_time_ratio=time_ratio,
            bytes_ratio=run.bytes / self.control.bytes if run.bytes else None,
            confirms=cause,
            why="; ".join(notes) or None,
        )

    def _time_ratio(self, run: ChangedRun) -> tuple[float | None, str | None]:
        """To the mean of the unchanged run's times just before and just after; or none, and why."""
        if run.step_time_s is None:
            return None, None
        self.control_times_s.append(run_changed(self.rebuilt, None, self.state, self.timed[-1], self.timed).step_time_s)
        before_s, after_s = self.control_times_s[-2:]
        if not 1 / (1 + MOST_TIME_NOISE) <= after_s / before_s <= 1 + MOST_TIME_NOISE:
            return None, f"no step time: the unchanged steps took {after_s / before_s:.2f}x as long after as before"
        return 2 * run.step_time_s / (before_s + after_s), None

    def enclosing(self, module: str | None, tried: list[Remedy]) -> Iterator[Remedy]:
        """Where fp32 in the culprit alone does not help (others overflow as well): the modules around it, from
        the inside out, until one does."""
        if any(remedy.confirms for remedy in tried) or self.first.phase not in ("forward", "backward"):
            return
        for name in enclosing_modules(self.rebuilt.model, module):
            remedy = self.remedy(change_of(f"fp32:{name}", self.rebuilt.settings.config, self.rebuilt.model))
            yield remedy
            if remedy.survives:
                return

    def _notes(self, change: Change, run: ChangedRun, cause: str | None) -> Iterator[str]:
        """What a person must know beside yes and no."""
        if run.failed_at is not None:
            yield _where(run)
            weights = DTYPES[change.config.weights]
            if run.in_fp32 is not None and run.in_fp32.largest is not None and run.in_fp32.largest > torch.finfo(weights).max:
                largest = float(run.in_fp32.largest)
                yield f"in fp32 its largest output was {largest:.3g}, which {change.config.weights} cannot hold"
        if run.skipped:
            yield f"{run.skipped} of {run.applied + run.skipped} updates skipped by the scaler"
        if run.failed_at is None and run.applied == 0:
            yield "nothing was trained"
        elif run.failed_at is None and not self.reproduced:
            yield "proves nothing: the unchanged run did not fail again"
        elif run.failed_at is None and cause is None:
            yield "avoids the failure without removing its cause"


def _where(run: ChangedRun) -> str:
    """The place of a changed run's failure, for a sentence."""
    if run.first is None:
        return "the loss exploded"
    if run.found is None:
        return f"{run.first.phase}: {run.first.tensor} is {run.first.kind}"
    found = run.found
    place = " ".join(part for part in (found.module, found.op) if part)
    return f"{found.cause.replace('_', ' ')} in {found.phase}" + (f", {place}" if place else "")


def _read(run_folder: Path) -> tuple[RunRecord, ForensicsRecord]:
    """The run's row and its forensics; a healthy run has none, or those of an older run of the same settings."""
    why = "--try is for runs that ended in a non-finite value under --instrument light or full"
    try:
        record = decode(read_plain(run_folder / "run.json"), RunRecord)
        if record.status != "diverged":
            raise NothingToReplay(f"{record.run_id} is {record.status}: {why}")
        return record, decode(read_plain(run_folder / "forensics.json"), ForensicsRecord)
    except FileNotFoundError as error:
        raise NothingToReplay(f"{run_folder.name} has no {Path(error.filename).name}: {why}") from error
    except (OSError, *UNREADABLE) as error:
        raise SnapshotError(f"{run_folder}: {error}") from error


def _keep(run_folder: Path, remedies: list[Remedy]) -> None:
    """Put the remedies into ``forensics.json``, in place of older ones of the same changes."""
    path = run_folder / "forensics.json"
    forensics = decode(path.read_bytes(), ForensicsRecord)
    new = {remedy.change for remedy in remedies}
    kept = [remedy for remedy in forensics.remedies if remedy.change not in new]
    replace(path, encode(msgspec.structs.replace(forensics, remedies=(*kept, *remedies))) + b"\n")
