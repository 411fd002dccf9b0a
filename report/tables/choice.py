"""What to use for a case: each cell's verdict with its reason, the recommended configuration and the one after it.

Recommended: of the configurations of which no seed failed and whose quality is shown to lie within the margin, the fastest;
among those than which no other is shown to be faster by 2 %, the one with the best quality, then the least memory, then the
most conservative dtype. With fewer than 3 seeds nothing is recommended. Avoided: shown to fail where fp32_true does not, to
train worse than the margin allows, or to be slower than fp32_true. Both with Holm's rule over the case's configurations."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench_cases import DTYPE_CONFIGS
from instrument.results.contents import Folder, is_cpu
from instrument.terminal import count
from report.significance import (
    FAMILY_LEVEL,
    FEWEST_SEEDS,
    LEVEL,
    UNTESTED,
    Test,
    above,
    above_unpaired,
    rate_above,
    shown_of_family,
)
from report.tables.cell_text import difference_text, margin_text, memory_text
from report.tables.cells import (
    AVOID,
    COMPLETED,
    CONTROL,
    FAILING,
    INCOMPARABLE,
    LOST,
    MEASURE,
    NO_VERDICT,
    RECOMMENDED,
    RUNNER_UP,
    STALLED,
    UNFINISHED,
    UNHEALTHY,
    UNJUDGED,
    UNMEASURED,
    UNRESOLVED,
    USABLE,
    Cell,
    measure_cells,
)
from report.tables.judgement import MARGIN_SPEED, Judgements, judge_runs
from report.tables.selection import REFERENCE, case_order, is_control, series_order
from report.text import bounds, shortened, times

MEMORY_TOLERANCE = 1.01
TOY = "; a tiny preset or a processor says nothing about a GPU"
RANKS = {"fp32": 0, "bf16": 1, "fp16": 2}
"""From the more conservative dtype to the less: bf16 has the range of fp32, fp16 has not."""


@dataclass(frozen=True)
class CaseTable:
    """A case's cells, one row a configuration in the registry's order, each with its verdict. ``use`` is recommended,
    ``runner_up`` is next, ``lossless`` is the fastest without a shown loss where ``use`` has one; None where there is none, and
    ``reason`` says why, or how sure. ``n``: seeds of fp32_true; ``unhealthy``: why its reference cannot judge."""

    case: str
    column: str
    cells: tuple[Cell, ...]
    use: str | None
    runner_up: str | None
    lossless: str | None
    reason: str
    n: int
    unhealthy: str | None = None

    def cell(self, config: str | None) -> Cell | None:
        """A configuration's cell."""
        return next((cell for cell in self.cells if cell.dtype_config == config), None)


_KNOWN: weakref.WeakKeyDictionary[Folder, tuple[CaseTable, ...]] = weakref.WeakKeyDictionary()


def case_tables(folder: Folder) -> tuple[CaseTable, ...]:
    """One table a case, in the registry's order; computed once a folder."""
    if folder not in _KNOWN:
        judgements = judge_runs(folder)
        cells = measure_cells(folder, judgements)
        toys = {run.case for run in judgements.selection.runs if run.preset == "tiny" or is_cpu(run)}
        tables = (_table(judgements, case, cells) for case in case_order({case for case, _ in cells}))
        _KNOWN[folder] = tuple(replace(t, reason=t.reason + TOY) if t.case in toys and t.use else t for t in tables)
    return _KNOWN[folder]


def all_cells(folder: Folder) -> dict[tuple[str, str], Cell]:
    """Every cell with its verdict by case and configuration."""
    return {(cell.case, cell.dtype_config): cell for table in case_tables(folder) for cell in table.cells}


def _table(judgements: Judgements, case: str, every: dict[tuple[str, str], Cell]) -> CaseTable:
    cells = {config: cell for (of, config), cell in every.items() if of == case}
    reference = cells.get(REFERENCE)
    rivals = {config: cell for config, cell in cells.items() if config != REFERENCE and not is_control(config)}
    ended = (COMPLETED, FAILING, STALLED)
    bad = {config: cell.bad() if cell.state in ended else UNTESTED for config, cell in rivals.items() if cell.n}
    # Where fp32_true fails too, or was not run, nothing says that the configuration is the cause.
    avoided = shown_of_family(bad) if reference is not None and not reference.n_failed else set()
    holding = shown_of_family({config: cell.holds() for config, cell in rivals.items() if cell.state == COMPLETED})
    why_not = _why_nothing(reference)
    candidates = [cell for config, cell in rivals.items() if config in holding - avoided and _is_timed(cell)]
    candidates = [reference, *candidates] if reference is not None and why_not is None else []
    best, reason = _best(candidates) if candidates else (None, why_not or "")
    if best:
        reason = _others(reason if len(candidates) > 1 else "", cells, holding, avoided)
    after = _best([cell for cell in candidates if cell is not best])[0] if len(candidates) > 1 else None
    lossless = _lossless(best, candidates) if best else None
    judged = tuple(
        replace(cell, verdict=verdict, why=why)
        for cell in cells.values()
        for verdict, why in [_verdict(cell, best, after, reason, avoided, holding, why_not)]
    )
    first = next(iter(cells.values()))
    return CaseTable(
        case,
        first.column,
        judged,
        best.dtype_config if best else None,
        after.dtype_config if after else None,
        lossless.dtype_config if lossless else None,
        reason,
        reference.n if reference else 0,
        judgements.unhealthy.get(case),
    )


def _why_nothing(reference: Cell | None) -> str | None:
    """Why nothing can be recommended, or None."""
    if reference is None:
        return "there is no fp32_true run to judge by"
    if reference.state == UNHEALTHY:
        return f"the fp32_true reference is unhealthy: {reference.what}"
    if reference.state != COMPLETED:
        how_often = f" in {reference.n_failed} of {count(reference.n, 'seed')}" if reference.n_failed else ""
        return f"fp32_true: {reference.state}, {reference.what}{how_often}"
    if reference.n < FEWEST_SEEDS:
        return f"{count(reference.n, 'seed')}: no difference is resolved below {FEWEST_SEEDS}"
    if not _is_timed(reference):
        return f"fp32_true was timed undisturbed in {len(reference.log_speed)} of {count(reference.n, 'seed')}"
    return None


def _is_timed(cell: Cell) -> bool:
    """Its speed is known from enough seeds to be compared: one lucky seed would tie with everything."""
    return len(cell.log_speed) >= FEWEST_SEEDS


def _others(decided: str, cells: dict[str, Cell], holding: set[str], avoided: set[str]) -> str:
    """What decided, or why nothing competes with fp32_true; and whose speed is not known."""
    slower, rest = series_order(holding & avoided), series_order(holding - avoided)
    untimed = [config for config in rest if not _is_timed(cells[config])]
    if not decided and slower:
        decided = f"what trains as well is slower: {shortened(slower)}"
    if not decided and not untimed:
        decided = "no other configuration is shown to train as well"
    unknown = [f"not timed in {FEWEST_SEEDS} seeds: {shortened(untimed)}"] if untimed else []
    return "; ".join([*filter(None, [decided]), *unknown])


def _best(candidates: Sequence[Cell]) -> tuple[Cell, str]:
    """The one to use, and what decided. In the race are those than which no other is shown to be faster by 2 %: being tied
    with the fastest mean alone would let a noisy leader carry what another one beats."""
    leader = max(candidates, key=lambda cell: cell.speed.value)
    level = min(LEVEL, FAMILY_LEVEL / max(1, len(candidates) - 1))
    tied = [cell for cell in candidates if not any(_faster(other, cell, level) for other in candidates)] or [leader]
    if len(tied) == 1:
        return tied[0], "the fastest that is shown to train as well"
    left, decided = tied, []
    for keep, by in (
        (_best_quality, "quality"),
        (_least_memory, "memory"),
        (_most_conservative, "the more conservative dtype"),
    ):
        kept = keep(left)
        if lost := series_order(cell.dtype_config for cell in left if cell not in kept):
            decided.append(f"by {by} over {shortened(lost)}")
        left = kept
    return left[0], f"tied in speed; chosen {', '.join(decided)}"


def _faster(cell: Cell, other: Cell, level: float) -> bool:
    return cell is not other and speed_lead(cell, other, MARGIN_SPEED).p <= level


def speed_lead(cell: Cell, other: Cell, bound: float) -> Test:
    """``cell`` is faster than ``other`` by more than ``bound`` (a log ratio): over the seeds that both have, or over the seeds
    of each where too few are common."""
    ratios = lead(cell, other)
    if len(ratios) >= FEWEST_SEEDS:
        return above(ratios, bound)
    return above_unpaired(cell.log_speed.values(), other.log_speed.values(), bound)


def _most_conservative(cells: Sequence[Cell]) -> list[Cell]:
    return [min(cells, key=lambda cell: conservatism(cell.dtype_config))]


def lead(leader: Cell, other: Cell) -> list[float]:
    """Paired differences of log speed."""
    return [leader.log_speed[seed] - other.log_speed[seed] for seed in sorted(leader.log_speed.keys() & other.log_speed.keys())]


def _best_quality(cells: Sequence[Cell]) -> list[Cell]:
    """Those that no measure shows to be worse than the best by the first measure. fp32_true stays: what seems better than the
    reference does so by chance."""
    if not all(cell.judged_qualities for cell in cells):
        return [*cells]
    best = min(cells, key=lambda cell: float(np.mean([*cell.judged_qualities[0].worse.values()])))
    level = min(LEVEL, FAMILY_LEVEL / max(1, len(cells) * (len(cells) - 1) / 2))  # the best may be so by chance: all pairs
    return [cell for cell in cells if cell.dtype_config == REFERENCE or not _trains_worse(cell, best, level)]


def _trains_worse(cell: Cell, best: Cell, level: float) -> bool:
    others = {quality.name: quality for quality in best.judged_qualities}
    for mine in cell.judged_qualities:
        theirs = others.get(mine.name, mine)
        seeds = sorted(mine.worse.keys() & theirs.worse.keys())
        if above([mine.worse[seed] - theirs.worse[seed] for seed in seeds], 0.0, mine.resolution).p <= level:
            return True
    return False


def _least_memory(cells: Sequence[Cell]) -> list[Cell]:
    """Those within 1 % of the least peak of the GPU's allocator, where all have one of their own."""
    peaks = [cell.peak_bytes for cell in cells]
    if None in peaks or any(cell.peak_is_bound or cell.peak_kind != "allocated" for cell in cells):
        return [*cells]  # what a process holds in RAM varies by more than a configuration changes
    least = min(peak for peak in peaks if peak is not None)
    return [cell for cell, peak in zip(cells, peaks, strict=True) if peak is not None and peak <= MEMORY_TOLERANCE * least]


def conservatism(config: str) -> tuple[int, ...]:
    """A key that sorts configurations from the most conservative to the least: bits of weights, states, compute, head, loss."""
    declared = DTYPE_CONFIGS.get(config)
    if declared is None:
        return (3,)
    kinds = (declared.weights, declared.compute, declared.head, declared.loss)
    weights, *others = (RANKS[kind] for kind in kinds)
    return (weights, int(declared.optimizer == "8bit"), *others, int(declared.tf32), list(DTYPE_CONFIGS).index(config))


def _lossless(best: Cell, candidates: Sequence[Cell]) -> Cell | None:
    """The fastest candidate without a shown loss, where the recommended one has a loss that the seeds resolve."""
    if not _loses(best):
        return None
    return max((cell for cell in candidates if not _loses(cell)), key=lambda cell: cell.speed.value, default=None)


def _loses(cell: Cell) -> bool:
    return cell.dtype_config != REFERENCE and any(quality.any_worse().shown for quality in cell.judged_qualities)


def _verdict(
    cell: Cell, best: Cell | None, after: Cell | None, reason: str, avoided: set[str], holding: set[str], why_not: str | None
) -> tuple[str, str]:
    """A cell's verdict and its reason in one sentence."""
    if cell.state in (UNFINISHED, UNMEASURED):
        return NO_VERDICT, f"{cell.state}: {cell.what}" if cell.what else cell.state
    if is_control(cell.dtype_config):
        return CONTROL, _control(cell)
    if cell.state in (FAILING, STALLED):
        if cell.dtype_config not in avoided:
            return LOST, failure_sentence(cell)
        worse = "" if rate_above(cell.n_failed, cell.n).shown else f"{bad_sentence(cell)}; "
        return AVOID, worse + failure_sentence(cell)
    if cell.state in (UNHEALTHY, INCOMPARABLE):
        reference = cell.state == UNHEALTHY and cell.dtype_config != REFERENCE
        return UNJUDGED, f"measured, not judged: {'its reference is unhealthy' if reference else cell.what}"
    if cell.dtype_config in avoided:
        return AVOID, bad_sentence(cell)
    if cell is best:
        return RECOMMENDED, reason
    if cell is after:
        return RUNNER_UP, _beside(cell, best)
    if cell.dtype_config == REFERENCE:
        return MEASURE, _beside(cell, best) if best else reason
    if cell.dtype_config in holding:
        return USABLE, _beside(cell, best) if best else f"its quality holds; {reason}"
    return UNRESOLVED, unresolved_sentence(cell)


def _control(cell: Cell) -> str:
    return f"explains another's failure: {failure_sentence(cell) if cell.n_failed else 'completed'}"


def failure_sentence(cell: Cell) -> str:
    """What failed in how many seeds, with the exact interval of the share."""
    share = cell.failure_share
    text = f"{cell.what} in {cell.n_failed} of {count(cell.n, 'seed')} {bounds(share, '.2f')}"
    return text if rate_above(cell.n_failed, cell.n).shown else f"{text}: it failed here; how often is not resolved"


def bad_sentence(cell: Cell) -> str:
    """Which measure shows that a completed configuration is to be avoided."""
    worst = min(cell.judged_qualities, key=lambda quality: quality.worse_than_margin().p, default=None)
    if worst is None or cell.slower().p < worst.worse_than_margin().p:
        return f"slower than fp32_true: {times(cell.speed)}"
    return f"{difference_text(worst)}, worse than the margin of {margin_text(worst)}"


def unresolved_sentence(cell: Cell) -> str:
    """What the seeds leave open about a completed configuration, and how many would decide."""
    if not cell.judged_qualities:
        return "no measure of quality that can judge"
    correction = "by itself, but not corrected for the measures and configurations of the case"
    if cell.slower().shown or any(quality.worse_than_margin().shown for quality in cell.judged_qualities):
        return f"{bad_sentence(cell)} {correction}"
    widest = max(cell.judged_qualities, key=lambda quality: quality.within_margin().p)
    if widest.within_margin().shown:
        return f"{difference_text(widest)}, within the margin of {margin_text(widest)} {correction}"
    paired = len(widest.worse)
    needed = min((n for test in (cell.holds(), cell.bad()) if (n := test.seeds_needed) is not None), default=None)
    more = f"; about {count(needed, 'seed')} would decide" if needed is not None and needed > paired else ""
    name = widest.name.replace("perplexity", "loss")
    return f"{name} not resolved by {count(paired, 'seed')} against a margin of {margin_text(widest)}{more}"


def _beside(cell: Cell, best: Cell) -> str:
    """How a configuration whose quality holds stands beside the recommended one."""
    ratios, name = lead(best, cell), best.dtype_config
    common = len(ratios) >= FEWEST_SEEDS
    ratio = math.exp(np.mean(ratios)) if common else best.speed.value / cell.speed.value
    if not common and not (_is_timed(cell) and _is_timed(best)):
        parts = [f"its speed beside {name} is known from {count(len(ratios), 'seed')}"]
    elif speed_lead(cell, best, -MARGIN_SPEED).shown and speed_lead(best, cell, -MARGIN_SPEED).shown:
        parts = [f"as fast as {name}, within 2 %"]
    elif speed_lead(best, cell, 0.0).shown:
        parts = [f"{name} is {ratio:.2f}x as fast"]
    elif speed_lead(cell, best, 0.0).shown:
        alone = speed_lead(cell, best, MARGIN_SPEED).shown
        parts = [f"{1 / ratio:.2f}x as fast as {name}{' by itself, but not corrected for the case' if alone else ''}"]
    else:
        parts = [f"not separated from {name} in speed by {count(len(ratios) if common else cell.speed.n, 'seed')}"]
    if cell.peak_bytes is not None and best.peak_bytes is not None:
        parts.append(f"{memory_text(cell)} against {memory_text(best)}")
    return ", ".join(parts)
