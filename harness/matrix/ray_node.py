"""One slot of a cluster's node: an actor that executes one run at a time, each in a fresh process.

Nothing is shared with the driver but this actor's answers: the run's folder lies in a temporary folder of the
node, and its files are read from there in chunks (`harness.matrix.ray_node`). The driver asks, the node answers;
a run never waits for the driver, and a report that nobody fetched is replaced by the next.

A run's files on their way between two machines that share no disk: listed, read in chunks, checked, written.

The one who receives trusts nothing: names stay inside the run's own places, no link is followed, sizes and
SHA-256 must be those that were listed, and the row comes last, so that a parcel that breaks off leaves an
unfinished run and not a wrong one.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import tempfile
import threading
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from bench_cases.data import fingerprint
from harness.commands.repair import files_of
from harness.planning import data_options, sources_fingerprint
from harness.run.outcome import Outcome, summarize
from harness.run.signals import Stop
from harness.settings import RunSettings
from harness.supervisor.failure import failure_of
from harness.supervisor.pool import supervise
from harness.supervisor.process_monitor import Rules
from instrument.environment import device_slug
from instrument.results import files
from instrument.results.folder import require_no_links
from instrument.results.schemas import RunRecord, StepRecord, is_safe, require_safe

CHUNK_BYTES = 4 << 20
MACHINE = "machine.json"

Wanted = tuple[str, int]
"""A path and an offset in bytes: the chunk that the receiver needs next."""


class ParcelError(Exception):
    """What came is not what was listed, or has no business there."""


@dataclass(frozen=True)
class Item:
    """A file of a parcel: its path in the results folder, with slashes."""

    path: str
    size_bytes: int
    sha256: str


def contents(out: Path, run_id: str) -> list[Item]:
    """A run's plain files in the results folder ``out``, the machine's facts first and the row last."""
    row = out / "runs" / run_id / "run.json"
    paths = [out / MACHINE, *files_of(out, run_id), row]
    return [_item(out, path) for path in paths if files.plain_inside(out, path)]


def chunk(out: Path, items: list[Item], wanted: Wanted) -> bytes:
    """A chunk of a listed file; raises `ParcelError` for one that is not listed."""
    path, offset = wanted
    if path not in {item.path for item in items}:
        raise ParcelError(f"{path!r} is not in the parcel")
    fd = os.open(out / path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return os.pread(fd, CHUNK_BYTES, offset)
    finally:
        os.close(fd)


def receive(out: Path, run_id: str, items: list[Item]) -> Generator[Wanted, bytes, None]:
    """Put a run's files into the results folder ``out``: yields what it wants and is sent that chunk.

    Whatever the run had there and is not in the parcel goes. Raises `ParcelError`, and OSError where ``out``
    cannot be written. Close it to give up: no half file stays.
    """
    require_safe(run_id)
    _refuse_foreign(run_id, items)
    require_no_links(out, run_id)
    row = f"runs/{run_id}/run.json"
    files.remove(out / row)  # a row must not stand beside another attempt's files
    for item in items:
        if item.path != row and not (item.path == MACHINE and (out / MACHINE).exists()):
            yield from _receive_file(out, item)
    _remove_others(out, run_id, {item.path for item in items})
    for item in items:
        if item.path == row:
            yield from _receive_file(out, item)


def _item(out: Path, path: Path) -> Item:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return Item(
            path.relative_to(out).as_posix(), os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        )


def _refuse_foreign(run_id: str, items: list[Item]) -> None:
    seen = set()
    for item in items:
        if item.path in seen or not _is_the_runs(run_id, item.path) or item.size_bytes < 0:
            raise ParcelError(f"{item.path[:120]!r} has no place among the files of {run_id}")
        seen.add(item.path)


def _is_the_runs(run_id: str, path: str) -> bool:
    """Whether a path names a file of this run, spelled in the one way that is allowed."""
    parts = PurePosixPath(path).parts
    if "/".join(parts) != path or not all(map(is_safe, parts)):
        return False
    name = re.escape(run_id)
    return (
        path == MACHINE
        or (len(parts) > 2 and parts[:2] == ("runs", run_id))
        or re.fullmatch(rf"training_logs/run_{name}\.jsonl|traces/{name}(-step[0-9]+)?\.json\.gz", path) is not None
    )


def _receive_file(out: Path, item: Item) -> Generator[Wanted, bytes, None]:
    target, digest, left_bytes = out / item.path, hashlib.sha256(), item.size_bytes
    for folder in target.relative_to(out).parents:
        if (out / folder).is_symlink() and out / folder != out:
            raise ParcelError(f"{out / folder} is a link, and links in a results folder are not followed")
    with files.replacing(target) as temporary, temporary.open("wb") as file:
        while left_bytes:
            data = yield item.path, item.size_bytes - left_bytes
            if not 0 < len(data) <= left_bytes:
                raise ParcelError(f"{item.path}: {len(data)} bytes came where {left_bytes} or fewer were wanted")
            file.write(data)
            digest.update(data)
            left_bytes -= len(data)
        if digest.hexdigest() != item.sha256:
            raise ParcelError(f"{item.path}: what came is not what was sent (SHA-256 differs)")


def _remove_others(out: Path, run_id: str, listed: set[str]) -> None:
    for path in list(files_of(out, run_id)):
        if path.relative_to(out).as_posix() not in listed:
            files.remove(path)
    for folder in sorted((out / "runs" / run_id).glob("*/")):
        if not folder.name.startswith(".") and not any(folder.iterdir()):
            files.remove_folder(folder)


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
        self._receiving = receive(self.out, settings.run_id, items) if items else _nothing()
        return self._next_wanted(None)

    def put(self, data: bytes) -> Wanted | None:
        """A chunk of the files the run goes on from; returns the next one wanted. None: all there, the run began."""
        return self._next_wanted(data)

    def report(self, within_s: float = 0.25) -> Report:
        """How far the run is; waits a moment for its end."""
        if not self._over.wait(within_s):
            return Report(self.last_step)
        self.items = contents(self.out, self.settings.run_id)
        return Report(self.last_step, is_over=True, items=tuple(self.items), row=self.row)

    def read(self, wanted: Wanted) -> bytes:
        """A chunk of a file of the run that is over."""
        return chunk(self.out, self.items, wanted)

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
            self.row = summarize(self.settings, Outcome(status="error", error=why, flags=failure_of(error).flags))
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
