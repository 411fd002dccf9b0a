"""The first step, and the first module, at which two runs differ: at all, and beyond rounding. Torch-free.

The rule: two numbers differ *beyond rounding* when they are more than `EPSILONS_APART` epsilons of the
coarser run's coarsest dtype apart, relative to the larger. One epsilon is the spacing of that dtype's
numbers at 1 (fp32 1.2e-7, fp16 and TF32 9.8e-4, bf16 7.8e-3). What is counted or decided (a skipped
step, non-finite elements) is compared exactly. Gradients of modules are compared without the loss scale.
"""

from __future__ import annotations

import math
from typing import Any

from harness.diff.two_runs import Run

EPSILONS_APART = 8
MEASURED = ("loss", "grad_norm", "logit_absmax")
COUNTED = ("grad_nonfinite", "logit_nonfinite", "step_skipped")


def tolerance(a: Run, b: Run) -> float:
    """The largest relative difference that still counts as rounding."""
    return EPSILONS_APART * max(a.epsilon, b.epsilon)


def first_step(a: Run, b: Run, limit: float) -> dict[str, Any] | None:
    """The first common step with a relative difference above ``limit`` (0: with any), and what differs in it."""
    for step in sorted(a.steps.keys() & b.steps.keys()):
        left, right = a.steps[step], b.steps[step]
        fields = [{"name": name, "a": getattr(left, name), "b": getattr(right, name),
                   "relative": relative(getattr(left, name), getattr(right, name))} for name in (*MEASURED, *COUNTED)]
        apart = [f for f in fields if (f["relative"] > limit if f["name"] in MEASURED else f["a"] != f["b"])]
        if apart:
            return {"step": step, "fields": apart}
    return None


def first_module(a: Run, b: Run, limit: float) -> dict[str, Any] | None:
    """The first module and direction, in order of windows and of execution, whose largest |x| differs by more than
    ``limit``. None when none does, or no window is common: then `common_windows` is 0."""
    left, right = _cells(a), _cells(b)
    places = _execution_order(a)
    for key in sorted(left.keys() & right.keys(), key=lambda key: _when(key, places)):
        x, y = left[key], right[key]
        if relative(x, y) > limit:
            first, last, direction, module = key
            return {"first_step": first, "step": last, "module": module, "direction": direction, "a": x, "b": y,
                    "relative": relative(x, y)}
    return None


def common_windows(a: Run, b: Run) -> int:
    """How many (module, direction, window) were measured in both."""
    return len(_cells(a).keys() & _cells(b).keys())


def relative(x: float | None, y: float | None) -> float:
    """|x - y| over the larger; infinite when only one is there, or only one is finite; 0 for the same non-finite value."""
    if x is None or y is None:
        return 0.0 if x is y else math.inf
    if not (math.isfinite(x) and math.isfinite(y)):
        return 0.0 if x == y or (math.isnan(x) and math.isnan(y)) else math.inf
    return abs(x - y) / max(abs(x), abs(y)) if x != y else 0.0


def _cells(run: Run) -> dict[tuple, float]:
    """(first step, last step, direction, module) -> largest |x|; of gradients, without the loss scale."""
    cells = {}
    for row in run.modules:
        step = run.steps.get(row.absmax_step)
        scale = (step.loss_scale if step and row.direction == "bwd" else None) or 1.0
        cells[row.first_step, row.step, row.direction, row.module] = row.absmax / scale
    return cells


def _execution_order(run: Run) -> dict[str, int]:
    """Module -> its place in the order in which outputs are ready: what a module contains comes before it."""
    listed = sorted({(row.order, row.module) for row in run.modules})

    def ready(entry: tuple[int, str]) -> tuple[int, int]:
        order, module = entry
        inside = [o for o, m in listed if not module or m.startswith(f"{module}.")]
        return max([order, *inside]), -order

    return {module: place for place, (_, module) in enumerate(sorted(listed, key=ready))}


def _when(key: tuple, places: dict[str, int]) -> tuple:
    """By the window's first step, then forward through the model, then backward through it."""
    first, last, direction, module = key
    return first, direction == "bwd", -places[module] if direction == "bwd" else places[module], last
