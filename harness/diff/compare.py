"""The comparison of two runs as plain data."""

from __future__ import annotations

from typing import Any

from harness.diff.paired import loss_difference, speed
from harness.diff.parting import EPSILONS_APART, comparable_windows, first_module, first_step, tolerance
from harness.diff.two_runs import Run, differences, why_not_paired

OUTCOME = (
    "status",
    "steps_done",
    "divergence_step",
    "scaler_skips",
    "val_loss",
    "perplexity",
    "f1_micro",
    "f1_macro",
    "final_weights_sha256",
)
SPLIT = ("weights_bytes", "buffers_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "peak_rss_bytes")


def compare(runs: tuple[Run, Run]) -> dict[str, Any]:
    """All differences. ``no_difference``: same settings, machine, steps, modules and outcome; times aside."""
    a, b = runs
    limit = tolerance(a, b)
    not_paired = why_not_paired(a, b)
    found = {
        "a": _who(a),
        "b": _who(b),
        "same_run": a.place.path.resolve() == b.place.path.resolve(),
        "paired": not not_paired,
        "not_paired_because": not_paired,
        "settings": settings(a, b),
        "environment": differences(a.environment, b.environment),
        "rounding": {"relative": limit, "epsilons": EPSILONS_APART, "epsilon": max(a.epsilon, b.epsilon)},
        "common_steps": len(a.steps.keys() & b.steps.keys()),
        "comparable_windows": comparable_windows(a, b),
        "first_difference": first_step(a, b, 0.0),
        "first_beyond_rounding": first_step(a, b, limit),
        "first_module_difference": first_module(a, b, 0.0),
        "first_module_beyond_rounding": first_module(a, b, limit),
        "loss": loss_difference(a, b),
        "speed": speed(a, b),
        "time_by_kernel": kernel_times(a, b),
        "memory": memory(a, b),
        "outcome": outcome(a, b),
    }
    same = not (
        found["settings"]
        or found["environment"]
        or not_paired
        or found["first_difference"]
        or found["first_module_difference"]
        or any(row["a"] != row["b"] for row in found["outcome"])
    )
    return found | {"no_difference": same and a.steps.keys() == b.steps.keys()}


def _who(run: Run) -> dict[str, Any]:
    r = run.record
    return {
        "run_id": r.run_id,
        "results_folder": str(run.place.out),
        "case": r.case,
        "dtype_config": r.dtype_config,
        "seed": r.seed,
        "device": r.device,
        "error": r.error,
    }


def settings(a: Run, b: Run) -> list[dict[str, Any]]:
    """What was decided differently; of two different cases their names are enough."""
    rows = differences(a.settings, b.settings)
    return [row for row in rows if a.record.case == b.record.case or not row["name"].startswith("case.")]


def outcome(a: Run, b: Run) -> list[dict[str, Any]]:
    """How each ended; a row for every figure that one of them has."""
    rows = [{"name": name, "a": getattr(a.record, name), "b": getattr(b.record, name)} for name in OUTCOME]
    return [row for row in rows if not (row["a"] is None and row["b"] is None)]


def memory(a: Run, b: Run) -> dict[str, Any]:
    """Bytes by kind (null where a run has no split: ``--instrument off``), and the peaks."""
    splits = [run.record.flags.get("memory_split") or {} for run in (a, b)]
    rows = [{"name": name, "a": splits[0].get(name), "b": splits[1].get(name)} for name in SPLIT]
    rows += [{"name": name, "a": getattr(a.record, name), "b": getattr(b.record, name)} for name in PEAKS]
    return {
        "split_missing_in": [side for side, split in zip("ab", splits, strict=True) if not split],
        "rows": [row for row in rows if not (row["a"] is None and row["b"] is None)],
    }


def kernel_times(a: Run, b: Run) -> dict[str, Any]:
    """Each kernel class' share of the traced time, and its seconds a step where the records say how many steps were
    traced; ``missing_in`` names the runs that were not traced."""
    tables = [run.record.flags.get("time_by_kernel") for run in (a, b)]
    if not all(tables):
        return {"missing_in": [side for side, table in zip("ab", tables, strict=True) if not table], "rows": []}
    steps = [(run.record.flags.get("trace") or {}).get("steps") for run in (a, b)]
    sides = [_classes(table, n) for table, n in zip(tables, steps, strict=True)]
    rows = [
        {
            "class": kind,
            **{
                f"{what}_{side}": found.get(kind, {}).get(what, 0.0 if what == "share" or n else None)
                for side, found, n in zip("ab", sides, steps, strict=True)
                for what in ("share", "s_per_step")
            },
        }
        for kind in dict.fromkeys([*sides[0], *sides[1]])
    ]
    return {"missing_in": [], "sources": [table["source"] for table in tables], "steps": steps, "rows": rows}


def _classes(table: dict[str, Any], steps: int | None) -> dict[str, dict[str, float | None]]:
    seconds = {kind: sum(phases.values()) for kind, phases in table["seconds"].items()}
    total = sum(seconds.values())
    return {
        kind: {"share": spent_s / total if total else 0.0, "s_per_step": spent_s / steps if steps else None}
        for kind, spent_s in seconds.items()
    }
