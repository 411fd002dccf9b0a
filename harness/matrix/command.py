"""``python -m harness matrix``: cases x configurations x seeds, each run in its own process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from bench_cases import CASES
from bench_cases.models import build_model
from harness.budget import BY_THE_BUDGET, asked_budget
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED, USAGE
from harness.matrix.plan import Shard, controls_of, distinct, plan_matrix
from harness.matrix.ray_cluster import connected, parse_address
from harness.matrix.screen import MatrixScreen
from harness.matrix.spending import BudgetSpent, Spending, estimated, run_seconds
from harness.parallel.ranks import refuse_ranks
from harness.planning import choose_device, data_options, results_folder
from harness.predict import store_all
from harness.run.checkpoints import discard
from harness.run.execute import load_run_data, make_batches, model_request
from harness.run.signals import Stop
from harness.settings import RunSettings, SettingsError, choose_preset
from harness.supervisor.pool import Pool
from harness.supervisor.process_monitor import Rules
from instrument.environment import device_slug
from instrument.results.claims import RunClaimed, claim
from instrument.results.folder import (
    OutputError,
    finished_run,
    finished_runs,
    output_error,
    require_writable,
    settled_run,
    write_index,
)
from instrument.results.schemas import RunRecord, encode
from instrument.terminal import count


def matrix_command(options: argparse.Namespace) -> int:
    """Run what is not done yet and print the stability matrix; ``--json`` prints all rows. When whoever reads that goes
    away (``| head``) the runs continue all the same (see `instrument.terminal`)."""
    refuse_ranks("matrix")
    device, jobs = choose_device(options.device), checked_jobs(options)
    out = results_folder(options.out, device)
    shard, everywhere = Shard.parse(options.shard), plan_matrix(options, device)
    planned = shard.of(everywhere)
    elsewhere = {s.run_id for s in everywhere} - {s.run_id for s in planned}  # nor are they controls of this shard
    if options.engine == "local":
        jobs = jobs or local_jobs(everywhere, device)
    if not planned:
        nothing_here(shard, len(everywhere), out, options.json and options.dry_run)
        return OK
    budget = asked_budget(options, device=device.type, preset=choose_preset(options.preset, device.type))
    spending = Spending(budget, shared=options.engine == "local")
    planned, done = skip_finished(planned, out, elsewhere, options)
    todo = [settings for settings in planned if settings.run_id not in done]
    screen = MatrixScreen(planned, done, out, jobs, shard, picture=options.svg)
    forecast(spending, todo, out, jobs, screen)
    if options.dry_run:
        cluster = f"the cluster at {options.address} was not contacted" if options.address else "no cluster was begun"
        screen.plan(todo, cluster if options.engine == "ray" else None)
        if options.json:
            print(json.dumps({"todo": [s.run_id for s in todo], "done": sorted(done), "results_folder": str(out)}))
        return OK
    require_writable(out)
    prepare(todo)
    for run_id in {*done, *(s.run_id for s in todo if options.fresh)}:  # those done: a process killed at its very end
        with suppress(RunClaimed), claim(out, run_id):  # another living process' checkpoints are its own
            discard(out, run_id)
    rows = dict(done)
    with pool_of(options, todo, out, jobs, device, screen.say) as pool, Stop(patient=True).listening() as stop:
        pool.stop = stop
        try:
            for record in run_all(pool, spending, out, screen, follow_up=not options.no_follow_up, known=elsewhere):
                rows[record.run_id] = record
        except BudgetSpent:  # what did not stop in time is killed by now
            stop.request(BY_THE_BUDGET)
        except OSError as error:
            raise output_error(error, out) or error from error
    screen.finish(rows.values())
    if stop.requested and stop.requested != BY_THE_BUDGET:
        print(f"stopped by {stop.requested}: the same command resumes", file=sys.stderr)
        return INTERRUPTED
    if spending.waiting or stop.requested:
        screen.say(spending.conclusion(screen.left))
        return INTERRUPTED if stop.requested or len(rows) > len(done) else USAGE  # too little for even one run: no use again
    store_all(sorted({row.case for row in rows.values()}), out)
    print_verdict(out)
    if options.json:
        sys.stdout.write("".join(encode(row).decode() + "\n" for row in rows.values()))
    return RUN_FAILED if any(row.status in ("oom", "error", "hung") for row in rows.values()) else OK


def skip_finished(
    planned: list[RunSettings], out: Path, elsewhere: set[str], options: argparse.Namespace
) -> tuple[list[RunSettings], dict[str, RunRecord]]:
    """The runs, with the controls of diverged ones that an interrupted or an earlier matrix left undone; and the settled rows
    among them, by run id."""
    if options.rerun or options.fresh:
        return planned, {}
    done = {s.run_id: settled_run(out, s.run_id) for s in planned}
    if not options.no_follow_up:
        diverged = [s for s in planned if (row := done[s.run_id]) is not None and row.status == "diverged"]
        planned = distinct([*planned, *(c for s in diverged for c in controls_of(s) if c.run_id not in elsewhere)])
        done |= {s.run_id: settled_run(out, s.run_id) for s in planned if s.run_id not in done}
    return planned, {run_id: row for run_id, row in done.items() if row is not None}


def checked_jobs(options: argparse.Namespace) -> int | None:
    """``--jobs``; raises `SettingsError` where it, ``--engine`` or ``--address`` cannot be. Contacts nobody."""
    if options.jobs is not None and options.jobs < 1:
        raise SettingsError(f"jobs is {options.jobs}; it must be at least 1")
    if options.address is not None:
        if options.engine != "ray":
            raise SettingsError("--address goes with --engine ray")
        parse_address(options.address)
    return options.jobs


def local_jobs(planned: list[RunSettings], device: torch.device) -> int:
    """Runs at a time on this machine: one on a GPU; on a CPU as many as have cores of their own."""
    cores = len(os.sched_getaffinity(0))
    threads = max((settings.threads or cores for settings in planned), default=1)
    return 1 if device.type == "cuda" else max(1, cores // threads)


@contextmanager
def pool_of(
    options: argparse.Namespace, queue: list[RunSettings], out: Path, jobs: int | None, device: torch.device, say: Callable
) -> Iterator[Pool]:
    """The pool that ``--engine`` names."""
    rules = Rules.asked(options.hang_after_s)
    if options.engine == "local":
        yield Pool(queue, out, jobs, rules=rules)
        return
    with connected(options.address):
        from harness.matrix.ray_pool import RayPool

        yield RayPool(queue, out, jobs, device_slug(device), rules=rules, say=say)


def nothing_here(shard: Shard, elsewhere: int, out: Path, as_json: bool) -> None:
    """A shard of a plan that has fewer runs than shards."""
    runs = count(elsewhere, "run of the plan is", "runs of the plan are")
    print(f"shard {shard}: nothing to do here: {runs} in other shards", file=sys.stderr)
    if as_json:
        print(json.dumps({"todo": [], "done": [], "results_folder": str(out)}))


def print_verdict(out: Path) -> None:
    """The report's verdict on the folder, on standard error. By a process of its own: the report reads files only,
    and this room does not import it."""
    command = [sys.executable, "-m", "report", "verdict", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    print(finished.stdout or finished.stderr, file=sys.stderr, end="")


def prepare(todo: list[RunSettings]) -> None:
    """Tokenise all data and try all models, once each: what is wrong with one refuses everything, early."""
    for settings in {(s.case.id, s.weights, s.data, *data_options(s.case, s).values()): s for s in todo}.values():
        data = load_run_data(settings)
        make_batches(settings, data)
        if settings.case.id not in CASES or settings.weights != "scratch":
            build_model(model_request(settings, data))


def forecast(spending: Spending, todo: list[RunSettings], out: Path, jobs: int | None, screen: MatrixScreen) -> None:
    """What the runs will cost, before the first of them begins: from the folder's own runs, and from estimates."""
    if spending.budget is None:
        return
    rows = finished_runs(out)
    spending.forecast.estimates_s = estimated(spending.unmeasured(todo, rows), out)
    for line in spending.announcement(todo, jobs, sum(map(run_seconds, rows))):
        screen.say(line)


def run_all(
    pool: Pool, spending: Spending, out: Path, screen: MatrixScreen, *, follow_up: bool, known: set[str]
) -> Iterable[RunRecord]:
    """Yield every row as it comes; a diverged run brings its control configurations along, but for those whose ids are
    ``known``. A folder that one run could not write ends them all, and raises `OutputError` when they have ended."""
    unwritable = None
    known = known | {settings.run_id for settings in pool.queue}
    spending.take_over(pool)
    with screen.live(pool):
        for ended in pool.run(lambda: (spending.tick(), screen.tick())):
            if isinstance(ended.failure, OutputError):
                unwritable = unwritable or ended.failure
                pool.stop.request("a folder that cannot be written")
            elif isinstance(ended.failure, RunClaimed):
                screen.say(f"{ended.failure}: left to it")
            elif record := ended.record or finished_run(out, ended.settings.run_id):
                if follow_up and record.status == "diverged":
                    controls = [c for c in controls_of(ended.settings) if c.run_id not in known]
                    known |= {c.run_id for c in controls}
                    spending.waiting[:0] = [c for c in controls if settled_run(out, c.run_id) is None]
                    screen.expect(controls)
                spending.learn(ended.settings, record, ended.duration_s)
                screen.ended(record, ended.duration_s)
                yield record
            spending.feed()
    if unwritable is not None:
        raise unwritable
    write_index(out)
