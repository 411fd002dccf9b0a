"""Numbers and counts as words: the one place where units become GB and ms."""

from __future__ import annotations

import math
from collections.abc import Iterable

from instrument.terminal import count as count
from report.statistics.interval import Interval


def joined(words: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = [*words] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def shortened(words: Iterable[str], most: int = 3) -> str:
    """At most ``most`` of them by name, the rest as a number."""
    words = list(words)
    return joined(words) if len(words) <= most else f"{', '.join(words[:most])} and {len(words) - most} more"


def times(interval: Interval) -> str:
    """``2.08x [2.01, 2.15]``, or ``2.08x (one seed)``."""
    return f"{interval.value:.2f}x {bounds(interval, '.2f')}"


def bounds(interval: Interval, form: str) -> str:
    """``[2.01, 2.15]``, or that one seed has no interval."""
    if interval.known:
        return f"[{interval.low:{form}}, {interval.high:{form}}]"
    return "(one seed)" if interval.n == 1 else "(no interval)"


def signed(value: float, digits: int) -> str:
    """``+0.31``, ``-0.31``; what rounds to nothing is ``0.00``, without a sign that says more than the digits."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def gigabytes(size_bytes: float | None) -> str:
    """``26.5 GB``."""
    if size_bytes is None or math.isnan(size_bytes):
        return "not measured"
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e10 else f"{size_bytes / 1e9:.2f} GB"


def printable(text: object) -> str:
    """Text from a file for a terminal: control characters and escape sequences cannot act there."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def sentence(text: str) -> str:
    """With a capital letter unless it begins with an identifier, and a full stop."""
    text = text.strip()
    first = text.split(" ", 1)[0]
    text = text if "_" in first or any(c.isdigit() for c in first) else text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."
