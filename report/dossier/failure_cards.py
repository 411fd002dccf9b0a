"""One card a failure: what died, why, what was tried, and the road to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report.dossier.citations import RowNumbers
from report.dossier.runs_table import run_href
from report.plots.text import clean, short

MOST_CARDS, MOST_LINKS = 24, 12
"""Cards in full; further failures are rows of the table of all runs."""


def failure_cards(failures: Sequence, folder, numbers: RowNumbers) -> dict[str, Any]:
    """Cards in the order given, and how many failures got none."""
    return {"cards": [_card(failure, folder, numbers) for failure in failures[:MOST_CARDS]],
            "further": max(0, len(failures) - MOST_CARDS)}


def _card(failure, folder, numbers: RowNumbers) -> dict[str, Any]:
    run = folder.by_id.get(failure.run_id)
    return {
        "case": clean(run.case if run else failure.run_id), "config": clean(run.dtype_config) if run else "",
        "seed": run.seed if run else None, "status": run.status if run else "",
        "sentence": clean(failure.sentence, 900), "cause": clean(failure.cause or "", 600),
        "remedies": [_remedy(remedy) for remedy in failure.remedies or ()],
        "chain": [_link(link) for link in (failure.chain or ())[:MOST_LINKS]],
        "kernels": [_kernel(kernel) for kernel in (failure.kernels or ())[:MOST_LINKS]],
        "trace": clean(failure.trace_file, 200) if failure.trace_file else None,
        "rows": numbers.cite([failure.run_id]), "href": run_href(failure.run_id),
    }


def _remedy(remedy: object) -> str:
    """A remedy tried on the dead step, in words; ratios against the failed configuration."""
    if not isinstance(remedy, dict):
        return clean(remedy, 300)
    survives = {True: "survives", False: "dies too"}.get(remedy.get("survives"), "not tried")
    words = [f"{clean(remedy.get('change', 'unnamed change'), 200)}: {survives}"]
    for key, name in (("step_time_ratio", "step time"), ("bytes_ratio", "memory")):
        if isinstance(remedy.get(key), (int, float)):
            words.append(f"{name} {remedy[key]:.2f}x")
    if remedy.get("confirms"):
        words.append(f"confirmed by {clean(remedy['confirms'], 80)}")
    if remedy.get("why"):
        words.append(clean(remedy["why"], 200))
    return ", ".join(words)


def _link(link: object) -> str:
    """One place of the chain from producer to where it surfaced."""
    if not isinstance(link, dict):
        return clean(link, 200)
    place = ".".join(clean(link[key], 80) for key in ("module", "tensor") if link.get(key))
    words = [clean(link[key], 60) for key in ("phase", "op", "kind", "dtype", "shape") if link.get(key)]
    return f"{place} ({', '.join(words)})" if words else place


def _kernel(kernel: object) -> str:
    if not isinstance(kernel, dict):
        return clean(kernel, 200)
    words = [clean(kernel.get("name", "unnamed"), 120)]
    if isinstance(kernel.get("duration_s"), (int, float)):
        words.append(f"{short(kernel['duration_s'] * 1e6)} us")
    words += [clean(kernel[key], 120) for key in ("module", "phase", "dtype", "shapes") if kernel.get(key)]
    return ", ".join(words)
