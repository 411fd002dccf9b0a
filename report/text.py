"""Text from files made safe to print and draw, and numbers as text: the one place where units become GB and ms."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from report.statistics import Interval  # which imports pandas: an error must be printed without it, too

LABEL_LIMIT = 60
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Control characters, and the marks that change the reading direction of the text.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")


def joined(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def shortened(names: Iterable[str], most: int = 3) -> str:
    """At most ``most`` of them by name, the rest as a number."""
    names = list(names)
    return joined(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"


def times(interval: Interval) -> str:
    """``2.08x [2.01, 2.15]``, or ``2.08x (one seed)``."""
    digits = max(2, enough_digits(interval.low, interval.high))
    return f"{interval.value:.{digits}f}x {bounds(interval, f'.{digits}f')}"


def span(values: Iterable[float], form: str = ",") -> str:
    """``5``, or ``5 to 9``: the smallest and the largest as they are printed."""
    values = [*values]
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def bracketed(low: float | None, high: float | None, form: str) -> str:
    """`` [2.01, 2.15]`` with its blank; empty where an end is not known."""
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f" [{low:{form}}, {high:{form}}]" if known else ""


def enough_digits(low: float, high: float) -> int:
    """Decimals in which the ends of an interval differ, so that a value agrees with its interval as printed; at most 5."""
    width = high - low
    rounded = 1e-9 * max(abs(low), abs(high))  # what adding floats leaves between two equal ends
    return min(5, max(0, -math.floor(math.log10(width)))) if math.isfinite(width) and width > rounded else 0


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


def number(value: object) -> float | None:
    """A plain finite number of a file, or None: JSON may hold anything."""
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None


def objects(rows: object) -> list[dict]:
    """The JSON objects in a list of a file; empty for anything else."""
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list | tuple) else []


def plain_json(value: Any) -> Any:
    """Dataclasses, tuples and numpy numbers as what strict JSON can hold; a number that is not finite is null."""
    if is_dataclass(value):
        return plain_json(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sentence(text: str) -> str:
    """With a capital letter unless it begins with an identifier, and a full stop."""
    text = text.strip()
    first = text.split(" ", 1)[0]
    text = text if "_" in first or any(c.isdigit() for c in first) else text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def clean(text: object, limit: int = LABEL_LIMIT) -> str:
    """``text`` on one line, without control or direction marks and lone surrogates, at most
    ``limit`` characters; what was cut is shown by an ellipsis."""
    short = str(text)[: 4 * limit + 64]  # a megabyte is not worth cleaning
    whole = UNSAFE.sub("", short.encode("utf-8", "replace").decode("utf-8"))
    line = " ".join(whole.split())
    return line if len(line) <= limit and len(short) == len(str(text)) else line[: limit - 1] + "…"


def log_tick(value: float, _position: int | None = None) -> str:
    """A log axis's tick: ``10⁻³``, ``2×10⁵``, or the plain number from 0.01 to 1,000 (5,000)."""
    if value <= 0 or not math.isfinite(value):
        return ""
    exponent = math.floor(math.log10(value) + 1e-9)
    digits = f"{value / 10.0**exponent:.4g}"
    if -2 <= exponent <= 3:
        return f"{value:,.6g}"
    return ("" if digits == "1" else digits + "×") + "10" + str(exponent).translate(SUPERSCRIPTS)


def short(value: float, digits: int = 3) -> str:
    """Three significant digits, thousands as k: ``0.0123``, ``456``, ``65.5k``, ``1.2M``, ``3.1e+12``;
    with two ``digits``, ``4.4k`` for 4,380."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    size = abs(value)
    plain_to = 1e4 if digits > 2 else 10.0 ** (digits + 1)
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if max(unit, plain_to if unit == 1e3 else 0) <= size < 1e9:
            return f"{value / unit:.{max(digits, len(str(int(size / unit))))}g}{name}"
    return f"{value:,.0f}" if 100 <= size < plain_to else f"{value:.{digits}g}"


def rate(value: float) -> str:
    """A rate with two to three digits and no exponent: ``3.7``, ``37``, ``1,240``."""
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
