"""Which runs may enter a figure of speed or memory: completed, timed long enough, undisturbed."""

from __future__ import annotations

import numpy as np

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.tables.judgement import death_words
from report.tables.selection import Selection

FEWEST_STEPS = 50
FEWEST_STEPS_TINY = 10


def eligible(folder: Folder, selection: Selection) -> tuple[list[RunRecord], tuple[tuple[str, str], ...]]:
    """The runs that may enter, and the others with their reasons (with those the selection left out)."""
    reasons = {run.run_id: why_not(folder, run) for run in selection.runs}
    left_out = tuple((run_id, reason) for run_id, reason in reasons.items() if reason is not None)
    return [run for run in selection.runs if reasons[run.run_id] is None], selection.excluded + left_out


def why_not(folder: Folder, run: RunRecord) -> str | None:
    """Why a run's speed says nothing, or None."""
    if run.status == "diverged":
        return death_words(run)
    if run.status != "completed":
        return run.status
    if run.samples_per_s is None:
        return "no step was timed"
    needed = FEWEST_STEPS_TINY if run.preset == "tiny" else FEWEST_STEPS
    found = int(timed(folder, run).sum())
    if found < needed:
        return f"{found} timed, finite steps after warm-up, and {needed} are needed"
    return disturbed(run)


def timed(folder: Folder, run: RunRecord) -> np.ndarray:
    """Which steps of a run count for speed: after the untimed ones, with a finite time and loss."""
    columns = folder.steps(run.run_id)
    return (columns["step"] > untimed_steps(run)) & np.isfinite(columns["step_time_s"]) & np.isfinite(columns["loss"])


def untimed_steps(run: RunRecord) -> int:
    """Steps at the start that no speed counts (allocation, kernel selection, compilation)."""
    told = run.config.get("untimed_steps")
    return told if isinstance(told, int) else run.steps_done - run.timed_steps


def disturbed(run: RunRecord) -> str | None:
    """A card that slowed itself down, or that others used: ``flags["hardware"]`` says so."""
    hardware = run.flags.get("hardware") or {}
    if not isinstance(hardware, dict):
        return None
    if hardware.get("throttled"):
        reasons = hardware.get("throttle_reasons")
        return "throttled" + (f": {', '.join(map(str, reasons))}" if isinstance(reasons, list) and reasons else "")
    return "contended: another process used the GPU" if hardware.get("contended") else None
