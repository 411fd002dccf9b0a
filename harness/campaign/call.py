"""One call's part of a campaign: one stage after the other until its minutes are over, and the dossier."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.campaign import pack as packing
from harness.campaign import process, stages, terminal
from harness.campaign.book import Book, now
from harness.campaign.calibration import calibrated, spread
from harness.campaign.plan import Block, Plan, make_plan
from harness.campaign.stages import FOLDER, LEAST_S, SHARES, Stage
from harness.exit_codes import INTERRUPTED, OK, RUN_FAILED
from harness.run.signals import Stop
from instrument.results.files import replace
from instrument.results.folder import finished_runs

GRACE_S = {"cpu": 20.0, "cuda": 45.0}
"""For a run that was asked to stop to write its checkpoint."""
END_S = 5.0
"""For what has nothing to write when it is asked to stop."""
DOSSIER_S = {"cpu": 30.0, "cuda": 60.0}
"""Kept free for the dossier at the end of a call until one has been built and its time is known."""
KEEPS_ROWS = ("check", "bench", "calibrate", "fit")
"""Groups whose stages write as they go."""
LEAST_RUN_S = 5.0
"""No stage is begun with less time than this in front of it."""


class Campaign:
    """One call's part of a campaign. ``ends_s``: on the monotonic clock."""

    def __init__(
        self, book: Book, machine: dict[str, Any], results: Path, out: Path, ends_s: float, stop: Stop, *, retry: bool
    ) -> None:
        self.book, self.machine, self.results, self.out, self.stop = book, machine, results, out, stop
        self.ends_s, self.retry = ends_s, retry
        self.grace_s = GRACE_S[machine["device"]]
        self.labels, self.configs = machine["labels"], machine["configs"]
        self.call = {"began": now(), "minutes": round((ends_s - time.monotonic()) / 60, 2), "ended": None, "end": None}

    def run(self, began_s: float) -> int:
        """Everything there is time for. Returns the exit code."""
        self.book.content["calls"].append(self.call)
        self._end_orphans()
        self.book.save()
        terminal.show_machine(self.machine, self.results)
        given = self.book.asked, self.results, self.labels, self.configs, self.book.total_s
        done = self._all(stages.before_the_plan(*given))
        if done:
            plan = self._plan()
            runs = stages.runs(self.book.asked, self.results, plan)
            done = self._all(runs[:1])
            if (
                not (self.stop.requested or (self.results / "dossier" / "index.html").exists())
                and self.ends_s - time.monotonic() > 2 * self._dossier_s()
            ):
                self._dossier()  # a cut from here on leaves something to read
            done = self._all(runs[1:]) and done
            done = self._all(stages.behind_the_runs(*given)) and done
        if not self.stop.requested:
            self._dossier()
        return self._end(done, time.monotonic() - began_s)

    def _all(self, todo: Sequence[Stage]) -> bool:
        """Run what is not settled; False where the call's time, or a signal, left something."""
        whole = True
        for stage in todo:
            entry = self.book.stage(stage.name)
            if self.retry and entry["state"] == "failed":
                entry.update(state="pending", spent_s=0.0)
            if self.book.settled(stage.name):
                continue
            whole = self._one(stage, todo) and whole
            if self.stop.requested:
                return False
        return whole

    def _one(self, stage: Stage, todo: Sequence[Stage]) -> bool:
        """Run a stage; False when it is left to a later call."""
        grace_s = self.grace_s if stage.goes_on else END_S
        left_s = self.ends_s - time.monotonic() - grace_s - self._dossier_behind_s(stage)
        limit_s = self._limit_s(stage, todo)
        # What would start over at the next call needs most of its time now.
        if left_s < (LEAST_RUN_S if stage.goes_on else max(LEAST_RUN_S, limit_s / 2)):
            self.book.update(stage.name, note="not begun: the call's minutes are over")
            return False
        before_s = self.book.stage(stage.name)["spent_s"]
        terminal.begins(stage, min(limit_s, left_s))
        ended = process.run(
            stage.command,
            self.results / FOLDER / "logs" / stage.name,
            limit_s=limit_s,
            call_s=left_s,
            grace_s=grace_s,
            stop=self.stop,
            beat=lambda pid, s: self.book.update(stage.name, state="running", pid=pid, spent_s=before_s + s),
            echo=terminal.echo if stage.echo else lambda line: None,
        )
        state, note = outcome(stage, ended)
        self._collect(stage)
        self.book.update(
            stage.name, state=state, pid=None, spent_s=round(before_s + ended.seconds, 1), exit_code=ended.exit_code, note=note
        )
        terminal.ended(stage, state, note, ended.seconds)
        return state != "pending"

    def _limit_s(self, stage: Stage, todo: Sequence[Stage]) -> float:
        """What a stage may take of its group's share: twice its part of what the group has left, so that a slow one does not
        take all; the matrix has no limit but the call's."""
        if stage.group == "run":
            return float("inf")
        group = [s.name for s in todo if s.group == stage.group]
        entries = [self.book.stage(name) for name in group]
        left_s = max(LEAST_S[stage.group] * len(group), SHARES[stage.group] * self.book.total_s) - sum(
            entry["spent_s"] for entry in entries
        )
        waiting = sum(not self.book.settled(name) for name in group)
        return max(LEAST_RUN_S, min(left_s, 2 * left_s / waiting))

    def _collect(self, stage: Stage) -> None:
        """The kernels' parts into one file each, and the doctor's findings beside them."""
        if stage.group == "bench":
            packing.merge_documents(self.results, "bench", "kernels.json")
        if stage.group == "check":
            packing.merge_documents(self.results, "check", "kernel_check.json")
        if stage.name == "doctor":
            with suppress(OSError, ValueError):
                found = (self.results / FOLDER / "logs" / "doctor.out").read_bytes()
                json.loads(found)
                replace(self.results / FOLDER / "doctor.json", found)

    def _plan(self) -> Plan:
        """Made once: steps are part of a run's settings, and a campaign compares runs with equal ones."""
        found = spread(calibrated(self.results, self.labels), self.labels, self.configs)
        if (row := self.book.content["plan"]) is None:
            asked = self.book.asked
            fit_s = stages.kept_for_fit_s(asked, self.book.total_s)
            plan = make_plan(
                found,
                self.labels,
                self.configs,
                budget_s=max(0.0, self.book.total_s - self.book.spent_s - fit_s - 2 * self._dossier_s()),
                preset_steps=self.machine["preset_steps"],
                preset_seeds=self.machine["preset_seeds"],
                max_steps=asked["max_steps"],
                seeds=asked["seeds"],
            )
            self.book.content["plan"] = plan.as_row() | {
                "made": now(),
                "costs": [{"case": label, "config": config, **vars(cost)} for (label, config), cost in found.items()],
            }
            self.book.save()
        else:
            names = Plan.__dataclass_fields__
            plan = Plan(
                **{name: row[name] for name in names}
                | {
                    "seeds": tuple(row["seeds"]),
                    "blocks": tuple(Block(**{**block, "configs": tuple(block["configs"])}) for block in row["blocks"]),
                }
            )
        terminal.show_plan(plan, found, self.machine)
        return plan

    def _dossier_s(self) -> float:
        """What one is expected to take: as the last for each run, and a block of runs more."""
        measured_s, rows = self.book.content.get("dossier_s"), self.book.content.get("dossier_rows")
        if not measured_s:
            return DOSSIER_S[self.machine["device"]]
        more = (len(finished_runs(self.results)) + len(self.configs)) / rows if rows else 1.0
        return measured_s * max(1.0, more)

    def _dossier_behind_s(self, stage: Stage) -> float:
        """Kept free while a stage runs; nothing where there will be no dossier, since no run has ended and none is begun."""
        if stage.group != "run" and not any(finished_runs(self.results)):
            return 0.0
        return self._dossier_s()

    def _dossier(self) -> None:
        """Build it from what is there, without the PDF where its engine is missing, and pack."""
        if not any(finished_runs(self.results)):
            terminal.say("no dossier: no run has ended yet")
            return
        began_s = time.monotonic()
        price = ("--price-per-hour", str(self.book.asked["price_per_hour"])) if self.book.asked["price_per_hour"] else ()
        pdf = () if "weasyprint" not in self.machine["missing"] else ("--no-pdf",)
        state, note = self._build((*price, *pdf))
        if state == "failed" and not pdf:  # an engine that is there and does not load, Pango above all
            why = note
            state, note = self._build((*price, "--no-pdf"))
            note = f"HTML only: {why}" if state == "done" else note
        with suppress(packing.PackTooLarge):
            packed = None
            try:
                packed = packing.pack(self.results, self.out)
            except packing.PackTooLarge as error:
                note = f"{note or ''} not packed: {error}".strip()
                raise
            finally:
                self.book.content |= {
                    "dossier_s": round(1.3 * (time.monotonic() - began_s), 1),
                    "dossier_rows": len(finished_runs(self.results)),
                }
                self.book.update(
                    "dossier",
                    state=state,
                    note=note,
                    spent_s=self.book.stage("dossier")["spent_s"] + round(time.monotonic() - began_s, 1),
                )
            terminal.packed(packed, state, note)

    def _build(self, more: tuple[str, ...]) -> tuple[str, str | None]:
        files = self.results / FOLDER / "logs" / "dossier"
        ended = process.run(
            ("report", "build", str(self.results), "--format", "svg", *more),
            files,
            limit_s=600.0,
            call_s=600.0,
            grace_s=END_S,
            stop=self.stop,
            beat=lambda pid, s: None,
        )
        return ("done", None) if ended.exit_code == OK else ("failed", ended.last_words)

    def _end_orphans(self) -> None:
        """A call that was killed may have left a stage running: it gets time for its checkpoint."""
        for name, entry in self.book.content["stages"].items():
            if entry["state"] == "running":
                if process.end_orphan(entry["pid"], self.grace_s):
                    terminal.say(f"{name} was still running from a call that was killed: ended")
                entry.update(state="pending", pid=None, note="a call was killed while it ran")

    def _end(self, done: bool, seconds: float) -> int:
        failed = [name for name, entry in self.book.content["stages"].items() if entry["state"] == "failed"]
        self.call |= {
            "ended": now(),
            "seconds": round(seconds, 1),
            "end": self.stop.requested or ("done" if done else "minutes over"),
        }
        self.book.save()
        if (self.out / "campaign.json").exists():
            replace(self.out / "campaign.json", self.book.path.read_bytes())
        terminal.last_words(self.book, done, failed)
        if not done:
            return INTERRUPTED
        return RUN_FAILED if failed else OK


def outcome(stage: Stage, ended: process.Ended) -> tuple[str, str | None]:
    """(state, note) of a stage from how its process ended."""
    if ended.exit_code == OK and ended.cut is None:
        return "done", None
    if ended.cut in ("call", "signal"):
        return ("done", None) if ended.exit_code == OK and stage.goes_on else ("pending", f"stopped by the {ended.cut}")
    if ended.cut == "limit":
        kept = "; the rows that it had by then are kept" if stage.group in KEEPS_ROWS else ""
        return "cut", f"its share of the time was over{kept}"
    if ended.exit_code == INTERRUPTED:
        return "pending", "it was interrupted from outside"
    if ended.exit_code == RUN_FAILED and stage.goes_on:
        return "done", "some run ended oom, error or hung; their rows say why"
    how = f"signal {-ended.exit_code}" if ended.exit_code < 0 else f"exit code {ended.exit_code}"
    return "failed", f"{how}: {ended.last_words}"
