"""The budget of one call, in GPU-hours or money, from its options; and how a single run keeps it. Torch-free.

A *unit* is what is paid by the hour: a GPU (with ``--engine local`` the one of this machine), or without GPUs a machine. A unit
costs as long as it is held, whether it works or waits.
"""

from __future__ import annotations

import _thread
import argparse
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from harness.parallel.ranks import Ranks, is_main_process
from harness.run.signals import Stop
from harness.settings import SettingsError

ONE_PROCESS = Ranks()
MARGIN_S = {"full": 60.0, "tiny": 5.0}
"""For the last step and a checkpoint, by preset: 1.5 GB for GPT-2 124M, or a few MB."""
LOOK_EVERY_S = 1.0
"""Ticks come more often; a machine that is busy may take as long as this for one."""
BY_THE_BUDGET = "the budget"
"""Who asks a run to stop."""


@dataclass(frozen=True)
class Budget:
    """``limit_unit_s``: seconds of one unit, so an hour of two GPUs is 7,200. ``price_per_hour`` of a unit, or None.
    ``margin_s`` before the budget is spent, runs are asked to stop."""

    limit_unit_s: float
    unit: str
    price_per_hour: float | None
    margin_s: float

    def text(self, unit_s: float) -> str:
        """``1.25 GPU-hours (2.50 USD)``; little of it in seconds."""
        time = f"{unit_s / 3600:.3g} {self.unit}-hours" if unit_s >= 360 else f"{unit_s:.0f} {self.unit}-seconds"
        if self.price_per_hour is None:
            return time
        usd = unit_s / 3600 * self.price_per_hour
        return f"{time} ({usd:,.2f} USD)" if usd >= 1 else f"{time} ({usd:.3f} USD)"


def asked_budget(options: argparse.Namespace, *, device: str, preset: str, ranks: Ranks = ONE_PROCESS) -> Budget | None:
    """What ``--max-gpu-hours``, ``--budget-usd`` and ``--price-per-hour`` say; None when they say nothing. For a run on
    several ``ranks`` in seconds of the clock: each holds a GPU, and the price is each machine's. Raises `SettingsError`."""
    max_gpu_hours, budget_usd, price_per_hour = options.max_gpu_hours, options.budget_usd, options.price_per_hour
    given = {"--max-gpu-hours": max_gpu_hours, "--budget-usd": budget_usd, "--price-per-hour": price_per_hour}
    for name, value in given.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SettingsError(f"{name} is {value:g}; it must be a positive number")
    if (budget_usd is None) != (price_per_hour is None):
        alone = "--budget-usd" if price_per_hour is None else "--price-per-hour"
        raise SettingsError(f"--budget-usd and --price-per-hour go together; given: {alone} alone")
    if max_gpu_hours is not None and device != "cuda":
        allowed = "--budget-usd X --price-per-hour Y, of the machine"
        raise SettingsError(f"--max-gpu-hours counts GPUs, and this runs on a CPU; allowed here: {allowed}")
    usd_per_hour = price_per_hour and price_per_hour * math.ceil(ranks.world / ranks.local_world)
    limits_h = ([max_gpu_hours / ranks.world] if max_gpu_hours else []) + ([budget_usd / usd_per_hour] if budget_usd else [])
    if not limits_h:
        return None
    unit = "clock" if ranks.world > 1 else "GPU" if device == "cuda" else "machine"
    return Budget(min(limits_h) * 3600, unit, usd_per_hour, MARGIN_S.get(preset, 60.0))


@contextmanager
def ending_in_time(budget: Budget | None, stop: Stop) -> Iterator[None]:
    """One run in this process under a budget: it is asked to stop when the margin begins, and interrupted at the end."""
    if budget is None:
        yield
        return
    refuse_too_little(budget)
    left_s, margin_s, limit = budget.limit_unit_s - process_age_s(), budget.margin_s, budget.text(budget.limit_unit_s)
    if is_main_process():
        print(f"budget: {limit}; {margin_s:.0f} s before it is spent, the run is stopped after a checkpoint", file=sys.stderr)
    timers = [
        threading.Timer(left_s - margin_s - LOOK_EVERY_S, stop.request, [BY_THE_BUDGET]),
        threading.Timer(left_s - LOOK_EVERY_S, _thread.interrupt_main),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def refuse_too_little(budget: Budget) -> None:
    """Raise `SettingsError` where nothing is left to run in."""
    limit, margin_s, age_s = budget.text(budget.limit_unit_s), budget.margin_s, process_age_s()
    if budget.limit_unit_s - age_s <= margin_s + LOOK_EVERY_S:
        why = f"{margin_s:.0f} s are kept for its checkpoint; allowed: more than {margin_s + LOOK_EVERY_S + age_s:.0f} s"
        raise SettingsError(f"a budget of {limit} leaves no time for a run: {why}")


def process_age_s() -> float:
    """Seconds since this process began: its imports are paid for, too."""
    return max(0.0, time.time() - psutil.Process().create_time())
