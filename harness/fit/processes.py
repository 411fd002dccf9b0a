"""Trials in processes of their own, from a fork server: one that runs out of memory, crashes or hangs costs only itself."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

from harness.fit.trial import Trial, device_facts, enter
from harness.settings import RunSettings

TRIAL_S = 180.0
"""A trial that takes longer is ended: it counts as one that does not run."""


class Processes:
    """Starts one trial at a time. ``memory_limit_bytes``: see `harness.fit.trial`."""

    def __init__(self, memory_limit_bytes: int | None, at_most_s: float = TRIAL_S) -> None:
        self.memory_limit_bytes, self.at_most_s = memory_limit_bytes, at_most_s
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["harness.fit.trial"])

    def trial(self, settings: RunSettings, *, timed: bool) -> Trial:
        """Run one, and wait for it."""
        told, why = self._run(enter, settings, timed, self.memory_limit_bytes)
        return told if told is not None else Trial(settings.batch_size, "crashed", why)

    def facts(self) -> tuple[str, str, int | None]:
        """(device slug, device name, its memory in bytes), without touching the GPU from here."""
        told, why = self._run(device_facts)
        if told is None:
            raise RuntimeError(f"the device does not tell its name: {why}")
        return told

    def _run(self, target: Callable, *arguments: Any) -> tuple[Any, str | None]:
        """What the process sent, or None and how it ended."""
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=target, args=(*arguments, there), daemon=True)
        process.start()
        there.close()
        try:
            if not here.poll(self.at_most_s):
                return None, f"it did not end within {self.at_most_s:.0f} s"
            return here.recv(), None
        except EOFError:
            process.join(10)
            return None, _death(process.exitcode)
        finally:
            process.kill()
            process.join()
            here.close()


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code} and no word"
