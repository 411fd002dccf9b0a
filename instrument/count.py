"""A number of things in words."""

from __future__ import annotations


def count(n: int, one: str, many: str | None = None) -> str:
    """``1 run``, ``3 runs``, ``1,000 runs``; ``many`` where it is not ``one`` with an s."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
