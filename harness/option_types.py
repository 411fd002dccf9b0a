"""What the numbers of a command line may be: functions for argparse's ``type``. Torch-free, like all of the grammar."""

from __future__ import annotations

import argparse
import math


def at_least_one(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: whole numbers from 1")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    return _within(text, "numbers above 0", lambda value: value > 0)


def seconds(text: str) -> float:
    """A duration, 0 included."""
    return _within(text, "seconds from 0", lambda value: value >= 0)


def share(text: str) -> float:
    """A share above 0, up to 1."""
    return _within(text, "above 0, up to 1", lambda value: 0 < value <= 1)


def _within(text: str, allowed: str, holds) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and holds(value)):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {allowed}")
    return value
