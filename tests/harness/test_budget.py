"""A budget is never exceeded, whatever runs really take; forecasts learn; what does not make sense is refused."""

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness import cli
from harness.budget import BY_THE_BUDGET, LOOK_EVERY_S, MARGIN_S, Budget, asked_budget
from harness.exit_codes import INTERRUPTED, OK, USAGE
from harness.matrix.spending import BudgetSpent, Forecast, Spending
from harness.parallel.ranks import Ranks
from harness.run.signals import Stop
from harness.settings import SettingsError
from instrument.results.folder import finished_runs
from tests.harness.commands import SMALL, TWO_STEPS


def a_run(case: str, config: str = "fp32_true", max_steps: int = 10):
    return SimpleNamespace(case=SimpleNamespace(id=case), config=SimpleNamespace(id=config), max_steps=max_steps)


@dataclass
class Machine:
    """A pool whose runs take what they take, and stop ``checkpoint_s`` after they were asked to."""

    queue: list
    jobs: int
    true_s: dict
    checkpoint_s: float
    now_s: float = 0.0
    running: list = field(default_factory=list)
    stop: Stop = field(default_factory=Stop)
    begun: list = field(default_factory=list)

    def begin(self):
        while self.queue and len(self.running) < self.jobs and not self.stop.requested:
            run = self.queue.pop(0)
            self.begun.append(run.case.id)
            self.running.append(
                SimpleNamespace(
                    settings=run, started_s=self.now_s, last_step=None, ends_s=self.now_s + self.true_s[run.case.id]
                )
            )

    def over(self):
        """The runs that have ended, whole or after a checkpoint."""
        for run in self.running:
            if self.stop.requested:
                run.asked_s = getattr(run, "asked_s", self.now_s)
                run.ends_s = min(run.ends_s, run.asked_s + self.checkpoint_s)
        ended = [run for run in self.running if run.ends_s <= self.now_s]
        self.running = [run for run in self.running if run not in ended]
        return ended


class Cluster(Machine):
    """Each run holds a GPU of its own."""

    @property
    def units_held(self):
        return [str(k) for k in range(len(self.running))]


def spend(kind, estimates_s, true_s, limit_s, *, jobs, checkpoint_s, tick_s, margin_s=5.0):
    """Play a matrix under a budget; returns the pool, what was spent when the last run was gone, and if any was killed."""
    runs = [a_run(f"case{k}") for k in range(len(true_s))]
    pool = kind(list(runs), jobs, {run.case.id: seconds for run, seconds in zip(runs, true_s, strict=True)}, checkpoint_s)
    spending = Spending(Budget(limit_s, "GPU", None, margin_s), shared=kind is Machine, clock=lambda: pool.now_s)
    spending.spent_unit_s = 0.0
    spending.forecast.estimates_s = {(run.case.id, "fp32_true"): s for run, s in zip(runs, estimates_s, strict=True)}
    spending.take_over(pool)
    pool.begin()
    try:
        while pool.running:
            pool.now_s += tick_s
            spending.tick()
            for run in pool.over():
                if not pool.stop.requested:
                    spending.forecast.learn((run.settings.case.id, "fp32_true"), pool.now_s - run.started_s)
                spending.feed()
            pool.begin()
    except BudgetSpent:
        return pool, spending.look(), True
    return pool, spending.look(), False


def spending_of(limit_s, measured_s, *, shared=True, margin_s=5.0, running=(), held=()):
    """A matrix at second 0 of its budget, with runs of known durations by case; ``running``: (case, since when, step of 10)."""
    spending = Spending(Budget(limit_s, "GPU", None, margin_s), shared=shared, clock=lambda: 0.0)
    spending.spent_unit_s = 0.0
    spending.forecast.measured_s = {(case, "fp32_true"): [seconds] for case, seconds in measured_s.items()}
    begun = [
        SimpleNamespace(settings=a_run(case), started_s=-elapsed_s, last_step=step and SimpleNamespace(step=step))
        for case, elapsed_s, step in running
    ]
    spending.pool = SimpleNamespace(running=begun, queue=[], units_held=list(held), jobs=1)
    return spending


seconds = st.floats(0.5, 500)
matrices = st.lists(st.tuples(st.one_of(st.none(), seconds), seconds), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from([Machine, Cluster]),
    durations=matrices,
    limit_s=st.floats(1, 2000),
    jobs=st.integers(1, 4),
    checkpoint_s=st.floats(0, 30),
    tick_s=st.floats(0.3, 1),
)
@example(kind=Machine, durations=[(1.0, 500.0)] * 5, limit_s=100.0, jobs=2, checkpoint_s=30.0, tick_s=1.0)
@example(kind=Cluster, durations=[(None, 500.0)] * 5, limit_s=400.0, jobs=4, checkpoint_s=30.0, tick_s=1.0)
def test_no_more_is_spent_than_was_given_whatever_runs_really_take(kind, durations, limit_s, jobs, checkpoint_s, tick_s):
    estimates_s, true_s = zip(*durations, strict=True)
    pool, spent_s, killed = spend(kind, estimates_s, true_s, limit_s, jobs=jobs, checkpoint_s=checkpoint_s, tick_s=tick_s)
    assert spent_s <= limit_s + 1e-6
    assert killed <= (checkpoint_s > 5 - LOOK_EVERY_S), "a checkpoint that fits into the margin is waited for"
    assert pool.begun == [f"case{k}" for k in range(len(pool.begun))], "in order, and no run is overtaken"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000).map(lambda ticks: ticks / 2), min_size=1, max_size=12), st.integers(1, 3))
@example([1.0, 1.0, 6.0], 1)  # it ends where the margin begins but for a look
def test_with_right_forecasts_nothing_is_stopped_and_room_is_used(true_s, jobs):
    limit_s = sum(true_s) / 2 + 10
    pool, spent_s, killed = spend(Machine, true_s, true_s, limit_s, jobs=jobs, checkpoint_s=1, tick_s=0.5)
    assert not killed and spent_s <= limit_s
    if jobs == 1:
        assert not pool.stop.requested
        fit, _ = spending_of(limit_s, dict(enumerate(true_s))).fitting([a_run(k) for k in range(len(true_s))], jobs=1)
        assert fit - 1 <= len(pool.begun) <= fit, "what was forecast to fit did, but for ticks"


def test_a_run_that_takes_longer_than_its_forecast_is_stopped_after_a_checkpoint_in_time():
    pool, spent_s, killed = spend(Machine, [10.0], [1000.0], 60.0, jobs=1, checkpoint_s=3, tick_s=0.25)
    assert pool.stop.requested == BY_THE_BUDGET and not killed and 50 < spent_s <= 60


def test_what_two_gpus_hold_counts_twice():
    pool, spent_s, _ = spend(Cluster, [100.0] * 4, [100.0] * 4, 300.0, jobs=2, checkpoint_s=1, tick_s=0.5)
    assert len(pool.begun) == 2 and 195 < spent_s < 205
    spending = spending_of(1e9, {}, shared=False, held="abc")
    looks = iter([(10.0, "abc", 30.0), (10.0, "abcde", 30.0), (12.0, "", 30.0)])
    for now_s, held, spent_s in looks:
        spending.clock, spending.pool.units_held = lambda now_s=now_s: now_s, list(held)
        assert spending.look() == spent_s


def test_forecasts_are_corrected_by_what_was_measured():
    forecast = Forecast({("a", "fp32_true"): 10.0, ("b", "fp32_true"): 30.0})
    assert [forecast.of(a_run(case)) for case in "abc"] == [10.0, 30.0, None]
    forecast.learn(("a", "fp32_true"), 20.0)
    assert [forecast.of(a_run(case)) for case in "abc"] == [20.0, 60.0, 20.0]
    forecast.learn(("a", "fp32_true"), 40.0)
    assert forecast.of(a_run("b")) == pytest.approx(90.0)


@pytest.mark.parametrize(
    "case, elapsed_s, step, remaining_s",
    [("a", 30.0, None, 70.0), ("a", 130.0, None, 0.0), ("a", 30.0, 1, 270.0), ("unknown", 5.0, None, 0.0)],
)
def test_progress_tells_more_than_the_forecast(case, elapsed_s, step, remaining_s):
    spending = spending_of(1e9, {"a": 100.0} if case == "a" else {}, running=[(case, elapsed_s, step)])
    assert spending._remaining_s(spending.pool.running[0]) == pytest.approx(remaining_s)


def test_a_run_begins_only_where_it_and_the_running_ones_end_in_time():
    known = {"a": 80.0, "b": 85.0, "c": 89.0, "d": 50.0, "e": 40.0}
    assert spending_of(100.0, known, margin_s=10.0, running=[("a", 0.0, None)]).admits(a_run("b")), "they share the time"
    assert not spending_of(100.0, known, margin_s=10.0).admits(a_run("c"))
    assert not spending_of(100.0, known, margin_s=10.0, running=[("d", 0.0, None)], shared=False).admits(a_run("e"))


def test_the_margin_stops_and_the_end_kills():
    for spent_s, stopped in ((88.0, None), (89.0, BY_THE_BUDGET), (98.9, BY_THE_BUDGET)):
        spending = spending_of(100.0, {}, margin_s=10.0, running=[("a", 0.0, None)])
        spending.spent_unit_s, spending.pool.stop = spent_s, Stop()
        spending.tick()
        assert spending.pool.stop.requested == stopped
    spending.spent_unit_s = 99.0
    with pytest.raises(BudgetSpent):
        spending.tick()


def test_words_name_hours_and_money():
    assert Budget(4500, "GPU", 2.0, 60).text(4500) == "1.25 GPU-hours (2.50 USD)"
    assert Budget(4500, "machine", None, 60).text(36) == "36 machine-seconds"
    assert Budget(4500, "machine", 2.0, 60).text(36) == "36 machine-seconds (0.020 USD)"


def asked(hours, usd, price, device="cpu", preset="tiny"):
    options = SimpleNamespace(max_gpu_hours=hours, budget_usd=usd, price_per_hour=price)
    return asked_budget(options, device=device, preset=preset)


@pytest.mark.parametrize(
    "given, says",
    [
        ((None, 5.0, None), "--budget-usd and --price-per-hour go together; given: --budget-usd alone"),
        ((None, None, 2.0), "given: --price-per-hour alone"),
        ((0.0, None, None), "--max-gpu-hours is 0; it must be a positive"),
        ((float("nan"), None, None), "must be a positive"),
        ((None, -1.0, 2.0), "--budget-usd is -1"),
        ((1.0, None, None), "counts GPUs, and this runs on a CPU; allowed here: --budget-usd"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(given, says):
    with pytest.raises(SettingsError, match=says):
        asked(*given)


def test_the_tighter_of_two_limits_counts():
    assert asked(2.0, 10.0, 10.0, device="cuda", preset="full").limit_unit_s == 3600
    assert asked(0.5, 10.0, 10.0, device="cuda", preset="full").limit_unit_s == 1800
    assert asked(None, None, None) is None


def test_a_run_on_several_gpus_holds_them_all_and_every_machine_costs():
    options = SimpleNamespace(max_gpu_hours=8.0, budget_usd=30.0, price_per_hour=5.0)
    eight, on_two = Ranks(0, 8, 0, 8), Ranks(0, 16, 0, 8)
    assert asked_budget(options, device="cuda", preset="full", ranks=eight).limit_unit_s == 3600  # 8 of 8 GPU-hours
    budget = asked_budget(options, device="cuda", preset="full", ranks=on_two)
    assert (budget.limit_unit_s, budget.text(1800)) == (1800, "0.5 clock-hours (5.00 USD)")
    options = SimpleNamespace(max_gpu_hours=None, budget_usd=30.0, price_per_hour=5.0)
    assert asked_budget(options, device="cuda", preset="full", ranks=on_two).limit_unit_s == 3 * 3600


@pytest.mark.process
def test_a_matrix_stops_before_its_budget_and_goes_on_with_the_next(tmp_path, monkeypatch, capsys):
    """By a clock on which a step takes a second: the first run is stopped after a checkpoint at step 15 or so of 60, and
    resumes with the budget of the next call, which ends in the second run."""
    logs = tmp_path / "out" / "training_logs"
    monkeypatch.setattr("harness.matrix.command.print_verdict", lambda out: None)
    monkeypatch.setattr("harness.matrix.command.estimated", lambda todo, out: {})
    monkeypatch.setattr("harness.matrix.spending.process_age_s", lambda: 0.0)
    monkeypatch.setattr(
        "harness.matrix.command.Spending",
        partial(Spending, clock=lambda: float(sum(path.read_bytes().count(b"\n") for path in logs.glob("*.jsonl")))),
    )
    words = [
        "matrix",
        *SMALL,
        "--max-steps",
        "60",
        "--cases",
        "gpt2_clm",
        "--configs",
        "fp32_true",
        "amp_bf16",
        "--jobs",
        "1",
        "--no-follow-up",
        "--log-every",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--price-per-hour",
        "2",
        "--budget-usd",
    ]
    assert cli.main([*words, "0.012"]) == INTERRUPTED  # 21.6 s
    said = capsys.readouterr().err
    assert "budget of this call: 22 machine-seconds (0.012 USD)" in said and "2 runs left" in said and "To continue" in said
    (row,) = finished_runs(tmp_path / "out")
    assert row.status == "preempted" and "stopped by SIGTERM after step" in row.error and 14 <= row.steps_done < 60
    assert cli.main([*words, "0.035"]) == INTERRUPTED  # 63 s
    rows = {row.status: row for row in finished_runs(tmp_path / "out")}
    assert rows["completed"].flags["resumed"]["behind_steps"] == [row.steps_done] and set(rows) == {"completed", "preempted"}
    assert "1 run left" in capsys.readouterr().err


def test_a_budget_that_no_call_could_begin_the_next_run_with_is_not_recommended_again():
    spending = Spending(Budget(24.0, "machine", 3.0, 5.0), shared=True, clock=lambda: 0.0)
    spending.waiting = [a_run("a")]
    spending.forecast.learn(("a", "fp32_true"), 8.0)
    assert "with as much again: python -m harness" in spending.conclusion(1)
    spending.forecast.learn(("a", "fp32_true"), 80.0)
    assert "give a larger one: as much again would not do" in spending.conclusion(1)


def test_usage_and_dry_run(tmp_path, capsys):
    words = ["matrix", *TWO_STEPS, "--cases", "gpt2_clm", "--configs", "fp32_true", "amp_bf16", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--budget-usd", "3"]) == USAGE and cli.main([*words, "--max-gpu-hours", "3"]) == USAGE
    capsys.readouterr()
    assert cli.main([*words, "--budget-usd", "3", "--price-per-hour", "2", "--dry-run"]) == OK
    said = capsys.readouterr().err
    assert "budget of this call: 1.5 machine-hours (3.00 USD)" in said and "forecast for 2 runs" in said
    assert "all of them fit" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_a_single_run_stops_before_its_budget_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("harness.budget.process_age_s", lambda: 0.0)
    monkeypatch.setattr("harness.budget.LOOK_EVERY_S", 0.1)
    monkeypatch.setitem(MARGIN_S, "tiny", 60.0)
    words = ["case", "gpt2_clm", "fp32_true", *SMALL, "--max-steps", "100000", "--out", str(tmp_path), "--price-per-hour", "2"]
    assert cli.main([*words, "--budget-usd", "0.0373"]) == INTERRUPTED  # 67 s, so 7 without the margin
    (row,) = finished_runs(tmp_path)
    assert row.status == "preempted" and row.error.startswith("stopped by the budget")
    assert cli.main([*words, "--budget-usd", "0.03"]) == USAGE
    assert "leaves no time for a run: 60 s are kept for its checkpoint" in capsys.readouterr().err
