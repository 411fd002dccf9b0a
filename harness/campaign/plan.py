"""Which steps and seeds fit into a campaign's time, and in which order its cases run: arithmetic over what the calibration's
short runs measured. Starts nothing.

The main question is what 16 bits do to a classifier's loss and to a language model's logits, so the cases come in the order
in which they answer it. Fewer steps for everything come before a second seed for anything: a case that did not run answers
nothing. Up to a fifth of the preset's steps one seed is drawn out; beyond, three seeds tell more than longer runs, because
intervals are over seeds.

The calibration runs a few steps of each case under three configurations (one of each kind: fp32, autocast, all in 16 bits); the
others are taken to cost what the one of their kind does, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench_cases import DTYPE_CONFIGS
from harness.settings import SettingsError
from instrument.results.schemas import RunRecord
from instrument.terminal import count

CASE_ORDER = (
    "gpt2_multi_cls",
    "gpt2_clm",
    "roberta_multi_cls",
    "roberta_mlm",
    "gpt2_clm@512",
    "gpt2_single_cls",
    "roberta_single_cls",
)
"""BCE and softmax in both architectures first (the 2 x 2 of every hypothesis), then the control that makes their sequence
lengths equal, then the third task."""
LADDER = ((0.03, 1), (0.08, 1), (0.1, 1), (0.15, 1), (0.2, 1), (0.1, 3), (0.15, 3), (0.2, 3), (0.3, 3), (0.5, 3), (1.0, 3))
"""(Share of the preset's steps, seeds), by cost. 0.08 of the full preset is the first with enough timed steps for speeds."""
CALIBRATION_STEPS = 8
START_S = 4.0
"""A run's process until its own clock begins (a fork, the GPU's context): assumed, not measured."""
UNSUPPORTED_S = 1.0
REPRESENTATIVES = {"fp32": "fp32_true", "autocast": "amp_bf16", "pure": "fp16_naive"}
FALLBACK = {"autocast": ("fp32",), "pure": ("autocast", "fp32"), "fp32": ()}
"""Whose cost stands in, as an upper bound, where a kind has none of its own."""
Costs = Mapping[tuple[str, str], "Cost"]
"""By (case label, configuration)."""


@dataclass(frozen=True)
class Variant:
    """A case at a sequence length; None: the preset's. ``label`` is ``gpt2_clm`` or ``gpt2_clm@512``."""

    case: str
    seq_len: int | None = None

    @property
    def label(self) -> str:
        return self.case if self.seq_len is None else f"{self.case}@{self.seq_len}"

    @classmethod
    def parse(cls, label: str) -> Variant:
        """Raises `SettingsError` for a length that is no number."""
        case, at, length = label.partition("@")
        if at and not (length.isdecimal() and int(length)):
            raise SettingsError(f"case {label!r}: after @ a number of tokens is needed, such as gpt2_clm@512")
        return cls(case, int(length) if at else None)


@dataclass(frozen=True)
class Cost:
    """Seconds of one run: ``fixed_s + steps x step_s``. ``source``: ``measured``, or where the numbers come from. A
    configuration that ``died`` in the calibration costs its few steps, and its ``controls`` that run beside it in full."""

    fixed_s: float
    step_s: float
    source: str
    died: bool = False
    controls: int = 0
    peak_allocated_bytes: int | None = None

    @classmethod
    def of_row(cls, row: RunRecord) -> Cost | None:
        """From one short run; None from one that failed. The first steps compile and allocate: a cost of every run, not of a
        step."""
        timings_s = row.flags.get("timings_s") or {}
        if row.status == "unsupported":
            return cls(UNSUPPORTED_S, 0.0, "measured: unsupported here")
        if "total" not in timings_s or row.status not in ("completed", "diverged"):
            return None
        died, step_s = row.status == "diverged", row.step_time_p50_s
        step_s = timings_s.get("steps", 0.0) / max(1, row.steps_done) if step_s is None else step_s
        controls = len(DTYPE_CONFIGS[row.dtype_config].controls) if died else 0
        fixed_s = START_S + max(0.0, timings_s["total"] - row.steps_done * step_s)
        return cls(fixed_s, step_s, "measured", died, controls, row.peak_allocated_bytes)

    def seconds(self, steps: int, died_by: int = 10) -> float:
        """Of a run of ``steps`` and of the controls that it brings along."""
        whole = self.fixed_s + steps * self.step_s
        return whole if not self.died else self.fixed_s + min(steps, died_by) * self.step_s + self.controls * whole


@dataclass(frozen=True)
class Block:
    """A case and seed under all configurations, in an order that rotates from block to block, so that a warming machine favours
    none."""

    case: str
    seed: int
    configs: tuple[str, ...]
    estimated_s: float | None


@dataclass(frozen=True)
class CampaignPlan:
    """``fits``: whether all blocks are expected to end within ``budget_s``; those that do not are run by further calls."""

    max_steps: int
    seeds: tuple[int, ...]
    blocks: tuple[Block, ...]
    budget_s: float
    estimated_s: float | None
    fits: bool
    why: str


def make_plan(
    costs: Costs,
    labels: Sequence[str],
    configs: Sequence[str],
    *,
    budget_s: float,
    preset_steps: int,
    preset_seeds: Sequence[int],
    max_steps: int | None,
    seeds: Sequence[int] | None,
) -> CampaignPlan:
    """The dearest rung of the ladder that fits into ``budget_s``; ``max_steps`` and ``seeds`` overrule it. A missing cost makes
    its block's estimate None, and nothing is said to fit."""
    rungs = [
        (max_steps or max(1, round(share * preset_steps)), tuple(seeds if seeds is not None else preset_seeds[:n]))
        for share, n in LADDER
    ]
    rungs = list(dict.fromkeys(rungs))
    planned = [_blocks(costs, labels, configs, *rung) for rung in rungs]
    totals = [_total(block.estimated_s for block in blocks) for blocks in planned]
    fitting = [i for i, total in enumerate(totals) if total is not None and total <= budget_s]
    chosen = fitting[-1] if fitting else 0
    if max_steps is not None and seeds is not None:
        why = "steps and seeds were given"
    elif totals[chosen] is None:
        why = "some case could not be calibrated, so nobody knows what fits: the fewest steps, most informative first"
    elif totals[chosen] > budget_s:
        why = "not even this much fits: the most informative cases come first, the rest is for further calls"
    elif chosen + 1 == len(rungs):
        why = "the preset's own steps and seeds fit"
    else:
        larger = f"{count(rungs[chosen + 1][0], 'step')} x {count(len(rungs[chosen + 1][1]), 'seed')}"
        why = f"the next larger plan, {larger}, would take {totals[chosen + 1] / 60:.0f} minutes"
    return CampaignPlan(*rungs[chosen], planned[chosen], budget_s, totals[chosen], bool(fitting), why)


def _blocks(costs: Costs, labels: Sequence[str], configs: Sequence[str], steps: int, seeds: Sequence[int]) -> tuple[Block, ...]:
    blocks = []
    for turn, (seed, label) in enumerate((seed, label) for seed in seeds for label in labels):
        first = turn % len(configs)
        found = [costs.get((label, config)) for config in configs]
        seconds = _total(cost and cost.seconds(steps) for cost in found)
        blocks.append(Block(label, seed, (*configs[first:], *configs[:first]), seconds))
    return tuple(blocks)


def _total(seconds: Iterable[float | None]) -> float | None:
    """The sum; None where one is not known."""
    every = list(seconds)
    return None if None in every else sum(every)


def order(labels: Sequence[str]) -> list[str]:
    """Most informative first; after them the cases that the order does not know, in theirs."""
    known = [label for label in CASE_ORDER if label in labels]
    return known + [label for label in labels if label not in known]


def kind(config: str) -> str:
    """fp32, autocast or pure: what decides a configuration's speed."""
    declared = DTYPE_CONFIGS[config]
    return "fp32" if declared.compute == "fp32" else "autocast" if declared.autocast else "pure"


def representatives(configs: Sequence[str]) -> list[str]:
    """The configurations to calibrate: of every kind that is asked for its representative, or its first."""
    kinds = list(dict.fromkeys(kind(config) for config in configs))
    return [REPRESENTATIVES[k] if REPRESENTATIVES[k] in configs else next(c for c in configs if kind(c) == k) for k in kinds]


def calibrated(rows: Iterable[RunRecord], labels: Sequence[str]) -> dict[tuple[str, str], Cost]:
    """What the rows of the calibration's results folder have measured. A case without a length in its label has the rows of no
    other label."""
    lengths = {(variant.case, variant.seq_len) for variant in map(Variant.parse, labels) if variant.seq_len}
    found = {}
    for row in rows:
        label = f"{row.case}@{row.seq_len}" if (row.case, row.seq_len) in lengths else row.case
        if row.max_steps == CALIBRATION_STEPS and label in labels and (cost := Cost.of_row(row)) is not None:
            found[label, row.dtype_config] = cost
    return found


def spread(known: Costs, labels: Sequence[str], configs: Sequence[str]) -> dict[tuple[str, str], Cost]:
    """A cost for every case and configuration: its own, or that of its kind, or (a calibration that was cut) that of the
    dearest other case. Empty where nothing at all is known."""
    found: dict[tuple[str, str], Cost] = {}
    for label in labels:
        own = {config: cost for (case, config), cost in known.items() if case == label}
        found |= {(label, config): cost for config in configs if (cost := _cost_of(config, own)) is not None}
    for config in configs:
        others = {label: found[label, config] for label in labels if (label, config) in found}
        if others:
            dearest = max(others, key=lambda label: others[label].seconds(100))
            stand_in = replace(others[dearest], source=f"as {dearest}")
            found = {(label, config): stand_in for label in labels} | found
    return found


def _cost_of(config: str, measured: Mapping[str, Cost]) -> Cost | None:
    if config in measured:
        return measured[config]
    for k in (kind(config), *FALLBACK[kind(config)]):
        for other, cost in measured.items():
            if kind(other) == k and cost.step_s > 0:
                return replace(cost, source=f"as {other}", died=False, controls=0)
    return None
