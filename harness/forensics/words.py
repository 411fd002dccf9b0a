"""A failure in one sentence."""

from __future__ import annotations

from instrument.records import FirstNonfinite
from instrument.replay.examine import Examination
from instrument.replay.op_schema import SUM_OVER_RANKS

KIND_WORDS = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}


def sentence(first: FirstNonfinite, found: Examination | None, headroom_since: int | None, spread: int) -> str:
    """Step, micro-batch, phase, module, op, what happened, and what led to it."""
    where = [f"step {first.step}"]
    ranks = (first.replay or {}).get("ranks", [first.rank] if first.rank is not None else [])
    if ranks:
        where.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}")
    if first.microbatch is not None:
        where.append(f"micro-batch {first.microbatch}")
    where.append(first.phase)
    parameter = found.parameter if found else None
    if parameter and first.tensor not in ("output",):
        where.append(f"{first.tensor} of {parameter}")
    elif first.module is not None:
        where.append(first.module or "the model's own forward")
    if first.op:
        where.append(first.op)
    what = {"output": "output", "grad": "gradient"}.get(first.tensor, first.tensor)
    words = f"{', '.join(where)}: {what} is {KIND_WORDS[first.kind]}" + (f" in {first.dtype}" if first.dtype else "")
    if found is None:
        return words + "; a replay from the snapshot did not fail the same way, so the op is not known"
    n = found.culprit.alike
    alike = f"; {n:,} more {'fails' if n == 1 else 'fail'} likewise" if n else ""
    spread_words = f", first of {spread} modules it spread to" if spread > 1 else ""
    return words + _why(first, found, headroom_since) + spread_words + alike


def _why(first: FirstNonfinite, found: Examination, headroom_since: int | None) -> str:
    diagnosis = found.diagnosis
    if first.op == SUM_OVER_RANKS:
        return ": finite on every rank, and not in their sum"
    if first.cause == "underflow_then_divide":
        source = f" from {first.source_tensor}" if first.source_tensor else ""
        zeros = f" in {diagnosis.zero_denominators:,} of {diagnosis.numel:,} elements" if diagnosis else ""
        return f", its denominator{source} underflowed to 0{zeros}; nothing overflowed"
    if first.cause == "from_input":
        return ", it came in from outside the step"
    largest = f", largest input {first.input_absmax:.3g}" if first.input_absmax is not None else ""
    if first.cause == "overflow":
        exact = f" (float64: {diagnosis.exact_absmax:.3g})" if diagnosis and diagnosis.exact_absmax else ""
        bits = f", {first.headroom_bits:.1f} bits of headroom left" if first.headroom_bits is not None else ""
        since = f" since step {headroom_since}" if headroom_since is not None and bits else ""
        return f": overflow{exact}{largest}{bits}{since}"
    return f": an invalid operation{largest}"
