"""A run that dies at a file operation, at every one, and goes on: alone, from a checkpoint, and when it dies again."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.exit_codes import OK
from harness.settings import RunSettings
from instrument.results.crash_hook import CRASHED
from tests.soak.reliability import same_run
from tests.soak.reliability.aftermath import completed, goes_on, left_alone, repaired
from tests.soak.reliability.processes import Ended, asked_to_stop, run, small
from tests.soak.reliability.trial import Trial, share_of

TWICE = 100
"""Pairs of deaths, each at a random operation."""


def sweep(share: float, folder: Path, *, behind_step: int = 0) -> Iterator[Trial]:
    """A trial for every file operation of a run with checkpoints, or for a random share of them. ``behind_step``: of the part
    that goes on from the checkpoint behind that step."""
    settings, begun = _settings(), folder / "begun"
    whole = left_alone(settings, folder)
    begun.mkdir()
    before = [run(settings, begun, then=(behind_step, asked_to_stop))] if behind_step else []
    count = _count(settings, begun, folder / "counted")
    for nth in sorted(random.Random(0).sample(range(1, count + 1), share_of(count, share))):
        yield _trial(f"operation {nth} of {count}", settings, folder / "out", whole, begun, before, [nth])


def sweep_continued(share: float, folder: Path) -> Iterator[Trial]:
    """Every file operation of a continuation."""
    return sweep(share, folder, behind_step=3)


def twice(share: float, folder: Path) -> Iterator[Trial]:
    """Two deaths, the second at a random operation of the continuation."""
    settings, begun, rng = _settings(), folder / "begun", random.Random(1)
    whole = left_alone(settings, folder)
    begun.mkdir()
    count = _count(settings, begun, folder / "counted")
    for _ in range(share_of(TWICE, share)):
        deaths = [rng.randint(1, count), rng.randint(1, count)]
        yield _trial(f"operations {deaths[0]} and {deaths[1]}", settings, folder / "out", whole, begun, [], deaths)


def _settings() -> RunSettings:
    return small(max_steps=5, eval_every=2, checkpoint_every=2)


def _count(settings: RunSettings, begun: Path, out: Path) -> int:
    """How many file operations the run has."""
    shutil.copytree(begun, out)
    return completed(run(settings, out, crash_at=sys.maxsize)).operations


def _trial(
    name: str, settings: RunSettings, out: Path, whole: Path, begun: Path, before: list[Ended], deaths: list[int]
) -> Trial:
    """Die at each of ``deaths``, then go on; once as it is and once behind a repair."""
    shutil.copytree(begun, out)
    parts, losses, counts = list(before), [], {"torn lines": 0, "deaths": 0}
    for nth in deaths:
        parts.append(run(settings, out, crash_at=nth))
        counts["deaths"] += parts[-1].exit_code == CRASHED
        torn = same_run.torn_lines(settings.run_id, out)
        counts["torn lines"] += torn
        losses += same_run.lost_rows(parts, settings.run_id, out)
        losses += [f"{torn} torn lines"] * (torn > 1)
        if parts[-1].exit_code != CRASHED:
            if len(deaths) == 1 or parts[-1].exit_code != OK:  # a continuation may have fewer operations
                losses.append(f"did not die at it: exit code {parts[-1].exit_code}, {parts[-1].sentence}")
            break
    counts["acknowledged rows"] = sum(len(part.acknowledged) for part in parts)
    mended = out.with_name(f"{out.name}-mended")
    shutil.copytree(out, mended)
    losses += repaired(mended)
    losses += [f"behind repair: {loss}" for loss in same_run.lost_rows(parts, settings.run_id, mended)]
    for place in (out, mended):
        losses += [f"{place.name}: {loss}" for loss in goes_on(settings, place, whole, parts)]
        shutil.rmtree(place)
    return Trial(name, losses, counts)
