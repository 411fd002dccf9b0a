"""The runs of a matrix on the nodes of a Ray cluster, with the interface of `harness.supervisor.pool.Pool`.

The driver owns the results folder: it claims a run, submits it as a task (`harness.matrix.ray_node`), and writes the files that
come back. Ray executes a task whose node is lost once more elsewhere; a run that is lost again is a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.failure import Failure
from harness.matrix.ray_cluster import EngineError
from harness.matrix.ray_node import Board, Progress, execute_on_node, failed_row, project_sha256
from harness.run.progress import checkpoint_steps
from harness.run.signals import Stop
from harness.settings import RunSettings
from harness.supervisor.pool import ProcessExit
from harness.supervisor.process_monitor import Rules
from instrument.results.claims import Claim, RunClaimed, claim
from instrument.results.folder import finished_run, write_index, write_terminal
from instrument.results.layout import RunFiles
from instrument.results.schemas import RunRecord, StepRecord
from instrument.results.transfer import TransferError, pack, unpack

RETRIES = 1
"""How often Ray executes a task again because its node or worker was lost."""
WAIT_FOR_ROOM_S = 600.0
"""How long runs wait in a cluster that has no node left for them."""


@dataclass(eq=False)
class Running:
    """A run that was submitted: its claim, the reference of its result, and what its node posted last."""

    settings: RunSettings
    claim: Claim
    result: ray.ObjectRef
    started_s: float = field(default_factory=time.monotonic)
    progress: Progress | None = None

    @property
    def last_step(self) -> StepRecord | None:
        return self.progress and self.progress.last_step


class RayPool:
    """At most ``jobs`` runs at a time (None: as many as the connected cluster has slots). A slot is a GPU where ``device`` (a
    slug) is one, or as many processors as a run has threads (0: all of a node's). ``say`` prints a line for people."""

    def __init__(
        self,
        queue: list[RunSettings],
        out: Path,
        jobs: int | None,
        device: str,
        *,
        stop: Stop | None = None,
        rules: Rules | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.queue, self.out, self.jobs, self.stop, self.say = queue, out, jobs, stop or Stop(), say
        self.running: list[Running] = []
        self.on_gpus = any(settings.device == "cuda" for settings in queue)
        self._threads = max((settings.threads for settings in queue), default=1)
        self._given = (device, project_sha256(), rules)
        self._rows_at_first = {settings.run_id: finished_run(out, settings.run_id) for settings in queue}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()

    @property
    def units_held(self) -> list[str]:
        """What is paid for now, one name a GPU or, without GPUs, a machine."""
        begun = [run for run in self.running if run.progress is not None]
        return [run.settings.run_id for run in begun] if self.on_gpus else sorted({run.progress.host for run in begun})

    def slots(self) -> int:
        """Runs that fit into the cluster at a time."""
        name, need = ("GPU", 1.0) if self.on_gpus else ("CPU", self._processors())
        return sum(int(resources.get(name, 0.0) // need) for resources in living_nodes().values()) if need else 0

    def run(self, tick: Callable[[], None], seconds_between_ticks: float = 0.25) -> Iterator[ProcessExit]:
        """Yield every run as it ends; ``tick`` is called while waiting. No task is left.

        Raises `EngineError` when the cluster cannot be used, OSError when the results folder cannot be written."""
        room_seen_s = time.monotonic()
        try:
            while self.running or (self.queue and not self.stop.requested):
                room = self.slots()
                room_seen_s = time.monotonic() if room else room_seen_s
                if time.monotonic() - room_seen_s > WAIT_FOR_ROOM_S:
                    why = f"the cluster has had no node with room for a run for {WAIT_FOR_ROOM_S:.0f} s"
                    raise EngineError(f"{why}; the same command resumes when it has")
                while self.queue and len(self.running) < min(self.jobs or room, room) and not self.stop.requested:
                    if (ended := self._start(self.queue.pop(0))) is not None:
                        yield ended
                finished = self._finished(seconds_between_ticks)
                self._read_progress()
                for run in finished:
                    ended = self._end(run)
                    self.running.remove(run)
                    run.claim.release()
                    yield ended
                tick()
        finally:
            for run in self.running:  # a second signal, or an error of ours
                ray.cancel(run.result, force=True)
                run.claim.release()

    def _start(self, settings: RunSettings) -> ProcessExit | None:
        """Claim a run and submit it, unless another driver executes it or has finished it since this one planned it."""
        run_id = settings.run_id
        try:
            own = claim(self.out, run_id)
        except RunClaimed as error:
            return ProcessExit(settings, None, error, 0.0)
        row = finished_run(self.out, run_id)
        if (
            row is not None
            and row != self._rows_at_first.get(run_id)
            and row.status in ("completed", "diverged", "unsupported")
        ):
            own.release()
            return ProcessExit(settings, row, None, 0.0)
        packed = pack(self.out, run_id) if checkpoint_steps(RunFiles(self.out, run_id).path) else []
        room = {"num_gpus": 1, "num_cpus": 0} if self.on_gpus else {"num_cpus": self._processors()}
        task = ray.remote(execute_on_node).options(max_retries=RETRIES, **room)
        self.running.append(Running(settings, own, task.remote(self._board, settings, *self._given, packed)))

    def _read_progress(self) -> None:
        """Of all runs; when asked to stop, also take back the tasks that no living node executes."""
        posted = ray.get(self._board.read.remote(self.stop.requested))
        for run in self.running:
            before, run.progress = run.progress, posted.get(run.settings.run_id, run.progress)
            if before is not None and before.worker != run.progress.worker:
                self.say(f"{before.host} was lost with {run.settings.run_id}: it is run again")
            if self.stop.requested and (run.progress is None or run.progress.node not in living_nodes()):
                ray.cancel(run.result)

    def _finished(self, within_s: float) -> list[Running]:
        if not self.running:
            time.sleep(within_s)
            return []
        results, _ = ray.wait([run.result for run in self.running], timeout=within_s)
        return [run for run in self.running if run.result in results]

    def _end(self, run: Running) -> ProcessExit:
        """What became of a run; its files come home."""
        record = None
        try:
            record = self._receive(run)
        except TaskCancelledError:
            pass
        except RayError as error:
            if isinstance(cause := getattr(error, "cause", None), EngineError):
                raise cause from None
            last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            if run.progress is None:
                raise EngineError(f"a node of the cluster cannot run this program: {last_line}") from error
            if not self.stop.requested:
                record = failed_row(run.progress.draft, _failure(error, run.progress.host, last_line))
                write_terminal(self.out, record)
        return ProcessExit(run.settings, record, None, time.monotonic() - run.started_s)

    def _receive(self, run: Running) -> RunRecord | None:
        result, run_id = ray.get(run.result), run.settings.run_id
        if not result.files and result.row is None:  # asked to stop before it began
            return None
        try:
            unpack(self.out, run_id, result.files)
        except TransferError as error:
            raise EngineError(f"{result.host}: {error}") from error
        if result.row is not None:
            write_terminal(self.out, result.row)
        write_index(self.out)
        return finished_run(self.out, run_id)

    def _processors(self) -> float:
        return float(self._threads or max((resources.get("CPU", 0.0) for resources in living_nodes().values()), default=0.0))


def living_nodes() -> dict[str, dict[str, float]]:
    """The resources of the cluster's nodes, by node id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _failure(error: RayError, host: str, last_line: str) -> Failure:
    if isinstance(error, RayTaskError):
        return Failure("exception", f"on {host}: {last_line}")
    if isinstance(error, OutOfMemoryError):
        return Failure("host_oom_kill", f"Ray killed the run's task on {host} for want of memory: {last_line}")
    times = f"its node was lost {RETRIES + 1} times while it executed the run"
    return Failure("node_lost", f"{times}, the last time {host}")
