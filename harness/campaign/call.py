"""A campaign's file and one call's part of it: one stage after the other until the call's minutes are over, and the dossier."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.campaign import pack as packing
from harness.campaign import stages, terminal
from harness.campaign.plan import CampaignPlan, calibrated, make_plan, spread
from harness.campaign.stages import CALIBRATION, FOLDER, LEAST_S, SHARES, Stage
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.run.signals import Stop
from harness.settings import SettingsError
from instrument.results.files import replace
from instrument.results.folder import OutputError, finished_runs

NAME, SCHEMA = packing.CAMPAIGN, 1
CHANGEABLE = ("skip", "price_per_hour")
"""Options that a later call may give anew: no run depends on them."""
SETTLED = ("done", "failed", "cut")
"""``cut``: it ran into its own limit, and what it had measured by then is kept. ``pending`` and ``running`` (a call that was
killed) are for this call or the next."""
GRACE_S = {"cpu": 20.0, "cuda": 45.0}
"""For a run that was asked to stop to write its checkpoint."""
END_S = 5.0
"""For what has nothing to write when it is asked to stop."""
DOSSIER_S = {"cpu": 30.0, "cuda": 60.0}
"""Kept free for the dossier at the end of a call until one has been built and its time is known."""
LEAST_RUN_S = 5.0
"""No stage is begun with less time than this left."""


class CampaignState:
    """``campaign.json``: what was asked for, what is planned, what is done and what it took. Written whole at every change, so
    that a cut at any moment leaves the old one or the new one."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def open(cls, results: Path, asked: Mapping[str, Any], total_minutes: float) -> CampaignState:
        """The campaign of a results folder, begun here when there is none. ``asked``: the options that make a campaign what
        it is; None is whatever it was begun with. Raises `SettingsError` when one contradicts it."""
        path = results / NAME
        try:
            content = json.loads(path.read_bytes())
            began = content["asked"]
        except FileNotFoundError:
            content = {"schema": SCHEMA, "began": now(), "asked": dict(asked), "total_minutes": total_minutes}
            return cls(path, content | {"machine": None, "plan": None, "stages": {}, "calls": []})
        except (ValueError, KeyError, TypeError) as error:
            what_now = "move it away, or give another folder with --results"
            raise OutputError(f"{path} is no campaign's file ({error}); {what_now}") from error
        began |= {name: asked[name] for name in CHANGEABLE if asked[name] is not None}
        for name, value in asked.items():
            if value is not None and value != began.get(name):
                raise SettingsError(
                    f"--{name.replace('_', '-')} is {_shown(value)}, and the campaign in {path} was begun with "
                    f"{_shown(began.get(name))}; leave it out to continue, or give another folder with --results"
                )
        return cls(path, content)

    @property
    def asked(self) -> dict[str, Any]:
        return self.content["asked"]

    @property
    def total_s(self) -> float:
        """Of all calls together, as planned."""
        return 60 * self.content["total_minutes"]

    @property
    def spent_s(self) -> float:
        """By all stages so far, in all calls."""
        return sum(stage["spent_s"] for stage in self.content["stages"].values())

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's entry, made when it is new."""
        new = {"state": "pending", "spent_s": 0.0, "exit_code": None, "note": None, "pid": None}
        return self.content["stages"].setdefault(name, new)

    def update(self, name: str, **changes: Any) -> None:
        """Change a stage's entry and save."""
        self.stage(name).update(changes)
        self.save()

    def settled(self, name: str) -> bool:
        """Whether nothing is left to do for a stage."""
        return self.stage(name)["state"] in SETTLED

    def save(self) -> None:
        """Write the file."""
        replace(self.path, json.dumps(self.content, indent=1, allow_nan=False).encode() + b"\n")


@contextmanager
def only_call(results: Path) -> Iterator[None]:
    """Hold the folder: one call at a time. Raises `OutputError` when another living one has it."""
    path = results / ".campaign.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = path.read_text().strip() or "unknown"
            raise OutputError(
                f"another campaign (process {owner}) works in {results}; wait for it, or give another folder with --results"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def now() -> str:
    """The time of day, for people."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "the default" if value is None else str(value)


class Call:
    """One call's part of a campaign. ``ends_s``: on the monotonic clock."""

    def __init__(
        self, state: CampaignState, machine: dict[str, Any], results: Path, out: Path, ends_s: float, stop: Stop, *, retry: bool
    ) -> None:
        self.state, self.machine, self.results, self.out, self.stop = state, machine, results, out, stop
        self.ends_s, self.retry = ends_s, retry
        self.grace_s = GRACE_S[machine["device"]]
        self.labels, self.configs = machine["labels"], machine["configs"]
        self.entry = {"began": now(), "minutes": round((ends_s - time.monotonic()) / 60, 2), "ended": None, "end": None}

    def run(self, began_s: float) -> int:
        """Everything there is time for. Returns the exit code."""
        self.state.content["calls"].append(self.entry)
        self._end_orphans()
        self.state.save()
        terminal.show_machine(self.machine, self.results)
        given = self.state.asked, self.results, self.labels, self.configs, self.state.total_s
        done = self._all(stages.before_the_plan(*given))
        if done:
            first, *others = stages.runs(self.state.asked, self.results, self._plan())
            done = self._all([first])
            others += stages.after_the_runs(*given)
            first_dossier = others and not (self.stop.requested or (self.results / "dossier" / "index.html").exists())
            if first_dossier and self.ends_s - time.monotonic() > 2 * self._dossier_s():
                self._dossier()  # a cut from here on leaves something to read
            done = self._all(others) and done
        if not self.stop.requested:
            self._dossier()
        return self._end(done, time.monotonic() - began_s)

    def _all(self, todo: Sequence[Stage]) -> bool:
        """Run what is not settled; False where the call's time, or a signal, left something."""
        whole = True
        for stage in todo:
            entry = self.state.stage(stage.name)
            if self.retry and entry["state"] == "failed":
                entry.update(state="pending", spent_s=0.0)
            if not self.state.settled(stage.name):
                whole = self._one(stage, todo) and whole
                if self.stop.requested:
                    return False
        return whole

    def _one(self, stage: Stage, todo: Sequence[Stage]) -> bool:
        """Run a stage; False when it is left to a later call."""
        grace_s = self.grace_s if stage.resumes else END_S
        # There is nothing to build a dossier of before a run has ended.
        dossier_s = self._dossier_s() if stage.group == "run" or finished_runs(self.results) else 0.0
        left_s = self.ends_s - time.monotonic() - grace_s - dossier_s
        limit_s = self._limit_s(stage, todo)
        # A stage that cannot resume is begun with half of its time at least.
        if left_s < (LEAST_RUN_S if stage.resumes else max(LEAST_RUN_S, limit_s / 2)):
            self.state.update(stage.name, note="not begun: the call's minutes are over")
            return False
        before_s = self.state.stage(stage.name)["spent_s"]
        terminal.show_begin(stage, min(limit_s, left_s))
        ended = stages.run_process(
            stage.command,
            self.results / FOLDER / "logs" / stage.name,
            limit_s=limit_s,
            call_s=left_s,
            grace_s=grace_s,
            stop=self.stop,
            report=lambda pid, s: self.state.update(stage.name, state="running", pid=pid, spent_s=before_s + s),
            echo=terminal.echo,
        )
        state, note = stages.outcome(stage, ended)
        self._collect(stage)
        changes = {"state": state, "exit_code": ended.exit_code, "note": note, "spent_s": round(before_s + ended.seconds, 1)}
        self.state.update(stage.name, pid=None, **changes)
        terminal.show_end(stage, state, note, ended.seconds)
        return state != "pending"

    def _limit_s(self, stage: Stage, todo: Sequence[Stage]) -> float:
        """What a stage may take of its group's share: twice its part of what the group has left, so that a slow one does not
        take all; the matrix has no limit but the call's."""
        if stage.group == "run":
            return float("inf")
        group = [other.name for other in todo if other.group == stage.group]
        share_s = max(LEAST_S[stage.group] * len(group), SHARES[stage.group] * self.state.total_s)
        left_s = share_s - sum(self.state.stage(name)["spent_s"] for name in group)
        waiting = sum(not self.state.settled(name) for name in group)
        return max(LEAST_RUN_S, min(left_s, 2 * left_s / waiting))

    def _collect(self, stage: Stage) -> None:
        """The kernels' parts into one file each, and the doctor's findings beside them."""
        for group, name in (("bench", "kernels.json"), ("check", "kernel_check.json")):
            if stage.group == group:
                packing.merge_documents(self.results, group, name)
        if stage.group == "doctor":
            with suppress(OSError, ValueError):
                found = (self.results / FOLDER / "logs" / "doctor.out").read_bytes()
                json.loads(found)
                replace(self.results / FOLDER / "doctor.json", found)

    def _plan(self) -> CampaignPlan:
        """Made once: steps are part of a run's settings, and a campaign compares runs with equal ones."""
        known = calibrated(finished_runs(self.results / CALIBRATION), self.labels)
        found, asked, planned = spread(known, self.labels, self.configs), self.state.asked, self.state.content["plan"]
        fit_s = stages.kept_for_fit_s(asked, self.state.total_s)
        left_s = max(0.0, self.state.total_s - self.state.spent_s - fit_s - 2 * self._dossier_s())
        plan = make_plan(
            found,
            self.labels,
            self.configs,
            budget_s=planned["budget_s"] if planned else left_s,
            preset_steps=self.machine["preset_steps"],
            preset_seeds=self.machine["preset_seeds"],
            max_steps=(planned or asked)["max_steps"],
            seeds=(planned or asked)["seeds"],
        )
        if planned is None:
            costs = [{"case": label, "config": config, **vars(cost)} for (label, config), cost in found.items()]
            self.state.content["plan"] = asdict(plan) | {"made": now(), "costs": costs}
            self.state.save()
        terminal.show_plan(plan, found, self.configs, self.labels)
        return plan

    def _dossier_s(self) -> float:
        """What one is expected to take: as the last for each run, and a block of runs more."""
        measured_s, rows = self.state.content.get("dossier_s"), self.state.content.get("dossier_rows")
        if not measured_s:
            return DOSSIER_S[self.machine["device"]]
        return measured_s * max(1.0, (len(finished_runs(self.results)) + len(self.configs)) / rows if rows else 1.0)

    def _dossier(self) -> None:
        """Build it from what is there, without the PDF where its engine is missing, and pack."""
        rows, began_s, packed = len(finished_runs(self.results)), time.monotonic(), None
        if not rows:
            terminal.say("no dossier: no run has ended yet")
            return
        no_pdf = "weasyprint" in self.machine["missing"]
        error = self._build("--no-pdf") if no_pdf else self._build()
        note = error
        if error is not None and not no_pdf:  # an engine that is there and does not load, Pango above all
            why, error = error, self._build("--no-pdf")
            note = error or f"HTML only: {why}"
        try:
            packed = packing.pack(self.results, self.out)
        except packing.PackTooLarge as too_large:
            note = f"{note or ''} not packed: {too_large}".strip()
        finally:
            seconds, state = time.monotonic() - began_s, "done" if error is None else "failed"
            self.state.content |= {"dossier_s": round(1.3 * seconds, 1), "dossier_rows": rows}
            spent_s = self.state.stage("dossier")["spent_s"] + round(seconds, 1)
            self.state.update("dossier", state=state, note=note, spent_s=spent_s)
        terminal.show_pack(packed, state, note)

    def _build(self, *more: str) -> str | None:
        """None, or the last line of what went wrong."""
        asked_price = self.state.asked["price_per_hour"]
        price = ("--price-per-hour", str(asked_price)) if asked_price else ()
        command = ("report", "build", str(self.results), "--format", "svg", *price, *more)
        files = self.results / FOLDER / "logs" / "dossier"
        ended = stages.run_process(command, files, limit_s=600.0, call_s=600.0, grace_s=END_S, stop=self.stop)
        return None if ended.exit_code == OK else ended.last_line

    def _end_orphans(self) -> None:
        """A call that was killed may have left a stage running: it gets time for its checkpoint."""
        for name, entry in self.state.content["stages"].items():
            if entry["state"] == "running":
                if stages.end_orphan(entry["pid"], self.grace_s):
                    terminal.say(f"{name} was still running from a call that was killed: ended")
                entry.update(state="pending", pid=None, note="a call was killed while it ran")

    def _end(self, done: bool, seconds: float) -> int:
        end = self.stop.requested or ("done" if done else "minutes over")
        self.entry |= {"ended": now(), "seconds": round(seconds, 1), "end": end}
        self.state.save()
        if (self.out / NAME).exists():
            replace(self.out / NAME, self.state.path.read_bytes())
        failed = [name for name, entry in self.state.content["stages"].items() if entry["state"] == "failed"]
        terminal.show_left(self.state.content, self.state.spent_s, self.results / FOLDER / "logs", done, failed)
        return INTERRUPTED if not done else RUN_FAILED if failed else OK
