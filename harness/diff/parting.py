"""The first step, and the first module, at which two runs differ: at all, and beyond rounding. Torch-free.

The rule: two numbers differ *beyond rounding* when they are more than `EPSILONS_APART` epsilons of the
coarser run's coarsest dtype apart, relative to the larger. One epsilon is the spacing of that dtype's
numbers at 1 (fp32 1.2e-7, fp16 and TF32 9.8e-4, bf16 7.8e-3). What is counted or decided (a skipped
step, non-finite elements) is compared exactly. Gradients of modules are compared without the loss scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
        fields = [
            {
                "name": name,
                "a": getattr(left, name),
                "b": getattr(right, name),
                "relative": relative(getattr(left, name), getattr(right, name)),
            }
            for name in (*MEASURED, *COUNTED)
        ]
        apart = [f for f in fields if (f["relative"] > limit if f["name"] in MEASURED else f["a"] != f["b"])]
        if apart:
            return {"step": step, "fields": apart}
    return None


def first_module(a: Run, b: Run, limit: float) -> dict[str, Any] | None:
    """The first module and direction, by window and then in the model's order, whose largest |x| differs by more
    than ``limit``. None when none does, or nothing can be compared: then `comparable_windows` is 0. Of two windows
    the common steps are named; of the longer one, ``a`` or ``b`` is over all of it, so that they differ by at least
    ``relative``."""
    left, right = _cells(a), _cells(b)
    places = _model_order(a)
    for key in sorted(left.keys() & right.keys(), key=lambda key: _when(key, places)):
        x, y = left[key], right[key]
        if _comparable(x, y) and relative(x.absmax, y.absmax) > limit:
            first, direction, module = key
            return {
                "first_step": first,
                "step": min(x.last, y.last),
                "module": module,
                "direction": direction,
                "a": x.absmax,
                "b": y.absmax,
                "relative": relative(x.absmax, y.absmax),
            }
    return None


def comparable_windows(a: Run, b: Run) -> int:
    """How many readings (module, direction, window) of the two runs can be compared."""
    left, right = _cells(a), _cells(b)
    return sum(_comparable(left[key], right[key]) for key in left.keys() & right.keys())


def relative(x: float | None, y: float | None) -> float:
    """|x - y| over the larger; infinite when only one is there, or only one is finite; 0 for the same non-finite value."""
    if x is None or y is None:
        return 0.0 if x is y else math.inf
    if not (math.isfinite(x) and math.isfinite(y)):
        return 0.0 if x == y or (math.isnan(x) and math.isnan(y)) else math.inf
    return abs(x - y) / max(abs(x), abs(y)) if x != y else 0.0


@dataclass(frozen=True)
class _Cell:
    """Largest |x| of a module in a window up to step ``last``, reached at step ``at``; of a gradient, without the loss
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
    """Whether two windows with the same start tell something of the same steps. Of unequal lengths (a run that failed
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


def _when(key: tuple, places: dict[str, int]) -> tuple:
    """By the window's first step, then forward through the model, then backward through it."""
    first, direction, module = key
    return first, direction == "bwd", -places[module] if direction == "bwd" else places[module]
