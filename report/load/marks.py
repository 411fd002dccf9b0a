"""What a reader must know about data before believing a figure: small, made up, imported."""

from __future__ import annotations

from collections.abc import Sequence

from instrument.results.schemas import RunRecord


def marks_of(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """The marks that any of these rows earns, in a fixed order."""
    tests = {
        "TINY PRESET": lambda run: run.preset == "tiny",
        "EMBEDDED DATA": lambda run: run.data_source == "embedded",
        "CPU": is_cpu,
        "IMPORTED": lambda run: bool(run.flags.get("imported")),
        "SIMULATED": lambda run: bool(run.flags.get("simulated")),
    }
    return tuple(mark for mark, earned in tests.items() if any(earned(run) for run in runs))


def is_cpu(run: RunRecord) -> bool:
    """Whether a run was made on a processor: its settings say so, or its device's name."""
    return run.config.get("device") == "cpu" or run.device.startswith("cpu")
