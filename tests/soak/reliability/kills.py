"""SIGKILL at random moments of runs that start again each time, until each has ended."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from harness.exit_codes import OK
from harness.settings import RunSettings
from tests.soak.reliability import same_run
from tests.soak.reliability.aftermath import finished_well, goes_on, left_alone
from tests.soak.reliability.processes import Ended, run, signalled, small
from tests.soak.reliability.trial import Trial, share_of

KILLS = 300
AT_MOST_A_RUN = 15
CONFIGS = ("amp_fp16", "amp_bf16_8bit", "bf16_pure_sr")
BEFORE_A_ROW_S, BEHIND_A_ROW_S = 0.6, 0.04
"""The longest wait: from the process' start, and behind a row, where the next step, an evaluation, a checkpoint or the
end comes."""


def kills(share: float, folder: Path) -> Iterator[Trial]:
    """A trial a run: it is killed up to `AT_MOST_A_RUN` times, and stands for as many."""
    count, killed, number, rng = share_of(KILLS, share), 0, 0, random.Random(0)
    while killed < count:
        settings = small(CONFIGS[number % len(CONFIGS)], max_steps=40, eval_every=10, checkpoint_every=3)
        whole, out = left_alone(settings, folder), folder / "out"
        parts, losses = _killed(settings, out, min(count - killed, AT_MOST_A_RUN), rng)
        ended = parts[-1].exit_code == OK
        deaths = len(parts) - ended
        losses += (finished_well if ended else goes_on)(settings, out, whole, parts)
        shutil.rmtree(out)
        killed, number = killed + deaths, number + 1
        yield Trial(
            f"run {number}, {settings.config.id}",
            losses,
            {"SIGKILLs": deaths, "acknowledged rows": sum(len(part.acknowledged) for part in parts)},
            stands_for=deaths,
        )


def _killed(settings: RunSettings, out: Path, times: int, rng: random.Random) -> tuple[list[Ended], list[str]]:
    """Start and kill it up to ``times`` times; its parts, the last of which may have ended first, and what a death lost."""
    parts: list[Ended] = []
    losses: list[str] = []
    for _ in range(times):
        behind = rng.randint(0, 4)
        longest_s = BEHIND_A_ROW_S if behind else BEFORE_A_ROW_S
        parts.append(run(settings, out, blow=signalled(signal.SIGKILL, behind, rng.random() * longest_s)))
        torn = same_run.torn_lines(settings.run_id, out)
        losses += same_run.lost_rows(parts, settings.run_id, out) + [f"{torn} torn lines"] * (torn > 1)
        if parts[-1].exit_code != -signal.SIGKILL:
            losses += [] if parts[-1].exit_code == OK else [f"exit code {parts[-1].exit_code}: {parts[-1].sentence}"]
            break
    return parts, losses
