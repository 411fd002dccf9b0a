"""Trials in processes of their own, from a fork server: one that runs out of memory, crashes or hangs costs only itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.fit.trial import Trial, device_facts, enter
from harness.settings import RunSettings
from harness.supervisor.child_process import ForkServerProcess

TRIAL_S = 180.0
"""A trial that takes longer is ended: it counts as one that does not run."""


class Processes:
    """Starts one trial at a time. ``memory_limit_bytes``: see `harness.fit.trial`."""

    def __init__(self, memory_limit_bytes: int | None, at_most_s: float = TRIAL_S) -> None:
        self.memory_limit_bytes, self.at_most_s = memory_limit_bytes, at_most_s

    def trial(self, settings: RunSettings, *, timed: bool) -> Trial:
        """Run one, and wait for it."""
        trial, why = self._run(enter, settings, timed, self.memory_limit_bytes)
        return trial if trial is not None else Trial(settings.batch_size, "crashed", why)

    def facts(self) -> tuple[str, str, int | None]:
        """(device slug, device name, its memory in bytes), without touching the GPU from here."""
        facts, why = self._run(device_facts)
        if facts is None:
            raise RuntimeError(f"the process that asks the device for its name failed: {why}")
        return facts

    def _run(self, target: Callable, *arguments: Any) -> tuple[Any, str | None]:
        """What the process sent, or None and how it ended."""
        with ForkServerProcess(target, arguments, preload=["harness.fit.trial"]) as child:
            if (result := child.result(self.at_most_s)) is not None:
                return result, None
            if child.connected:
                return None, f"it did not end within {self.at_most_s:.0f} s"
            return None, child.failure().error
