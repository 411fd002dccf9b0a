"""Who runs what: a run is executed by one process at a time, whoever else was started on the same folder.

``runs/<run_id>/.claim`` holds the owner's process id, host, the boot of its kernel, when it began, and a
token of this claim. It appears complete (linked into place, its lock held) and goes when the owner releases
it. How an owner's death is known:

- on the same host (the same boot of one kernel, so containers too): its lock on the file is gone. At once,
  and no reused process id is taken for it;
- from another host, where a network file system may not pass locks on: its heartbeat, the file's own
  time, which the owner renews every `HEARTBEAT_S`, is older than `STALE_S` by the file server's clock.

A dead owner's claim is taken over by one process only: the one that holds the lock of the file named after the
dead claim's token (without locks: that made it, and if it dies there others wait for `STALE_S`). An owner
that slept past `STALE_S` (a suspended machine) finds out by `Claim.is_held`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from instrument import background
from instrument.results.files import TEMPORARY, locked_temporary, make_folder
from instrument.results.schemas import require_safe

FILE = ".claim"
AFTER, NOBODY = f"{FILE}.after-", "nobody"
HEARTBEAT_S = 20.0
STALE_S = 120.0
NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK}
TRIES = 20
"""A claim that changes hands as often as this while we look is somebody else's."""


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
    fd: int
    job: object

    @property
    def is_held(self) -> bool:
        """Whether the run is still ours: others may have taken us for dead."""
        return self.fd >= 0 and _is_at(self.fd, self.path)

    def release(self) -> None:
        """Let others have the run; a second call does nothing."""
        if self.fd < 0:
            return
        background.cancel(self.job)
        try:
            if self.is_held:  # or its folder vanished, or it is another's by now
                self.path.unlink(missing_ok=True)
        finally:  # the lock goes, whatever becomes of the file
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_) -> None:
        self.release()


def claim(out: Path, run_id: str) -> Claim:
    """Claim a run of the results folder ``out``.

    Raises `RunClaimed` when another living process has it, ValueError for an id that is no safe name,
    OSError where the folder cannot be written. Look at the run's row only after claiming: its last owner
    may have finished it a moment ago.
    """
    require_safe(run_id)
    path = out / "runs" / run_id / FILE
    for _ in range(TRIES):
        if (owner := _living_owner(path)) is not None:
            raise RunClaimed(run_id, owner)
        make_folder(path.parent)
        fd, prepared = _prepare(path)
        try:
            if _put_in_place(path, prepared):
                _sweep_marks(path.parent)
                return Claim(path, fd, background.every(HEARTBEAT_S, partial(_beat, fd, path)))
        except BaseException:
            os.close(fd)
            raise
        finally:
            prepared.unlink(missing_ok=True)
        os.close(fd)
    raise RunClaimed(run_id, _read(path) or {})


def owner_of(out: Path, run_id: str) -> dict[str, Any] | None:
    """The living owner of a run as its claim says (``pid``, ``host``, ``started_unix_s``), or None."""
    require_safe(run_id)
    return _living_owner(out / "runs" / run_id / FILE)


def _prepare(path: Path) -> tuple[int, Path]:
    """A complete claim under a temporary name, its lock held."""
    prepared, fd = locked_temporary(path.parent, f"{FILE}.")
    facts = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": this_boot(),
        "started_unix_s": time.time(),
        "token": uuid.uuid4().hex,
    }
    os.write(fd, json.dumps(facts).encode() + b"\n")
    os.fsync(fd)
    return fd, prepared


def _put_in_place(path: Path, prepared: Path) -> bool:
    """Make the prepared claim the run's: there is none, or its owner is dead and we are first to notice."""
    dead = _read(path)
    if dead is None:
        try:
            os.link(prepared, path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
    elif _is_alive(path, dead):
        return False
    mark = path.with_name(f"{AFTER}{dead['token'] if dead else NOBODY}")
    fd = _take_mark(mark)
    if fd is None:
        return False
    try:
        if _read(path) != dead:
            return False
        os.replace(prepared, path)
        return True
    finally:
        mark.unlink(missing_ok=True)
        os.close(fd)


def _take_mark(mark: Path) -> int | None:
    """The mark that lets one process take a dead one's claim over, its lock held; None while another has it. Who dies
    with the lock leaves it free; on a file system without locks the mark is its maker's for `STALE_S`."""
    made = True
    try:
        fd = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    except FileExistsError:
        made = False
        try:
            fd = os.open(mark, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = _is_at(fd, mark)  # and not the file of one that is through and removed it
    except BlockingIOError:
        ours = False
    except OSError:
        ours = made
        if not made and _age_s(mark) > STALE_S:
            mark.unlink(missing_ok=True)
    if ours:
        return fd
    os.close(fd)
    return None


def _sweep_marks(folder: Path) -> None:
    """Remove what takers-over that died in the middle left; the marks of claims before ours let nobody in any more."""
    for mark in folder.glob(f"{AFTER}*"):
        if mark.name != f"{AFTER}{NOBODY}":
            mark.unlink(missing_ok=True)


def _living_owner(path: Path) -> dict[str, Any] | None:
    facts = _read(path)
    return facts if facts is not None and _is_alive(path, facts) else None


def _is_alive(path: Path, facts: dict[str, Any]) -> bool:
    if facts["boot"] != this_boot():
        return _age_s(path) <= STALE_S
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: only the heartbeat tells
        return _age_s(path) <= STALE_S
    finally:
        os.close(fd)


def _read(path: Path) -> dict[str, Any] | None:
    """What a claim says; None where there is none. Not of our making: a dead claim with no owner named."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        content = file.read(4096)
    try:
        facts = json.loads(content)
        if uuid.UUID(hex=facts["token"]).hex == facts["token"] and isinstance(facts["boot"], str):
            return facts
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return {"pid": None, "host": None, "boot": this_boot(), "token": uuid.uuid5(uuid.NAMESPACE_OID, content.hex()).hex}


def _age_s(path: Path) -> float:
    """Seconds since a file was touched, by the clock of the file system it is on."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{FILE}.now.", suffix=TEMPORARY) as now:
            return os.stat(now.name).st_mtime - os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def _beat(fd: int, path: Path) -> None:
    if _is_at(fd, path):
        with suppress(OSError):  # a disk that is away for a moment
            os.utime(fd)


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file is the one that has this name."""
    try:
        ours, named = os.fstat(fd), os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


def this_boot() -> str:
    """The boot of this kernel: the same in all of its containers, another one after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()}-{uuid.getnode():x}"
