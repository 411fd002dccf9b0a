"""What is done behind an error: it may fail too, and must not take the error's place. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.supervise.death import sentence

NAME = "failed_behind_the_error"


@contextmanager
def behind(error: BaseException | None, flags: dict[str, Any], what: str) -> Iterator[None]:
    """Around ``what`` is done when a run is over. Behind an ``error`` (a poisoned CUDA context fails at every call) an
    exception is noted in ``flags`` and goes no further; where there was none, it is an error like any other."""
    try:
        yield
    except Exception as second:
        if error is None:
            raise
        flags.setdefault(NAME, []).append(f"{what}: {sentence(second)}")
