"""``python -m harness campaign``: one call of a campaign, which begins or continues it, stage after stage until its minutes are
over; or (``--dry-run``) the plan of one."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil
from filelock import FileLock, Timeout

from harness.campaign.pack import CAMPAIGN, FOLDER, PackTooLarge, pack, require_ours, unpack
from harness.campaign.plan import ASKED, FIT_FROM_S, GROUPS, Stage, costs_of, find_machine, make_plan, outcome, stages_of
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.run.signals import Stop
from harness.settings import SettingsError
from harness.supervisor.child_process import run_command
from harness.supervisor.process_monitor import tail
from instrument.results.files import make_folder, replace
from instrument.results.folder import OutputError, finished_runs, require_writable

CHANGEABLE = ("skip", "price_per_hour")  # options that a later call may give anew: no run depends on them
MOST_CUTS = 3  # of a stage that cannot resume, by its own limit or the call's end
GRACE_S = {"cpu": 20.0, "cuda": 45.0}  # to write a checkpoint
END_S = 5.0  # to end with nothing to write
DOSSIER_S = {"cpu": 30.0, "cuda": 60.0}  # kept free at least at the end of a call
LEAST_S = 5.0  # no stage is begun with less time left
SCHEMA = 2


class StageState(msgspec.Struct):
    """``cut`` by its own limit, ``pending``, or ``running`` in a call that was killed: for this call or the next. ``cuts``: how
    often it was cut; every turn's limit is twice the last one's."""

    state: Literal["pending", "running", "cut", "done", "failed"] = "pending"
    spent_s: float = 0.0
    exit_code: int | None = None
    note: str | None = None
    cuts: int = 0
    pid: int | None = None
    last_s: float = 0.0  # its last turn

    @property
    def settled(self) -> bool:
        return self.state in ("done", "failed")


class CampaignFile(msgspec.Struct, kw_only=True):
    """``campaign.json``. ``asked``: the options that make the campaign what it is; ``machine``: what `probe` found."""

    schema: int = SCHEMA
    began: str
    asked: dict[str, Any]
    total_minutes: float
    machine: dict[str, Any]
    plan: dict[str, Any] | None = None
    stages: dict[str, StageState] = {}
    calls: list[dict[str, Any]] = []


def campaign_command(options: argparse.Namespace) -> int:
    """Continue the campaign of a results folder, or begin one. Exit code 75 while something is left to do."""
    ends_s = time.monotonic() + 60 * options.minutes
    asked = {name: getattr(options, name) for name in ASKED}
    machine = find_machine(asked, estimates=options.dry_run)
    results = options.results or Path("results") / machine["slug"]
    out = options.out or Path("dossiers") / machine["slug"]
    require_ours(out)
    total = options.total_minutes or options.minutes
    content = CampaignFile(began=now(), asked=asked, total_minutes=total, machine=machine)
    if options.dry_run:
        plan = Call(content, results, out, ends_s, Stop()).plan()
        if options.json:
            print(json.dumps({"machine": machine, "plan": plan}))
        return OK
    require_writable(results)
    try:
        held = FileLock(results / ".campaign.lock", timeout=0).acquire()
    except Timeout:
        raise OutputError(f"another campaign works in {results}; wait for it, or give another with --results") from None
    with held, Stop(patient=True).listening() as stop:
        if unpack(out, results):
            print(f"continues from {out}", file=sys.stderr)
        content = begun(results / CAMPAIGN, asked) or content
        # What a later call leaves out is what the first one said.
        content.machine = machine if content.asked == asked else find_machine(content.asked, estimates=False)
        code = Call(content, results, out, ends_s, stop).run(retry=options.retry_failed)
    if options.json:
        print(msgspec.json.encode(content).decode())
    return code


def begun(path: Path, asked: Mapping[str, Any]) -> CampaignFile | None:
    """The campaign of this file, or None. ``asked``: None is whatever it was begun with. Raises `SettingsError` when an option
    contradicts it, and `OutputError` for a file that is none, or another version's."""
    try:
        plain = json.loads(path.read_bytes())
        if plain["schema"] != SCHEMA:
            why = f"{path} is another version's (schema {plain['schema']}; here {SCHEMA}), which planned its stages otherwise"
            raise OutputError(f"{why}; continue with that version, or give new folders with --results and --out")
        content = msgspec.convert(plain, CampaignFile)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is no campaign's file ({error}); move it away, or give another with --results") from error
    content.asked |= {name: asked[name] for name in CHANGEABLE if asked[name] is not None}
    for name, value in asked.items():
        if value is not None and value != (before := content.asked.get(name)):
            there = f"the campaign in {path} was begun with {before or 'the default'}"
            way_out = "leave it out to continue, or give another folder with --results"
            raise SettingsError(f"--{name.replace('_', '-')} is {value}, and {there}; {way_out}")
    return content


class Call:
    """One call's part of a campaign; ``content`` is that of its file. ``ends_s``: on the monotonic clock."""

    def __init__(self, content: CampaignFile, results: Path, out: Path, ends_s: float, stop: Stop) -> None:
        self.content, self.results, self.out, self.ends_s, self.stop = content, results, out, ends_s, stop
        self.asked, self.machine, self.stages = content.asked, content.machine, content.stages
        self.total_s, self.grace_s = 60 * content.total_minutes, GRACE_S[self.machine["device"]]
        self.half_s = (ends_s - time.monotonic()) / 2  # of the call

    def run(self, *, retry: bool) -> int:
        """Everything there is time for; with ``retry`` also what failed before. Returns the exit code."""
        entry = {"began": now(), "minutes": round((self.ends_s - time.monotonic()) / 60, 2), "ended": None, "end": None}
        self.content.calls.append(entry)
        for stage in self.stages.values():
            if stage.state == "running":  # of a call that was killed: asked to stop as well, it may write a checkpoint yet
                with suppress(psutil.Error):
                    psutil.Process(stage.pid).wait(self.grace_s)
                stage.state, stage.note = "pending", "a call was killed while it ran"
            elif stage.state == "failed" and retry:
                stage.state, stage.spent_s, stage.cuts = "pending", 0.0, 0
        self.say("{slug}, preset {preset}, data {data}, weights {weights}".format(**self.machine))
        given = self.asked, self.machine, self.results, self.total_s
        done = self.all(stages_of(*given)) and self.all(stages_of(*given, self.plan()))
        self.dossier()
        seconds = round(time.monotonic() - self.ends_s + 60 * entry["minutes"], 1)
        entry |= {"ended": now(), "seconds": seconds, "end": self.stop.requested or ("done" if done else "minutes over")}
        self.save()
        if (self.out / CAMPAIGN).exists():
            replace(self.out / CAMPAIGN, (self.results / CAMPAIGN).read_bytes())
        left = [name for name, stage in self.stages.items() if not stage.settled]
        for name in (failed := [name for name, stage in self.stages.items() if stage.state == "failed"]):
            self.say(f"failed: {name}: {self.stages[name].note} (log: {self.files(name)[1]})")
        self.say("nothing is left to do" if done else f"left to do: {', '.join(left) or 'the plan'}; the same command resumes")
        return INTERRUPTED if not done else RUN_FAILED if failed else OK

    def save(self) -> None:
        """Write ``campaign.json`` whole, so that a cut at any moment leaves the old one or the new one."""
        replace(self.results / CAMPAIGN, msgspec.json.format(msgspec.json.encode(self.content), indent=1) + b"\n")

    def say(self, line: str) -> None:
        """One line with the time of day, on standard error and (but for a dry run) in the campaign's log."""
        line, log = f"{time.strftime('%H:%M:%S')}  {line}", self.files(FOLDER)[1]
        print(line, file=sys.stderr, flush=True)
        if self.content.calls:
            make_folder(log.parent)
            with log.open("a") as file:
                print(line, file=file)

    def files(self, name: str) -> tuple[Path, Path]:
        """A stage's standard output and its log."""
        return self.results / FOLDER / f"{name}.json", self.results / FOLDER / "logs" / f"{name}.log"

    def all(self, todo: Sequence[Stage]) -> bool:
        """Run what is not settled, in turns: what is cut by its own limit comes again, after the others. False where the call's
        time, or a signal, left something."""
        for stage in todo:
            self.stages.setdefault(stage.name, StageState())
        self.save()
        again = True
        while again:
            left = [stage for stage in todo if not self.stages[stage.name].settled]
            again = False
            for stage in sorted(left, key=lambda stage: self.stages[stage.name].cuts):
                share, least_s, _ = GROUPS[stage.group]
                share_s = max(least_s, share * self.total_s / sum(other.group == stage.group for other in todo))
                again |= self.one(stage, share_s) == "cut"
                left_s = self.ends_s - time.monotonic()
                if stage.group == "run" and "dossier" not in self.stages and left_s > 2 * self.dossier_s():
                    self.dossier()  # a cut from here on leaves something to read
        return all(self.stages[stage.name].settled for stage in todo)

    def one(self, stage: Stage, share_s: float) -> str | None:
        """Run a stage, and return its state; None where it is left to a later call."""
        if self.stop.requested:
            return None
        entry, resumes, log = self.stages[stage.name], GROUPS[stage.group][-1], self.files(stage.name)[1]
        grace_s, own_s, began_s = self.grace_s if resumes else END_S, share_s * 2**entry.cuts, time.monotonic()
        # There is nothing to build a dossier of before a run has ended.
        dossier_s = self.dossier_s() if stage.group == "run" or finished_runs(self.results) else 0.0
        left_s = self.ends_s - began_s - grace_s - dossier_s
        limits_s = {"limit": own_s, "the call's end": own_s if stage.group == "dossier" else left_s}
        # One that cannot resume is begun with half of its time at least, or a quarter of the call's.
        if limits_s["the call's end"] < (LEAST_S if resumes else min(own_s, self.half_s) / 2):
            entry.note = "not begun: the call's minutes are over"
            return None
        self.say(f"{stage.name} (at most {min(limits_s.values()):.0f} s; it writes {log})")

        def started(pid: int) -> None:
            entry.state, entry.pid = "running", pid
            self.save()

        entry.exit_code, cut = run_command(stage.argv, self.files(stage.name), limits_s, grace_s, self.stop, started)
        entry.state, entry.note = outcome(entry.exit_code, cut, resumes=resumes)
        entry.cuts += entry.state == "cut" or (cut == "the call's end" and not resumes)
        if not resumes and entry.state in ("cut", "pending") and entry.cuts >= MOST_CUTS:
            entry.state, entry.note = "failed", f"it did not end in {MOST_CUTS} turns"
        if entry.state == "failed":
            entry.note += ": " + (tail(log).strip() or "it said nothing").splitlines()[-1][:300]
        entry.last_s = round(time.monotonic() - began_s, 1)
        entry.spent_s = round(entry.spent_s + entry.last_s, 1)
        self.save()
        self.say(f"{stage.name}: {entry.state} in {entry.last_s:.0f} s" + (f", {entry.note}" if entry.note else ""))
        return entry.state

    def plan(self) -> dict[str, Any]:
        """Made once: steps are part of a run's settings, and a campaign compares runs with equal ones. From what the pilot
        took, or (a dry run before it) from estimates; nothing is written."""
        machine, groups = self.machine, GROUPS.keys() - {*(self.asked["skip"] or ()), "run"}
        costs = {(label, config): (fixed_s, step_s) for label, config, fixed_s, step_s in machine["estimates"]}
        costs |= costs_of(finished_runs(self.results), machine, self.asked)
        groups -= {"fit"} if self.total_s < FIT_FROM_S else set()
        kept_s = 2 * self.dossier_s() + self.total_s * sum(GROUPS[name][0] for name in groups)
        self.content.plan = self.content.plan or make_plan(costs, machine, self.asked, max(0.0, self.total_s - kept_s))
        plan = self.content.plan
        times = " of ".join("unknown" if s is None else f"{s / 60:.1f}" for s in (plan["estimated_s"], plan["budget_s"]))
        self.say("plan: {max_steps} steps, seeds {seeds}, {} minutes; {why}".format(times, **plan))
        for case in machine["labels"]:
            steps = [f"{config} {1e3 * step_s:.0f}" for (label, config), (_, step_s) in costs.items() if label == case]
            self.say(f"  {case:<26} ms a step: {', '.join(steps) or 'unknown'}")
        return plan

    def dossier_s(self) -> float:
        """What one is expected to take at most; a call has half of its minutes for the stages in any case."""
        expected_s = max(DOSSIER_S[self.machine["device"]], 1.5 * self.stages.get("dossier", StageState()).last_s)
        return min(self.half_s, expected_s)

    def dossier(self) -> None:
        """Build it, if a run has ended and nobody asked to stop, and pack what is there."""
        price = ["--price-per-hour", str(self.asked["price_per_hour"])] if self.asked["price_per_hour"] else []
        if finished_runs(self.results):
            self.stages.setdefault("dossier", StageState()).cuts = 0
            self.one(Stage("dossier", "dossier", ("report", "build", str(self.results), "--format", "svg", *price)), 600.0)
        self.save()
        try:
            self.say(f"packed: {pack(self.results, self.out)}")
        except PackTooLarge as error:
            self.say(f"not packed: {error}")


def now() -> str:
    """The time of day, for ``campaign.json``."""
    return datetime.now(UTC).isoformat(timespec="seconds")
