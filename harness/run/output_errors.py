"""Which errors mean that results can no longer be written: the run stops there, with what it wrote intact."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from instrument.results.folder import OutputError, RunFolder

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG}
OF_THE_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM}


def output_error(error: OSError, out: Path) -> OutputError | None:
    """What ``error`` says of the results folder ``out``; None when it is about something else."""
    where = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    ours = where is None or where.is_relative_to(out) or where.resolve().is_relative_to(out.resolve())
    if not out.is_dir():
        return OutputError(f"{out} has disappeared while the run was writing to it; put it back, or choose another with --out")
    if ours and (error.errno in OF_THE_DISK or (error.errno in OF_THE_FOLDER and where is not None)):
        return OutputError(
            f"cannot write {where or out}: {os.strerror(error.errno)}; what was written before is intact, and "
            f"the same command resumes the run when that is mended (or choose another folder with --out)"
        )
    return None


class DeletedFileCheck:
    """Notices that a run's files went away: what is written to a deleted file is lost without an error."""

    def __init__(self, folder: RunFolder) -> None:
        self._paths = [log.path for log in (folder.steps, folder.evaluations, folder.events)]
        self._inodes = [self._inode(path) for path in self._paths]

    def check(self) -> None:
        """Raise `FileNotFoundError` with the first file that is not there, or is another."""
        for path, inode in zip(self._paths, self._inodes, strict=True):
            if self._inode(path) != inode:
                raise FileNotFoundError(errno.ENOENT, "deleted or replaced while the run was writing to it", str(path))

    @staticmethod
    def _inode(path: Path) -> int | None:
        try:
            return path.stat().st_ino
        except OSError:
            return None
