"""The runs of a matrix on the nodes of a Ray cluster.

The driver owns the results folder: it claims a run, submits it as a task, and writes the files that come back through Ray's
object store; a node has a temporary folder. Ray executes a task whose node is lost again elsewhere; lost twice, it is a row.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.failure import Failure, of_exception
from harness.matrix.ray_cluster import RETRIES, EngineError
from harness.planning import project_sha256, require_planned_files
from harness.run.outcome import Outcome, summarize
from harness.run.progress import checkpoint_steps
from harness.settings import RunSettings
from harness.supervisor.pool import Pool, ProcessExit
from harness.supervisor.process_monitor import Rules
from instrument.environment import device_slug
from instrument.results import claims, files, folder
from instrument.results.layout import RunFiles
from instrument.results.schemas import RunRecord, StepRecord
from instrument.results.transfer import PackedFile, TransferError, pack, unpack

WAIT_FOR_ROOM_S = 600.0  # in a cluster that has no node left for a run
POST_EVERY_S = 0.5
ANSWER_S = 5.0  # of the board: one that Ray's memory monitor killed starts again, and runs do without it meanwhile


@dataclass(frozen=True)
class Progress:
    """How far a run is: who executes it (another worker after a loss), its row if nothing more is heard, and its last step."""

    worker: str
    node: str
    host: str
    draft: RunRecord
    last_step: StepRecord | None = None


class Board:
    """An actor beside the driver: tasks post their progress, and learn who asked them to stop (None: nobody)."""

    def __init__(self) -> None:
        self.stop, self.posted = None, {}

    def post(self, run_id: str, progress: Progress) -> str | None:
        self.posted[run_id] = progress
        return self.stop

    def read(self, stop: str | None) -> dict[str, Progress]:
        self.stop = stop
        return self.posted


def execute_on_node(
    board: Any, settings: RunSettings, device: str, project: str, rules: Rules, packed: list[PackedFile]
) -> list[PackedFile] | None:
    """The task: execute a run, from ``packed`` files where it resumes. Returns its files, the row last; None if asked to stop
    before. Raises what goes wrong here, and `EngineError` where the device (a slug) or the program is not the driver's."""
    context, host = ray.get_runtime_context(), socket.gethostname()
    if project != project_sha256():
        raise EngineError(f"{host} has another version of this program than this machine; install the same on every node")
    if (found := device_slug(torch.device(settings.device))) != device:
        raise EngineError(f"{host} is a {found}, and the results folder is about a {device}; one device a folder")
    progress = Progress(context.get_worker_id(), context.get_node_id(), host, summarize(settings, Outcome()))
    files.sweep(Path(tempfile.gettempdir()))  # what killed workers left
    with files.temporary_folder("ddb-run") as out:
        pool, due_s = Pool([settings], out, jobs=1, rules=rules), 0.0

        def post() -> None:
            nonlocal due_s
            if time.monotonic() >= due_s:
                now = replace(progress, last_step=pool.running[0].last_step if pool.running else None)
                with suppress(RayError):
                    if who := ray.get(board.post.remote(settings.run_id, now), timeout=ANSWER_S):
                        pool.stop.request(who)
                due_s = time.monotonic() + POST_EVERY_S

        post()
        if pool.stop.requested:
            return None
        require_planned_files(settings)
        unpack(out, settings.run_id, packed)
        for failure in [ended.failure for ended in pool.run(post) if ended.failure]:
            raise failure
        return pack(out, settings.run_id)


@dataclass(eq=False)
class Running:
    """A run that was submitted: its claim, the reference of its result (or why Ray does not give one), and what its node
    posted last."""

    settings: RunSettings
    claim: claims.Claim
    result: ray.ObjectRef | RayError
    progress: Progress | None = None
    last_step: StepRecord | None = None
    started_s: float = field(default_factory=time.monotonic)


class RayPool(Pool):
    """At most ``jobs`` runs at a time (None: as many as the connected cluster has slots). A slot is a GPU where ``device`` (a
    slug) is one, or as many processors as a run has threads (0: all of a node's). ``say`` prints a line for people.
    `run` raises `EngineError` when the cluster cannot be used, OSError when the results folder cannot be written."""

    def __init__(
        self, queue: list[RunSettings], out: Path, jobs: int | None, device: str, say: Callable = lambda _: None, **given: Any
    ) -> None:
        super().__init__(queue, out, jobs, **given)
        self.say, self.on_gpus = say, any(run.device == "cuda" for run in queue)
        self._amount = 1 if self.on_gpus else max((run.threads for run in queue), default=1)
        self._given, self._room_seen_s = (device, project_sha256(), self.rules), time.monotonic()
        self._rows_at_first = {settings.run_id: folder.finished_run(out, settings.run_id) for settings in queue}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        self._board = ray.remote(Board).options(scheduling_strategy=here, **lasting).remote()

    @property
    def units_held(self) -> list[str]:
        """What is paid for now, one name a GPU or, without GPUs, a machine."""
        return sorted({run.settings.run_id if self.on_gpus else run.progress.host for run in self.running if run.progress})

    def slots(self) -> int:
        """Runs that fit into the cluster at a time."""
        need = self._need()
        return sum(int(amount // need) for amount in self._nodes().values()) if need else 0

    def _need(self) -> float:
        return float(self._amount or max(self._nodes().values(), default=0.0))

    def _nodes(self) -> dict[str, float]:
        """The GPUs, or processors, of the living nodes, by node id."""
        resource = "GPU" if self.on_gpus else "CPU"
        return {node["NodeID"]: node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]}

    def _room(self) -> int:
        if room := self.slots():
            self._room_seen_s = time.monotonic()
        elif time.monotonic() - self._room_seen_s > WAIT_FOR_ROOM_S:
            raise EngineError(
                f"the cluster has had no node with room for a run for {WAIT_FOR_ROOM_S:.0f} s; the command resumes"
            )
        return min(self.jobs or room, room)

    def _start(self, settings: RunSettings) -> Running | ProcessExit:
        """Claim a run and submit it, unless another driver executes it or has finished it since this one planned it."""
        try:
            claim = claims.claim(self.out, settings.run_id)
        except claims.RunClaimed as error:
            return ProcessExit(settings, None, error, 0.0)
        row = folder.settled_run(self.out, settings.run_id)
        if row is not None and row != self._rows_at_first.get(settings.run_id):
            claim.release()
            return ProcessExit(settings, row, None, 0.0)
        packed = pack(self.out, settings.run_id) if checkpoint_steps(RunFiles(self.out, settings.run_id).path) else []
        room = {"num_gpus": 1, "num_cpus": 0} if self.on_gpus else {"num_cpus": self._need()}
        task = ray.remote(execute_on_node).options(max_retries=RETRIES, **room)
        try:
            return Running(settings, claim, task.remote(self._board, settings, *self._given, packed))
        except RayError as error:
            return self._end(Running(settings, claim, error))

    def _ended(self, within_s: float) -> list[Running]:
        """Also reads the progress of all runs and, when asked to stop, cancels the tasks that no living node executes."""
        if not self.running:
            time.sleep(within_s)
            return []
        try:
            results, _ = ray.wait([run.result for run in self.running], timeout=within_s)
        except RayError as error:  # of no run in particular, hence of all
            for run in self.running:
                run.result = error
            return list(self.running)
        posted: dict[str, Progress] = {}
        with suppress(RayError):
            posted = ray.get(self._board.read.remote(self.stop.requested), timeout=ANSWER_S)
        for run in self.running:
            before, run.progress = run.progress, posted.get(run.settings.run_id, run.progress)
            run.last_step = run.progress and run.progress.last_step
            if before is not None and before.worker != run.progress.worker:
                self.say(f"{before.host} was lost with {run.settings.run_id}: it is run again")
            if self.stop.requested and (run.progress is None or run.progress.node not in self._nodes()):
                ray.cancel(run.result)
        return [run for run in self.running if run.result in results]

    def _end(self, run: Running) -> ProcessExit:
        """What became of a run: its files come home, or Ray's error is its row."""
        record, run_id = None, run.settings.run_id
        try:
            if isinstance(run.result, RayError):
                raise run.result
            if (packed := ray.get(run.result)) is not None:
                unpack(self.out, run_id, packed)
                folder.write_index(self.out)
                record = folder.finished_run(self.out, run_id)
        except TransferError as error:
            raise EngineError(f"{run.progress.host}: {error}") from error
        except RayError as error:
            if isinstance(error, RayTaskError) or not self.stop.requested:  # else it was cancelled
                folder.write_terminal(self.out, record := failed_row(run, error))
        finally:
            run.claim.release()
        return ProcessExit(run.settings, record, None, time.monotonic() - run.started_s)

    def _kill(self, run: Running) -> None:
        with suppress(RayError):
            if not isinstance(run.result, RayError):
                ray.cancel(run.result, force=True)
        run.claim.release()


def failed_row(run: Running, error: RayError) -> RunRecord:
    """The row of a run whose task Ray lost, or raised; raises `EngineError` for one that failed before the run: all would."""
    cause, at = getattr(error, "cause", None) or error, run.progress
    failure, host = of_exception(cause), at.host if at else "a node that had reported nothing"
    if isinstance(cause, EngineError):
        raise cause from None
    is_ray_s = isinstance(cause, RayError) and cause is not error
    if isinstance(error, RayTaskError) and at is None and not is_ray_s:
        raise EngineError(f"a node of the cluster cannot run this program: {failure.error}") from error
    failure = replace(failure, error=f"on {host}: {failure.error}")
    if failure.cause == "node_lost":
        failure = Failure(
            "node_lost",
            f"its node was lost {RETRIES + 1} times while it executed the run, the last time {host} ({type(cause).__name__})",
        )
    draft = at.draft if at else summarize(run.settings, Outcome())
    return msgspec.structs.replace(draft, status=failure.status, error=failure.error, flags=draft.flags | failure.flags)
