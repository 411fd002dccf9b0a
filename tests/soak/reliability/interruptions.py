"""SIGTERM and SIGINT at random moments: exit code 75, the row ``preempted``, and the same command goes on."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from harness.exit_codes import INTERRUPTED
from harness.run import checkpoint_files
from harness.settings import RunSettings
from instrument.results.folder import finished_run
from tests.soak.reliability import same_run
from tests.soak.reliability.aftermath import goes_on, left_alone
from tests.soak.reliability.processes import Ended, run, signalled, small
from tests.soak.reliability.trial import Trial, share_of

TIMES = 20
STEPS = 40
BEFORE_A_STEP_S, BEHIND_A_STEP_S = 0.6, 0.02
"""The longest wait: one in five comes while the run is prepared, the others behind a step."""


def signals(share: float, folder: Path) -> Iterator[Trial]:
    """A trial a signal, SIGTERM and SIGINT in turn."""
    settings, out, rng = small("amp_bf16", max_steps=STEPS, eval_every=10), folder / "out", random.Random(4)
    whole = left_alone(settings, folder)
    for number in range(share_of(TIMES, share)):
        behind = 0 if number % 5 == 4 else rng.randint(1, STEPS * 3 // 4)
        kind, delay_s = (
            (signal.SIGTERM, signal.SIGINT)[number % 2],
            rng.random() * (BEHIND_A_STEP_S if behind else BEFORE_A_STEP_S),
        )
        part = run(settings, out, blow=signalled(kind, behind, delay_s))
        losses = _stopped_well(settings, out, part) + goes_on(settings, out, whole, [part])
        shutil.rmtree(out)
        yield Trial(
            f"{kind.name} {1000 * delay_s:.0f} ms behind step {behind}",
            losses,
            {"acknowledged rows": len(part.acknowledged), "behind a checkpoint": part.steps > 0},
        )


def _stopped_well(settings: RunSettings, out: Path, part: Ended) -> list[str]:
    """What is wrong with a run that was asked to stop; one that had not begun has no row yet."""
    row = finished_run(out, settings.run_id)
    losses = [] if part.exit_code == INTERRUPTED else [f"exit code {part.exit_code}: {part.sentence}"]
    losses += same_run.lost_rows([part], settings.run_id, out)
    losses += ["a traceback was printed"] if "Traceback" in part.heard else []
    losses += ["a torn line"] if same_run.torn_lines(settings.run_id, out) else []
    if row is None:
        return losses + (["no row"] if part.acknowledged else [])
    losses += [] if row.status == "preempted" else [f"its row says {row.status}"]
    newest = checkpoint_files.steps(out / "runs" / settings.run_id)[:1]
    losses += [] if newest == [row.steps_done] * (row.steps_done > 0) else [f"{row.steps_done} steps, checkpoint {newest}"]
    return losses + same_run.terminal_records(settings.run_id, out)
