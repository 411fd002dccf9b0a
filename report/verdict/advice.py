"""The one command that would teach most next: run, it changes the verdict."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from bench_cases import CASES, DTYPE_CONFIGS
from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.harness_commands import OF_ONE_CASE, cases_option, unusual_options
from report.hypotheses.evidence import EvidenceBase
from report.significance import FEWEST_SEEDS
from report.tables.cells import COMPLETED, UNRESOLVED
from report.tables.choice import CaseTable, case_tables
from report.tables.judgement import is_unfinished
from report.tables.selection import REFERENCE, case_order, is_control, series_order
from report.tables.speed import ineligible_reason

MATRIX = "python -m harness matrix"
MOST_SEEDS = 20
"""More seeds than these are not asked for: the difference is then too small to matter."""


def next_command(folder: Folder, base: EvidenceBase) -> str:
    """In order: own runs instead of imported ones, a missing reference, an unhealthy one, what was stopped, a third seed,
    undisturbed times, the seeds that an open cell needs, missing cases, the full size; empty when no run would decide more. It
    makes runs that compare with those of the cases it names; runs on several GPUs, which no matrix makes, are not asked for."""
    out = f" --out {shlex.quote(str(folder.path))}"
    tables = [table for table in case_tables(folder) if _of(base, table.case)]
    if "IMPORTED" in folder.marks or "SIMULATED" in folder.marks:
        named = cases_option(base.cases.values())
        return f"{MATRIX} {named} --seeds 0 1 2 --preset full" if named else f"{MATRIX} --seeds 0 1 2"
    alone = [case for case in base.cases if not _ended_references(base, case)]
    if options := _matrix_options(base, alone, _seeds(base, alone), configs=(REFERENCE,)):
        return f"{MATRIX} {options}{out}"
    unhealthy = [case for case in case_order(base.judgements.unhealthy) if _of(base, case)][:1]
    rate = base.cases[unhealthy[0]].config.get("lr") if unhealthy else None
    slower = f" --lr {rate / 3:.2g}" if isinstance(rate, float) else ""
    # One seed more than there are: of two variants of a case the report shows the one with more runs.
    more = max(FEWEST_SEEDS, 1 + max((run.seed for case in unhealthy for run in _of(base, case)), default=0) + 1)
    if options := _matrix_options(base, unhealthy, _range(more) + slower, ("lr",)):
        return f"{MATRIX} {options}{out}"
    stopped = [case for case in base.cases if any(is_unfinished(run) for run in _of(base, case))]
    if options := _matrix_options(base, stopped, _seeds(base, stopped)):
        return f"{MATRIX} {options}{out}"
    few = [case for case in base.cases if 0 < _ended_references(base, case) < FEWEST_SEEDS]
    if options := _matrix_options(base, few, _range(FEWEST_SEEDS)):
        return f"{MATRIX} {options}{out}"
    untimed = [table.case for table in tables if _untimed(folder, base, table)]
    if options := _matrix_options(base, untimed, _seeds(base, untimed)):
        return f"{MATRIX} {options} --rerun{out}"
    for table in tables:
        n, configs = _seeds_that_decide(base, table)
        if configs and (options := _matrix_options(base, [table.case], _range(n), configs=(REFERENCE, *configs))):
            return f"{MATRIX} {options}{out}"
    default = [case.id for case in CASES.values() if case.in_default_matrix]
    missing = [case for case in default if case not in base.cases]
    some = [run for case in base.cases for run in _of(base, case)]
    presets = sorted({run.preset for run in some})
    only_own = not set(base.cases) & set(default) and cases_option(base.cases.values()) is not None
    if missing and presets and not only_own:
        some = [run for run in some if run.preset == presets[0]]
        usual = unusual_options(some, OF_ONE_CASE)
        return f"{MATRIX} --cases {' '.join(missing)}{_range(FEWEST_SEEDS)} --preset {presets[0]}{usual}{out}"
    if presets == ["tiny"]:
        named = cases_option(base.cases.values())
        return f"{MATRIX} {named}{_range(FEWEST_SEEDS)} --preset full" if named else ""
    return ""


def _range(n: int) -> str:
    return f" --seeds {' '.join(map(str, range(n)))}"


def _seeds(base: EvidenceBase, cases: Sequence[str]) -> str:
    """The seeds that the cases' runs have."""
    seeds = sorted({run.seed for case in cases for run in _of(base, case)})
    return f" --seeds {' '.join(map(str, seeds))}"


def _configs(base: EvidenceBase, cases: Sequence[str]) -> tuple[str, ...]:
    """The configurations that the cases were run with, the reference first; controls follow a failure by themselves."""
    ran = series_order({run.dtype_config for case in cases for run in _of(base, case)} | {REFERENCE})
    followed = {control for config in ran if config in DTYPE_CONFIGS for control in DTYPE_CONFIGS[config].controls}
    return tuple(config for config in ran if config in DTYPE_CONFIGS and not (is_control(config) and config in followed))


def _untimed(folder: Folder, base: EvidenceBase, table: CaseTable) -> bool:
    """Whether the reference completed and none of its times counts, because others disturbed it."""
    runs = [run for run in base.runs(table.case, REFERENCE).values() if run.status == "completed"]
    reasons = [ineligible_reason(folder, run) for run in runs]
    return bool(reasons) and all(reason and reason.startswith(("throttled", "contended")) for reason in reasons)


def _seeds_that_decide(base: EvidenceBase, table: CaseTable) -> tuple[int, tuple[str, ...]]:
    """The fewest seeds that would decide an open cell of the case, and the configurations that they would decide: with as many
    new ones as are missing where those that were run have no measure of quality to compare."""
    needed: dict[str, int] = {}
    for cell in table.cells:
        if cell.verdict == UNRESOLVED and cell.state == COMPLETED and cell.dtype_config in DTYPE_CONFIGS:
            paired = min((len(quality.worse) for quality in cell.judged_qualities), default=cell.n)
            found = [n for test in (cell.holds(), cell.bad()) if (n := test.seeds_needed) is not None and n > paired]
            if not found or (n := min(found)) > MOST_SEEDS:
                continue
            seeds = base.runs(table.case, cell.dtype_config).keys() & base.runs(table.case, REFERENCE).keys()
            needed[cell.dtype_config] = max(seeds) + 1 + n - paired if seeds >= {*range(n)} else n
    n = min(needed.values(), default=0)
    return n, tuple(config for config, of_config in needed.items() if of_config == n)


def _matrix_options(
    base: EvidenceBase, cases: Sequence[str], more: str = "", leave_out: Sequence[str] = (), configs: Sequence[str] = ()
) -> str | None:
    """The options that name the first of ``cases`` that the command line knows and those that share its settings and
    configurations, ``more``, and their settings but ``leave_out``; None where there is none. ``configs``: instead of theirs."""
    options = {
        case: f" --configs {' '.join(configs or _configs(base, [case]))}{more} --preset {runs[0].preset}"
        f"{unusual_options(runs, leave_out)}"
        for case in cases
        if (runs := _of(base, case))
    }
    named = {case: options[case] for case in case_order(options) if cases_option([base.cases[case]])}
    if not named:
        return None
    first = next(iter(named.values()))
    return f"{cases_option(base.cases[case] for case, text in named.items() if text == first)}{first}"


def _of(base: EvidenceBase, case: str) -> list[RunRecord]:
    """A case's runs, if one process made them."""
    return [run for run in base.selection.of_case(case) if run.config.get("world") in (None, 1)]


def _ended_references(base: EvidenceBase, case: str) -> int:
    return sum(not is_unfinished(run) for run in base.runs(case, REFERENCE).values())
