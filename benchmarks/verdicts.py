"""``python -m benchmarks verdicts``: how often the report's verdicts are false, and how often they find what is there.

2,000 worlds a question, setting and number of seeds, drawn from a recorded seed, go through the verdicts' own code; the table
and the figure in ``docs/`` are what this command writes."""

from __future__ import annotations

import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.verdict_worlds import QUESTIONS, SETTINGS, frequencies

DOCS = Path(__file__).resolve().parents[1] / "docs"
SEEDS = (1, 2, 3, 5, 10)
WORLDS, SEED = 2_000, 20_261
LEVEL = 0.05
MEANINGS = {
    "worse": "a case's table: six configurations, all with the setting's loss (margin 0.02 nats), or all dying at its rate",
    "slower": "a case's table: six configurations, all slower by the setting's factor (margin 2 %), or all dying at its rate",
    "one dies": "a case's table: six configurations, one of which dies at the setting's rate",
    "H1": "fp16_naive diverges on multi-label at the setting's rate (margin 1 seed in 10) and never on single-label",
    "H2": "RoBERTa's gain is larger than GPT-2's by the setting's factor (margin 2 %); with deaths: at the margin",
    "H3": "GPT-2's loss suffers more by the setting (margin 5 %); with deaths: both architectures die alike",
    "H3, only GPT-2 dies": "one of two configurations dies at the setting's rate, on GPT-2 alone",
    "P1": "a logit leaves fp16's range at the setting's rate of seeds (margin 1 in 10)",
    "P2": "five rivals are faster than bf16_pure by the setting's factor (margin 2 %); with deaths: equal, and bf16_pure dies",
    "P3": "classification's MFU is lower by the setting's factor (margin 2 %) and its variation higher (margin half a point)",
    "P4": "two configurations swap places by the setting's factor (margin 2 %); with deaths: the fastest dies on one task",
}
Row = tuple[str, str, str, str, tuple[float, ...], int]
"""Question, setting, ``false`` or ``power``, the answer, its frequency by number of seeds, and the worlds of each."""


def rows(worlds: int = WORLDS, seed: int = SEED, seeds: tuple[int, ...] = SEEDS, processes: int | None = None) -> list[Row]:
    """Every frequency that is an error, or a power."""
    tasks = [
        (name, setting, n)
        for name, question in QUESTIONS.items()
        for setting in SETTINGS
        if question.wrong.get(setting) or setting in question.right
        for n in seeds
    ]
    found = {}
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        arguments = (*zip(*tasks, strict=True), [worlds] * len(tasks), [seed] * len(tasks))
        for task, answers in zip(tasks, pool.map(frequencies, *arguments), strict=True):
            found[task] = answers
            print(*task, answers, file=sys.stderr, flush=True)
    return [
        (name, setting, kind, answer, tuple(found[name, setting, n].get(answer, 0.0) for n in seeds), worlds)
        for name, question in QUESTIONS.items()
        for setting in SETTINGS
        for kind, answers in (
            ("false", question.wrong.get(setting, ())),
            ("power", filter(None, [question.right.get(setting)])),
        )
        for answer in answers
    ]


def markdown(found: list[Row], seed: int, seeds: tuple[int, ...] = SEEDS) -> str:
    """The table with what it means."""
    worst = max(max(values) for _, _, kind, _, values, _ in found if kind == "false")
    sizes = sorted({worlds for *_, worlds in found})
    errors = [f"{100 * math.sqrt(LEVEL * (1 - LEVEL) / worlds):.1f} points in {worlds:,}" for worlds in sizes]
    lines = [
        "# How often a verdict is false, and how many seeds a question needs",
        "",
        f"Written by `python -m benchmarks verdicts` (seed {seed}): at least as many simulated worlds as a line says, for each",
        "number of seeds, judged by the code that judges a folder. Paired differences of losses and speeds scatter by 1 %",
        "(of a language model: 0.01 nats). False: the answer is untrue in that world; aimed at is at most 5 %, and the largest",
        f"below is **{100 * worst:.1f} %** (the standard error of 5 %: {', '.join(errors)} worlds). Power: how often the true",
        "answer is given. A claim about a rate asks whether it is above 1 seed in 10: `refuted` needs 36 seeds without one,",
        "so with 10 its power is 0. A failure that no seed showed is known to nobody: a configuration that completed every",
        "seed is judged by its speed and quality alone.",
        "",
        "The noise of these worlds is normal and independent from seed to seed. Heavy tails (Student's t with 3 degrees of",
        "freedom) and noise that differs by configuration keep every false rate at 5 % too. Two kinds do not, at an effect of",
        "just the margin: a loss skewed by rare seeds that are much worse than the rest, and a disturbance that all seeds of a",
        "configuration share. What few seeds did not show, no test of them knows.",
        "",
        "![False verdicts and power by number of seeds](verdicts.svg)",
        "",
        "| question | setting | | answer | worlds | " + " | ".join(f"{n} seed{'s' * (n > 1)}" for n in seeds) + " |",
        "|---|---|---|---|---:|" + "---:|" * len(seeds),
    ]
    for name, setting, kind, answer, values, worlds in found:
        lines.append(
            f"| {name} | {setting} | {kind} | {answer} | {worlds:,} | " + " | ".join(f"{100 * v:.1f} %" for v in values) + " |"
        )
    lines += ["", *(f"- **{name}**: {meaning}." for name, meaning in MEANINGS.items()), ""]
    return "\n".join(lines)


def figure(found: list[Row], path: Path, seeds: tuple[int, ...] = SEEDS) -> None:
    """Left: every false rate under the line of 5 %. Right: power."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "verdicts"
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    colours = dict(zip(QUESTIONS, plt.get_cmap("tab20").colors, strict=False))
    markers = dict(zip(SETTINGS, "o^vsDP", strict=True))
    for ax, kind, top in ((axes[0], "false", 0.1), (axes[1], "power", 1.02)):
        for name, setting, which, _, values, _ in found:
            if which == kind:
                ax.plot(range(len(seeds)), values, marker=markers[setting], ms=4, lw=1, color=colours[name], alpha=0.85)
        ax.set(
            xticks=range(len(seeds)),
            xticklabels=seeds,
            xlabel="seeds",
            ylim=(-0.02 * top, top),
            ylabel=f"share of worlds: {kind}",
        )
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(LEVEL, color="black", lw=1, ls="--")
    axes[0].text(0, LEVEL + 0.001, "aim: at most 5 %", va="bottom", size=8)
    names = [plt.Line2D([], [], color=colours[name], label=name) for name in QUESTIONS]
    shapes = [plt.Line2D([], [], color="grey", marker=markers[s], ls="", label=s) for s in SETTINGS]
    fig.legend(handles=names + shapes, loc="outside right upper", fontsize=8, frameon=False)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def bench_command(worlds: int | None, seed: int | None, as_json: bool, out: Path = DOCS) -> int:
    """Simulate, and write ``verdicts.md`` and ``verdicts.svg``."""
    worlds, seed = worlds or WORLDS, SEED if seed is None else seed
    found = rows(worlds, seed)
    (out / "verdicts.md").write_text(markdown(found, seed), encoding="utf-8")
    figure(found, out / "verdicts.svg")
    if as_json:
        sys.stdout.write(json.dumps({"worlds": worlds, "seed": seed, "seeds": SEEDS, "rows": found}) + "\n")
    return 0
