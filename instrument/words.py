"""A number of things in words.

Errors of the operating system that a person can mend: a full disk, a file where a folder should be, no permission.
Torch-free.
"""

from __future__ import annotations

import errno
import os


def count(n: int, one: str, many: str | None = None) -> str:
    """``1 run``, ``3 runs``, ``1,000 runs``; ``many`` where it is not ``one`` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


THEIRS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def sentence_of(error: BaseException) -> str | None:
    """``cannot use PATH: Not a directory``; None for what is no such error, a missing file above all: that is ours."""
    if not isinstance(error, OSError) or error.errno not in THEIRS or not isinstance(error.filename, str | bytes):
        return None
    return f"cannot use {os.fsdecode(error.filename)}: {os.strerror(error.errno)}"
