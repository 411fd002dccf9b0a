"""Run ids become names of folders and files, so they are safe names or they are refused. Torch-free."""

from __future__ import annotations

import re

LONGEST = 200
"""Characters: ``run_<id>.jsonl`` and a temporary name beside it must fit the 255 bytes of a file name."""
ALLOWED = "letters a to z, digits and . _ + = @ , ~ -, not beginning with . or -"
_SAFE = re.compile(r"[A-Za-z0-9_+=@,~][A-Za-z0-9._+=@,~-]*")


def is_safe(run_id: object) -> bool:
    """Whether a run id stays one plain file name wherever it is made part of a path."""
    return isinstance(run_id, str) and len(run_id) <= LONGEST and _SAFE.fullmatch(run_id) is not None


def require_safe(run_id: object) -> None:
    """Raise ValueError, in one sentence, unless the id is a safe name."""
    if not is_safe(run_id):
        shown = repr(run_id)
        shown = shown if len(shown) <= 80 else shown[:80] + "..."
        raise ValueError(f"run_id {shown} is no safe file name; allowed: up to {LONGEST} {ALLOWED}")
