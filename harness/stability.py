"""The stability matrix in the terminal: what became of every configuration in every case. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from bench_cases import CASES, DTYPE_CONFIGS
from instrument.records import RunRecord

STYLES = {"completed": "green", "diverged": "bold red", "unsupported": "dim", "preempted": "yellow"}
SIGNS = {"completed": "✓", "diverged": "✗", "unsupported": "–", "preempted": "…"}


def stability_cells(records: Iterable[RunRecord]) -> dict[tuple[str, str], list[RunRecord]]:
    """Runs by (configuration id, case id), in the registries' order."""
    cells: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        cells.setdefault((record.dtype_config, record.case), []).append(record)
    return dict(sorted(cells.items(), key=lambda cell: (_place(cell[0][0], DTYPE_CONFIGS), _place(cell[0][1], CASES))))


def _place(name: str, registry: dict) -> tuple[int, str]:
    return (list(registry).index(name) if name in registry else len(registry), name)


def cell_text(runs: list[RunRecord]) -> tuple[str, str]:
    """(words, status that decides the colour) of one cell; several seeds read ``2/3 …``."""
    worst = next((run for run in runs if run.status not in ("completed", "unsupported")), runs[0])
    same = sum(run.status == worst.status for run in runs)
    share = f" {same}/{len(runs)}" if len(runs) > 1 else ""
    return f"{SIGNS.get(worst.status, '!')}{share} {_outcome(worst)}", worst.status


def _outcome(run: RunRecord) -> str:
    """A run's end in a few characters."""
    if run.status == "completed":
        if run.f1_micro is not None:
            return f"loss {run.val_loss:.3g} F1 {run.f1_micro:.2f}"
        return f"loss {run.val_loss:.3g}" if run.val_loss is not None else "done"
    if run.status == "diverged":
        first = run.first_nonfinite
        return f"{first.kind} @ {run.divergence_step} {first.phase}" if first else f"exploded @ {run.divergence_step}"
    return run.status


def stability_table(records: Iterable[RunRecord], title: str):
    """The matrix as a rich table: configurations down, cases across."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    cells = stability_cells(records)
    cases = sorted({case for _, case in cells}, key=lambda case: _place(case, CASES))
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for case in cases:
        table.add_column(case.replace("_multi", "\nmulti").replace("_single", "\nsingle").replace("_clm", "\nclm")
                         .replace("_mlm", "\nmlm"))
    for config in dict.fromkeys(config for config, _ in cells):
        row = []
        for case in cases:
            words, status = cell_text(cells[config, case]) if (config, case) in cells else ("", "missing")
            row.append(Text(words, style=STYLES.get(status, "yellow")))
        table.add_row(config, *row)
    return table
