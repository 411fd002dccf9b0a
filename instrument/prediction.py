"""Which values of an fp32 run would leave the range of a narrower format, and what would come of it under a
configuration; then whether it happened in a run of that configuration (`compare`). Torch-free.

Everything is read from the reference alone: the ranges of its modules, its step log, its size. So two things
cannot be seen: what an op makes between a module's input and its output (x^3 in gelu), and that a 16-bit run
takes another road once it has rounded differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from instrument.results.schemas import FirstNonfinite, StepRecord
from kernels.float_formats import FLOAT_FORMATS, FP16, FloatFormat

HEAD, LOGITS, GRADIENTS = "head", "logits", "parameter gradients"
FLUSHED = 0.5
"""Share of values lost to zero from which it is called a hazard."""


@dataclass(frozen=True)
class Arithmetic:
    """What decides, of a configuration. Formats by id: ``compute`` of products, ``head`` after the last encoder
    output, ``states`` of AdamW (``8bit`` too) and ``update`` of its arithmetic, ``clip`` of the gradient norm.
    ``mixed``: under autocast, where sums of residuals stay fp32. ``loss_scale``: the first one, or None."""

    compute: str
    head: str
    states: str
    update: str
    clip: str
    mixed: bool
    eps: float
    beta2: float
    max_norm: float
    loss_scale: float | None


@dataclass(frozen=True)
class Hazard:
    """One thing that would go wrong. ``value`` is the fp32 run's, at ``step``, and ``limit`` what it is beyond (or
    below); ``share``: of values lost to zero; ``module``: null where it is about all of them."""

    kind: str
    module: str | None
    step: int
    value: float | None
    limit: float | None
    bits: float | None = None
    share: float | None = None

    @property
    def fatal(self) -> bool:
        """Whether training ends of it."""
        return self.kind in FATAL


FATAL = ("overflow_forward", "overflow_backward", "norm_overflow", "division_by_zero")
"""In the order in which a step meets them."""
KINDS = (*FATAL, "scaler_skip", "states_flush", "gradient_flush")
COMPARED = (*FATAL, "scaler_skip", "states_flush")
"""Not ``gradient_flush``: a run in fp16 cannot see what it has flushed."""


@dataclass(frozen=True)
class Reference:
    """An fp32 run. ``modules``: rows of its ``activations.jsonl`` (`watch.module_log.ModuleRecord`);
    ``micro_batches``: how many a step's gradients are summed over."""

    modules: Sequence
    steps: Sequence[StepRecord]
    n_params: int | None
    micro_batches: int = 1


def hazards(reference: Reference, arithmetic: Arithmetic) -> list[Hazard]:
    """What would go wrong under a configuration, by kind and then in the model's order."""
    parts = (_forward, _backward, _norm, _optimizer, _gradient_flush)
    found = (hazard for part in parts for hazard in part(reference, arithmetic))
    return sorted(found, key=lambda hazard: KINDS.index(hazard.kind))


def end(found: Iterable[Hazard]) -> Hazard | None:
    """The hazard that training ends of: the first fatal one, None when it survives."""
    return min((h for h in found if h.fatal), key=lambda h: (h.step, FATAL.index(h.kind)), default=None)


def smallest_gradient(arithmetic: Arithmetic) -> float:
    """|g| up to which (1 - beta2) g^2 rounds to zero in the states' format."""
    return math.sqrt(FLOAT_FORMATS[arithmetic.states].smallest_subnormal / 2 / (1 - arithmetic.beta2))


def _modules(kind: str, reference: Reference, arithmetic: Arithmetic, direction: str, scale: float = 1.0) -> Iterable[Hazard]:
    """Modules whose values times ``scale`` leave their format: the largest value, the step at which that was first seen."""
    found: dict[str, Hazard] = {}
    holders = {row.module.rpartition(".")[0] for row in reference.modules}
    for row in reference.modules:
        if row.direction != direction or (arithmetic.mixed and row.module in holders):
            continue  # what a block hands on under autocast is an fp32 sum
        in_head = row.module == HEAD or row.module.startswith(f"{HEAD}.")
        form = FLOAT_FORMATS[arithmetic.head if in_head else arithmetic.compute]
        value = (math.inf if row.inf or row.nan else row.absmax) * scale
        if value > form.max and form.name != "fp32":
            worst, step = (found[row.module].value, found[row.module].step) if row.module in found else (0.0, row.absmax_step)
            worst, step = max(worst, value), min(step, row.absmax_step)
            found[row.module] = Hazard(kind, row.module, step, worst, form.max, form.headroom_bits(worst))
    return found.values()


def _forward(reference: Reference, arithmetic: Arithmetic) -> Iterable[Hazard]:
    yield from _modules("overflow_forward", reference, arithmetic, "fwd")
    yield from _over("overflow_forward", LOGITS, reference, "logit_absmax", FLOAT_FORMATS[arithmetic.head])


def _backward(reference: Reference, arithmetic: Arithmetic) -> Iterable[Hazard]:
    """Beyond the range at the scale at which backward runs; a scaler makes a skipped step of it."""
    scale = arithmetic.loss_scale or 1.0
    kind = "overflow_backward" if arithmetic.loss_scale is None else "scaler_skip"
    yield from _modules(kind, reference, arithmetic, "bwd", scale)
    if arithmetic.mixed:  # each micro-batch's share is 16-bit, their sum fp32; one share is at least the m-th part
        scale /= reference.micro_batches
    yield from _over(kind, GRADIENTS, reference, "grad_absmax", FLOAT_FORMATS[arithmetic.compute], scale)


def _norm(reference: Reference, arithmetic: Arithmetic) -> Iterable[Hazard]:
    for hazard in _over("norm_overflow", None, reference, "grad_norm", FLOAT_FORMATS[arithmetic.clip]):
        yield replace(hazard, bits=None)


def _over(
    kind: str, module: str | None, reference: Reference, field: str, form: FloatFormat, scale: float = 1.0
) -> Iterable[Hazard]:
    """The hazard of a column of the step log whose values times ``scale`` leave a format."""
    over = [s for s in reference.steps if (value := getattr(s, field)) is not None and value * scale > form.max]
    if over and form.name != "fp32":
        worst = max(getattr(s, field) for s in over) * scale
        yield Hazard(kind, module, over[0].step, worst, form.max, form.headroom_bits(worst))


def _optimizer(reference: Reference, arithmetic: Arithmetic) -> Iterable[Hazard]:
    """AdamW's second moment at the first update, from the gradients' norm alone.

    n clipped gradients of norm N have a root mean square r = N / sqrt(n). At most a share (r / g)^2 of them exceeds any g
    (Chebyshev): so at least 1 - (r / g0)^2 of the second moments round to zero, g0 being `smallest_gradient`; and where r < g0,
    one does at least. Divided by with an epsilon that rounds to zero as well, it ends training, whatever its gradient is.
    """
    if arithmetic.states not in FLOAT_FORMATS or arithmetic.states == "fp32" or not reference.steps:
        return
    first = reference.steps[0]
    if reference.n_params is None or first.grad_norm is None or not math.isfinite(first.grad_norm):
        return
    rms = min(first.grad_norm, arithmetic.max_norm) / math.sqrt(reference.n_params)
    limit = smallest_gradient(arithmetic)
    if rms >= limit:
        return
    if arithmetic.eps <= FLOAT_FORMATS[arithmetic.update].smallest_subnormal / 2:
        yield Hazard("division_by_zero", None, first.step, rms, limit)
    share = 1 - (rms / limit) ** 2
    if share >= FLUSHED:
        yield Hazard("states_flush", None, first.step, rms, limit, share=share)


def _gradient_flush(reference: Reference, arithmetic: Arithmetic) -> Iterable[Hazard]:
    """What fp16 would flush without a scale, as the instruments counted it in fp32."""
    if arithmetic.compute != "fp16" or arithmetic.loss_scale is not None:
        return
    worst: dict[str, Hazard] = {}
    for row in (row for row in reference.modules if row.direction == "bwd" and (row.flush_frac or 0) >= FLUSHED):
        if row.module not in worst or row.flush_frac > worst[row.module].share:
            step, limit, share = row.absmax_step, FP16.smallest_subnormal, row.flush_frac
            worst[row.module] = Hazard("gradient_flush", row.module, step, None, limit, share=share)
    yield from worst.values()


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
        return OVERFLOWS[phase] if cause == "overflow" else "other"


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
