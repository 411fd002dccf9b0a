"""The runs of a matrix on the nodes of a Ray cluster, with what `harness.pool.Pool` offers: ``queue``, ``running``, `run`.

One slot executes one run at a time (`harness.engines.node`). The driver owns the results folder: it claims a
run before a node gets it, sends what the run goes on from, fetches its files when it is over, and writes the
index. A run whose node is lost is run once more elsewhere, from what the driver has of it; lost again, it is a row.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from harness import checkpoint
from harness.claims import RunClaimed, claim
from harness.engines import parcel
from harness.engines.cluster import Cluster
from harness.engines.errors import EngineError
from harness.engines.node import Facts, Report, project_sha256
from harness.engines.parcel import ParcelError
from harness.pool import Ended
from harness.run_folder import finished_run, write_index, write_terminal
from harness.settings import RunSettings
from harness.signals import Stop
from harness.supervise.vigil import Rules
from instrument.records import RunRecord, StepRecord

LOST = (RayActorError, ActorUnavailableError, NodeDiedError, ObjectLostError, WorkerCrashedError)
LOSSES_BORNE = 1
"""How often a run is started again because its node was lost."""
FAILED_HIRES = 3
"""Slots that die one after the other before one of them has said a word: the cluster cannot run this program."""
WAIT_FOR_ROOM_S = 600.0
"""How long runs wait in a cluster that has no node left for them."""

Talk = Generator[Any, Any, None]
"""A conversation with an actor: yields what to wait for (None: there is nothing to do) and is sent the answer."""


@dataclass(eq=False)
class Running:
    """A run on a node, and the last step it reported."""

    settings: RunSettings
    started_s: float = field(default_factory=time.monotonic)
    last_step: StepRecord | None = None


@dataclass(eq=False)
class Slot:
    """An actor, the conversation with it, and the answer that is awaited."""

    actor: Any
    talk: Talk
    awaited: Any = None
    facts: Facts | None = None


class RayPool:
    """At most ``jobs`` runs at a time (None: as many as the cluster has slots). ``device`` is the kind of machine the
    results folder is about, None where it is empty; ``say`` tells a person what happens."""

    def __init__(self, queue: list[RunSettings], out: Path, jobs: int | None, stop: Stop | None, cluster: Cluster, *,
                 device: str | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        self.queue, self.out, self.jobs, self.stop = queue, out, jobs, stop or Stop()
        self.cluster, self.device, self.say, self.rules = cluster, device, say, Rules()
        self.running: list[Running] = []
        self.slots: list[Slot] = []
        self._ended: deque[Ended] = deque()
        self._losses: Counter[str] = Counter()
        self._failed_hires = 0
        self._without_room_since_s: float | None = None
        self._project_sha256 = project_sha256()

    @property
    def units_held(self) -> list[str]:
        """What is paid for now, one name a GPU or, without GPUs, a machine."""
        living = [slot for slot in self.slots if slot.facts is not None]
        return [str(id(slot)) for slot in living] if self.cluster.device == "cuda" else sorted({s.facts.host for s in living})

    def run(self, tick: Callable[[], None], seconds_between_ticks: float = 0.25) -> Iterator[Ended]:
        """Yield every run as it ends; ``tick`` is called while waiting. Leaves no actor behind.

        Raises `EngineError` when the cluster cannot be used, OSError when the results folder cannot be written."""
        ticked_s = 0.0
        try:
            while self._ended or self.running or (self.queue and not self.stop.requested):
                self._hire()
                self._listen(seconds_between_ticks)
                while self._ended:
                    yield self._ended.popleft()
                if time.monotonic() - ticked_s >= seconds_between_ticks:
                    ticked_s = time.monotonic()
                    tick()
        finally:
            for slot in self.slots:  # idle by now, but for a second signal or an error of ours
                slot.talk.close()
                self.cluster.dismiss(slot.actor)

    def _hire(self) -> None:
        """As many slots as there are runs for them, and as the cluster has room for (nodes come and go)."""
        room = self.cluster.slots()
        wanted = min(self.jobs or room, len(self.queue) + len(self.running)) if not self.stop.requested else 0
        while len(self.slots) < wanted:
            slot = Slot(self.cluster.hire(), talk=None)
            slot.talk = self._talk(slot)
            slot.awaited = next(slot.talk)
            self.slots.append(slot)
        self._without_room_since_s = None if room else self._without_room_since_s or time.monotonic()
        if not room and time.monotonic() - self._without_room_since_s > WAIT_FOR_ROOM_S:
            raise EngineError(f"the cluster has had no node with room for a run for {WAIT_FOR_ROOM_S:.0f} s; the same command "
                              f"goes on when it has")

    def _listen(self, within_s: float) -> None:
        """Pass on the answers that have come, and give the slots that wait for a run one."""
        for slot in [slot for slot in self.slots if slot.awaited is None and self.queue and not self.stop.requested]:
            self._go_on(slot, slot.talk.send, None)
        awaited = {slot.awaited: slot for slot in self.slots if slot.awaited is not None}
        if not awaited:
            time.sleep(within_s)
            return
        ray.wait(list(awaited), num_returns=1, timeout=within_s)
        ready, _ = ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
        for reference in ready:
            try:
                answer = ray.get(reference)
            except (*LOST, RayTaskError) as error:
                self._go_on(awaited[reference], awaited[reference].talk.throw, error)
            else:
                self._go_on(awaited[reference], awaited[reference].talk.send, answer)

    def _go_on(self, slot: Slot, how: Callable[[Any], Any], what: Any) -> None:
        try:
            slot.awaited = how(what)
        except StopIteration:
            self.slots.remove(slot)
            self.cluster.dismiss(slot.actor)

    def _talk(self, slot: Slot) -> Talk:
        """All there is to say to an actor; ends when it is of no more use."""
        try:
            slot.facts = yield slot.actor.facts.remote()
        except (*LOST, RayTaskError) as error:
            self._failed_hires += 1
            hopeless = isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False)
            if hopeless or self._failed_hires >= FAILED_HIRES:
                raise EngineError(f"a node of the cluster cannot run this program: {_last_line(error)}") from error
            return
        self._failed_hires = 0
        self._refuse_another(slot.facts)
        while True:
            while not self.queue or self.stop.requested:
                yield None
            settings = self.queue.pop(0)
            run = Running(settings)
            try:
                with claim(self.out, settings.run_id):
                    self.running.append(run)
                    yield from self._execute(slot, run)
            except RunClaimed as error:
                self._ended.append(Ended(settings, None, error, 0.0))
            except (*LOST, RayTaskError):
                return
            finally:
                if run in self.running:
                    self.running.remove(run)

    def _execute(self, slot: Slot, run: Running) -> Talk:
        """One run, from giving it to the node to its row in the results folder."""
        blank: RunRecord | None = None
        try:
            blank = yield slot.actor.blank_row.remote(run.settings)
            report = yield from self._accompany(slot, run)
            record = yield from self._fetch(slot, run, report)
        except LOST:
            self._lost(slot, run, blank)
            raise
        except RayTaskError as error:  # the node's own failure: a full disk
            if blank is not None:
                self._bury(run, blank, f"on {slot.facts.host}: {_last_line(error)}")
            raise
        with suppress(*LOST):  # its next question will tell
            yield slot.actor.forget.remote()
        self._end(run, record)

    def _accompany(self, slot: Slot, run: Running) -> Talk:
        """Send what the run goes on from, start it, and watch it to its end; returns the last `Report`."""
        run_id, actor, told = run.settings.run_id, slot.actor, False
        items = parcel.contents(self.out, run_id) if checkpoint.steps(self.out / "runs" / run_id) else []
        wanted = yield actor.start.remote(run.settings, items, self.rules)
        while wanted is not None:
            wanted = yield actor.put.remote(parcel.chunk(self.out, items, wanted))
        report = Report(None)
        while not report.is_over:
            if self.stop.requested and not told:
                told = True
                yield actor.ask_to_stop.remote(self.stop.requested)
            report = yield actor.report.remote()
            run.last_step = report.last_step or run.last_step
        return report

    def _fetch(self, slot: Slot, run: Running, report: Report) -> Talk:
        """Bring the run's files home, the row last; returns it, or None."""
        run_id = run.settings.run_id
        receiving = parcel.receive(self.out, run_id, list(report.items))
        try:
            wanted = next(receiving, None)
            while wanted is not None:
                data = yield slot.actor.read.remote(wanted)
                try:
                    wanted = receiving.send(data)
                except StopIteration:
                    wanted = None
        except ParcelError as error:
            raise EngineError(f"{slot.facts.host}: {error}") from error
        finally:
            receiving.close()
        if report.row is not None:
            write_terminal(self.out, report.row)
        write_index(self.out)
        return finished_run(self.out, run_id)

    def _lost(self, slot: Slot, run: Running, blank: RunRecord | None) -> None:
        """A node went away with a run: once more elsewhere, or a row."""
        run_id, host = run.settings.run_id, slot.facts.host
        self._losses[run_id] += blank is not None
        if self.stop.requested:
            self._end(run, None)
        elif self._losses[run_id] <= LOSSES_BORNE:
            if blank is not None:
                self.say(f"{host} was lost with {run_id}: it is run again")
            self.queue.insert(0, run.settings)
        else:
            self._bury(run, msgspec.structs.replace(blank, flags=blank.flags | {"death": {"cause": "node_lost"}}),
                       f"its node was lost {self._losses[run_id]} times while it executed the run, the last time {host}")

    def _bury(self, run: Running, blank: RunRecord, error: str) -> None:
        row = msgspec.structs.replace(blank, error=error)
        write_terminal(self.out, row)
        self._end(run, row)

    def _end(self, run: Running, record: RunRecord | None) -> None:
        self.running.remove(run)
        self._ended.append(Ended(run.settings, record, None, time.monotonic() - run.started_s))

    def _refuse_another(self, facts: Facts) -> None:
        """A node that would not do what this machine would."""
        if facts.project_sha256 != self._project_sha256:
            raise EngineError(f"{facts.host} has another version of this program than this machine; install the same on every "
                              f"node")
        self.device = self.device or facts.device
        if facts.device != self.device:
            raise EngineError(f"{facts.host} is a {facts.device}, and the results folder {self.out} is about a {self.device}; "
                              f"one device a folder")


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
