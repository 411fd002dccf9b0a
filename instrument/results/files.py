"""Every result file is written here, or line by line in `instrument.results.log`. Torch-free.

**Replace** (`replacing`, `replace`, `copy`, `placing_folder`): a temporary file in the same folder, sync, rename, sync of
the folder: readers see the old content or the new one. The writer holds the temporary file's lock while
it lives, which is how `is_abandoned` knows what a dead writer left.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import SoftFileLock

TEMPORARY = ".ddb-tmp"
"""Suffix of temporary files: ``.<name>.<random>.ddb-tmp``."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
"""What a file system without locks answers: NFS without its lock daemon, Lustre without ``flock``."""
SOFT_LOCK_S = 60.0
"""Far longer than an index is written for."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of an open file, which knows its descriptor alone, names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path to write the new content to; leaving the block puts it in ``path``'s place.

    The content may be written in place or as a new file of that name. An exception leaves the old file.
    """
    make_folder(path.parent)
    temporary, fd = locked_temporary(path.parent, f".{path.name[:200]}.")
    try:
        with naming(path):
            yield temporary
            sync_file(temporary)
            os.chmod(temporary, mode)
            uninterrupted(os.replace, temporary, path)
    except BaseException:
        remove(temporary)
        raise
    finally:
        os.close(fd)
    sync_folder(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Replace a file's content in one step: readers see the old or the new, never a part."""
    view = memoryview(data)
    with replacing(path) as temporary:
        fd = os.open(temporary, os.O_WRONLY)
        try:
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)


def copy(source: Path, path: Path) -> None:
    """Copy a regular file (OSError for a link), in one step for readers of ``path``."""
    with (
        open_plain(source) as content,
        replacing(path) as temporary,
        temporary.open("wb") as target,
    ):
        shutil.copyfileobj(content, target, 1 << 20)


def open_plain(path: Path, *, follow: bool = False) -> IO[bytes]:
    """Open a file to read. Raises OSError for a pipe or a device, which would be waited for; for a link, unless ``follow``."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is no plain file", str(path))
    return open(fd, "rb")


def read_plain(path: Path, *, follow: bool = False) -> bytes:
    """The content of a file that `open_plain` opens."""
    with open_plain(path, follow=follow) as file, naming(path):
        return file.read()


def truncate(path: Path, size: int) -> None:
    """Cut a file's end off, in place, so that a writer that has it open continues in the same file."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        with naming(path):
            os.ftruncate(fd, size)
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def placing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; leaving the block syncs the files in it and gives it the name ``path``.

    A folder that has that name is removed just before. An exception leaves it, and nothing of the new one.
    """
    make_folder(path.parent)
    temporary, fd = locked_temporary(path.parent, f".{path.name[:200]}.", folder=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            sync_file(file)
        sync_folder(temporary)
        os.chmod(temporary, 0o755)
        remove_folder(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(fd)
    sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder if it is there: by a temporary name first, so that half of it never looks like all of it."""
    if not path.is_dir() or path.is_symlink():
        return
    going = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:200]}.", suffix=TEMPORARY))
    os.rename(path, going)
    shutil.rmtree(going, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file if it is there."""
    with suppress(FileNotFoundError):
        uninterrupted(os.unlink, path)


def uninterrupted(call: Callable[..., None], *paths: Path) -> None:
    """``call(*paths)``, again after an EINTR: a network file system may give it to link, unlink and rename, too."""
    while True:
        with suppress(InterruptedError):
            return call(*paths)


def age_s(path: Path) -> float:
    """Seconds since a file was touched, by the clock of the file system it is on; 0 where there is none. One that was touched
    in the future (a clock was set back) is touched now: its age counts from here unless its owner renews it."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.now.", suffix=TEMPORARY) as now:
            age = os.stat(now.name).st_mtime - os.lstat(path).st_mtime
        if age < 0:
            with suppress(PermissionError):
                os.utime(path, follow_symlinks=False)
        return max(age, 0.0)
    except FileNotFoundError:
        return 0.0


def sweep(folder: Path) -> list[Path]:
    """Delete the temporary files and folders that dead writers left in a folder; returns their paths. What may not be
    deleted (another user's, among the system's temporary files) stays."""
    left = []
    for path in sorted(folder.glob(f".*{TEMPORARY}")):
        with _lock_of(path) as is_ours, suppress(OSError):  # until it is gone: `locked_temporary` waits for that
            if not is_ours:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
            if not path.exists():
                left.append(path)
    return left


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Yield a new folder among the system's temporary files, ``.<name>.<random>.ddb-tmp``; it is deleted at the end.
    Where the process dies before, it is abandoned, and the next `sweep` there deletes it."""
    folder, fd = locked_temporary(Path(tempfile.gettempdir()), f".{name}.", folder=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def locked_temporary(parent: Path, prefix: str, *, folder: bool = False) -> tuple[Path, int]:
    """A new temporary file or ``folder`` in ``parent``, and what holds its lock until it is closed. One that a `sweep`
    found between its making and its lock is made again."""
    while True:
        if folder:
            path = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=TEMPORARY))
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
        else:
            fd, name = tempfile.mkstemp(dir=parent, prefix=prefix, suffix=TEMPORARY)
            path = Path(name)
        with suppress(OSError):  # a file system without locks, where nothing is ever swept
            fcntl.flock(fd, fcntl.LOCK_EX)
        if path.exists():
            return path, fd
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder and the ones above it; their names are on the disk then."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def require_there(folder: Path) -> None:
    """Raise `FileNotFoundError` for a folder that somebody removed or renamed: what is written must not make it again."""
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "deleted or renamed while it was being written to", str(folder))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, one process or thread at a time; the file is made and stays. On a file system without locks
    another file's existence is the lock; one that a dead process left counts for `SOFT_LOCK_S`."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    with ExitStack() as held:
        held.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                error.filename = str(path)
                raise
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the lock may expire is what we ask for
                age_s(there := path.with_name(f"{path.name}.soft"))
                soft = SoftFileLock(there, poll_interval=0.01, thread_local=False, lifetime=SOFT_LOCK_S)
            held.enter_context(soft)
        yield


def is_abandoned(temporary: Path) -> bool:
    """Whether nobody writes this temporary file or folder any more: its writer would hold its lock."""
    with _lock_of(temporary) as is_ours:
        return is_ours


@contextmanager
def _lock_of(temporary: Path) -> Iterator[bool]:
    """Hold the lock of a temporary file or folder; False where its writer does, or it is gone or neither of them."""
    with ExitStack() as opened:
        fd = None
        with suppress(OSError):
            fd = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would be waited for
            opened.callback(os.close, fd)
        yield fd is not None and _is_file_or_folder(fd) and try_lock(fd)


def _is_file_or_folder(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def plain_inside(root: Path, path: Path) -> bool:
    """Whether ``path`` is a regular file below ``root`` with no link on the way: what is read from a
    results folder must lie in it."""
    try:
        parts = path.relative_to(root).parts
        modes = [os.lstat(root.joinpath(*parts[:depth])).st_mode for depth in range(1, len(parts) + 1)]
    except (OSError, ValueError):
        return False
    return ".." not in parts and bool(modes) and all(map(stat.S_ISDIR, modes[:-1])) and stat.S_ISREG(modes[-1])


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk; file systems that cannot (some network ones) are left be."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            error.filename = str(folder)
            raise
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of an open file if it is free and the file system has locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
