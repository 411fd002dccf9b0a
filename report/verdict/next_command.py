"""The one command that would teach most next."""

from __future__ import annotations

import shlex

from bench_cases import CASES
from report.hypotheses.evidence_base import EvidenceBase
from report.load import Folder
from report.statistics.interval import FEWEST_SEEDS
from report.tables.columns import REFERENCE, case_order

MATRIX = "python -m harness matrix"


def next_command(folder: Folder, base: EvidenceBase) -> str:
    """In order: a missing reference, an unhealthy one, own runs instead of imported ones, more seeds,
    missing cases, the full size; when nothing is missing, the dossier."""
    out = f" --out {shlex.quote(str(folder.path))}"
    if "IMPORTED" in folder.marks or "SIMULATED" in folder.marks:
        return f"{MATRIX} --seeds 0 1 2"
    preset = next(iter({run.preset for run in base.selection.runs}), "tiny")
    given = f" --preset {preset}"
    alone = case_order(case for case in base.cases if not _referred(base, case) and case in CASES)
    if alone:
        return f"{MATRIX} --cases {' '.join(alone)}{given}{out}"
    ill = case_order(base.judgements.unhealthy)
    if ill:
        rate = base.cases[ill[0]].config.get("lr")
        lower = f" --lr {rate / 3:.2g}" if isinstance(rate, float) else ""
        return f"{MATRIX} --cases {ill[0]}{lower}{given}{out}"
    fewest = min(len(base.runs(case, REFERENCE)) for case in base.cases)
    if fewest < FEWEST_SEEDS:
        seeds = " ".join(map(str, range(FEWEST_SEEDS)))
        return f"{MATRIX} --cases {' '.join(_registered(base))} --seeds {seeds}{given}{out}" if not _default(base) else \
            f"{MATRIX} --seeds {seeds}{given}{out}"
    missing = [case.id for case in CASES.values() if case.in_default_matrix and case.id not in base.cases]
    if missing:
        return f"{MATRIX} --cases {' '.join(missing)} --seeds 0 1 2{given}{out}"
    if preset == "tiny":
        return f"{MATRIX} --preset full"
    return f"python -m report build {shlex.quote(str(folder.path))}"


def _referred(base: EvidenceBase, case: str) -> bool:
    """Whether some reference of a case has ended by itself."""
    return any(base.state(run) != "unfinished" for run in base.runs(case, REFERENCE).values())


def _registered(base: EvidenceBase) -> list[str]:
    """The folder's cases that the command line knows by their ids; those from files outside have other names there."""
    return [case for case in base.cases if case in CASES] or list(base.cases)


def _default(base: EvidenceBase) -> bool:
    """Whether the folder holds the default cases, which need no naming."""
    return base.cases.keys() >= {case.id for case in CASES.values() if case.in_default_matrix}
