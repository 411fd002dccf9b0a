"""Screen one: a table per case with the state, figures, verdict and reason of every configuration, as text."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

from instrument.results.contents import Folder
from report.dossier.rows import RowNumbers
from report.tables.cell_text import (
    UNKNOWN,
    difference_text,
    headroom_text,
    memory_text,
    shown_qualities,
    speed_text,
    state_text,
    value_text,
)
from report.tables.cells import AVOID, COMPLETED, LOST, RECOMMENDED, RUNNER_UP, UNJUDGED, USABLE, Cell
from report.tables.choice import CaseTable
from report.tables.selection import REFERENCE
from report.tables.speed import ineligible_reason
from report.text import clean

HEADS = (
    "Configuration",
    "State",
    "Speed vs fp32_true",
    "Peak memory",
    "Quality",
    "Difference from fp32_true",
    "Logit headroom to 65,504",
    "Verdict",
)
MEASURED = "measured, not judged"
KINDS = {RECOMMENDED: "yes", RUNNER_UP: "yes", USABLE: "quiet", AVOID: "no", LOST: "no"}


def case_sections(verdict, folder: Folder, numbers: RowNumbers) -> list[dict[str, Any]]:
    """One entry a case: the answer in a sentence, rows, costs and citations."""
    costs = {case.case: case.cost for case in verdict.cases}
    return [
        {
            "case": clean(table.case, 60),
            "column": clean(table.column, 40),
            "answer": answer(table),
            "use": table.use,
            "cost": clean(costs.get(table.case) or "", 200),
            "rows": [_row(cell, folder, numbers) for cell in table.cells],
        }
        for table in verdict.tables
    ]


def answer(table: CaseTable) -> str:
    """``use amp_bf16 (the fastest ...); runner-up fp32_true``, or why nothing is recommended."""
    reason = clean(table.reason, 400)
    if table.use is None:
        return f"No recommendation: {reason}."
    others = [f"runner-up {clean(table.runner_up, 60)}"] if table.runner_up else []
    others += [f"without a shown loss {clean(table.lossless, 60)}"] if table.lossless else []
    return "; ".join([f"Use {clean(table.use, 60)}: {reason}", *others]) + "."


def _kept(text: str) -> Markup:
    """The text with its intervals on one line each."""
    return Markup(re.sub(r"\[[^\]]*\]", lambda interval: interval[0].replace(" ", "\u00a0"), Markup.escape(text)))


def _speed(cell: Cell, folder: Folder) -> str:
    """The ratio, or why a cell that completed has none."""
    text = speed_text(cell)
    if text != UNKNOWN or cell.state != COMPLETED:
        return text
    reasons = [reason for run_id in cell.run_ids if (reason := ineligible_reason(folder, folder.by_id[run_id]))]
    return clean(reasons[0].partition(":")[0], 40) if reasons else text


def _reason(cell: Cell) -> str:
    """Why, without the difference that stands in its own column."""
    text = cell.why.removeprefix(f"{MEASURED}: ")
    for quality in cell.qualities:
        text = text.replace(f"{difference_text(quality)}: ", f"{quality.name} ")
    return text


def _row(cell: Cell, folder: Folder, numbers: RowNumbers) -> dict[str, Any]:
    reference, shown = cell.dtype_config == REFERENCE, shown_qualities(cell)
    differences = [] if reference else [difference_text(quality) for quality in shown if quality.difference.n]
    return {
        "config": clean(cell.dtype_config, 40),
        "state": clean(state_text(cell), 160),
        "speed": _kept(_speed(cell, folder)),
        "memory": memory_text(cell),
        "quality": [clean(value_text(quality, baseline=reference), 120) for quality in shown] or [UNKNOWN],
        "difference": [_kept(text) for text in differences] or ["the reference" if reference else UNKNOWN],
        "headroom": headroom_text(cell).split(" (")[0],
        "logit": headroom_text(cell).partition(" (")[2].rstrip(")"),
        "verdict": MEASURED if cell.verdict == UNJUDGED else cell.verdict,
        "kind": KINDS.get(cell.verdict, "open"),
        "chosen": cell.verdict == RECOMMENDED,
        "why": clean(_reason(cell), 400),
        "rows": numbers.cite(cell.run_ids),
    }
