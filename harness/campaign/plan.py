"""How many steps and seeds fit, and in which order: pure arithmetic over what the calibration measured.

The main question is what 16 bits do to a classifier's loss and to a language model's logits, so the cases come in the order
in which they answer it. Fewer steps for everything come before a second seed for anything: a case that did not run answers
nothing. Up to a fifth of the preset's steps one seed is drawn out; beyond, three seeds tell more than longer runs, because
intervals are over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from harness.settings import SettingsError
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
"""BCE and softmax in both architectures first (the 2 x 2 behind every hypothesis), then the control that makes their sequence
lengths equal, then the third task."""
LADDER = ((0.03, 1), (0.08, 1), (0.1, 1), (0.15, 1), (0.2, 1), (0.1, 3), (0.15, 3), (0.2, 3), (0.3, 3), (0.5, 3), (1.0, 3))
"""(Share of the preset's steps, seeds), by cost. 0.08 of the full preset is the first with enough timed steps for speeds."""


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
            raise SettingsError(f"case {label!r}: behind @ a number of tokens is needed, such as gpt2_clm@512")
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

    def seconds(self, steps: int, died_by: int = 10) -> float:
        """Of a run of ``steps`` and of the controls that it brings along."""
        whole = self.fixed_s + steps * self.step_s
        return whole if not self.died else self.fixed_s + min(steps, died_by) * self.step_s + self.controls * whole


@dataclass(frozen=True)
class Block:
    """One matrix command: a case and seed under all configurations, in an order that rotates from block to block, so that a
    warming machine favours none."""

    case: str
    seed: int
    configs: tuple[str, ...]
    estimated_s: float | None


@dataclass(frozen=True)
class Plan:
    """``fits``: whether all blocks are expected to end within ``budget_s``; those that do not are run by further calls."""

    max_steps: int
    seeds: tuple[int, ...]
    blocks: tuple[Block, ...]
    budget_s: float
    estimated_s: float | None
    fits: bool
    why: str

    def as_row(self) -> dict:
        return asdict(self)


def make_plan(
    costs: Mapping[tuple[str, str], Cost],
    labels: Sequence[str],
    configs: Sequence[str],
    *,
    budget_s: float,
    preset_steps: int,
    preset_seeds: Sequence[int],
    max_steps: int | None,
    seeds: Sequence[int] | None,
) -> Plan:
    """The dearest rung of the ladder that fits into ``budget_s``; ``max_steps`` and ``seeds`` overrule it. ``costs`` by
    (case label, configuration); one that is missing makes its block's estimate None, and nothing is said to fit."""
    rungs = [
        (max_steps or max(1, round(share * preset_steps)), tuple(seeds if seeds is not None else preset_seeds[:n]))
        for share, n in LADDER
    ]
    rungs = list(dict.fromkeys(rungs))
    made = [(rung, _blocks(costs, labels, configs, *rung)) for rung in rungs]
    totals = [_total(blocks) for _, blocks in made]
    fitting = [i for i, total in enumerate(totals) if total is not None and total <= budget_s]
    chosen = fitting[-1] if fitting else 0
    (steps, chosen_seeds), blocks = made[chosen]
    return Plan(
        steps,
        chosen_seeds,
        blocks,
        budget_s,
        totals[chosen],
        bool(fitting),
        _why(chosen, rungs, totals, budget_s, asked=max_steps is not None and seeds is not None),
    )


def _blocks(
    costs: Mapping, labels: Sequence[str], configs: Sequence[str], steps: int, seeds: Sequence[int]
) -> tuple[Block, ...]:
    blocks = []
    for turn, (seed, label) in enumerate((seed, label) for seed in seeds for label in labels):
        rotated = (*configs[turn % len(configs) :], *configs[: turn % len(configs)])
        found = [costs.get((label, config)) for config in configs]
        seconds = None if None in found else sum(cost.seconds(steps) for cost in found)
        blocks.append(Block(label, seed, rotated, seconds))
    return tuple(blocks)


def _total(blocks: Sequence[Block]) -> float | None:
    times = [block.estimated_s for block in blocks]
    return None if None in times else sum(times)


def _why(chosen: int, rungs: Sequence, totals: Sequence[float | None], budget_s: float, *, asked: bool) -> str:
    """The sentence behind the choice."""
    if asked:
        return "steps and seeds were given"
    if totals[chosen] is None:
        return "some case could not be calibrated, so nobody knows what fits: the fewest steps, most informative first"
    if totals[chosen] > budget_s:
        return "not even this much fits: the most informative cases come first, the rest is for further calls"
    if chosen + 1 == len(rungs):
        return "the preset's own steps and seeds fit"
    (steps, seeds), seconds = rungs[chosen + 1], totals[chosen + 1]
    return f"the next larger plan, {count(steps, 'step')} x {count(len(seeds), 'seed')}, would take {seconds / 60:.0f} minutes"


def order(labels: Sequence[str]) -> list[str]:
    """Most informative first; cases that the order does not know keep theirs, behind."""
    known = [label for label in CASE_ORDER if label in labels]
    return known + [label for label in labels if label not in known]
