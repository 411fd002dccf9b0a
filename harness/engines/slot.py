"""What the driver says to one slot of the cluster, from its first word to its last.

A conversation is a generator: it yields the question whose answer it waits for (None: there is nothing to do) and is
sent the answer, or has the node's loss thrown into it. So a driver talks to many slots and waits for none.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from harness import checkpoint
from harness.claims import RunClaimed, claim
from harness.engines import parcel
from harness.engines.errors import EngineError
from harness.engines.node import Facts, Report
from harness.engines.parcel import ParcelError
from harness.pool import Ended
from harness.run_folder import finished_run, write_index, write_terminal
from harness.settings import RunSettings
from harness.supervise.death import Death, of_exception
from instrument.records import RunRecord, StepRecord

if TYPE_CHECKING:
    from harness.engines.ray_pool import RayPool

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
    """An actor (`harness.engines.node.Node`), the conversation with it, and the answer that is awaited."""

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
                        self.pool.ended.append(Ended(settings, row, None, 0.0))
                        continue
                    self.pool.running.append(run)
                    yield from self._execute(run)
            except RunClaimed as error:
                self.pool.ended.append(Ended(settings, None, error, 0.0))
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
        items = parcel.contents(self.pool.out, run_id) if checkpoint.steps(self.pool.out / "runs" / run_id) else []
        wanted = yield actor.start.remote(run.settings, items, self.pool.rules)
        while wanted is not None:
            wanted = yield actor.put.remote(parcel.chunk(self.pool.out, items, wanted))
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
        receiving = parcel.receive(self.pool.out, run_id, list(report.items))
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
            death = Death(
                "node_lost",
                f"its node was lost {self.pool.losses[run_id]} times while it executed the run, the last time {host}",
            )
            self._bury(run, death)

    def _bury(self, run: Running, death: Death) -> None:
        row = msgspec.structs.replace(run.blank, status=death.status, error=death.error, flags=run.blank.flags | death.flags)
        write_terminal(self.pool.out, row)
        self._end(run, row)

    def _end(self, run: Running, record: RunRecord | None) -> None:
        self.pool.running.remove(run)
        self.pool.ended.append(Ended(run.settings, record, None, time.monotonic() - run.started_s))


def nodes_own_failure(error: RayTaskError, host: str) -> Death:
    """The death that the same exception would be here; where a node could not send it, a Ray error comes in its place,
    and only its words are known."""
    if isinstance(error.cause, Exception) and not isinstance(error.cause, RayError):
        death = of_exception(error.cause)
        return replace(death, error=f"on {host}: {death.error}")
    return Death("exception", f"on {host}: {_last_line(error)}", {"why": "the node could not send the exception itself"})


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
