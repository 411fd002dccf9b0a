"""The comparison of two runs as plain data: the first step and module at which they differ, and what each of them costs.

Two numbers differ *beyond rounding* when they are more than `EPSILONS_APART` epsilons of the coarser run's coarsest dtype
apart, relative to the larger. One epsilon is the spacing of that dtype's numbers at 1 (fp32 1.2e-7, fp16 and TF32 9.8e-4,
bf16 7.8e-3). What is counted or decided (a skipped step, non-finite elements) is compared exactly. Gradients of modules are
compared without the loss scale. Differences over steps carry a 95 % t-interval over the means of consecutive blocks, about
as many blocks as steps in each, since neighbouring steps are alike: over single steps it would be too narrow. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from msgspec.structs import asdict

from harness.figures import half_width_95
from instrument.results.read import Run, differences, why_not_paired

FEWEST_STEPS = 9
"""Below three blocks of three there is no interval."""
EPSILONS_APART = 8
MEASURED = ("loss", "grad_norm", "logit_absmax")
COUNTED = ("grad_nonfinite", "logit_nonfinite", "step_skipped")
OUTCOME = (
    *("status", "steps_done", "divergence_step", "scaler_skips"),
    *("val_loss", "perplexity", "f1_micro", "f1_macro", "final_weights_sha256"),
)
SPLIT = ("weights_bytes", "buffers_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "peak_rss_bytes")


def compare(runs: tuple[Run, Run]) -> dict[str, Any]:
    """All differences. ``no_difference``: same settings, machine, steps, modules and outcome; times aside."""
    a, b = runs
    epsilon = max(a.epsilon, b.epsilon)
    limit = EPSILONS_APART * epsilon
    not_paired, windows = why_not_paired(a, b), comparable_windows(a, b)
    found = {
        "a": _who(a),
        "b": _who(b),
        "same_run": a.place.path.resolve() == b.place.path.resolve(),
        "paired": not not_paired,
        "not_paired_because": not_paired,
        "settings": settings(a, b),
        "environment": differences(a.environment, b.environment),
        "rounding": {"relative": limit, "epsilons": EPSILONS_APART, "epsilon": epsilon},
        "common_steps": len(a.steps.keys() & b.steps.keys()),
        "comparable_windows": len(windows),
        "first_difference": first_step(a, b, 0.0),
        "first_beyond_rounding": first_step(a, b, limit),
        "first_module_difference": first_module(windows, 0.0),
        "first_module_beyond_rounding": first_module(windows, limit),
        "loss": loss_difference(a, b),
        "speed": speed(a, b),
        "time_by_kernel": kernel_times(a, b),
        "memory": memory(a, b),
        "outcome": _pairs(OUTCOME, asdict(a.record), asdict(b.record)),
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
    named = {name: getattr(run.record, name) for name in ("case", "dtype_config", "seed", "device", "error")}
    return {"run_id": run.record.run_id, "results_folder": str(run.place.out), **named}


def settings(a: Run, b: Run) -> list[dict[str, Any]]:
    """What was decided differently; of two different cases their names are enough."""
    rows = differences(a.settings, b.settings)
    return [row for row in rows if a.record.case == b.record.case or not row["name"].startswith("case.")]


def _pairs(names: Sequence[str], a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every name of which one of the two has a value."""
    rows = [{"name": name, "a": a.get(name), "b": b.get(name)} for name in names]
    return [row for row in rows if not (row["a"] is None and row["b"] is None)]


def memory(a: Run, b: Run) -> dict[str, Any]:
    """Bytes by kind (null where a run has no split: ``--instrument off``), and the peaks."""
    splits = [run.record.flags.get("memory_split") or {} for run in (a, b)]
    return {
        "split_missing_in": [side for side, split in zip("ab", splits, strict=True) if not split],
        "rows": _pairs(SPLIT, *splits) + _pairs(PEAKS, asdict(a.record), asdict(b.record)),
    }


def kernel_times(a: Run, b: Run) -> dict[str, Any]:
    """Each kernel class' share of the traced time, and its seconds a step where the records say how many steps were
    traced; ``missing_in`` names the runs that were not traced."""
    tables = [run.record.flags.get("time_by_kernel") for run in (a, b)]
    if not all(tables):
        return {"missing_in": [side for side, table in zip("ab", tables, strict=True) if not table], "rows": []}
    steps = [(run.record.flags.get("trace") or {}).get("steps") for run in (a, b)]
    seconds = [{kind: sum(phases.values()) for kind, phases in table["seconds"].items()} for table in tables]
    rows = [{"class": kind} for kind in dict.fromkeys([*seconds[0], *seconds[1]])]
    for side, spent_s, n in zip("ab", seconds, steps, strict=True):
        total = sum(spent_s.values())
        for row in rows:
            class_s = spent_s.get(row["class"], 0.0)
            row |= {f"share_{side}": class_s / total if total else 0.0, f"s_per_step_{side}": class_s / n if n else None}
    return {"missing_in": [], "sources": [table["source"] for table in tables], "steps": steps, "rows": rows}


def first_step(a: Run, b: Run, limit: float) -> dict[str, Any] | None:
    """The first common step with a relative difference above ``limit`` (0: with any), and what differs in it."""
    for step in sorted(a.steps.keys() & b.steps.keys()):
        left, right = a.steps[step], b.steps[step]
        pairs = [(name, getattr(left, name), getattr(right, name)) for name in (*MEASURED, *COUNTED)]
        fields = [{"name": name, "a": x, "b": y, "relative": relative(x, y)} for name, x, y in pairs]
        apart = [f for f in fields if (f["relative"] > limit if f["name"] in MEASURED else f["a"] != f["b"])]
        if apart:
            return {"step": step, "fields": apart}
    return None


def comparable_windows(a: Run, b: Run) -> list[dict[str, Any]]:
    """The readings of a module and direction that can be compared: by their window's first step, then forward through the
    model, then backward through it. Of two windows the common steps are named; of the longer one, ``a`` or ``b`` is over all of
    it, so that they differ by at least ``relative``."""
    left, right, places = _cells(a), _cells(b), _model_order(a)

    def when(key: tuple) -> tuple:
        first, direction, module = key
        return first, direction == "bwd", -places[module] if direction == "bwd" else places[module]

    return [
        dict(zip(("first_step", "direction", "module"), key, strict=True))
        | {"step": min(x.last, y.last), "a": x.absmax, "b": y.absmax, "relative": relative(x.absmax, y.absmax)}
        for key in sorted(left.keys() & right.keys(), key=when)
        if _comparable(x := left[key], y := right[key])
    ]


def first_module(windows: list[dict[str, Any]], limit: float) -> dict[str, Any] | None:
    """The first of `comparable_windows` whose largest |x| differs by more than ``limit``; None when none does."""
    return next((window for window in windows if window["relative"] > limit), None)


def relative(x: float | None, y: float | None) -> float:
    """|x - y| over the larger; infinite when only one is there, or only one is finite; 0 for the same non-finite value."""
    if x is None or y is None:
        return 0.0 if x is y else math.inf
    if not (math.isfinite(x) and math.isfinite(y)):
        return 0.0 if x == y or (math.isnan(x) and math.isnan(y)) else math.inf
    return abs(x - y) / max(abs(x), abs(y)) if x != y else 0.0


@dataclass(frozen=True)
class _Cell:
    """Largest |x| of a module in a window up to step ``last``, found at step ``at``; of a gradient, without the loss
    scale."""

    absmax: float
    at: int
    last: int
    forward: bool


def _cells(run: Run) -> dict[tuple, _Cell]:
    """By (first step of the window, direction, module)."""
    cells = {}
    for row in run.modules:
        step = run.steps.get(row.absmax_step)
        scale = (step.loss_scale if step and row.direction == "bwd" else None) or 1.0
        cell = _Cell(row.absmax / scale, row.absmax_step, row.step, row.direction == "fwd")
        cells[row.first_step, row.direction, row.module] = cell
    return cells


def _comparable(x: _Cell, y: _Cell) -> bool:
    """Whether two windows with the same start measured some of the same steps. Of unequal lengths (a run that failed
    has a short last one), when the longer's maximum lies in the shorter, or is surpassed by the shorter's."""
    short, long = sorted((x, y), key=lambda cell: cell.last)
    return short.last == long.last or long.at <= short.last or (short.forward and short.absmax > long.absmax)


def _model_order(run: Run) -> dict[str, int]:
    """Module -> its place: as the model lists them, but what a module contains before it, since its output comes
    last. Siblings may run in another order than they are listed in."""
    listed = sorted({(row.order, row.module) for row in run.modules})

    def ready(entry: tuple[int, str]) -> tuple[int, int]:
        order, module = entry
        inside = [o for o, m in listed if not module or m.startswith(f"{module}.")]
        return max([order, *inside]), -order

    return {module: place for place, (_, module) in enumerate(sorted(listed, key=ready))}


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """``mean``, ``low95``, ``high95`` (null for too few values), over ``n`` values in ``blocks`` blocks."""
    n = len(values)
    if n < FEWEST_STEPS:
        return {"mean": fmean(values) if values else None, "low95": None, "high95": None, "n": n, "blocks": 0}
    blocks = math.isqrt(n)
    edges = [round(i * n / blocks) for i in range(blocks + 1)]
    half = half_width_95([fmean(values[start:end]) for start, end in zip(edges, edges[1:], strict=False)])
    mean = fmean(values)
    return {"mean": mean, "low95": mean - half, "high95": mean + half, "n": n, "blocks": blocks}


def loss_difference(a: Run, b: Run) -> dict[str, Any]:
    """Training loss of ``b`` minus that of ``a``, over the steps in which both are finite; then at the end."""
    pairs = [(a.steps[s].loss, b.steps[s].loss) for s in sorted(a.steps.keys() & b.steps.keys())]
    finite = [y - x for x, y in pairs if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]
    return mean_with_interval(finite) | {
        "left_out": len(pairs) - len(finite),
        "final_a": a.record.train_loss_final,
        "final_b": b.record.train_loss_final,
        "val_loss_a": a.record.val_loss,
        "val_loss_b": b.record.val_loss,
    }


def speed(a: Run, b: Run) -> dict[str, Any]:
    """Ratios of ``b`` to ``a``: step time, and real tokens per second, as geometric means over the timed steps that
    both have."""
    untimed = max(run.record.config.get("untimed_steps", 0) for run in (a, b))
    common = [(a.steps[s], b.steps[s]) for s in sorted(a.steps.keys() & b.steps.keys()) if s > untimed]
    common = [(x, y) for x, y in common if (x.step_time_s or 0) > 0 < (y.step_time_s or 0)]
    timed = [(x, y, math.log(y.step_time_s / x.step_time_s)) for x, y in common]
    tokens = [math.log(y.real_tokens / x.real_tokens) - t for x, y, t in timed if x.real_tokens > 0 < y.real_tokens]
    names = ("step_time_p50_s", "real_tokens_per_s")
    rates = {f"{name}_{side}": getattr(run.record, name) for side, run in (("a", a), ("b", b)) for name in names}
    return {"step_time_ratio": _ratio([t for *_, t in timed]), "real_tokens_per_s_ratio": _ratio(tokens)} | rates


def _ratio(logs: Sequence[float]) -> dict[str, Any]:
    found = mean_with_interval(logs)
    return found | {key: None if found[key] is None else math.exp(found[key]) for key in ("mean", "low95", "high95")}
