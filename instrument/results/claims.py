"""Who executes a run: one process at a time, whoever else was started on the same folder.

``runs/<run_id>/.claim`` is a `filelock.FileLock` that the owner holds; it holds the owner's process id, host, the boot
of its kernel, when it began, and a token of this claim. How the death of an owner is noticed:

- on the same host (the same boot of one kernel, so containers too): its lock on the file is free. At once,
  and no reused process id is taken for it;
- from another host, where a network file system may not pass locks on: its heartbeat, the file's own
  time, which the owner renews every `HEARTBEAT_S`, is older than `STALE_S` by the file server's clock;
- on a file system without locks, where the claim is a `filelock.SoftFileLock`: a process of this host is gone, or the
  heartbeat is stale. That lock knows a host by its name; a file beside says which kernel and which container the owner
  is of, and one from elsewhere lives until its heartbeat is stale.

Of two hosts that find the same stale claim at once, the one takes it over that makes the file named after it.
An owner that slept for longer than `STALE_S` (a suspended machine) finds out by `Claim.is_held`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import time
import uuid
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from instrument.results import log
from instrument.results.files import (
    TEMPORARY,
    age_s,
    is_abandoned,
    locked_temporary,
    make_folder,
    open_plain,
    remove,
    try_lock,
    uninterrupted,
)
from instrument.results.layout import RunFiles
from instrument.results.schemas import require_safe

FILE = ".claim"
HEARTBEAT_S = 20.0
STALE_S = 120.0
PATIENCE_S = 0.02
"""A lock that is taken for longer than this has an owner: who only looks at it lets go at once."""
NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK}


class RunClaimed(Exception):
    """Another living process executes this run. `owner` is what its claim says, for a sentence."""

    def __init__(self, run_id: str, owner: dict[str, Any]) -> None:
        self.run_id, self.owner = run_id, owner
        super().__init__(f"{run_id} is being executed by process {owner.get('pid', '?')} on {owner.get('host', '?')}")

    def __reduce__(self):  # crosses from a run's process to the matrix
        return RunClaimed, (self.run_id, self.owner)


@dataclass
class Claim:
    """A run that is ours until `release`; a context. Death releases it too."""

    path: Path
    lock: BaseFileLock
    owner: dict[str, Any]
    heartbeat: object = None
    mark: Path | None = None
    """Beside a soft lock: where its process id counts."""

    @property
    def is_held(self) -> bool:
        """Whether the run is still ours: others may have taken us for dead."""
        return self.lock.is_locked and _read(self.path) == self.owner

    def release(self) -> None:
        """Let others have the run; a second call does nothing."""
        log.cancel_job(self.heartbeat)
        try:
            if self.is_held:  # or its folder vanished, or it is another's by now
                remove(self.path)
        finally:
            self.lock.release()
            if self.mark is not None:
                remove(self.mark)

    def _renew(self) -> None:
        with suppress(OSError):  # a disk that is away for a moment
            if self.is_held:
                os.utime(self.path)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_) -> None:
        self.release()


def claim(out: Path, run_id: str) -> Claim:
    """Claim a run of the results folder ``out``.

    Raises `RunClaimed` when another living process has it, ValueError for an id that is no safe name, OSError where the folder
    cannot be written. Look at the run's row only after claiming: its last owner may have finished it a moment ago.
    """
    require_safe(run_id)
    path = RunFiles(out, run_id).path / FILE
    make_folder(path.parent)
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "boot": this_boot()}
    owner |= {"started_unix_s": time.time(), "token": uuid.uuid4().hex}
    try:
        own = _claim(path, owner) if _make(path, owner) else _claim_softly(path)
    except Timeout:
        own = None
    if own is None:
        raise RunClaimed(run_id, _read(path) or {})
    own.heartbeat = log.run_every(HEARTBEAT_S, own._renew)
    return own


def owner_of(out: Path, run_id: str) -> dict[str, Any] | None:
    """The living owner of a run as its claim says (``pid``, ``host``, ``started_unix_s``), or None."""
    require_safe(run_id)
    path = RunFiles(out, run_id).path / FILE
    owner = _read(path)
    if not owner:
        return None
    is_alive = not is_abandoned(path) and path.exists() if owner["boot"] == this_boot() else age_s(path) <= STALE_S
    return owner if is_alive else None


def _make(path: Path, owner: dict[str, Any]) -> bool:
    """Make the file with its whole content where there is none, so that of two hosts that do not see each other's locks
    one makes it. False on a file system without locks, where nothing is made."""
    prepared, fd = locked_temporary(path.parent, f"{FILE}.")
    try:
        if not try_lock(fd):
            return False
        os.write(fd, json.dumps(owner).encode())
        uninterrupted(os.link, prepared, path)
    except OSError as error:
        if error.errno not in {errno.EEXIST, *NO_HARD_LINKS}:
            raise
    finally:
        remove(prepared)
        os.close(fd)
    return True


def _claim(path: Path, owner: dict[str, Any]) -> Claim | None:
    """By the lock of the file; None where an owner on another host lives, or a third host is about to take over from a dead
    one; `Timeout` where an owner on this host lives."""
    lock = FileLock(path, PATIENCE_S, poll_interval=PATIENCE_S / 4, thread_local=False, fallback_to_soft=False)
    lock.acquire()
    there = _read(path)
    elsewhere = there and there["boot"] != owner["boot"]
    takeover = path.with_name(f"{FILE}.after-{there['token']}{TEMPORARY}") if there and elsewhere else None
    if there and takeover and (age_s(path) <= STALE_S or not _is_first(takeover, path, there)):
        lock.release()
        return None
    if there != owner:
        with open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW), "wb") as file:  # in place: the lock is this file's
            file.write(json.dumps(owner).encode())
            file.truncate()
    if takeover is not None:
        remove(takeover)
    return Claim(path, lock, owner)


def _is_first(takeover: Path, path: Path, dead: dict[str, Any]) -> bool:
    """Make the file ``takeover``; False where another host has it, or had it and wrote its own claim over the ``dead`` one.
    Where its maker died before that, the run waits for `STALE_S`."""
    if age_s(takeover) > STALE_S:
        remove(takeover)
    try:
        takeover.touch(exist_ok=False)
    except FileExistsError:
        return False
    if _read(path) == dead:
        return True
    remove(takeover)
    return False


def _claim_softly(path: Path) -> Claim | None:
    """By the existence of the file; None where its owner's process id is another kernel's or another container's, and its
    heartbeat fresh. ``.claim.<pid>-<namespace>-...``, made before the claim and gone after it, says whose the id is."""
    here, there, age = uuid.uuid5(uuid.NAMESPACE_OID, pid_namespace()).hex, _read(path), age_s(path)
    marks = path.parent.glob(f"{FILE}.{there['pid']}-*{TEMPORARY}") if there and there["boot"] is None else ()
    if any(f"-{here}-" not in mark.name for mark in marks) and age <= STALE_S:
        return None
    mark = path.with_name(f"{FILE}.{os.getpid()}-{here}-{uuid.uuid4().hex}{TEMPORARY}")
    mark.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a claim may expire is what we ask for
        lock = SoftFileLock(path, PATIENCE_S, poll_interval=PATIENCE_S / 4, thread_local=False, lifetime=STALE_S)
    try:
        lock.acquire()
    except BaseException:
        remove(mark)
        raise
    for old in set(path.parent.glob(f"{FILE}.[0-9]*-*-*{TEMPORARY}")) - {mark}:  # of owners that died
        remove(old)
    return Claim(path, lock, _read(path) or {}, mark=mark)


def _read(path: Path) -> dict[str, Any] | None:
    """What a claim says; None where there is none, and nothing for a file that is not of our making."""
    try:
        with open_plain(path) as file:
            content = file.read(4096)
    except FileNotFoundError:
        return None
    if soft := re.fullmatch(rb"(\d+)\n(.+)\n(?:(\d{1,80})\n)?", content):
        host, token = soft[2].decode(errors="replace"), (soft[3] or b"").decode()
        return {"pid": int(soft[1]), "host": host.partition("?")[0], "boot": None, "token": token}
    try:
        owner = json.loads(content)
        if re.fullmatch("[0-9a-f]{32}", owner["token"]) and isinstance(owner["boot"], str):
            return owner
    except (ValueError, KeyError, TypeError):
        pass
    return {}


def this_boot() -> str:
    """The boot of this kernel: the same in all of its containers, another one after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()}-{uuid.getnode():x}"


def pid_namespace() -> str:
    """One kernel, and in it one container: elsewhere the same number is another process."""
    with suppress(OSError):
        return f"{this_boot()} {os.readlink('/proc/self/ns/pid')}"
    return this_boot()
