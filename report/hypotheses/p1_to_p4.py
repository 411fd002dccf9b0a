"""The plots' claims: P1 heads overflow fp16, P2 bf16_pure is top-left, P3 padding, P4 the ranking changes with the task."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from instrument.results.schemas import RunRecord
from instrument.terminal import count
from kernels.float_formats import FP16
from report.hypotheses.evidence import (
    BySeed,
    Evidence,
    EvidenceBase,
    Finding,
    everywhere,
    finding,
    run_ids,
    seen,
    somewhere,
    unanimous,
)
from report.significance import UNTESTED, Test, above, all_of, any_of, below, rate_above, rate_below
from report.statistics import NOTHING, Interval, exponential, mean_interval
from report.tables.cell_text import memory_text
from report.tables.cells import AVOID, COMPLETED, FAILING, STALLED, Cell
from report.tables.choice import lead
from report.tables.e_logits import overflows
from report.tables.f_padding import favourite, real_rates, real_tokens_known
from report.tables.judgement import MARGIN_SPEED
from report.tables.selection import REFERENCE, column_of, is_bucketed, is_control, is_lm, series_order, unlike_reason
from report.tables.speed import y_kind
from report.text import bounds, joined

ByConfig = dict[str, Cell]

P1 = "Classification heads overflow fp16: some logit passes 65,504."


def judge_p1(base: EvidenceBase) -> Finding:
    """Per classification case, over all configurations: with how many seeds some logit left fp16's range, more often than
    rarely?"""
    evidence = [e for case, run in base.cases.items() if not is_lm(run) and (e := _p1_evidence(base, case)) is not None]
    missing = "classification runs with logged logits, seeds 0 1 2"
    return finding(base, "P1", P1, "E", "share of 65,504", evidence, somewhere, missing)


def _p1_evidence(base: EvidenceBase, case: str) -> Evidence | None:
    by_seed: dict[int, list[RunRecord]] = {}
    for run in base.selection.of_case(case):
        if np.isfinite(base.folder.steps(run.run_id)["logit_absmax"]).any():
            by_seed.setdefault(run.seed, []).append(run)
    if not by_seed:
        return None
    hits = sum(any(overflows(base.folder, run).any() for run in runs) for runs in by_seed.values())
    largest = [max(_largest(base, run) for run in runs) for runs in by_seed.values()]
    share = exponential(mean_interval(np.log([value / FP16.max for value in largest])))
    steps = min(run.steps_done for runs in by_seed.values() for run in runs)
    what = seen(hits, share.n, f"a logit leaves fp16's range (runs of {count(steps, 'step')} or more)")
    sentence = (
        f"{what}; the largest finite one is {max(largest):,.4g}, on average {share.value:.2g} {bounds(share, '.2g')} of 65,504."
    )
    tests = rate_above(hits, share.n), rate_below(hits, share.n)
    return Evidence(case, *tests, share, sentence, tuple(run.run_id for runs in by_seed.values() for run in runs))


def _largest(base: EvidenceBase, run: RunRecord) -> float:
    absmax = base.folder.steps(run.run_id)["logit_absmax"]
    return max(float(absmax[np.isfinite(absmax)].max(initial=0.0)), np.finfo(float).tiny)


P2 = "bf16_pure is top-left: in every case no other configuration is faster or needs less memory."
CONFIG = "bf16_pure"
MEMORY_TOLERANCE = math.log(1.01)


def judge_p2(base: EvidenceBase) -> Finding:
    """Every case with a healthy reference, among the configurations of which no seed failed and that are not avoided. Within a
    case the FLOPs are equal, so the ratio of MFU against one peak is that of samples/s. Memory is the allocator's peak:
    resident memory is no VRAM."""
    evidence, notes = [], []
    for case in base.cases:
        if case in base.judgements.unhealthy:
            notes.append(f"{case} is not judged: its reference is unhealthy.")
        elif (found := _p2_evidence(base, case)) is not None:
            evidence.append(found)
        else:
            notes.append(f"{case} is not judged: {CONFIG} was not timed there beside another configuration.")
    missing = "a GPU (peak memory of the allocator), a healthy fp32_true, seeds 0 1 2"
    return finding(base, "P2", P2, "B", "speed over its best rival", evidence, everywhere, missing, notes)


def _p2_evidence(base: EvidenceBase, case: str) -> Evidence | None:
    ours = base.cells.get((case, CONFIG))
    rivals = [
        cell
        for (of, config), cell in base.cells.items()
        if of == case and config != CONFIG and not is_control(config) and _in_race(cell)
    ]
    if ours is None or not rivals:
        return None
    if ours.state in (FAILING, STALLED):
        lost = rate_above(ours.n_failed, ours.n)
        return Evidence(case, UNTESTED, lost, NOTHING, f"{CONFIG} failed: {ours.what}.", ours.run_ids)
    if ours.verdict == AVOID:
        return Evidence(case, UNTESTED, ours.bad(), NOTHING, f"{CONFIG} is avoided: {ours.why}.", ours.run_ids)
    every = {cell.dtype_config: lead(ours, cell) for cell in rivals}
    leads = {config: values for config, values in every.items() if values}
    if not leads:
        return None
    best = min(leads, key=lambda config: float(np.mean(leads[config])))
    shown = exponential(mean_interval(leads[best]))
    least = min(rivals, key=lambda cell: cell.peak_bytes or math.inf)
    leaner, heavier = _memory(base, ours, rivals)
    side = {config: cell for (of, config), cell in base.cells.items() if of == case and config != CONFIG}
    supports = all_of([*(above(values, -MARGIN_SPEED) for values in every.values()), leaner, *_out_of_the_race(side)])
    refutes = any_of([*(below(values, -MARGIN_SPEED) for values in leads.values()), heavier])
    sentence = (
        f"{CONFIG} runs {shown.value:.2f}x {bounds(shown, '.2f')} as fast as {best}, its best rival; it needs "
        f"{memory_text(ours)}, the leanest rival ({least.dtype_config}) {memory_text(least)}{_not_compared(ours, rivals)}"
        f"{_untimed(every)}{_unresolved(side)}."
    )
    return Evidence(case, supports, refutes, shown, sentence, tuple(i for cell in (ours, *rivals) for i in cell.run_ids))


def _in_race(cell: Cell) -> bool:
    """A configuration that failed, or is avoided, has lost."""
    return cell.state == COMPLETED and cell.verdict != AVOID


def _competes(cell: Cell) -> bool:
    """It is in the race, and its speed was measured."""
    return _in_race(cell) and bool(cell.log_speed)


def _untimed(leads: dict[str, list[float]]) -> str:
    """Rivals whose speed is not known, as the end of a sentence."""
    names = [config for config, values in leads.items() if not values]
    return f"; the speed of {joined(names)} is not known" if names else ""


def _failing(side: ByConfig) -> list[Cell]:
    """Those of which some seed failed, and how often is not resolved: one of them may yet be the best."""
    return [c for c in side.values() if c.state in (FAILING, STALLED) and c.verdict != AVOID and not is_control(c.dtype_config)]


def _out_of_the_race(side: ByConfig) -> list[Test]:
    """That each of those fails more often than rarely."""
    return [rate_above(cell.n_failed, cell.n) for cell in _failing(side)]


def _unresolved(side: ByConfig) -> str:
    """Those by name, as the end of a sentence."""
    open_ones = [cell for cell in _failing(side) if not rate_above(cell.n_failed, cell.n).shown]
    parts = [f"{cell.dtype_config} in {cell.n_failed} of {count(cell.n, 'seed')}" for cell in open_ones]
    return f"; failed, and how often is not resolved: {', '.join(parts)}" if parts else ""


def _not_compared(ours: Cell, rivals: list[Cell]) -> str:
    if any(cell.peak_is_bound for cell in (ours, *rivals)):
        return " (not compared: runs shared a process)"
    return "" if ours.peak_kind == "allocated" else " (not compared: no memory of a GPU)"


def _memory(base: EvidenceBase, ours: Cell, rivals: list[Cell]) -> tuple[Test, Test]:
    """The tests that no rival needs less memory by 1 %, and that some rival does, over paired seeds."""
    if _not_compared(ours, rivals):
        return UNTESTED, UNTESTED
    peaks = {cell.dtype_config: _log_peaks(base, cell) for cell in (ours, *rivals)}
    more = [
        [
            peaks[CONFIG][seed] - peaks[cell.dtype_config][seed]
            for seed in sorted(peaks[CONFIG].keys() & peaks[cell.dtype_config])
        ]
        for cell in rivals
    ]
    return all_of(below(values, MEMORY_TOLERANCE) for values in more), any_of(
        above(values, MEMORY_TOLERANCE) for values in more
    )


def _log_peaks(base: EvidenceBase, cell: Cell) -> dict[int, float]:
    runs = (base.folder.by_id[run_id] for run_id in cell.run_ids)
    return {run.seed: math.log(run.peak_allocated_bytes) for run in runs if run.peak_allocated_bytes}


P3 = "Classification uses the machine less, and less evenly, than language modelling (MFU of real tokens)."
SMALLEST_CV = 0.005
"""A coefficient of variation that is less than half a point higher is not noisier."""


def judge_p3(base: EvidenceBase) -> Finding:
    """Per classification case against its architecture's language model, without batching by length."""
    plain = EvidenceBase.of(base.folder, lambda run: not is_bucketed(run) and real_tokens_known(run))
    timed = [
        run
        for case in plain.cases
        for config in {r.dtype_config for r in plain.selection.of_case(case)}
        for run in plain.timed(case, config).values()
    ]
    config, kind = favourite(timed), y_kind(timed)
    evidence, notes = [], []
    if kind is None:
        notes.append("MFU was not measured; tokens per second of two tasks are no MFU and are not compared.")
    for case, run in plain.cases.items():
        model = next((c for c, r in plain.cases.items() if is_lm(r) and r.arch == run.arch), None)
        if kind is not None and not is_lm(run) and model is not None:
            cells = plain.timed(case, config), plain.timed(model, config)
            why = plain.unlike(*cells, but=("seq_len",))
            notes += [f"{case} and {model} are not compared: {why}."] if why else []
            found = None if why else _p3_evidence(plain, *cells, f"{case} / {model}", kind)
            evidence += [found] if found else []
    missing = f"{config} with a measured MFU on a classification case and its architecture's language model, seeds 0 1 2"
    return finding(base, "P3", P3, "F", "MFU relative to the language model", evidence, unanimous, missing, notes)


def _p3_evidence(base: EvidenceBase, classification: BySeed, model: BySeed, place: str, kind: str) -> Evidence | None:
    read = [{seed: real_rates(base.folder, run, kind) for seed, run in cell.items()} for cell in (classification, model)]
    rates, variations = (
        [{seed: pair[at] for seed, pair in side.items() if math.isfinite(pair[at])} for side in read] for at in (0, 1)
    )
    logs = [{seed: math.log(value) for seed, value in side.items() if value > 0} for side in rates]
    lower, noisier = _paired(logs[1], logs[0]), _paired(*variations)
    if not lower or not noisier:
        return None
    shown, cv = exponential(mean_interval(lower).negated()), mean_interval(noisier)
    sentence = (
        f"classification reaches {shown.value:.2f} {bounds(shown, '.2f')} of the language model's MFU, and its coefficient of "
        f"variation is {cv.value:+.3f} {bounds(cv, '+.3f')} higher{_lengths(classification, model)}."
    )
    supports = all_of([above(lower, MARGIN_SPEED), above(noisier, SMALLEST_CV)])
    refutes = any_of([below(lower, MARGIN_SPEED), below(noisier, SMALLEST_CV)])
    return Evidence(place, supports, refutes, shown, sentence, run_ids(classification, model))


def _paired(first: dict[int, float], second: dict[int, float]) -> list[float]:
    """first - second over the seeds that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def _lengths(*cells: BySeed) -> str:
    """A note when the two tasks have sequences of other lengths."""
    lengths = [next(iter(cell.values())).seq_len for cell in cells]
    return "" if lengths[0] == lengths[1] else f" (sequence length {lengths[0]} against {lengths[1]})"


P4 = "The best configuration changes with the task: one that is fastest on one task is not on another."


def judge_p4(base: EvidenceBase) -> Finding:
    """Pairs of one architecture's cases with other tasks: is there no configuration that completes both with its quality shown
    to hold and without another that holds and is faster by 2 %?"""
    evidence, notes = [], []
    cases = {case: run for case, run in base.cases.items() if case not in base.judgements.unhealthy}
    for (first, run), (second, other) in combinations(cases.items(), 2):
        if run.arch != other.arch or column_of(run) == column_of(other):
            continue
        sides = [
            {
                config: cell
                for (of, config), cell in base.cells.items()
                if of == case and not is_control(config) and cell.state in (COMPLETED, FAILING, STALLED)
            }
            for case in (first, second)
        ]
        ids = [run_id for side in sides for cell in side.values() for run_id in cell.run_ids]
        why = unlike_reason([base.folder.by_id[run_id] for run_id in ids], ("seq_len",))
        notes += [f"{first} and {second} are not compared: {why}."] if why else []
        found = None if why else _p4_evidence(first, second, *sides)
        evidence += [found] if found else []
    missing = "two tasks of one architecture with healthy references and two configurations each, seeds 0 1 2"
    unit = "speed of the one task's best on the other, relative to that one's best"
    return finding(base, "P4", P4, "H", unit, evidence, somewhere, missing, notes)


def _p4_evidence(first: str, second: str, one: ByConfig, two: ByConfig) -> Evidence | None:
    """One pair of tasks."""
    sides = {first: one, second: two}
    best = {case: _fastest(side) for case, side in sides.items()}
    if any(cell is None for cell in best.values()) or min(len(side) for side in sides.values()) < 2:
        return None
    configs = series_order({*one, *two})
    supports = all_of(any_of([_loses(one, config), _loses(two, config)]) for config in configs)
    refutes = any_of(all_of([_serves(one, config), _serves(two, config)]) for config in configs)
    ours, theirs = (cell for cell in best.values() if cell)
    there = two.get(ours.dtype_config)
    loss, how = NOTHING, "was not run"
    if there is not None and _competes(there):
        loss = exponential(mean_interval(lead(there, theirs)))
        how = f"reaches {loss.value:.2f} {bounds(loss, '.2f')} of its speed"
    elif there is not None:
        how = f"is avoided: {there.why}" if there.verdict == AVOID else "was not timed"
        how = f"failed: {there.what}" if there.n_failed else how
    sentence = f"of what completed and is not avoided, {ours.dtype_config} has the highest mean speed on "
    if ours.dtype_config == theirs.dtype_config:
        sentence += "both."
    else:
        sentence += f"{first}, {theirs.dtype_config} on {second}, where {ours.dtype_config} {how}."
    for case, side in sides.items():
        sentence = sentence[:-1] + _unresolved(side).replace("; failed", f"; on {case} failed") + "."
    n = min(ours.n, theirs.n)
    ids = tuple(run_id for side in sides.values() for cell in side.values() for run_id in cell.run_ids)
    return Evidence(f"{first} / {second}", supports, refutes, Interval(loss.value, loss.low, loss.high, n), sentence, ids)


def _fastest(side: ByConfig) -> Cell | None:
    """The fastest of those that completed and are not avoided."""
    return max((cell for cell in side.values() if _competes(cell)), key=lambda cell: cell.speed.value, default=None)


def _holds(cell: Cell) -> Test:
    return Test(0.0) if cell.dtype_config == REFERENCE and cell.state == COMPLETED else cell.holds()


def _loses(side: ByConfig, config: str) -> Test:
    """The configuration is not the one for this task: it fails or trains worse, or another that holds is faster by 2 %."""
    cell = side.get(config)
    if cell is None:
        return UNTESTED
    rivals = [other for other in side.values() if other is not cell and _competes(other)]
    slower = [all_of([_holds(rival), above(lead(rival, cell), MARGIN_SPEED)]) for rival in rivals if cell.log_speed]
    return any_of([cell.bad(), *slower])


def _serves(side: ByConfig, config: str) -> Test:
    """The configuration holds its quality on this task, no other that competes is faster by 2 %, and those that failed in
    some seed fail more often than rarely."""
    cell = side.get(config)
    if cell is None or not _competes(cell):
        return UNTESTED
    rivals = [other for other in side.values() if other is not cell and _in_race(other)]
    slower = [below(lead(rival, cell), MARGIN_SPEED) for rival in rivals]
    return all_of([_holds(cell), *slower, *_out_of_the_race(side)])
