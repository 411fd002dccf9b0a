"""Everything the page prints, as text: templates choose places, never values."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from bench_cases import TASKS
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.dossier import measurements
from report.dossier.decision import HEADS as CASE_HEADS
from report.dossier.decision import case_sections
from report.dossier.failure_cards import failure_cards
from report.dossier.prediction import prediction_text
from report.dossier.rows import HEADS, RowNumbers, commands, run_rows
from report.dossier.system import system_block
from report.hypotheses.evidence import NOT_DECIDED
from report.plots.draw import Drawn
from report.tables import headroom
from report.tables.selection import select
from report.tables.speed import eligible
from report.tables.table import Table
from report.text import clean, joined, plain_json

MARK_MEANINGS = {
    "TINY PRESET": "Two-layer models and some dozen steps: mechanisms show, speeds and scores do not carry over.",
    "EMBEDDED DATA": "Generated documents, not EUR-Lex and OpenWebText.",
    "CPU": "Measured on a processor: its fp16 and bf16 arithmetic says nothing about a GPU's speed.",
    "IMPORTED": "Logs of another program, converted; what it did not record is missing here.",
    "SIMULATED": "These numbers are made up, to measure the report. They say nothing about any device.",
}


EXECUTIVE = "ACB"
LABELS = {"lm_loss": "LM loss", "step_times": "Step times", "kernel_time": "Kernel time"}
MACHINE = ("hardware", "step_times")
SECTIONS = (
    ("decision", "Decision"),
    ("trust", "Can you trust this?"),
    ("summary", "Executive summary"),
    ("hypotheses", "Hypotheses"),
    ("failures", "Failures"),
    ("time", "Where the time goes"),
    ("hardware", "Memory, energy, hardware"),
    ("runs", "All runs"),
    ("methods", "Methods"),
    ("reproduce", "Reproduce"),
)
MOST_DEFECTS, MOST_EXCLUDED, MOST_REASONS = 200, 12, 4


def header(folder) -> dict:
    """Device, marks with their meaning, and the facts beneath the title: the runs, then the system."""
    runs = folder.runs
    facts = [
        ("Preset", ", ".join(_values(run.preset for run in runs))),
        ("Data", ", ".join(_values(run.data_source for run in runs))),
        ("Weights", ", ".join(_values(run.weights_source for run in runs))),
        (
            "Runs",
            f"{len(runs)}: "
            + ", ".join(
                count(len({getattr(run, field) for run in runs}), word)
                for field, word in (("case", "case"), ("dtype_config", "configuration"), ("seed", "seed"))
            ),
        ),
        *_attention(runs),
        *_left_out(runs),
        ("Outcomes", joined(f"{n} {status}" for status, n in Counter(run.status for run in runs).most_common())),
    ]
    return {
        "device": clean(folder.device, 60),
        "facts": [*facts, *system_block(folder)],
        "marks": [{"name": mark, "meaning": MARK_MEANINGS.get(mark, "")} for mark in folder.marks],
    }


def _attention(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Where attention's products ran in another dtype than the configuration's compute dtype, and what has none."""
    wide = {
        run.dtype_config: f"{run.attention_dtype} ({run.attention_backend})"
        for run in runs
        if run.attention_dtype is not None
        and (compute := (run.config.get("config") or {}).get("compute")) is not None
        and run.attention_dtype not in (compute, "tf32")
    }
    said = [f"{dtype} under {joined(c for c in wide if wide[c] == dtype)}" for dtype in dict.fromkeys(wide.values())]
    if free := dict.fromkeys(run.case for run in runs if run.attention_backend == "none"):
        said.append(f"no attention in {joined(free)}")
    return [("Attention's products", "; ".join(said))] if said else []


def _left_out(runs: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Documents without a single-label class, by split, of the cases that drop them."""
    found = {
        run.case: ", ".join(f"{n:,} {split}" for split, n in left_out.items() if n)
        for run in runs
        if (task := TASKS.get(run.task)) is not None
        and (task.head, task.loss) == ("classification", "cross_entropy")
        and isinstance(left_out := (run.flags.get("data") or {}).get("single_label_excluded"), dict)
        and all(isinstance(n, int) for n in left_out.values())
    }
    said = [f"{case}: {text or 'none'}" for case, text in found.items()]
    return [("Documents without a class, left out", "; ".join(said))] if said else []


def _values(values: Iterable[object]) -> list[str]:
    return [clean(value, 60) for value in dict.fromkeys(values) if value]


def context(
    folder,
    drawn: dict[str, Drawn],
    tables: dict[str, Table],
    findings: Sequence,
    verdict,
    checks: Sequence,
    failures: Sequence,
    forecast,
) -> dict[str, Any]:
    """The template's values. ``drawn``: figures by letter; the rest as their modules return it."""
    numbers = RowNumbers(folder.runs)
    class_heads, class_rows = measurements.kernel_classes(tables["kernel_time"].data)
    return {
        **header(folder),
        "sections": SECTIONS,
        "machine_figures": [key for key in MACHINE if key in drawn],
        "figures": {letter: _figure(figure, tables[letter], numbers) for letter, figure in drawn.items()},
        "executive": [letter for letter in EXECUTIVE if letter in drawn],
        "cases": case_sections(verdict, folder, numbers),
        "case_heads": CASE_HEADS,
        "left_out": [clean(text, 300) for text in verdict.left_out],
        "open_claims": [finding.id for finding in findings if finding.verdict == NOT_DECIDED],
        "next_command": verdict.next_command,
        "numbers": numbers,
        "checks": checks,
        "findings": findings,
        "failures": failure_cards(failures, numbers),
        "predicted": prediction_text(forecast, folder),
        "class_heads": class_heads,
        "class_rows": class_rows,
        "top_heads": measurements.TOP_HEADS,
        "top_rows": measurements.top_kernels(tables["kernel_time"].summary),
        "mfu_tables": measurements.mfu_tables(eligible(folder, select(folder))[0]),
        "kernel_heads": measurements.KERNEL_HEADS,
        "kernel_rows": measurements.kernel_rows(folder.kernels),
        "overhead_heads": measurements.OVERHEAD_HEADS,
        "overhead_rows": measurements.overhead_rows(tables["overhead"].summary),
        "fit_heads": measurements.FIT_HEADS,
        "fit_rows": measurements.fit_rows(folder.fit, verdict.price_per_hour),
        "peaks": _peaks(folder.runs),
        "run_heads": HEADS,
        "run_rows": run_rows(folder.runs, numbers),
        "commands": commands(folder.runs, numbers),
        "defects": folder.defects[:MOST_DEFECTS],
        "n_defects": len(folder.defects),
    }


def _figure(figure: Drawn, table: Table, numbers: RowNumbers) -> dict[str, Any]:
    return {
        "letter": table.letter,
        "label": f"Figure {table.letter}" if len(table.letter) == 1 else LABELS.get(table.name, table.name.capitalize()),
        "name": table.name,
        "caption": table.caption,
        "svg": Markup(figure.svg),
        "cells": headroom_cells(table.data) if table.name == headroom.NAME and not table.empty else None,
        "files": figure.files,
        "empty": table.empty,
        "n_excluded": len(table.excluded),
        "excluded": _excluded(table.excluded, numbers),
    }


def headroom_cells(data: pd.DataFrame) -> Markup:
    """What stands under a pointer over the heat maps, as JSON for an attribute: a map's modules, steps and bits."""
    maps = [
        {
            "modules": [clean(module, 80) for module in cells.index],
            "steps": [int(step) for step in cells.columns],
            "bits": cells.round(1).to_numpy().tolist(),
        }
        for cells in (headroom.cells(run) for _, run in data.groupby("run_id", sort=False))
    ]
    return Markup.escape(json.dumps(plain_json(maps)))


def _excluded(excluded: Sequence[tuple[str, str]], numbers: RowNumbers) -> list[dict[str, Any]]:
    """What a figure leaves out, by reason: the rows, and what is no row by its name."""
    reasons: dict[str, list[str]] = {}
    for run_id, reason in excluded:
        reasons.setdefault(clean(reason, 300), []).append(run_id)
    shown = sorted(reasons.items(), key=lambda item: -len(item[1]))
    if len(shown) > MOST_REASONS:
        others = [run_id for _, run_ids in shown[MOST_REASONS - 1 :] for run_id in run_ids]
        shown = [*shown[: MOST_REASONS - 1], (f"{len(shown) - MOST_REASONS + 1} further reasons, in summary.json", others)]
    return [
        {
            "reason": reason,
            "rows": numbers.cite(run_ids),
            "others": [clean(run_id, 80) for run_id in run_ids if run_id not in numbers][:MOST_EXCLUDED],
        }
        for reason, run_ids in shown
    ]


def _peaks(runs: Sequence) -> list[tuple[str, str, str]]:
    """Peak, source and number of rows: what an MFU of these rows is divided by."""
    found = Counter(
        (run.peak_flops_per_s, clean(run.peak_flops_source or "source not recorded", 200))
        for run in runs
        if run.peak_flops_per_s is not None
    )
    return [(f"{peak / 1e12:,.1f} TFLOP/s", source, f"{n}") for (peak, source), n in sorted(found.items())]
