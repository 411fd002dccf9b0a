"""One slot of a cluster's node: an actor that executes one run at a time, each in a fresh process.

Nothing is shared with the driver but this actor's answers: the run's folder lies in a temporary folder of the
node, and its files are read from there in chunks (`harness.engines.parcel`). The driver asks, the node answers;
a run never waits for the driver, and a report that nobody fetched is replaced by the next.
"""

from __future__ import annotations

import hashlib
import socket
import tempfile
import threading
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from bench_cases.data import fingerprint
from harness.engines import parcel
from harness.engines.parcel import Item, Wanted
from harness.planning import data_options, sources_fingerprint
from harness.pool import supervise
from harness.settings import RunSettings
from harness.signals import Stop
from harness.summary import Outcome, summarize
from harness.supervise.fault import fault_of
from harness.supervise.vigil import Rules
from instrument import files
from instrument.environment import device_slug
from instrument.records import RunRecord, StepRecord

ROOMS = ("bench_cases", "harness", "instrument", "kernels")


@dataclass(frozen=True)
class Facts:
    """What a driver must know of a node before it gives it a run."""

    host: str
    device: str
    project_sha256: str
    torch_version: str


@dataclass(frozen=True)
class Report:
    """How far a run is: its last step, and when it is over the files there are to fetch, and in ``row`` the run's row
    where it has none of its own."""

    last_step: StepRecord | None
    is_over: bool = False
    items: tuple[Item, ...] = ()
    row: RunRecord | None = None


class OtherFiles(Exception):
    """A node has other files than the machine that planned the run."""


class Node:
    """The actor's methods return at once, `report` after at most a moment; they are called one after the other."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._receiving: Generator[Wanted, bytes, None]
        self._over = threading.Event()
        files.sweep(Path(tempfile.gettempdir()))  # what a killed slot left behind

    def facts(self) -> Facts:
        """Host, kind of device, and which program this is."""
        return Facts(socket.gethostname(), device_slug(self.device), project_sha256(), str(torch.__version__))

    def blank_row(self, settings: RunSettings) -> RunRecord:
        """The row of a run of which nothing is known, as this node would write it: for a driver that loses the node."""
        return summarize(settings, Outcome(status="error"))

    def start(self, settings: RunSettings, items: list[Item], rules: Rules | None = None) -> Wanted | None:
        """Take a run, and the files that it goes on from, if any; returns what is wanted first, as `put` does."""
        self.settings, self.stop, self.rules = settings, Stop(), rules
        self._folder = ExitStack()
        self.out = self._folder.enter_context(files.temporary_folder("ddb-run"))
        self.last_step: StepRecord | None = None
        self.row: RunRecord | None = None
        self._over.clear()
        self._receiving = parcel.receive(self.out, settings.run_id, items) if items else _nothing()
        return self._next_wanted(None)

    def put(self, data: bytes) -> Wanted | None:
        """A chunk of the files the run goes on from; returns the next one wanted. None: all there, the run began."""
        return self._next_wanted(data)

    def report(self, within_s: float = 0.25) -> Report:
        """How far the run is; waits a moment for its end."""
        if not self._over.wait(within_s):
            return Report(self.last_step)
        self.items = parcel.contents(self.out, self.settings.run_id)
        return Report(self.last_step, is_over=True, items=tuple(self.items), row=self.row)

    def read(self, wanted: Wanted) -> bytes:
        """A chunk of a file of the run that is over."""
        return parcel.chunk(self.out, self.items, wanted)

    def ask_to_stop(self, who: str) -> None:
        """The run writes a checkpoint and ends."""
        self.stop.request(who)

    def forget(self) -> None:
        """Delete the run's folder on this node."""
        self._folder.close()

    def _next_wanted(self, data: bytes | None) -> Wanted | None:
        try:
            return self._receiving.send(data)
        except StopIteration:
            threading.Thread(target=self._execute, name="run", daemon=True).start()
            return None

    def _execute(self) -> None:
        """On a thread of its own: what goes wrong here (other data, a full disk) is this run's row."""
        try:
            refuse_other_files(self.settings)
            ended = supervise(self.settings, self.out, stop=self.stop, on_step=self._keep, rules=self.rules)
            if ended.failure is not None:
                raise ended.failure
        except Exception as error:
            why = f"{type(error).__name__} on {socket.gethostname()}: {error}"
            self.row = summarize(self.settings, Outcome(status="error", error=why, flags=fault_of(error).flags))
        finally:
            self._over.set()

    def _keep(self, step: StepRecord) -> None:
        self.last_step = step


def refuse_other_files(settings: RunSettings) -> None:
    """Raise `OtherFiles` where this machine's data, weights or model files are not those the run was planned with."""
    if fingerprint(settings.data, **data_options(settings.case, settings)) != settings.data_fingerprint:
        raise OtherFiles(
            f"--data {settings.data} is not here what it is on the machine that planned the run; put the same "
            f"files on every node"
        )
    build = settings.case.architecture
    if sources_fingerprint(settings.weights, build.hub_id, build.build) != settings.sources_fingerprint:
        raise OtherFiles(
            "weights or model files are not here what they are on the machine that planned the run; put the "
            "same files on every node"
        )


def project_sha256() -> str:
    """SHA-256 over this program's sources: a run means the same on every node only where they are the same."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _nothing() -> Generator[Wanted, bytes, None]:
    """A parcel with nothing in it."""
    yield from ()
