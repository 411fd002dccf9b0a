"""``bench forensics``: how often the watch names the planted fault, and how often it cries wolf."""

from __future__ import annotations

from collections import Counter

from harness.overhead.figure import Figure, summarize

HEALTHY_SHARE = 0.4
"""Healthy runs for every injected one: 200 for 500."""


def measure(trials: int) -> list[Figure]:
    """The share of ``trials`` injected faults that were named right (step, phase, module; cause where the
    plant fixes it), by plant and together, and of healthy runs in which nothing was named."""
    import torch

    from tests.soak.forensics.trials import healthy_trials, injection_trials

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    injected = list(injection_trials(trials, device=device))
    healthy = list(healthy_trials(max(1, round(trials * HEALTHY_SHARE)), device=device))
    figures = []
    for plant in dict.fromkeys(result.trial.plant for result in sorted(injected, key=lambda r: r.trial.plant)):
        figures.append(_share(f"right_{plant}", [r for r in injected if r.trial.plant == plant]))
    wrong = [r for r in (*injected, *healthy) if r.why_wrong]
    figures.append(_share("right", injected, at_least=1.0, note=_words(injected)))
    figures.append(
        _share(
            "healthy_left_alone",
            healthy,
            at_least=1.0,
            note=(f"{sum(r.infinities > 0 for r in healthy)} of {len(healthy)} held infinities that died out or a mask's"),
        )
    )
    figures += [summarize("forensics", f"wrong: {r.why_wrong}", [1.0], "count", note=str(r.as_row())) for r in wrong[:20]]
    return figures


def _share(name: str, results: list, *, at_least: float | None = None, note: str = "") -> Figure:
    right = [0.0 if r.why_wrong else 1.0 for r in results]
    return summarize(
        "forensics",
        name,
        [sum(right) / len(right)],
        "ratio",
        at_least=at_least,
        note=note or f"{int(sum(right))} of {len(right)}",
    )


def _words(injected: list) -> str:
    models = Counter(r.trial.model for r in injected)
    right = sum(not r.why_wrong for r in injected)
    harmless = sum(r.expected is None for r in injected)
    return f"{right} of {len(injected)}; {harmless} did no harm and were left alone; " + ", ".join(
        f"{name} {count}" for name, count in sorted(models.items())
    )
