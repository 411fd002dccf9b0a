"""What may still be spent: GPU-hours or money, by forecasts before a run begins and by the clock while runs go on.

Pure arithmetic, torch-free; the caller tells the time. A *unit* is what is paid by the hour: a GPU (with ``--engine
local`` the one of this machine), or without GPUs a machine. A unit costs as long as it is held, whether it
works or waits. Three lines are drawn, in this order:

1. no run begins whose forecast, with what the running ones still need, goes beyond the budget;
2. `Budget.margin_s` before the budget is spent, runs are asked to stop, each behind a checkpoint;
3. what has not stopped when it is spent is killed (and goes on from its checkpoint before).

A matrix under a budget: lets runs into the pool as long as there is room for them, and stops in time.

`Spending` stands between a matrix and its pool, see `harness.matrix.budget` for the arithmetic. Runs keep their order: one
that does not fit is not overtaken by a shorter one behind it.
"""

from __future__ import annotations

import _thread
import argparse
import math
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import psutil

from harness.parallel.ranks import Ranks, is_spokesman
from harness.run.signals import Stop
from harness.settings import RunSettings, SettingsError
from instrument.results.schemas import RunRecord
from instrument.terminal import count

ONE_PROCESS = Ranks()
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


def asked_budget(options: argparse.Namespace, *, device: str, preset: str, ranks: Ranks = ONE_PROCESS) -> Budget | None:
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


SIZES = ("max_steps", "batch_size", "micro_batch", "seq_len", "validation_documents", "eval_every", "threads", "preset")
"""Settings that a run's duration goes with: only runs that agree in all of them tell of each other."""
LOOK_EVERY_S = 1.0
"""Ticks come more often; a machine that is busy may take as long as this for one."""
WHO = "the budget"
THIS_MACHINE = ["this machine"]
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
        command = f"python -m harness {shlex.join(sys.argv[1:])}"
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
        return THIS_MACHINE if self.shared else self.pool.units_held if self.pool else []

    def _places(self) -> int:
        return self.pool.jobs or self.pool.slots()

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
