"""The stability matrix in the terminal: what became of every configuration in every case. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from bench_cases import CASES, DTYPE_CONFIGS
from instrument.results.schemas import RunRecord
from instrument.terminal import STATUS_STYLES

PHASES = {"optimizer": "optim"}
LEGEND = (
    "✓ validation loss (F1 micro)   = stalled   ✗ what @step, phase of the first non-finite value   – unsupported   … stopped"
)
SIGNS = {"completed": "✓", "stalled": "=", "diverged": "✗", "unsupported": "–", "preempted": "…"}


def stability_cells(records: Iterable[RunRecord]) -> dict[tuple[str, str], list[RunRecord]]:
    """Runs by (configuration id, case id), in the registries' order."""
    cells: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        cells.setdefault((record.dtype_config, record.case), []).append(record)
    return dict(sorted(cells.items(), key=lambda cell: (_place(cell[0][0], DTYPE_CONFIGS), _place(cell[0][1], CASES))))


def _place(name: str, registry: dict) -> tuple[int, str]:
    return (list(registry).index(name) if name in registry else len(registry), name)


def cell_text(runs: list[RunRecord]) -> tuple[str, str, str]:
    """(outcome, detail, status that decides the colour) of one cell; several seeds read ``✗ 2/3 …``,
    and completed ones show the seed in the middle."""
    in_order = sorted(runs, key=lambda run: (run.val_loss is None, run.val_loss))
    bad = [run for run in runs if _end(run) not in ("completed", "unsupported")]
    worst = min(
        bad,
        key=lambda run: (_end(run) == "preempted", _end(run) == "stalled", run.status != "diverged"),
        default=in_order[(len(runs) - 1) // 2],
    )
    end = _end(worst)
    same = sum(_end(run) == end for run in runs)
    share = f"{same}/{len(runs)} " if len(runs) > 1 else ""
    outcome, detail = _outcome(worst)
    return f"{SIGNS.get(end, '!')} {share}{outcome}", detail, end


def _end(run: RunRecord) -> str:
    """A run's status, ``stalled`` where it completed and stood still."""
    return "stalled" if run.stalled is not None else run.status


def _outcome(run: RunRecord) -> tuple[str, str]:
    """A run's end in two short pieces."""
    if run.status == "completed":
        loss = f"{run.val_loss:.3g}" if run.val_loss is not None else "done"
        return loss, "stalled" if run.stalled else f"F1 {run.f1_micro:.2f}" if run.f1_micro is not None else ""
    if run.status == "diverged":
        first = run.first_nonfinite
        return (
            (f"{first.kind} @{run.divergence_step}", PHASES.get(first.phase, first.phase))
            if first
            else (f"loss up @{run.divergence_step}", "")
        )
    return run.status, ""


def stability_table(records: Iterable[RunRecord], title: str):
    """The matrix as a rich table, within 80 columns for the six cases: configurations down, cases across."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    cells = stability_cells(records)
    cases = sorted({case for _, case in cells}, key=lambda case: _place(case, CASES))
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for case in cases:
        arch, _, task = case.partition("_")
        table.add_column(overflow="fold", header=f"{arch}\n{task.replace('_cls', '').replace('_', ' ')}")
    for config in dict.fromkeys(config for config, _ in cells):
        row = []
        for case in cases:
            *lines, status = cell_text(cells[config, case]) if (config, case) in cells else ("", "", "missing")
            row.append(Text("\n".join(filter(None, lines)), style=STATUS_STYLES.get(status, "yellow")))
        table.add_row(config, *row)
    return table
