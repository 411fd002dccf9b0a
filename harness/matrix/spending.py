"""A matrix under a budget: lets runs into the pool while there is room for them, and stops in time. Torch-free.

Three lines are drawn, in this order:

1. no run begins whose forecast, with what the running ones still need, goes beyond the budget;
2. `Budget.margin_s` before the budget is spent, runs are asked to stop, each after a checkpoint;
3. what has not stopped when it is spent is killed (and resumes from its last checkpoint).

Runs keep their order: one that does not fit is not overtaken by a shorter one after it.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from harness.budget import BY_THE_BUDGET, LOOK_EVERY_S, Budget, process_age_s
from harness.settings import RunSettings
from instrument.results.schemas import RunRecord
from instrument.terminal import count

START_UP_S = 5.0
"""Process, data and model of a run that has not been measured: an assumption, corrected by the first run that ends."""
SIZES = ("max_steps", "batch_size", "micro_batch", "seq_len", "validation_documents", "eval_every", "threads", "preset")
"""Settings that a run's duration goes with: a run's time is a forecast for runs that agree in all of them."""


class BudgetSpent(Exception):
    """The budget is spent, and runs did not stop within the margin."""


def kind(run: RunSettings) -> tuple[str, str]:
    """Runs of one kind take as long as each other: one matrix' runs differ in case, configuration and seed only."""
    return run.case.id, run.config.id


@dataclass
class Forecast:
    """How long runs take, from the start of their process to their row: as long as runs of the same `kind` took here; else
    their estimate, times what measured runs took relative to theirs. ``estimates_s``: None where there is none."""

    estimates_s: Mapping[tuple[str, str], float | None] = field(default_factory=dict)
    measured_s: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def learn(self, name: tuple[str, str], duration_s: float) -> None:
        """A run of this kind was executed from its beginning to its end."""
        self.measured_s.setdefault(name, []).append(duration_s)

    def of(self, run: RunSettings) -> float | None:
        """Seconds; None when there is nothing to go by."""
        if (own := self.measured_s.get(kind(run))) is not None:
            return fmean(own)
        if (estimate_s := self.estimates_s.get(kind(run))) is not None:
            both = [name for name in self.measured_s if self.estimates_s.get(name) is not None]
            measured_s = sum(fmean(self.measured_s[name]) for name in both)
            return estimate_s * (measured_s / sum(self.estimates_s[name] for name in both) if both else 1.0)
        every = [seconds for measured in self.measured_s.values() for seconds in measured]
        return fmean(every) if every else None


class Spending:
    """The budget of one call. Without one (``budget`` None) every run is let in at once."""

    def __init__(self, budget: Budget | None, *, shared: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """``shared``: the runs share one unit, which is held all the time that this process lives, until the last of them ends;
        else each has its own, and the pool says in ``units_held`` what is held."""
        self.budget, self.shared, self.clock, self.forecast = budget, shared, clock, Forecast()
        self.spent_unit_s, self._looked_s = process_age_s() if shared else 0.0, clock()
        self.waiting: list[RunSettings] = []
        self.pool = None

    def unmeasured(self, todo: list[RunSettings], rows: list[RunRecord]) -> list[RunSettings]:
        """Learn what runs of the same kind and sizes took in this folder; returns the runs of the other kinds."""
        sizes = {kind(run): run.as_config() for run in todo}
        for row in rows:
            same = sizes.get((row.case, row.dtype_config))
            if row.status == "completed" and same is not None and all(row.config.get(name) == same[name] for name in SIZES):
                self.forecast.learn((row.case, row.dtype_config), run_seconds(row))
        return [run for run in todo if kind(run) not in self.forecast.measured_s]

    def take_over(self, pool) -> None:
        """From now on the pool's queue is filled by `feed`."""
        self.pool = pool
        self.waiting[:] = pool.queue
        pool.queue.clear()
        self.feed()

    def feed(self) -> None:
        """Let runs into the pool: all of them, or one for every free place that the budget has room for."""
        pool, places = self.pool, len(self.waiting)
        if self.budget is not None:
            self.look()
            places = (pool.jobs or pool.slots()) - len(pool.running) - len(pool.queue)
        while self.waiting and places > 0 and (self.budget is None or self.admits(self.waiting[0])):
            pool.queue.append(self.waiting.pop(0))
            places -= 1

    def tick(self) -> None:
        """Stop the runs when the margin begins; raises `BudgetSpent` when that did not help."""
        if self.budget is None:
            return
        spent_unit_s, units, budget = self.look(), self._units(), self.budget
        if self.pool.running and spent_unit_s + LOOK_EVERY_S * units >= budget.limit_unit_s:
            raise BudgetSpent
        if self.pool.running and spent_unit_s + (budget.margin_s + LOOK_EVERY_S) * units >= budget.limit_unit_s:
            self.pool.stop.request(BY_THE_BUDGET)
        self.feed()

    def look(self) -> float:
        """Count the time since the last look for all units that are held; returns the unit-seconds spent."""
        now_s = self.clock()
        self.spent_unit_s += max(0.0, now_s - self._looked_s) * self._units()
        self._looked_s = now_s
        return self.spent_unit_s

    def admits(self, run: RunSettings) -> bool:
        """Whether a run may begin: what it and those before it still need is there, but for the margin. A run without a
        forecast begins where there is any room."""
        needs_s = [self._remaining_s(begun) for begun in self.pool.running]
        needs_s += [self.forecast.of(queued) or 0.0 for queued in (*self.pool.queue, run)]
        units = 1 if self.shared else len(needs_s)
        needed_unit_s = (max if self.shared else sum)(needs_s) + (self.budget.margin_s + LOOK_EVERY_S) * units
        return self.spent_unit_s + needed_unit_s < self.budget.limit_unit_s

    def fitting(self, todo: list[RunSettings], jobs: int) -> tuple[int, float | None]:
        """How many of the runs fit, in their order, and what all of them need in unit-seconds (None: not all have a forecast).
        ``jobs`` runs at a time; those that share a unit are taken to share its time evenly."""
        forecasts_s, needed_unit_s, fit = [self.forecast.of(run) for run in todo], 0.0, 0
        units = 1 if self.shared else jobs
        room_unit_s = self.budget.limit_unit_s - self.look() - (self.budget.margin_s + LOOK_EVERY_S) * units
        for number, seconds in enumerate(forecasts_s, start=1):
            needed_unit_s += (seconds or 0.0) / (jobs if self.shared else 1)
            if needed_unit_s < room_unit_s and None not in forecasts_s[:number]:
                fit = number
        return fit, None if None in forecasts_s else needed_unit_s

    def learn(self, run: RunSettings, record: RunRecord, duration_s: float) -> None:
        """A run has ended: the forecast is corrected by the completed ones, with all of their parts."""
        if record.status == "completed":
            self.forecast.learn(kind(run), run_seconds(record) if "resumed" in record.flags else duration_s)

    def announcement(self, todo: list[RunSettings], jobs: int | None, before_s: float) -> list[str]:
        """The lines to print first. ``before_s``: what the folder's rows say that their runs took."""
        budget, (fit, needed_unit_s) = self.budget, self.fitting(todo, jobs or 1)
        fits = f"{'all' if fit == len(todo) else fit} of them {'fits' if fit == 1 else 'fit'}"
        if len(todo) == 1:
            fits = "it fits" if fit else "it does not fit"
        needed = "not known: no run has been measured here, and this GPU's peak is not known"
        if needed_unit_s is not None:
            needed = f"{budget.text(needed_unit_s)}, so {fits}"
        measured = sum(map(len, self.forecast.measured_s.values()))
        source = (
            f"{count(measured, 'run')} measured here" if measured else "estimates (`case --dry-run` shows how they are made)"
        )
        limit, before = budget.text(budget.limit_unit_s), budget.text(before_s)
        margin = f"{budget.margin_s:.0f} s before the budget is spent"
        return [
            f"budget of this call: {limit}; the runs in the folder took {before} before",
            f"forecast for {count(len(todo), 'run')}: {needed}; from {source}, corrected as runs end",
            f"no run begins that would not end in time; {margin}, what runs is stopped after a checkpoint",
        ]

    def conclusion(self, left: int) -> str:
        """What a person must know when ``left`` runs are left undone."""
        next_s = self.forecast.of(self.waiting[0]) if self.waiting else None
        needs_s = None if next_s is None else next_s + self.budget.margin_s
        then = "" if needs_s is None else f"; the next one alone needs about {self.budget.text(needs_s)}"
        how = f"To continue, with as much again: {shlex.join(['python', '-m', 'harness', *sys.argv[1:]])}"
        if needs_s is not None and needs_s + START_UP_S >= self.budget.limit_unit_s:
            how = "To continue, give a larger one: as much again would not do"
        spent, limit = self.budget.text(self.look()), self.budget.text(self.budget.limit_unit_s)
        return f"the budget ends here: {spent} of {limit} spent, {count(left, 'run')} left{then}. {how}"

    def _units(self) -> int:
        return 1 if self.shared else len(self.pool.units_held) if self.pool else 0

    def _remaining_s(self, begun) -> float:
        """What a running run still needs, from its progress or its forecast; 0 where nothing is known."""
        elapsed_s = max(0.0, self.clock() - begun.started_s)
        if begun.last_step is not None and begun.last_step.step:
            return elapsed_s * begun.settings.max_steps / begun.last_step.step - elapsed_s
        return max(0.0, (self.forecast.of(begun.settings) or 0.0) - elapsed_s)


def estimated(runs: list[RunSettings], out: Path) -> dict[tuple[str, str], float | None]:
    """Seconds of a run of each kind, by `harness.estimate`; half a second a kind."""
    from harness.estimate import estimate

    first = {kind(run): run for run in reversed(runs)}
    times = {name: estimate(run, out)["time"] for name, run in first.items()}
    return {name: None if not time or time["total_s"] is None else time["total_s"] + START_UP_S for name, time in times.items()}


def run_seconds(record: RunRecord) -> float:
    """What a row says its run took, over all of its parts."""
    return float(record.flags.get("timings_s", {}).get("total", 0.0))
