"""H1, loss-scale inversion: fp16_naive survives single-label and dies on multi-label."""

from __future__ import annotations

from bench_cases import DTYPE_CONFIGS
from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.hypotheses.evidence_base import BySeed, EvidenceBase, ids
from report.hypotheses.finding import Evidence, Finding, decide_count, finding, unanimous
from report.statistics.interval import share_interval
from report.tables.columns import column_of
from report.tables.judgement import death_words

CLAIM = "Loss-scale inversion: fp16_naive survives single-label classification and dies on multi-label."
STRESSED, CLEAN = "fp16_naive", "fp16_naive_fp32_states"
SETTLED = ("completed", "diverged")


def judge(base: EvidenceBase) -> Finding:
    """Per architecture and loss reduction; where AdamW's epsilon kills fp16_naive in both tasks, the
    control with fp32 AdamW states is judged instead: it shows what precision itself does."""
    pairs = _case_pairs(base)
    evidence = [e for single, multi, place in pairs if (e := _place(base, single, multi, place)) is not None]
    controls = [
        line
        for single, multi, place in pairs
        for config in (STRESSED, *DTYPE_CONFIGS[STRESSED].controls)
        if (line := _line(base, single, multi, place, config)) is not None
    ]
    return finding(
        "H1",
        CLAIM,
        "G",
        "share of seeds with the inversion",
        evidence,
        unanimous(evidence),
        more=controls,
        missing=f"single- and multi-label runs (mean and label_sum) of {STRESSED} and its controls with seeds 0 1 2",
    )


def _case_pairs(base: EvidenceBase) -> list[tuple[str, str, str]]:
    """(single-label case, multi-label case, words) of every architecture and reduction."""
    singles = {run.arch: case for case, run in base.cases.items() if column_of(run) == "Cls-Single"}
    return [
        (singles[run.arch], case, f"{run.arch}, {run.loss_reduction}")
        for case, run in base.cases.items()
        if column_of(run) == "Cls-Multi" and run.arch in singles
    ]


def _settled(base: EvidenceBase, single: str, multi: str, config: str) -> tuple[BySeed, BySeed]:
    """Runs of both cases that lived or died, for the seeds that both have."""
    cells = [{seed: run for seed, run in base.runs(case, config).items() if run.status in SETTLED} for case in (single, multi)]
    seeds = cells[0].keys() & cells[1].keys()
    first, second = ({seed: cell[seed] for seed in sorted(seeds)} for cell in cells)
    return first, second


def _place(base: EvidenceBase, single: str, multi: str, place: str) -> Evidence | None:
    cells = _settled(base, single, multi, STRESSED)
    judged, why = STRESSED, ""
    dead = [run for cell in cells for run in cell.values() if run.status == "diverged"]
    if cells[0] and len(dead) == 2 * len(cells[0]) and all(_in_optimizer(run) for run in dead):
        why = f"{STRESSED} dies in the optimizer in both tasks"
        control = _settled(base, single, multi, CLEAN)
        if control[0]:
            judged, cells, why = CLEAN, control, f"{why}, so its control with fp32 AdamW states is judged. "
        else:
            why += ". "
    if not cells[0]:
        return None
    hits = sum(cells[0][seed].status == "completed" and cells[1][seed].status == "diverged" for seed in cells[0])
    share = share_interval(hits, len(cells[0]))
    sentence = (
        f"{why}{judged} survives single-label and dies on multi-label with {hits} of {count(share.n, 'seed')} "
        f"[{share.low:.2f}, {share.high:.2f}]."
    )
    return Evidence(place, decide_count(hits, share.n), share, sentence, ids(*cells))


def _in_optimizer(run: RunRecord) -> bool:
    return run.first_nonfinite is not None and run.first_nonfinite.phase == "optimizer"


def _line(base: EvidenceBase, single: str, multi: str, place: str, config: str) -> str | None:
    """How many runs of a configuration died in each task, and of what."""
    cells = _settled(base, single, multi, config)
    if not cells[0]:
        return None
    words = []
    for name, cell in zip(("single-label", "multi-label"), cells, strict=True):
        dead = [death_words(run) for run in cell.values() if run.status == "diverged"]
        words.append(f"{name} {len(dead)} of {len(cell)} dead" + (f" ({', '.join(sorted(set(dead)))})" if dead else ""))
    return f"{place}, {config}: {'; '.join(words)}."
