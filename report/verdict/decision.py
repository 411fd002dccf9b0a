"""The decision for one device: a table per case, what it costs, the claims, and the next command."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.hypotheses import judge
from report.hypotheses.evidence import NOT_DECIDED, EvidenceBase
from report.tables.cell_text import difference_text
from report.tables.cells import AVOID, LOST
from report.tables.choice import CaseTable, case_tables
from report.tables.selection import REFERENCE, series_order
from report.tables.speed import ineligible_reason, pooled_rate
from report.verdict.advice import next_command


@dataclass(frozen=True)
class Price:
    """``per_hour`` of the whole machine, above 0, in ``currency`` (a word such as ``EUR``, or empty)."""

    per_hour: float
    currency: str = ""

    def of(self, hours: float) -> str:
        """The price of so many hours: ``1.85 EUR``."""
        return f"{plain_number(self.per_hour * hours)} {self.currency}".rstrip()


def cost_text(
    relative_cost: float, hours_per_million_samples: float, hours_per_billion_real_tokens: float | None, price: Price | None
) -> str:
    """Cost against fp32_true's, and per million samples and 10^9 real tokens: in money where a price is known,
    else in hours."""
    relative = f"{relative_cost:.2f} of fp32_true's"
    say = price.of if price else lambda hours: f"{plain_number(hours)} hours"
    tokens = f", {say(hours_per_billion_real_tokens)} per 10⁹ real tokens" if hours_per_billion_real_tokens else ""
    return f"{relative}, {say(hours_per_million_samples)} per million samples{tokens}"


def plain_number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.2e}"


@dataclass(frozen=True)
class CaseVerdict:
    """One case. ``use`` None: nothing can be recommended, and ``reason`` says why. ``runner_up`` is next; ``lossless`` is named
    where ``use`` has a loss that the seeds resolve. ``relative_speed`` with ``low`` and ``high`` is against fp32_true,
    ``relative_cost`` its inverse (the same machine by the hour); ``cost`` is the same as text, in money where the price of an
    hour is known. ``quality`` is text. ``avoid`` and ``failed`` (in some seed; how often, or why, is open):
    ``configuration: reason``."""

    case: str
    column: str
    use: str | None
    runner_up: str | None
    lossless: str | None
    avoid: tuple[str, ...]
    failed: tuple[str, ...]
    reason: str
    n: int
    relative_speed: float | None = None
    low: float | None = None
    high: float | None = None
    peak_bytes: int | None = None
    peak_kind: str | None = None
    peak_is_bound: bool = False
    quality: str | None = None
    relative_cost: float | None = None
    hours_per_million_samples: float | None = None
    hours_per_billion_real_tokens: float | None = None
    cost: str | None = None
    run_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The decision for one device. ``cases`` and ``tables`` in the registry's order of cases, those that were run. ``claims``:
    id, verdict, and how many seeds would decide it where that is known. ``left_out``: the runs that no table compares, by
    reason, and defects of the files."""

    device: str
    marks: tuple[str, ...]
    n_runs: int
    n_seeds: int
    n_defects: int
    cases: tuple[CaseVerdict, ...]
    tables: tuple[CaseTable, ...]
    claims: tuple[tuple[str, str, int | None], ...]
    open_questions: tuple[str, ...]
    next_command: str
    left_out: tuple[str, ...] = ()
    price_per_hour: float | None = None
    currency: str = ""


def verdict(folder: Folder, price: Price | None = None) -> Verdict:
    """The decision, computed from the rows alone; ``price`` turns hours into money."""
    base = EvidenceBase.of(folder)
    findings, tables = judge(folder), case_tables(folder)
    return Verdict(
        folder.device,
        folder.marks,
        len(folder.runs),
        len({run.seed for run in folder.runs}),
        len(folder.defects),
        tuple(_case(table, folder, price) for table in tables),
        tables,
        tuple((f.id, f.verdict, f.seeds) for f in findings),
        tuple(f"{f.id}: {f.claim} Not decided; it needs {f.would_decide}." for f in findings if f.verdict == NOT_DECIDED),
        next_command(folder, base),
        (*_not_compared(base), *(f"{counted} in the files: {what}" for what, counted in _defects(folder))),
        price.per_hour if price else None,
        price.currency if price else "",
    )


def _not_compared(base: EvidenceBase) -> list[str]:
    """``3 runs of gpt2_clm (bf16_pure): other settings than ...``, one line a case and reason."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for run_id, reason in base.selection.excluded:
        run = base.folder.by_id[run_id]
        groups.setdefault((run.case, reason), []).append(run)
    return [
        f"{count(len(runs), 'run')} of {case} ({', '.join(series_order(run.dtype_config for run in runs))}): {reason}"
        for (case, reason), runs in groups.items()
    ]


def _defects(folder: Folder) -> list[tuple[str, str]]:
    """What is wrong with the files and how often."""
    return [(what, count(n, "defect")) for what, n in Counter(defect.what for defect in folder.defects).items()]


def _case(table: CaseTable, folder: Folder, price: Price | None) -> CaseVerdict:
    avoid, failed = (
        tuple(
            f"{cell.dtype_config}: {cell.why}"
            for cell in table.cells
            if cell.verdict == verdict and cell.dtype_config != REFERENCE
        )
        for verdict in (AVOID, LOST)
    )
    found = (table.case, table.column, table.use, table.runner_up, table.lossless, avoid, failed, table.reason, table.n)
    cell = table.cell(table.use)
    if cell is None:
        return CaseVerdict(*found)
    known = cell.speed.known
    hours = 1e6 / cell.samples_per_s / 3600
    runs = [folder.by_id[run_id] for run_id in cell.run_ids]
    token_hours = _token_hours([run for run in runs if ineligible_reason(folder, run) is None])
    differences = [difference_text(quality) for quality in cell.judged_qualities]
    return CaseVerdict(
        *found,
        cell.speed.value,
        cell.speed.low if known else None,
        cell.speed.high if known else None,
        cell.peak_bytes,
        cell.peak_kind,
        cell.peak_is_bound,
        "the reference" if table.use == REFERENCE else ", ".join(differences) or None,
        1 / cell.speed.value,
        hours,
        token_hours,
        cost_text(1 / cell.speed.value, hours, token_hours, price),
        cell.run_ids,
    )


def _token_hours(runs: list[RunRecord]) -> float | None:
    """Hours for 10^9 tokens without padding; None unless every run counted them."""
    rates = [run.real_tokens_per_s for run in runs]
    return 1e9 / pooled_rate(rates) / 3600 if rates and all(rates) else None
