"""One run as a task on a node of a Ray cluster. Nodes share no disk with the driver: a run's folder is a temporary one of its
node, and its files are the task's result, which travels through Ray's object store."""

from __future__ import annotations

import hashlib
import socket
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import ray
import torch

from bench_cases.data import fingerprint
from harness.failure import Failure, failure_of
from harness.matrix.ray_cluster import EngineError
from harness.planning import data_options, sources_fingerprint
from harness.run.outcome import Outcome, summarize
from harness.run.signals import Stop
from harness.settings import RunSettings
from harness.supervisor.pool import supervise
from harness.supervisor.process_monitor import Rules
from instrument.environment import device_slug
from instrument.results import files
from instrument.results.schemas import RunRecord, StepRecord
from instrument.results.transfer import PackedFile, pack, unpack

ROOMS = ("bench_cases", "harness", "instrument", "kernels")
POST_EVERY_S = 0.5


class OtherFiles(Exception):
    """A node has other data, weights or model files than the machine that planned the run."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: the Ray worker that executes it (another one after a loss), its node and host, the run's row if nothing
    more is heard of it, and its last step."""

    worker: str
    node: str
    host: str
    draft: RunRecord
    last_step: StepRecord | None = None


@dataclass(frozen=True)
class NodeResult:
    """The run's files, its row last; or nothing for a run that was asked to stop before it began. ``row``: where the files have
    none."""

    host: str
    files: list[PackedFile] = field(default_factory=list)
    row: RunRecord | None = None


class Board:
    """An actor beside the driver: tasks post their progress, and learn whether to stop."""

    def __init__(self) -> None:
        self.stop: str | None = None
        self.posted: dict[str, Progress] = {}

    def post(self, run_id: str, progress: Progress) -> str | None:
        """From a task; returns who asked to stop, or None."""
        self.posted[run_id] = progress
        return self.stop

    def read(self, stop: str | None) -> dict[str, Progress]:
        """From the driver: what was posted last, by run id."""
        self.stop = stop
        return self.posted


def execute_on_node(
    board: Any, settings: RunSettings, device: str, project: str, rules: Rules | None, packed: list[PackedFile]
) -> NodeResult:
    """Execute a run, from the files in ``packed`` where it resumes. What goes wrong with it here (a full disk) is its row.
    Raises `EngineError` where this node's device is no ``device`` (a slug) or its program not ``project``, the driver's."""
    context, host, stop = ray.get_runtime_context(), socket.gethostname(), Stop()
    if project != project_sha256():
        raise EngineError(f"{host} has another version of this program than this machine; install the same on every node")
    if (found := device_slug(torch.device(settings.device))) != device:
        raise EngineError(f"{host} is a {found}, and the results folder is about a {device}; one device a folder")
    draft = summarize(settings, Outcome(status="error"))
    progress, due_s = Progress(context.get_worker_id(), context.get_node_id(), host, draft), 0.0

    def post(last_step: StepRecord | None = None) -> None:
        nonlocal progress, due_s
        progress = replace(progress, last_step=last_step or progress.last_step)
        if time.monotonic() >= due_s:
            due_s = time.monotonic() + POST_EVERY_S
            if who := ray.get(board.post.remote(settings.run_id, progress)):
                stop.request(who)

    post()
    if stop.requested:
        return NodeResult(host)
    files.sweep(Path(tempfile.gettempdir()))  # what killed workers left
    with files.temporary_folder("ddb-run") as out:
        row = None
        try:
            refuse_other_files(settings)
            unpack(out, settings.run_id, packed)
            if failure := supervise(settings, out, stop=stop, on_step=post, rules=rules, tick=post).failure:
                raise failure
        except Exception as error:
            row = failed_row(draft, replace(failure := failure_of(error), error=f"on {host}: {failure.error}"))
        return NodeResult(host, pack(out, settings.run_id), row)


def failed_row(draft: RunRecord, failure: Failure) -> RunRecord:
    """The row of a run that ``failure`` ended."""
    return msgspec.structs.replace(draft, status=failure.status, error=failure.error, flags=draft.flags | failure.flags)


def refuse_other_files(settings: RunSettings) -> None:
    """Raise `OtherFiles` where this machine's data, weights or model files are not those the run was planned with."""
    model, other = settings.case.architecture, "is not here what it is on the machine that planned the run"
    if fingerprint(settings.data, **data_options(settings.case, settings)) != settings.data_fingerprint:
        raise OtherFiles(f"--data {settings.data} {other}; put the same files on every node")
    if sources_fingerprint(settings.weights, model.hub_id, model.build) != settings.sources_fingerprint:
        raise OtherFiles(f"a file of the weights or the model {other}; put the same files on every node")


def project_sha256() -> str:
    """SHA-256 over this program's sources: a run means the same on every node only where they are the same."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
