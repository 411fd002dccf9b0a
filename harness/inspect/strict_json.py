"""Findings as strict JSON: a non-finite number is written by its name (``"nan"``, ``"inf"``, ``"-inf"``). Torch-free."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from instrument.records import nonfinite_name


def strict_json(found: Any) -> str:
    """One line of JSON."""
    return msgspec.json.encode(_named(msgspec.to_builtins(found))).decode()


def _named(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else nonfinite_name(value)
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list) else value
