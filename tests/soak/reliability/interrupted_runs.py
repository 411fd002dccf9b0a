"""Runs that die at a file operation, are killed, or are asked to stop, at every operation or at random moments, and then
resume.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.exit_codes import INTERRUPTED, OK
from harness.run.progress import checkpoint_steps
from harness.settings import RunSettings
from instrument.results.folder import finished_run
from tests.crash_hook import CRASHED
from tests.soak.reliability import same_run
from tests.soak.reliability.processes import ProcessResult, asked_to_stop, run, signalled, small
from tests.soak.reliability.same_run import completed, finished_well, left_alone, repaired, resumes_well
from tests.soak.reliability.trials import Trial, share_of

TWICE = 100
"""Pairs of deaths, each at a random operation."""


def sweep(share: float, folder: Path, *, after_step: int = 0) -> Iterator[Trial]:
    """A trial for every file operation of a run with checkpoints, or for a random share of them. ``after_step``: of the part
    that resumes from the checkpoint after that step."""
    settings, begun = _settings(), folder / "begun"
    whole = left_alone(settings, folder)
    begun.mkdir()
    before = [run(settings, begun, then=(after_step, asked_to_stop))] if after_step else []
    count = _count(settings, begun, folder / "counted")
    for nth in sorted(random.Random(0).sample(range(1, count + 1), share_of(count, share))):
        yield _trial(f"operation {nth} of {count}", settings, folder / "out", whole, begun, before, [nth])


def sweep_resumed(share: float, folder: Path) -> Iterator[Trial]:
    """Every file operation of a resumed run."""
    return sweep(share, folder, after_step=3)


def twice(share: float, folder: Path) -> Iterator[Trial]:
    """Two deaths, the second at a random operation of the resumed run."""
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
    name: str, settings: RunSettings, out: Path, whole: Path, begun: Path, before: list[ProcessResult], deaths: list[int]
) -> Trial:
    """Die at each of ``deaths``, then resume; once as it is and once after a repair."""
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
            if len(deaths) == 1 or parts[-1].exit_code != OK:  # a resumed run may have fewer operations
                losses.append(f"did not die at it: exit code {parts[-1].exit_code}, {parts[-1].sentence}")
            break
    counts["acknowledged rows"] = sum(len(part.acknowledged) for part in parts)
    repaired_copy = out.with_name(f"{out.name}-repaired")
    shutil.copytree(out, repaired_copy)
    losses += repaired(repaired_copy)
    losses += [f"after repair: {loss}" for loss in same_run.lost_rows(parts, settings.run_id, repaired_copy)]
    for place in (out, repaired_copy):
        losses += [f"{place.name}: {loss}" for loss in resumes_well(settings, place, whole, parts)]
        shutil.rmtree(place)
    return Trial(name, losses, counts)


KILLS = 300
MOST_KILLS_PER_RUN = 15
CONFIGS = ("amp_fp16", "amp_bf16_8bit", "bf16_pure_sr")
BEFORE_A_ROW_S, AFTER_A_ROW_S = 0.6, 0.04
"""The longest wait: from the process' start, and after a row, where the next step, an evaluation, a checkpoint or the
end comes."""


def kills(share: float, folder: Path) -> Iterator[Trial]:
    """A trial a run: it is killed up to `MOST_KILLS_PER_RUN` times, and stands for as many."""
    count, killed, number, rng = share_of(KILLS, share), 0, 0, random.Random(0)
    while killed < count:
        settings = small(CONFIGS[number % len(CONFIGS)], max_steps=40, eval_every=10, checkpoint_every=3)
        whole, out = left_alone(settings, folder), folder / "out"
        parts, losses = _killed(settings, out, min(count - killed, MOST_KILLS_PER_RUN), rng)
        ended = parts[-1].exit_code == OK
        deaths = len(parts) - ended
        losses += (finished_well if ended else resumes_well)(settings, out, whole, parts)
        shutil.rmtree(out)
        killed, number = killed + deaths, number + 1
        yield Trial(
            f"run {number}, {settings.config.id}",
            losses,
            {"SIGKILLs": deaths, "acknowledged rows": sum(len(part.acknowledged) for part in parts)},
            stands_for=deaths,
        )


def _killed(settings: RunSettings, out: Path, times: int, rng: random.Random) -> tuple[list[ProcessResult], list[str]]:
    """Start and kill it up to ``times`` times; its parts, the last of which may have ended first, and what a death lost."""
    parts: list[ProcessResult] = []
    losses: list[str] = []
    for _ in range(times):
        after = rng.randint(0, 4)
        longest_s = AFTER_A_ROW_S if after else BEFORE_A_ROW_S
        parts.append(run(settings, out, blow=signalled(signal.SIGKILL, after, rng.random() * longest_s)))
        torn = same_run.torn_lines(settings.run_id, out)
        losses += same_run.lost_rows(parts, settings.run_id, out) + [f"{torn} torn lines"] * (torn > 1)
        if parts[-1].exit_code != -signal.SIGKILL:
            losses += [] if parts[-1].exit_code == OK else [f"exit code {parts[-1].exit_code}: {parts[-1].sentence}"]
            break
    return parts, losses


SIGNALS = 20
STEPS = 40
BEFORE_A_STEP_S, AFTER_A_STEP_S = 0.6, 0.02
"""The longest wait: one in five comes while the run is prepared, the others after a step."""


def signals(share: float, folder: Path) -> Iterator[Trial]:
    """A trial a signal, SIGTERM and SIGINT in turn."""
    settings, out, rng = small("amp_bf16", max_steps=STEPS, eval_every=10), folder / "out", random.Random(4)
    whole = left_alone(settings, folder)
    for number in range(share_of(SIGNALS, share)):
        after = 0 if number % 5 == 4 else rng.randint(1, STEPS * 3 // 4)
        kind, delay_s = (
            (signal.SIGTERM, signal.SIGINT)[number % 2],
            rng.random() * (AFTER_A_STEP_S if after else BEFORE_A_STEP_S),
        )
        part = run(settings, out, blow=signalled(kind, after, delay_s))
        losses = _stopped_well(settings, out, part) + resumes_well(settings, out, whole, [part])
        shutil.rmtree(out)
        yield Trial(
            f"{kind.name} {1000 * delay_s:.0f} ms after step {after}",
            losses,
            {"acknowledged rows": len(part.acknowledged), "after a checkpoint": part.steps > 0},
        )


def _stopped_well(settings: RunSettings, out: Path, part: ProcessResult) -> list[str]:
    """What is wrong with a run that was asked to stop; one that had not begun has no row yet."""
    row = finished_run(out, settings.run_id)
    losses = [] if part.exit_code == INTERRUPTED else [f"exit code {part.exit_code}: {part.sentence}"]
    losses += same_run.lost_rows([part], settings.run_id, out)
    losses += ["a traceback was printed"] if "Traceback" in part.stderr else []
    losses += ["a torn line"] if same_run.torn_lines(settings.run_id, out) else []
    if row is None:
        return losses + (["no row"] if part.acknowledged else [])
    losses += [] if row.status == "preempted" else [f"its row says {row.status}"]
    newest = checkpoint_steps(out / "runs" / settings.run_id)[:1]
    losses += [] if newest == [row.steps_done] * (row.steps_done > 0) else [f"{row.steps_done} steps, checkpoint {newest}"]
    return losses + same_run.terminal_records(settings.run_id, out)
