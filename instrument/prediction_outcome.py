"""Whether what was predicted from an fp32 run happened in a run of a narrower configuration. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from instrument.prediction import COMPARED, FLUSHED, KINDS, Hazard
from instrument.records import FirstNonfinite

VERDICTS = (
    "predicted and happened",
    "predicted and did not happen",
    "happened and was not predicted",
    "predicted and not reached",
    "neither predicted nor happened",
)
HIT, FALSE_ALARM, MISSED, NOT_REACHED, NEITHER = VERDICTS
OVERFLOWS = {
    "forward": "overflow_forward",
    "loss": "overflow_forward",
    "backward": "overflow_backward",
    "unscale": "overflow_backward",
    "clip": "norm_overflow",
    "unscale_or_clip": "norm_overflow",
}
"""Phase of an overflow -> kind of hazard."""


@dataclass(frozen=True)
class Happened:
    """What a run's record says. ``zero_share``: of ``exp_avg_sq`` at its end, null where none was kept or where NaN
    had reached it."""

    ended_at: int | None
    first: FirstNonfinite | None
    scaler_skips: int
    zero_share: float | None

    @property
    def kind(self) -> str | None:
        """The kind of hazard that it ended of; ``other`` for one that no hazard stands for, None: it did not end."""
        if self.ended_at is None:
            return None
        if self.first is None:
            return "other"
        phase, cause = self.first.phase, self.first.cause
        if phase == "optimizer":
            return "division_by_zero" if cause == "underflow_then_divide" else "other"
        if cause != "overflow":
            return "other"
        return OVERFLOWS[phase]


@dataclass(frozen=True)
class Outcome:
    """One kind of hazard in one run. ``verdict``: one of `VERDICTS`. ``named``: for an overflow that was predicted
    and happened, whether its module was among the predicted ones."""

    kind: str
    verdict: str
    named: bool | None = None


def compare(found: Sequence[Hazard], happened: Happened) -> list[Outcome]:
    """Every kind of hazard that can be compared against one run."""
    kinds = [kind for kind in COMPARED if kind != "states_flush" or happened.zero_share is not None]
    outcomes = [_outcome(kind, [h for h in found if h.kind == kind], happened) for kind in kinds]
    if happened.kind == "other":
        outcomes.append(Outcome("other", MISSED))
    return outcomes


def _outcome(kind: str, predicted: list[Hazard], happened: Happened) -> Outcome:
    if kind == "scaler_skip":
        did = happened.scaler_skips > 0
    elif kind == "states_flush":
        did = happened.zero_share >= FLUSHED
    else:
        did = happened.kind == kind
    if predicted and did:
        module = happened.first.module if kind.startswith("overflow") and happened.first else None
        return Outcome(kind, HIT, _is_named(module, predicted) if module else None)
    if predicted:
        return Outcome(kind, NOT_REACHED if _cut_short(predicted, happened) else FALSE_ALARM)
    return Outcome(kind, MISSED if did else NEITHER)


def _cut_short(predicted: list[Hazard], happened: Happened) -> bool:
    """Whether the run ended of something else before the place where the fp32 run shows the hazard."""
    if happened.ended_at is None:
        return False
    first = min((h.step, KINDS.index(h.kind)) for h in predicted)
    return (happened.ended_at, KINDS.index(happened.kind) if happened.kind in KINDS else len(KINDS)) < first


def _is_named(module: str, predicted: list[Hazard]) -> bool:
    """The module, one around it, or one in it."""
    names = [h.module for h in predicted if h.module]
    return any(module == n or module.startswith(f"{n}.") or n.startswith(f"{module}.") for n in names)
