"""``python -m harness campaign``: one call of a campaign, which begins or continues it, stage after stage until its minutes are
over; or (``--dry-run``) the plan of one."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from harness.campaign import stages
from harness.campaign.pack import CAMPAIGN, PackTooLarge, pack, require_ours, unpack
from harness.campaign.plan import ASKED, Cost, calibrated, costs_of_all, find_machine, make_plan
from harness.campaign.stages import CALIBRATION, FIT_FROM_S, FOLDER, GROUPS, Stage, outcome, stages_of
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.run.signals import Stop
from harness.settings import SettingsError
from instrument.results.files import replace
from instrument.results.folder import OutputError, finished_runs, require_writable

CHANGEABLE = ("skip", "price_per_hour")  # options that a later call may give anew: no run depends on them
SETTLED = ("done", "failed", "cut")
"""``cut`` by its own limit. ``pending`` and ``running`` (in a call that was killed) are for this call or the next."""
GRACE_S = {"cpu": 20.0, "cuda": 45.0}  # to write a checkpoint
END_S = 5.0  # to end with nothing to write
DOSSIER_S = {"cpu": 30.0, "cuda": 60.0}  # kept free at least at the end of a call
LEAST_S = 5.0  # no stage is begun with less time left


def campaign_command(options: argparse.Namespace) -> int:
    """Continue the campaign of a results folder, or begin one. Exit code 75 while something is left to do."""
    ends_s = time.monotonic() + 60 * options.minutes
    asked = {name: getattr(options, name) for name in ASKED}
    machine = find_machine(asked, estimates=options.dry_run)
    results = options.results or Path("results") / machine["slug"]
    out = options.out or Path("dossiers") / machine["slug"]
    require_ours(out)
    new = {"schema": 1, "began": now(), "asked": asked, "total_minutes": options.total_minutes or options.minutes}
    new |= {"machine": machine, "plan": None, "stages": {}, "calls": []}
    if options.dry_run:
        plan = Call(new, results, out, ends_s, Stop()).plan()
        if options.json:
            print(json.dumps({"machine": machine, "plan": plan}))
        return OK
    require_writable(results)
    with ExitStack() as held, Stop(patient=True).listening() as stop:
        try:
            held.enter_context(FileLock(results / ".campaign.lock", timeout=0))
        except Timeout:
            raise OutputError(f"another campaign works in {results}; wait for it, or give another with --results") from None
        if unpack(out, results):
            print(f"continues from {out}", file=sys.stderr)
        content = begun(results / CAMPAIGN, asked) or new
        # What a later call leaves out is what the first one said.
        content["machine"] = machine if content["asked"] == asked else find_machine(content["asked"], estimates=False)
        code = Call(content, results, out, ends_s, stop).run(retry=options.retry_failed)
    if options.json:
        print(json.dumps(content))
    return code


def begun(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The campaign of this file, or None. ``asked``: the options that make a campaign what it is; None is whatever it was
    begun with. Raises `SettingsError` when one contradicts it."""
    try:
        content = json.loads(path.read_bytes())
        before = content["asked"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is no campaign's file ({error}); move it away, or give another with --results") from error
    before |= {name: asked[name] for name in CHANGEABLE if asked[name] is not None}
    for name in (name for name, value in asked.items() if value is not None and value != before.get(name)):
        there = f"the campaign in {path} was begun with {before.get(name) or 'the default'}"
        way_out = "leave it out to continue, or give another folder with --results"
        raise SettingsError(f"--{name.replace('_', '-')} is {asked[name]}, and {there}; {way_out}")
    return content


class Call:
    """One call's part of a campaign; ``content`` is that of its file. ``ends_s``: on the monotonic clock."""

    def __init__(self, content: dict[str, Any], results: Path, out: Path, ends_s: float, stop: Stop) -> None:
        self.content, self.results, self.out, self.ends_s, self.stop = content, results, out, ends_s, stop
        self.asked, self.machine, self.stages = content["asked"], content["machine"], content["stages"]
        self.total_s, self.grace_s = 60 * content["total_minutes"], GRACE_S[self.machine["device"]]

    def run(self, *, retry: bool) -> int:
        """Everything there is time for; with ``retry`` also what failed before. Returns the exit code."""
        entry = {"began": now(), "minutes": round((self.ends_s - time.monotonic()) / 60, 2), "ended": None, "end": None}
        self.content["calls"].append(entry)
        for stage in self.stages.values():
            if stage["state"] == "running":  # of a call that was killed: asked to stop as well, it may write a checkpoint yet
                with suppress(psutil.Error):
                    psutil.Process(stage["pid"]).wait(self.grace_s)
                stage |= {"state": "pending", "note": "a call was killed while it ran"}
            elif stage["state"] == "failed" and retry:
                stage |= {"state": "pending", "spent_s": 0.0}
        self.say("{slug}, preset {preset}, data {data}, weights {weights}".format(**self.machine))
        given = self.asked, self.machine, self.results, self.total_s
        done = self.all(stages_of(*given)) and self.all(stages_of(*given, self.plan()))
        if not self.stop.requested:
            self.dossier()
        seconds = round(time.monotonic() - self.ends_s + 60 * entry["minutes"], 1)
        entry |= {"ended": now(), "seconds": seconds, "end": self.stop.requested or ("done" if done else "minutes over")}
        self.save()
        if (self.out / CAMPAIGN).exists():
            replace(self.out / CAMPAIGN, (self.results / CAMPAIGN).read_bytes())
        failed = [name for name, stage in self.stages.items() if stage["state"] == "failed"]
        left = [name for name, stage in self.stages.items() if stage["state"] not in SETTLED]
        for name in failed:
            self.say(f"failed: {name}: {self.stages[name]['note']} (log: {self.files(name)[1]})")
        self.say("nothing is left to do" if done else f"left to do: {', '.join(left) or 'the plan'}; the same command resumes")
        return INTERRUPTED if not done else RUN_FAILED if failed else OK

    def save(self) -> None:
        """Write ``campaign.json`` whole, so that a cut at any moment leaves the old one or the new one."""
        replace(self.results / CAMPAIGN, json.dumps(self.content, indent=1, allow_nan=False).encode() + b"\n")

    def say(self, line: str) -> None:
        """One line with the time of day, for people; it also reads well in a log."""
        print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)

    def files(self, name: str) -> tuple[Path, Path]:
        """A stage's standard output and its log."""
        return self.results / FOLDER / f"{name}.json", self.results / FOLDER / "logs" / f"{name}.log"

    def all(self, todo: Sequence[Stage]) -> bool:
        """Run what is not settled; False where the call's time, or a signal, left something."""
        for stage in todo:
            self.stages.setdefault(stage.name, {"state": "pending", "spent_s": 0.0, "exit_code": None, "note": None})
        self.save()
        for stage in (stage for stage in todo if self.stages[stage.name]["state"] not in SETTLED):
            if not self.stop.requested:
                share, least_s, _ = GROUPS[stage.group]
                self.one(stage, max(least_s, share * self.total_s / sum(other.group == stage.group for other in todo)))
            first = stage.group == "run" and stage != todo[-1] and "dossier" not in self.stages
            if first and not self.stop.requested and self.ends_s - time.monotonic() > 2 * self.dossier_s():
                self.dossier()  # a cut from here on leaves something to read
        return all(self.stages[stage.name]["state"] in SETTLED for stage in todo)

    def one(self, stage: Stage, share_s: float) -> None:
        """Run a stage, or leave it to a later call."""
        entry, resumes, log = self.stages[stage.name], GROUPS[stage.group][-1], self.files(stage.name)[1]
        before_s, grace_s = entry["spent_s"], self.grace_s if resumes else END_S
        # There is nothing to build a dossier of before a run has ended.
        dossier_s = self.dossier_s() if stage.group == "run" or finished_runs(self.results) else 0.0
        began_s = time.monotonic()
        own_s = max(LEAST_S, share_s - before_s) if resumes else share_s
        limits_s = {"limit": own_s, "the call's end": self.ends_s - began_s - grace_s - dossier_s}
        # One that cannot resume is begun with half of its time at least.
        if limits_s["the call's end"] < (LEAST_S if resumes else own_s / 2):
            entry["note"] = "not begun: the call's minutes are over"
            return
        self.say(f"{stage.name} (at most {min(limits_s.values()):.0f} s; it writes {log})")

        def started(pid: int) -> None:
            entry.update(state="running", pid=pid)
            self.save()

        exit_code, cut = stages.run_process(stage.command, self.files(stage.name), limits_s, grace_s, self.stop, started)
        state, note = outcome(exit_code, cut, resumes=resumes)
        note = f"{note}: {last_line(log)}" if state == "failed" else note
        seconds = time.monotonic() - began_s
        entry.update(state=state, exit_code=exit_code, note=note, spent_s=round(before_s + seconds, 1))
        self.save()
        self.say(f"{stage.name}: {state} in {seconds:.0f} s" + (f", {note}" if note else ""))

    def plan(self) -> dict[str, Any]:
        """Made once: steps are part of a run's settings, and a campaign compares runs with equal ones. From the calibration, or
        (a dry run before it) from estimates; nothing is written."""
        labels, configs, planned = self.machine["labels"], self.machine["configs"], self.content["plan"]
        known = {(row["label"], row["config"]): Cost(row["fixed_s"], row["step_s"]) for row in self.machine["estimates"]}
        known |= calibrated(finished_runs(self.results / CALIBRATION), labels)
        costs, groups = costs_of_all(known, labels, configs), GROUPS.keys() - {*(self.asked["skip"] or ()), "run"}
        fit_s = GROUPS["fit"][0] * self.total_s if "fit" in groups and self.total_s >= FIT_FROM_S else 0.0
        before_s = sum(stage["spent_s"] for stage in self.stages.values())
        before_s = before_s or self.total_s * sum(GROUPS[name][0] for name in groups - {"fit"})
        left_s = max(0.0, self.total_s - before_s - fit_s - 2 * self.dossier_s())
        plan = make_plan(costs, self.machine, planned or self.asked, planned["budget_s"] if planned else left_s)
        rows = [{"case": label, "config": config, **cost._asdict()} for (label, config), cost in costs.items()]
        self.content["plan"] = planned or plan | {"made": now(), "costs": rows}
        times = " of ".join("unknown" if s is None else f"{s / 60:.1f}" for s in (plan["estimated_s"], plan["budget_s"]))
        self.say("plan: {max_steps} steps, seeds {seeds}, {} minutes; {why}".format(times, **plan))
        for case in labels:
            steps = [f"{config} {1e3 * known[case, config].step_s:.0f}" for config in configs if (case, config) in known]
            self.say(f"  {case:<26} ms a step: {', '.join(steps) or 'unknown'}")
        return plan

    def dossier_s(self) -> float:
        """What one is expected to take at most."""
        return max(DOSSIER_S[self.machine["device"]], 2 * self.content.get("dossier_s", 0.0))

    def dossier(self) -> None:
        """Build it from what is there, and pack."""
        if not finished_runs(self.results):
            self.say("no dossier: no run has ended yet")
            return
        began_s, price = time.monotonic(), self.asked["price_per_hour"]
        options = ["--price-per-hour", str(price)] if price else []
        command = ["report", "build", str(self.results), "--format", "svg", *options]
        exit_code, _ = stages.run_process(command, self.files("dossier"), {"limit": 600.0}, END_S, self.stop, lambda pid: None)
        state, note = ("done", None) if exit_code == OK else ("failed", last_line(self.files("dossier")[1]))
        try:
            packed = pack(self.results, self.out)
        except PackTooLarge as error:
            packed = note = f"{note or ''} not packed: {error}".strip()
        self.content["dossier_s"] = round(time.monotonic() - began_s, 1)
        spent_s = self.stages.get("dossier", {"spent_s": 0.0})["spent_s"] + self.content["dossier_s"]
        self.stages["dossier"] = {"state": state, "spent_s": spent_s, "exit_code": exit_code, "note": note}
        self.save()
        self.say(f"dossier: {state}; {packed}")


def now() -> str:
    """The time of day, for ``campaign.json``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def last_line(log: Path) -> str:
    """Of what a stage has said so far."""
    lines = log.read_bytes()[-4000:].decode(errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")
