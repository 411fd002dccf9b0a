"""One card a group of failures: what failed, where, why, which remedies were tried, and which controls survived. Forensics are
read as plain data: what is missing or of another kind is a dash, and nothing of it is markup."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from bench_cases import DTYPE_CONFIGS
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.dossier.rows import ABSENT, RowNumbers
from report.tables.failures import Control, FailureGroup
from report.tables.selection import in_order
from report.text import clean, number, short, span

MOST_CARDS, MOST_PLACES, MOST_LINKS, MOST_REMEDIES = 16, 12, 8, 12
"""Cards, and places of one; what is further is in the table of all runs."""
BESIDE = 3
"""Kernels shown before the culprit, and as many after it."""
FEWEST_STEPS = 3
"""A magnitude over fewer steps is printed; from here on it is drawn as well."""
PLACE_HEADS = ("case", "seeds", "step", "producer", "what it became")
REMEDY_HEADS = ("change", "survives", "time", "memory", "confirms, or why not")
CHAIN_HEADS = ("", "phase", "module", "op", "kind", "dtype")
KERNEL_HEADS = ("", "kernel", "module", "phase", "us", "shapes", "dtype")
DIRECTIONS = (("absmax_fwd", "output"), ("absmax_bwd", "gradient"))
WIDTH_PX, HEIGHT_PX, EDGE_PX = 110, 22, 3


def failure_cards(groups: Sequence[FailureGroup], numbers: RowNumbers) -> dict[str, Any]:
    """Cards in the order given, how many failures got none, and the heads of the cards' tables."""
    return {
        "cards": [_card(group, numbers) for group in groups[:MOST_CARDS]],
        "further": sum(len(group.members) for group in groups[MOST_CARDS:]),
        "place_heads": PLACE_HEADS,
        "remedy_heads": REMEDY_HEADS,
        "chain_heads": CHAIN_HEADS,
        "kernel_heads": KERNEL_HEADS,
    }


def _card(group: FailureGroup, numbers: RowNumbers) -> dict[str, Any]:
    failure, runs = group.example, [member.run for member in group.members]
    run, chain = failure.run, [*failure.chain]
    if chain and run.first_nonfinite:  # a link names NaN before Inf; of the culprit it is known what prevails
        chain[0] = {**chain[0], "kind": run.first_nonfinite.kind}
    places, cases, one = _places(runs), {run.case for run in runs}, len(runs) == 1
    where = f"{clean(run.case, 40)} · seed {run.seed}" if one else f"{len(runs)} runs in {count(len(cases), 'case')}"
    return {
        "config": clean(run.dtype_config),
        "where": where,
        "status": run.status,
        "sentence": clean(failure.sentence, 900),
        "cause": clean(failure.cause or "", 600),
        "places": [] if one else places[:MOST_PLACES],
        "places_further": max(0, len(places) - MOST_PLACES),
        "controls": [_control(control, numbers) for control in group.controls],
        "example": None if one else f"{clean(run.case, 40)}, seed {run.seed}",
        "remedies": [_remedy(remedy) for remedy in failure.remedies[:MOST_REMEDIES]],
        "chain": [[str(at), *_link(link)] for at, link in enumerate(chain[:MOST_LINKS], start=1)],
        "chain_further": max(0, len(chain) - MOST_LINKS),
        "kernels": _kernels(failure.kernels),
        "history": _history(failure.history),
        "trace": clean(failure.trace_file, 200) if failure.trace_file else None,
        "rows": numbers.cite(run.run_id for run in runs),
    }


def _places(runs: Sequence[RunRecord]) -> list[list[str]]:
    """A row a case and producer: the seeds and steps in which it failed there."""
    found: dict[tuple[str, str, str], list[RunRecord]] = {}
    for run in in_order(runs):
        first = run.first_nonfinite
        what = first.kind if first else run.status
        place = ".".join(filter(None, (first.module, first.tensor))) if first else ABSENT
        found.setdefault((run.case, place, what), []).append(run)
    return [
        [
            clean(case, 40),
            ", ".join(str(run.seed) for run in group),
            span(run.divergence_step if run.divergence_step is not None else run.steps_done for run in group),
            _word(place, 90),
            clean(what, 20),
        ]
        for (case, place, what), group in found.items()
    ]


def _control(control: Control, numbers: RowNumbers) -> dict[str, Any]:
    """``fp16_naive_eps1e4 survived in 18 of 18 of the same cases and seeds``, with its rows and what it changes."""
    n = len(control.survived) + len(control.failed)
    note = getattr(DTYPE_CONFIGS.get(control.config), "note", "")
    what = f"survived in {len(control.survived)} of {n} of the same cases and seeds" if n else "was not run beside them"
    return {
        "text": f"{clean(control.config, 40)} {what}",
        "note": note,
        "rows": numbers.cite(control.survived + control.failed),
    }


def _remedy(remedy: dict) -> list[str]:
    """A change tried on the snapshot, and what it costs against the run that failed."""
    outcome = {True: "yes", False: "no"}.get(
        remedy.get("survives") if isinstance(remedy.get("survives"), bool) else None, "not tried"
    )
    steps, failed_at = number(remedy.get("steps")), number(remedy.get("failed_at"))
    if outcome == "yes" and steps:
        outcome += f", {count(round(steps), 'step')}"
    elif outcome == "no" and failed_at is not None:
        outcome += f", diverges at step {failed_at:.0f}"
    confirms = remedy.get("why")
    if isinstance(remedy.get("confirms"), str):
        confirms = f"confirms {remedy['confirms'].replace('_', ' ')}"
    return [
        _word(remedy.get("change"), 80),
        outcome,
        *(_ratio(remedy.get(key)) for key in ("step_time_ratio", "bytes_ratio")),
        _word(confirms, 200),
    ]


def _link(link: dict) -> list[str]:
    """One place on the way from the producer to where the value surfaced."""
    place = _word(link.get("module"), 80)
    tensor = link.get("tensor")
    if tensor and not str(tensor).startswith(str(link.get("module"))):
        place += f" ({clean(tensor, 60)})"
    elif tensor and tensor != link.get("module"):
        place = clean(tensor, 90)  # a parameter's name begins with its module's
    return [_word(link.get("phase"), 20), place, *(_word(link.get(key), 60) for key in ("op", "kind", "dtype"))]


def _kernels(kernels: Sequence[dict]) -> list[dict[str, Any]]:
    """The culprit marked, and its neighbours; without a culprit the last ones that were seen."""
    here = next((at for at, kernel in enumerate(kernels) if kernel.get("here") is True), None)
    first = max(0, len(kernels) - 2 * BESIDE - 1 if here is None else here - BESIDE)
    last = len(kernels) if here is None else here + BESIDE + 1
    return [{"here": kernel.get("here") is True, "cells": _kernel(kernel)} for kernel in kernels[first:last]]


def _kernel(kernel: dict) -> list[str]:
    duration_s = number(kernel.get("duration_s"))
    mark = "→" if kernel.get("here") is True else "✗" if kernel.get("nonfinite") is True else ""
    return [
        mark,
        _word(kernel.get("name"), 80),
        _word(kernel.get("module"), 80),
        _word(kernel.get("phase"), 20),
        ABSENT if duration_s is None else short(duration_s * 1e6),
        _shapes(kernel.get("shapes")),
        _word(kernel.get("dtype"), 20),
    ]


def _shapes(shapes: object) -> str:
    """The first shapes of an op's outputs; a foreach op has one a parameter."""
    if not isinstance(shapes, list) or not shapes:
        return ABSENT
    parts = [clean(str(shape), 40) for shape in shapes[:2]]
    return ", ".join(parts) + (f" and {len(shapes) - 2} more" if len(shapes) > 2 else "")


def _history(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """The culprit's largest |x| before it failed, a line for its output and one for its gradient."""
    found = []
    for key, name in DIRECTIONS:
        points = [
            (step, value)
            for row in rows
            if (step := number(row.get("step"))) is not None and (value := number(row.get(key))) is not None
        ]
        if points:
            line = sparkline(points, f"largest {name} by step") if len(points) >= FEWEST_STEPS else None
            found.append({"text": f"{name}: {_span(points)}", "line": line})
    return found


def _span(points: list[tuple[float, float]]) -> str:
    (first, before), (last, after) = points[0], points[-1]
    if len(points) == 1:
        return f"{short(before)} at step {first:.0f}"
    return f"{short(before)} at step {first:.0f}, {short(after)} at step {last:.0f}"


def _ratio(value: object) -> str:
    known = number(value)
    return ABSENT if known is None else f"{known:.2f}x"


def _word(value: object, limit: int) -> str:
    return ABSENT if value is None or value == "" else clean(value, limit)


def sparkline(points: Sequence[tuple[float, float]], label: str) -> Markup | None:
    """An inline SVG of (step, magnitude >= 0), a dot on the last; zeros stand on the ground line. None for
    fewer than two points, or when all are zero: there is no line to see."""
    sizes = [value for _, value in points if value > 0]
    if len(points) < 2 or not sizes:
        return None
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    first, last = points[0][0], points[-1][0]
    drawn = []
    for step, value in points:
        x = EDGE_PX + (WIDTH_PX - 2 * EDGE_PX) * ((step - first) / (last - first) if last > first else 0.5)
        share = ((math.log2(value) - low) / (high - low) if high > low else 0.5) if value > 0 else 0.0
        drawn.append((x, HEIGHT_PX - EDGE_PX - (HEIGHT_PX - 2 * EDGE_PX) * share))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    x, y = drawn[-1]
    return Markup(
        f'<svg class="spark" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(label, quote=True)}" '
        f'width="{WIDTH_PX}" height="{HEIGHT_PX}" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}">'
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.3"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="currentColor"/></svg>'
    )
