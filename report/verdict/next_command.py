"""The one command that would teach most next."""

from __future__ import annotations

import shlex

from bench_cases import CASES
from report.hypotheses.evidence_base import EvidenceBase
from report.load import Folder
from report.spelled import cases_option
from report.statistics.interval import FEWEST_SEEDS
from report.tables.columns import REFERENCE, case_order
from report.unusual import ALL_BUT_LR, unusual

MATRIX = "python -m harness matrix"


def next_command(folder: Folder, base: EvidenceBase) -> str:
    """In order: a missing reference, an unhealthy one, own runs instead of imported ones, more seeds,
    missing cases, the full size; when nothing is missing, the dossier."""
    out = f" --out {shlex.quote(str(folder.path))}"
    if "IMPORTED" in folder.marks or "SIMULATED" in folder.marks:
        return f"{MATRIX} --seeds 0 1 2"
    runs = base.selection.runs
    preset = next(iter({run.preset for run in runs}), "tiny")
    told = f" --preset {preset}{unusual(runs)}{out}"
    if alone := _option(base, (case for case in base.cases if not _referred(base, case))):
        return f"{MATRIX} {alone}{told}"
    if ill := _option(base, case_order(base.judgements.unhealthy)[:1]):
        rate = base.cases[case_order(base.judgements.unhealthy)[0]].config.get("lr")
        lower = f" --lr {rate / 3:.2g}" if isinstance(rate, float) else ""
        return f"{MATRIX} {ill}{lower} --preset {preset}{unusual(runs, ALL_BUT_LR)}{out}"
    fewest = min(len(base.runs(case, REFERENCE)) for case in base.cases)
    if fewest < FEWEST_SEEDS and (cases := "" if _default(base) else _option(base, base.cases)) is not None:
        seeds = " ".join(map(str, range(FEWEST_SEEDS)))
        return f"{MATRIX}{cases and ' ' + cases} --seeds {seeds}{told}"
    missing = [case.id for case in CASES.values() if case.in_default_matrix and case.id not in base.cases]
    if missing:
        return f"{MATRIX} --cases {' '.join(missing)} --seeds 0 1 2{told}"
    if preset == "tiny":
        return f"{MATRIX} --preset full"
    return f"python -m report build {shlex.quote(str(folder.path))}"


def _referred(base: EvidenceBase, case: str) -> bool:
    """Whether some reference of a case has ended by itself."""
    return any(base.state(run) != "unfinished" for run in base.runs(case, REFERENCE).values())


def _option(base: EvidenceBase, cases) -> str | None:
    """The options that name ``cases`` to the command line; None when it knows none of them."""
    return cases_option(base.cases[case] for case in case_order(cases))


def _default(base: EvidenceBase) -> bool:
    """Whether the folder holds the default cases, which need no naming."""
    return base.cases.keys() >= {case.id for case in CASES.values() if case.in_default_matrix}
