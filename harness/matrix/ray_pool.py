"""The runs of a matrix on the nodes of a Ray cluster, with the interface of `Pool`: ``queue``, ``running``, `run`.

One slot executes one run at a time (`harness.matrix.ray_node`). The driver owns the results folder: it claims a
run before a node gets it, sends what the run goes on from, fetches its files when it is over, and writes the
index. A run whose node is lost is run once more elsewhere, from what the driver has of it; lost again, it is a row.

What the driver says to one slot of the cluster, from its first word to its last.

A conversation is a generator: it yields the question whose answer it waits for (None: there is nothing to do) and is
sent the answer, or has the node's loss thrown into it. So a driver talks to many slots and waits for none.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from harness.matrix import ray_node
from harness.matrix.ray_cluster import Cluster, EngineError
from harness.matrix.ray_node import Facts, ParcelError, Report, project_sha256
from harness.run import checkpoint_files
from harness.run.signals import Stop
from harness.settings import RunSettings
from harness.supervisor.failure import Failure, of_exception
from harness.supervisor.pool import ProcessExit
from harness.supervisor.process_monitor import Rules
from instrument.results.claims import RunClaimed, claim
from instrument.results.folder import finished_run, write_index, write_terminal
from instrument.results.schemas import RunRecord, StepRecord

if TYPE_CHECKING:
    pass

LOST = (RayActorError, ActorUnavailableError, NodeDiedError, ObjectLostError, WorkerCrashedError)
LOSSES_BORNE = 1
"""How often a run is started again because its node was lost."""
FAILED_HIRES = 3
"""Slots that die one after the other before one of them has said a word: the cluster cannot run this program."""

Talk = Generator[Any, Any, Any]


@dataclass(eq=False)
class Running:
    """A run on a node: the last step it reported, its row if nothing more is ever heard of it (None until the node has
    given it), and whether the node said that it is over."""

    settings: RunSettings
    started_s: float = field(default_factory=time.monotonic)
    last_step: StepRecord | None = None
    blank: RunRecord | None = None
    is_over: bool = False


class Slot:
    """An actor (`harness.matrix.ray_node.Node`), the conversation with it, and the answer that is awaited."""

    def __init__(self, actor: Any, pool: RayPool) -> None:
        self.actor, self.pool = actor, pool
        self.facts: Facts | None = None
        self.conversation = self.talk()
        self.awaited = next(self.conversation)

    def talk(self) -> Talk:
        """All there is to say to an actor; ends when it is of no more use."""
        try:
            self.facts = yield self.actor.facts.remote()
        except (*LOST, RayTaskError) as error:
            self.pool.failed_hires += 1
            hopeless = isinstance(error, RayTaskError) or getattr(error, "actor_init_failed", False)
            if hopeless or self.pool.failed_hires >= FAILED_HIRES:
                raise EngineError(f"a node of the cluster cannot run this program: {_last_line(error)}") from error
            return
        self.pool.failed_hires = 0
        self.pool.refuse_another(self.facts)
        while True:
            while not self.pool.queue or self.pool.stop.requested:
                yield None
            settings = self.pool.queue.pop(0)
            run = Running(settings)
            try:
                with claim(self.pool.out, settings.run_id):
                    if (row := self.pool.done_meanwhile(settings)) is not None:
                        self.pool.ended.append(ProcessExit(settings, row, None, 0.0))
                        continue
                    self.pool.running.append(run)
                    yield from self._execute(run)
            except RunClaimed as error:
                self.pool.ended.append(ProcessExit(settings, None, error, 0.0))
            except (*LOST, RayTaskError):
                return
            finally:
                if run in self.pool.running:
                    self.pool.running.remove(run)

    def _execute(self, run: Running) -> Talk:
        """One run, from giving it to the node to its row in the results folder."""
        try:
            run.blank = yield self.actor.blank_row.remote(run.settings)
            report = yield from self._accompany(run)
            record = yield from self._fetch(run, report)
        except LOST:
            self._lost(run)
            raise
        except RayTaskError as error:  # the node's own failure: a full disk
            if run.blank is not None:
                self._bury(run, nodes_own_failure(error, self.facts.host))
            raise
        with suppress(*LOST):  # its next question will tell
            yield self.actor.forget.remote()
        self._end(run, record)

    def _accompany(self, run: Running) -> Talk:
        """Send what the run goes on from, start it, and watch it to its end; returns the last `Report`."""
        run_id, actor, told = run.settings.run_id, self.actor, False
        items = ray_node.contents(self.pool.out, run_id) if checkpoint_files.steps(self.pool.out / "runs" / run_id) else []
        wanted = yield actor.start.remote(run.settings, items, self.pool.rules)
        while wanted is not None:
            wanted = yield actor.put.remote(ray_node.chunk(self.pool.out, items, wanted))
        report = Report(None)
        while not report.is_over:
            if self.pool.stop.requested and not told:
                told = True
                yield actor.ask_to_stop.remote(self.pool.stop.requested)
            report = yield actor.report.remote()
            run.last_step = report.last_step or run.last_step
        run.is_over = True
        return report

    def _fetch(self, run: Running, report: Report) -> Talk:
        """Bring the run's files home, the row last; returns it, or None."""
        run_id = run.settings.run_id
        receiving = ray_node.receive(self.pool.out, run_id, list(report.items))
        try:
            wanted = next(receiving, None)
            while wanted is not None:
                data = yield self.actor.read.remote(wanted)
                try:
                    wanted = receiving.send(data)
                except StopIteration:
                    wanted = None
        except ParcelError as error:
            raise EngineError(f"{self.facts.host}: {error}") from error
        finally:
            receiving.close()
        if report.row is not None:
            write_terminal(self.pool.out, report.row)
        write_index(self.pool.out)
        return finished_run(self.pool.out, run_id)

    def _lost(self, run: Running) -> None:
        """A node went away with a run: once more elsewhere, or a row."""
        run_id, host = run.settings.run_id, self.facts.host
        self.pool.losses[run_id] += run.blank is not None
        if self.pool.stop.requested:
            self._end(run, None)
        elif self.pool.losses[run_id] <= LOSSES_BORNE:
            if run.blank is not None:
                self.pool.say(f"{host} was lost with {run_id}: it is run again")
            self.pool.queue.insert(0, run.settings)
        else:
            death = Failure(
                "node_lost",
                f"its node was lost {self.pool.losses[run_id]} times while it executed the run, the last time {host}",
            )
            self._bury(run, death)

    def _bury(self, run: Running, death: Failure) -> None:
        row = msgspec.structs.replace(run.blank, status=death.status, error=death.error, flags=run.blank.flags | death.flags)
        write_terminal(self.pool.out, row)
        self._end(run, row)

    def _end(self, run: Running, record: RunRecord | None) -> None:
        self.pool.running.remove(run)
        self.pool.ended.append(ProcessExit(run.settings, record, None, time.monotonic() - run.started_s))


def nodes_own_failure(error: RayTaskError, host: str) -> Failure:
    """The death that the same exception would be here; where a node could not send it, a Ray error comes in its place,
    and only its words are known."""
    if isinstance(error.cause, Exception) and not isinstance(error.cause, RayError):
        death = of_exception(error.cause)
        return replace(death, error=f"on {host}: {death.error}")
    return Failure("exception", f"on {host}: {_last_line(error)}", {"why": "the node could not send the exception itself"})


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


WAIT_FOR_ROOM_S = 600.0
"""How long runs wait in a cluster that has no node left for them."""


class RayPool:
    """At most ``jobs`` runs at a time (None: as many as the cluster has slots). ``device`` is the kind of machine the
    results folder is about, None where it is empty; ``say`` tells a person what happens."""

    def __init__(
        self,
        queue: list[RunSettings],
        out: Path,
        jobs: int | None,
        stop: Stop | None,
        cluster: Cluster,
        *,
        device: str | None = None,
        rules: Rules | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.queue, self.out, self.jobs, self.stop = queue, out, jobs, stop or Stop()
        self.cluster, self.device, self.rules, self.say = cluster, device, rules, say
        self.running: list[Running] = []
        self.slots: list[Slot] = []
        self.ended: deque[ProcessExit] = deque()
        self.losses: Counter[str] = Counter()
        self.failed_hires = 0
        self._without_room_since_s: float | None = None
        self._project_sha256 = project_sha256()
        self._rows_at_first = {settings.run_id: finished_run(out, settings.run_id) for settings in queue}

    @property
    def units_held(self) -> list[str]:
        """What is paid for now, one name a GPU or, without GPUs, a machine."""
        living = [slot for slot in self.slots if slot.facts is not None]
        return [str(id(slot)) for slot in living] if self.cluster.device == "cuda" else sorted({s.facts.host for s in living})

    def run(self, tick: Callable[[], None], seconds_between_ticks: float = 0.25) -> Iterator[ProcessExit]:
        """Yield every run as it ends; ``tick`` is called while waiting. Leaves no actor behind.

        Raises `EngineError` when the cluster cannot be used, OSError when the results folder cannot be written."""
        ticked_s = 0.0
        try:
            while self.ended or self.running or (self.queue and not self.stop.requested):
                self._hire()
                self._listen(seconds_between_ticks)
                while self.ended:
                    yield self.ended.popleft()
                if time.monotonic() - ticked_s >= seconds_between_ticks:
                    ticked_s = time.monotonic()
                    tick()
        finally:
            for slot in self.slots:  # idle by now, but for a second signal or an error of ours
                slot.conversation.close()
                self.cluster.dismiss(slot.actor)

    def _hire(self) -> None:
        """As many slots as there are runs for them, and as the cluster has room for (nodes come and go)."""
        room = self.cluster.slots()
        wanted = min(self.jobs or room, len(self.queue) + len(self.running)) if not self.stop.requested else 0
        while len(self.slots) < wanted:
            self.slots.append(Slot(self.cluster.hire(), self))
        self._without_room_since_s = None if room else self._without_room_since_s or time.monotonic()
        if not room and time.monotonic() - self._without_room_since_s > WAIT_FOR_ROOM_S:
            raise EngineError(
                f"the cluster has had no node with room for a run for {WAIT_FOR_ROOM_S:.0f} s; the same command "
                f"goes on when it has"
            )

    def _listen(self, within_s: float) -> None:
        """Pass on the answers that have come, and give the slots that wait for a run one."""
        for slot in [slot for slot in self.slots if slot.awaited is None and self.queue and not self.stop.requested]:
            self._go_on(slot, slot.conversation.send, None)
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
                self._go_on(awaited[reference], awaited[reference].conversation.throw, error)
            else:
                self._go_on(awaited[reference], awaited[reference].conversation.send, answer)

    def _go_on(self, slot: Slot, how: Callable[[Any], Any], what: Any) -> None:
        try:
            slot.awaited = how(what)
        except StopIteration:
            self.slots.remove(slot)
            self.cluster.dismiss(slot.actor)

    def done_meanwhile(self, settings: RunSettings) -> RunRecord | None:
        """The row of a run that another driver has finished since this one planned it."""
        row = finished_run(self.out, settings.run_id)
        known = row is None or row == self._rows_at_first.get(settings.run_id)
        return None if known or row.status not in ("completed", "diverged", "unsupported") else row

    def refuse_another(self, facts: Facts) -> None:
        """A node that would not do what this machine would."""
        if facts.project_sha256 != self._project_sha256:
            raise EngineError(
                f"{facts.host} has another version of this program than this machine; install the same on every node"
            )
        self.device = self.device or facts.device
        if facts.device != self.device:
            raise EngineError(
                f"{facts.host} is a {facts.device}, and the results folder {self.out} is about a {self.device}; "
                f"one device a folder"
            )
