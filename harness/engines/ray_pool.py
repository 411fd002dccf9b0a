"""The runs of a matrix on the nodes of a Ray cluster, with what `harness.pool.Pool` offers: ``queue``, ``running``, `run`.

One slot executes one run at a time (`harness.engines.node`). The driver owns the results folder: it claims a
run before a node gets it, sends what the run goes on from, fetches its files when it is over, and writes the
index. A run whose node is lost is run once more elsewhere, from what the driver has of it; lost again, it is a row.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from harness.engines.cluster import Cluster
from harness.engines.errors import EngineError
from harness.engines.node import Facts, project_sha256
from harness.engines.slot import LOST, Running, Slot
from harness.pool import Ended
from harness.run_folder import finished_run
from harness.settings import RunSettings
from harness.signals import Stop
from harness.supervise.vigil import Rules
from instrument.records import RunRecord

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
        self.ended: deque[Ended] = deque()
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

    def run(self, tick: Callable[[], None], seconds_between_ticks: float = 0.25) -> Iterator[Ended]:
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
