"""The one command that would teach most next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from bench_cases import CASES
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.harness_commands import OF_ONE_CASE, cases_option, unusual_options
from report.hypotheses.evidence import EvidenceBase
from report.significance import FEWEST_SEEDS
from report.tables.judgement import is_unfinished
from report.tables.selection import REFERENCE, case_order

MATRIX = "python -m harness matrix"


def next_command(folder: Folder, base: EvidenceBase) -> str:
    """In order: a missing reference, an unhealthy one, own runs instead of imported ones, more seeds, missing cases, the
    full size; when nothing is missing, the dossier. It makes runs that compare with those of the cases it names; runs on
    several GPUs, which no matrix makes, are not asked for."""
    out = f" --out {shlex.quote(str(folder.path))}"
    if "IMPORTED" in folder.marks or "SIMULATED" in folder.marks:
        return f"{MATRIX} --seeds 0 1 2"
    alone = [case for case in base.cases if not _ended_references(base, case)]
    if options := _matrix_options(base, alone):
        return f"{MATRIX} {options}{out}"
    unhealthy = [case for case in case_order(base.judgements.unhealthy) if _of(base, case)][:1]
    rate = base.cases[unhealthy[0]].config.get("lr") if unhealthy else None
    if options := _matrix_options(base, unhealthy, f" --lr {rate / 3:.2g}" if isinstance(rate, float) else "", ("lr",)):
        return f"{MATRIX} {options}{out}"
    few = [case for case in base.cases if 0 < _ended_references(base, case) < FEWEST_SEEDS]
    if options := _matrix_options(base, few, f" --seeds {' '.join(map(str, range(FEWEST_SEEDS)))}"):
        return f"{MATRIX} {options}{out}"
    missing = [case.id for case in CASES.values() if case.in_default_matrix and case.id not in base.cases]
    some = [run for case in base.cases for run in _of(base, case)]
    presets = sorted({run.preset for run in some})
    if missing and presets:
        some = [run for run in some if run.preset == presets[0]]
        return (
            f"{MATRIX} --cases {' '.join(missing)} --seeds 0 1 2 --preset {presets[0]}{unusual_options(some, OF_ONE_CASE)}{out}"
        )
    if presets == ["tiny"]:
        return f"{MATRIX} --preset full"
    return f"python -m report build {shlex.quote(str(folder.path))}"


def _matrix_options(base: EvidenceBase, cases: Sequence[str], more: str = "", leave_out: Sequence[str] = ()) -> str | None:
    """The options that name the first of ``cases`` that the command line knows and those that share its settings, ``more``,
    and their settings but ``leave_out``; None where there is none."""
    options = {
        case: f" --preset {runs[0].preset}{unusual_options(runs, leave_out)}" for case in cases if (runs := _of(base, case))
    }
    named = {case: options[case] for case in case_order(options) if cases_option([base.cases[case]])}
    if not named:
        return None
    first = next(iter(named.values()))
    return f"{cases_option(base.cases[case] for case, text in named.items() if text == first)}{more}{first}"


def _of(base: EvidenceBase, case: str) -> list[RunRecord]:
    """A case's runs, if one process made them."""
    return [run for run in base.selection.of_case(case) if run.config.get("world") in (None, 1)]


def _ended_references(base: EvidenceBase, case: str) -> int:
    return sum(not is_unfinished(run) for run in base.runs(case, REFERENCE).values())
