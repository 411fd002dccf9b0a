"""Differences over the common steps of two runs, with their uncertainty.

Neighbouring steps are alike, so single steps would make intervals too narrow: the 95 % t-interval is
over the means of consecutive blocks (batch means), about as many blocks as steps in each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from harness.bench.figure import half_width_95
from harness.diff.two_runs import Run

FEWEST_STEPS = 9
"""Below three blocks of three there is no interval."""


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
    common = [
        s for s in sorted(a.steps.keys() & b.steps.keys()) if s > untimed and a.steps[s].step_time_s and b.steps[s].step_time_s
    ]
    times = [math.log(b.steps[s].step_time_s / a.steps[s].step_time_s) for s in common]
    tokens = [
        math.log(b.steps[s].real_tokens / a.steps[s].real_tokens) - t
        for s, t in zip(common, times, strict=True)
        if a.steps[s].real_tokens and b.steps[s].real_tokens
    ]
    rates = {
        f"{name}_{side}": getattr(run.record, name)
        for side, run in (("a", a), ("b", b))
        for name in ("step_time_p50_s", "real_tokens_per_s")
    }
    return {"step_time_ratio": _ratio(times), "real_tokens_per_s_ratio": _ratio(tokens)} | rates


def _ratio(logs: Sequence[float]) -> dict[str, Any]:
    found = mean_with_interval(logs)
    return found | {key: None if found[key] is None else math.exp(found[key]) for key in ("mean", "low95", "high95")}
