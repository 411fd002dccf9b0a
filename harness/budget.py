"""What may still be spent: GPU-hours or money, by forecasts before a run begins and by the clock while runs go on.

Pure arithmetic, torch-free; the caller tells the time. A *unit* is what is paid by the hour: a GPU (with ``--engine
local`` the one of this machine), or without GPUs a machine. A unit costs as long as it is held, whether it
works or waits. Three lines are drawn, in this order:

1. no run begins whose forecast, with what the running ones still need, goes beyond the budget;
2. `Budget.margin_s` before the budget is spent, runs are asked to stop, each behind a checkpoint;
3. what has not stopped when it is spent is killed (and goes on from its checkpoint before).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from harness.parallel.ranks import Ranks
from harness.settings import RunSettings, SettingsError

ALONE = Ranks()
MARGIN_S = {"full": 60.0, "tiny": 5.0}
"""For the last step and a checkpoint, by preset: 1.5 GB for GPT-2 124M, or a few MB."""
START_UP_S = 5.0
"""Process, data and model of a run that has not been measured: an assumption, corrected by the first run that ends."""


@dataclass(frozen=True)
class Budget:
    """``limit_unit_s``: seconds of one unit, so an hour of two GPUs is 7,200. ``price_per_hour`` of a unit, or None."""

    limit_unit_s: float
    unit: str
    price_per_hour: float | None
    margin_s: float

    def words(self, unit_s: float) -> str:
        """``1.25 GPU-hours (2.50 USD)``; little of it in seconds."""
        time = f"{unit_s / 3600:.3g} {self.unit}-hours" if unit_s >= 360 else f"{unit_s:.0f} {self.unit}-seconds"
        if self.price_per_hour is None:
            return time
        usd = unit_s / 3600 * self.price_per_hour
        return f"{time} ({usd:,.2f} USD)" if usd >= 1 else f"{time} ({usd:.3f} USD)"


def asked_budget(options: argparse.Namespace, *, device: str, preset: str, ranks: Ranks = ALONE) -> Budget | None:
    """What ``--max-gpu-hours``, ``--budget-usd`` and ``--price-per-hour`` say; None when they say nothing. For a run on
    several ``ranks`` in seconds of the clock: each holds a GPU, and the price is each machine's. Raises `SettingsError`."""
    max_gpu_hours, budget_usd, price_per_hour = options.max_gpu_hours, options.budget_usd, options.price_per_hour
    given = {"--max-gpu-hours": max_gpu_hours, "--budget-usd": budget_usd, "--price-per-hour": price_per_hour}
    for name, value in given.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SettingsError(f"{name} is {value:g}; it must be a positive number")
    if (budget_usd is None) != (price_per_hour is None):
        raise SettingsError(
            f"--budget-usd and --price-per-hour go together; given: "
            f"{'--budget-usd' if price_per_hour is None else '--price-per-hour'} alone"
        )
    if max_gpu_hours is not None and device != "cuda":
        raise SettingsError(
            "--max-gpu-hours counts GPUs, and this runs on a CPU; allowed here: --budget-usd X "
            "--price-per-hour Y, of the machine"
        )
    usd_per_hour = price_per_hour and price_per_hour * math.ceil(ranks.world / ranks.local_world)
    limits_h = ([max_gpu_hours / ranks.world] if max_gpu_hours else []) + ([budget_usd / usd_per_hour] if budget_usd else [])
    if not limits_h:
        return None
    unit = "clock" if ranks.world > 1 else "GPU" if device == "cuda" else "machine"
    return Budget(min(limits_h) * 3600, unit, usd_per_hour, MARGIN_S.get(preset, 60.0))


@dataclass
class Forecast:
    """How long runs take: as long as runs of the same case and configuration took here; else their estimate, times what
    measured runs took relative to theirs. ``estimates_s``: by `kind`; None where there is none."""

    estimates_s: Mapping[tuple[str, str], float | None] = field(default_factory=dict)
    measured_s: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def learn(self, run: RunSettings, duration_s: float) -> None:
        """A run was executed from its beginning to its end."""
        self.learn_kind(kind(run), duration_s)

    def learn_kind(self, name: tuple[str, str], duration_s: float) -> None:
        """A run of this kind was."""
        self.measured_s.setdefault(name, []).append(duration_s)

    def of(self, run: RunSettings) -> float | None:
        """Seconds, from the start of its process to its row; None when there is nothing to go by."""
        if (own := self.measured_s.get(kind(run))) is not None:
            return fmean(own)
        estimate_s = self.estimates_s.get(kind(run))
        if estimate_s is not None:
            return estimate_s * self._correction()
        every = [seconds for measured in self.measured_s.values() for seconds in measured]
        return fmean(every) if every else None

    def _correction(self) -> float:
        pairs = [
            (fmean(measured), estimate_s)
            for name, measured in self.measured_s.items()
            if (estimate_s := self.estimates_s.get(name)) is not None
        ]
        return sum(measured for measured, _ in pairs) / sum(estimated for _, estimated in pairs) if pairs else 1.0


def kind(run: RunSettings) -> tuple[str, str]:
    """Runs of one kind take as long as each other: one matrix' runs differ in case, configuration and seed only."""
    return run.case.id, run.config.id


@dataclass(frozen=True)
class InFlight:
    """A run that is being executed: for how long, its forecast, and which share of its steps is done (None: unknown)."""

    elapsed_s: float
    forecast_s: float | None
    done_share: float | None = None

    def remaining_s(self) -> float:
        """Seconds it still needs; 0 where nothing is known."""
        if self.done_share:
            return self.elapsed_s / self.done_share - self.elapsed_s
        return max(0.0, (self.forecast_s or 0.0) - self.elapsed_s)


@dataclass
class Meter:
    """Unit-seconds spent by ``now_s`` (any monotonic clock's seconds), from what was held since the last look."""

    now_s: float
    spent_unit_s: float = 0.0

    def look(self, now_s: float, units_held: int) -> float:
        """Count the time since the last look; returns the total."""
        self.spent_unit_s += max(0.0, now_s - self.now_s) * units_held
        self.now_s = now_s
        return self.spent_unit_s


def admits(
    budget: Budget,
    spent_unit_s: float,
    running: Iterable[InFlight],
    forecast_s: float | None,
    *,
    shared: bool,
    until_next_look_s: float,
) -> bool:
    """Whether a run may begin: what it and the running ones still need is there. ``shared``: they share one unit, which is
    held until the last of them ends; else each has its own. A run without a forecast begins where there is any room. What
    is `must_stop`'s is not there."""
    needs_s = [run.remaining_s() for run in running] + [forecast_s or 0.0]
    needed_unit_s = max(needs_s) if shared else sum(needs_s)
    units = 1 if shared else len(needs_s)
    return spent_unit_s + needed_unit_s + (budget.margin_s + until_next_look_s) * units < budget.limit_unit_s


def must_stop(budget: Budget, spent_unit_s: float, units_held: int, until_next_look_s: float) -> bool:
    """Whether the margin begins before anybody looks again."""
    return spent_unit_s + (budget.margin_s + until_next_look_s) * units_held >= budget.limit_unit_s


def must_kill(budget: Budget, spent_unit_s: float, units_held: int, until_next_look_s: float) -> bool:
    """Whether the budget is spent before anybody looks again."""
    return spent_unit_s + until_next_look_s * units_held >= budget.limit_unit_s


def fitting(
    budget: Budget, spent_unit_s: float, forecasts_s: list[float | None], *, jobs: int, shared: bool, until_next_look_s: float
) -> tuple[int, float | None]:
    """How many of the runs fit, in their order, and what all of them need in unit-seconds (None: not all have a
    forecast). ``jobs`` runs at a time; those that share a unit are taken to share its time evenly."""
    share, needed_unit_s, fit, known = 1 / jobs if shared else 1.0, 0.0, 0, True
    room_unit_s = budget.limit_unit_s - spent_unit_s - (budget.margin_s + until_next_look_s) * (1 if shared else jobs)
    for seconds in forecasts_s:
        known = known and seconds is not None
        needed_unit_s += (seconds or 0.0) * share
        fit += known and needed_unit_s < room_unit_s
    return fit, needed_unit_s if known else None
