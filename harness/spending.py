"""A matrix under a budget: lets runs into the pool as long as there is room for them, and stops in time.

`Spending` stands between a matrix and its pool, see `harness.budget` for the arithmetic. Runs keep their order: one
that does not fit is not overtaken by a shorter one behind it.
"""

from __future__ import annotations

import _thread
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from harness.budget import START_UP_S, Budget, Forecast, InFlight, Meter, admits, fitting, kind, must_kill, must_stop
from harness.parallel.ranks import is_spokesman
from harness.settings import RunSettings, SettingsError
from harness.signals import Stop
from instrument.count import count
from instrument.records import RunRecord

SIZES = ("max_steps", "batch_size", "micro_batch", "seq_len", "validation_documents", "eval_every", "threads", "preset")
"""Settings that a run's duration goes with: only runs that agree in all of them tell of each other."""
LOOK_EVERY_S = 1.0
"""Ticks come more often; a machine that is busy may take as long as this for one."""
WHO = "the budget"
ALONE = ["this machine"]
"""The one unit of a pool whose runs share this machine and its GPU."""


class BudgetSpent(Exception):
    """The budget is spent, and runs did not stop within the margin."""


class Spending:
    """The budget of one call. Without one (``budget`` None) every run is let in at once."""

    def __init__(self, budget: Budget | None, *, shared: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """``shared``: the runs share one unit, which is held all the time that this process lives; else the pool says in
        ``units_held`` what is held."""
        self.budget, self.shared, self.clock, self.forecast = budget, shared, clock, Forecast()
        self.meter = Meter(clock(), process_age_s() if shared else 0.0)
        self.waiting: list[RunSettings] = []
        self.pool = None

    def unmeasured(self, todo: list[RunSettings], rows: list[RunRecord]) -> list[RunSettings]:
        """Learn what runs of the same kind and sizes took in this folder; returns the runs of the other kinds."""
        sizes = {kind(run): run.as_config() for run in todo}
        for row in rows:
            same = sizes.get((row.case, row.dtype_config))
            if row.status == "completed" and same is not None and all(row.config.get(name) == same[name] for name in SIZES):
                self.forecast.learn_kind((row.case, row.dtype_config), run_seconds(row))
        return [run for run in todo if kind(run) not in self.forecast.measured_s]

    def take_over(self, pool) -> None:
        """From now on the pool's queue is filled by `feed`."""
        self.pool = pool
        self.waiting[:] = pool.queue
        pool.queue.clear()
        self.feed()

    def front(self, runs: list[RunSettings]) -> None:
        """Runs that come next."""
        self.waiting[:0] = runs

    def feed(self) -> None:
        """Let runs into the pool: all of them, or one for every free place that the budget has room for."""
        if self.budget is None:
            self.pool.queue[:0] = self.waiting
            self.waiting.clear()
            return
        self._look()
        while self.waiting and len(self.pool.running) + len(self.pool.queue) < self._places() and self._admits(self.waiting[0]):
            self.pool.queue.append(self.waiting.pop(0))

    def tick(self) -> None:
        """Stop the runs when the margin begins; raises `BudgetSpent` when that did not help."""
        if self.budget is None:
            return
        spent_unit_s, units = self._look(), len(self._units())
        if must_kill(self.budget, spent_unit_s, units, LOOK_EVERY_S) and self.pool.running:
            raise BudgetSpent
        if must_stop(self.budget, spent_unit_s, units, LOOK_EVERY_S) and self.pool.running:
            self.pool.stop.request(WHO)
        self.feed()

    def learn(self, run: RunSettings, record: RunRecord, duration_s: float) -> None:
        """A run has ended: the forecast is corrected by the completed ones, with all of their parts."""
        if record.status == "completed":
            self.forecast.learn(run, run_seconds(record) if "resumed" in record.flags else duration_s)

    def forecast_words(self, todo: list[RunSettings], jobs: int | None, before_s: float) -> list[str]:
        """The lines to print first. ``before_s``: what the folder's rows say that their runs took."""
        budget, forecasts_s = self.budget, [self.forecast.of(run) for run in todo]
        fit, needed_unit_s = fitting(
            budget, self._look(), forecasts_s, jobs=jobs or 1, shared=self.shared, until_next_look_s=LOOK_EVERY_S
        )
        needed = (
            "not known: no run has been measured here, and this GPU's peak is not known"
            if needed_unit_s is None
            else f"{budget.words(needed_unit_s)}, so {self._fitting_words(fit, len(todo))}"
        )
        return [
            f"budget of this call: {budget.words(budget.limit_unit_s)}; the runs in the folder took "
            f"{budget.words(before_s)} before",
            f"forecast for {count(len(todo), 'run')}: {needed}; from {self._source()}, corrected as runs end",
            f"no run begins that would not end in time; {budget.margin_s:.0f} s before the budget is spent, what runs is "
            f"stopped behind a checkpoint",
        ]

    def last_words(self, left: int) -> str:
        """What a person must know when ``left`` runs are left undone."""
        next_s = self.forecast.of(self.waiting[0]) if self.waiting else None
        needs_s = None if next_s is None else next_s + self.budget.margin_s
        then = "" if needs_s is None else f"; the next one alone needs about {self.budget.words(needs_s)}"
        command = shlex.join(["python", "-m", "harness", *sys.argv[1:]])
        spent, limit = self.budget.words(self._look()), self.budget.words(self.budget.limit_unit_s)
        how = (
            f"To go on, with as much again: {command}"
            if needs_s is None or needs_s + START_UP_S < self.budget.limit_unit_s
            else "To go on, give a larger one: as much again would not do"
        )
        return f"the budget ends here: {spent} of {limit} spent, {count(left, 'run')} left{then}. {how}"

    def _source(self) -> str:
        measured = sum(map(len, self.forecast.measured_s.values()))
        return f"{count(measured, 'run')} measured here" if measured else "estimates (`case --dry-run` shows how they are made)"

    @staticmethod
    def _fitting_words(fit: int, of: int) -> str:
        if of == 1:
            return "it fits" if fit else "it does not fit"
        return f"{'all' if fit == of else fit} of them {'fits' if fit == 1 else 'fit'}"

    def _units(self) -> list[str]:
        return ALONE if self.shared else self.pool.units_held if self.pool else []

    def _places(self) -> int:
        return self.pool.jobs or self.pool.cluster.slots()

    def _look(self) -> float:
        return self.meter.look(self.clock(), len(self._units()))

    def _admits(self, run: RunSettings) -> bool:
        begun = [self._in_flight(one) for one in self.pool.running]
        begun += [InFlight(0.0, self.forecast.of(queued)) for queued in self.pool.queue]
        return admits(
            self.budget,
            self.meter.spent_unit_s,
            begun,
            self.forecast.of(run),
            shared=self.shared,
            until_next_look_s=LOOK_EVERY_S,
        )

    def _in_flight(self, run) -> InFlight:
        share = run.last_step.step / run.settings.max_steps if run.last_step is not None else None
        return InFlight(max(0.0, self.clock() - run.started_s), self.forecast.of(run.settings), share)


@contextmanager
def ending_in_time(budget: Budget | None, stop: Stop) -> Iterator[None]:
    """One run in this process under a budget: it is asked to stop when the margin begins, and interrupted at the end."""
    if budget is None:
        yield
        return
    refuse_too_little(budget)
    left_s, margin_s, limit = budget.limit_unit_s - process_age_s(), budget.margin_s, budget.words(budget.limit_unit_s)
    if is_spokesman():
        print(f"budget: {limit}; {margin_s:.0f} s before it is spent, the run is stopped behind a checkpoint", file=sys.stderr)
    timers = [
        threading.Timer(left_s - margin_s - LOOK_EVERY_S, stop.request, [WHO]),
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
    limit, margin_s, age_s = budget.words(budget.limit_unit_s), budget.margin_s, process_age_s()
    if budget.limit_unit_s - age_s <= margin_s + LOOK_EVERY_S:
        raise SettingsError(
            f"a budget of {limit} leaves no time for a run: {margin_s:.0f} s are kept for its checkpoint; "
            f"allowed: more than {margin_s + LOOK_EVERY_S + age_s:.0f} s"
        )


def estimated(runs: list[RunSettings], out: Path) -> dict[tuple[str, str], float | None]:
    """Seconds of a run of each kind, by `harness.estimate`; half a second a kind."""
    from harness.estimate import estimate

    first = {kind(run): run for run in reversed(runs)}
    times = {name: estimate(run, out)["time"] for name, run in first.items()}
    return {name: None if not time or time["total_s"] is None else time["total_s"] + START_UP_S for name, time in times.items()}


def process_age_s() -> float:
    """Seconds since this process began: its imports are paid for, too."""
    return max(0.0, time.time() - psutil.Process().create_time())


def run_seconds(record: RunRecord) -> float:
    """What a row says its run took, over all of its parts."""
    return float(record.flags.get("timings_s", {}).get("total", 0.0))
