"""The measured rates in ``machine.json``: put there by ``doctor --measure``, read by every run for its
``mfu_measured_peak``. They hold for the machine that they were measured on, and for no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instrument.results.files import replace
from instrument.results.folder import OutputError, require_writable
from instrument.terminal import count

IDENTITY = ("cpu", "gpu")
BUSY_FRAC = 0.1
HOW_TO = "`python -m harness doctor --measure` (with the same --out) measures them"


def merge_measured(out: Path, machine: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
    """Put ``measured`` into the folder's ``machine.json``, in place of older rates; all other facts stay.

    ``machine`` (`instrument.environment.capture`) is what a new file begins with. Raises `OutputError` when
    the file is another machine's or cannot be read.
    """
    refuse_another_machine(out, machine)
    facts = read_machine(out)
    whole = {**(machine if facts is None else facts), "measured": measured}
    replace(out / "machine.json", json.dumps(whole, indent=1, allow_nan=False).encode() + b"\n")


def refuse_another_machine(out: Path, machine: Mapping[str, Any]) -> None:
    """Raise `OutputError` unless rates measured here may be written into the folder: asked before measuring."""
    require_writable(out)
    other = another_machine(read_machine(out) or machine, machine)
    if other:
        raise OutputError(f"{out / 'machine.json'} {other}: choose another folder with --out")


def rates_measured_here(
    out: Path, machine: Mapping[str, Any], threads: int | None
) -> tuple[dict[str, float] | None, str | None]:
    """(FLOP/s by dtype, what to know about them or None), or (None, why not). ``threads``: torch's on a CPU, None
    on CUDA."""
    try:
        facts = read_machine(out)
    except OutputError as error:
        return None, str(error)
    if facts is None or not facts.get("measured"):
        return None, f"no rates were measured here; {HOW_TO}"
    if other := another_machine(facts, machine):
        return None, f"machine.json {other}"
    rows = facts["measured"]["matmul"]
    rates = {row["dtype"]: row["flops_per_s"] for row in rows if row["threads"] == threads}
    if not rates:
        known = sorted({row["threads"] for row in rows if row["threads"] is not None})
        measured = f"{' and '.join(map(str, known))} CPU {'thread' if known == [1] else 'threads'}" if known else "the GPU"
        used = count(threads, "CPU thread") if threads else "the GPU"
        return None, f"rates were measured on {measured}, and this run uses {used}"
    return rates, too_low(facts["measured"])


def too_low(measured: Mapping[str, Any]) -> str | None:
    """Why the rates are no ceiling: other work had the cores, so MFU against them comes out too high."""
    busy = measured.get("cpu_busy_before_frac")
    if busy is None or busy <= BUSY_FRAC:
        return None
    return (
        f"other work took {busy:.0%} of the CPU before these rates were measured, so they are too low: "
        "measure again when it is idle"
    )


def another_machine(facts: Mapping[str, Any], machine: Mapping[str, Any]) -> str | None:
    """``describes ..., and this is ...`` when the facts are of another processor or GPU."""
    for name in IDENTITY:
        there, here = facts.get(name) or "none", machine.get(name) or "none"
        if there != here:
            return f"describes a machine with {name} {there}, and this one has {here}"
    return None


def read_machine(out: Path) -> dict[str, Any] | None:
    """The folder's ``machine.json``; None when there is none. Raises `OutputError` when it is no JSON object."""
    path = out / "machine.json"
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(f"{path} is not JSON ({error}); move it away, and the next run writes it anew") from error
    if not isinstance(facts, dict):
        raise OutputError(f"{path} is no JSON object; move it away, and the next run writes it anew")
    return facts
