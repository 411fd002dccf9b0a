"""Why an op wrote a non-finite value: computed again in float64 from the same inputs, and from inputs whose zeros are what
they would have been without rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from instrument.replay.graph import Node
from instrument.replay.ops import can_be_nonfinite, kinds_of, outputs, values_of
from instrument.results.measurements import OperandRecord, OutputRecord


@dataclass(frozen=True)
class Diagnosis:
    """``kind`` is what prevails among the non-finite outputs, ``counts`` how many of each kind there are;
    ``input_absmax`` the largest finite |x| that the op read; ``headroom_bits`` what is left between the largest finite
    value of its own dtype that it read or wrote and the largest number of that dtype."""

    cause: str
    kind: str
    counts: dict[str, int]
    input_absmax: float | None
    headroom_bits: float | None
    output: OutputRecord
    operands: tuple[OperandRecord, ...] = ()


def diagnose(node: Node, captured: tuple[Any, tuple, dict], unflushed: tuple[tuple, dict] | None = None) -> Diagnosis:
    """Diagnose one captured op (the function and its arguments as they were before it ran). ``unflushed``: its arguments
    in float64, where zeros that an earlier op's rounding made are what float64 gives."""
    func, args, kwargs = captured
    written = _run(func, args, kwargs)
    place = _place(written, node)
    out = as_real(written[place])
    bad = ~out.isfinite()
    own, operands = bad, tuple(_operands(func, args, kwargs))
    if node.fails_alone:  # what it does by itself is asked for, not what the meant infinities do
        args, kwargs, unflushed = _without_infinities(args, kwargs, unflushed)
        own = bad & ~as_real(_run(func, args, kwargs)[place]).isfinite()
    largest = max((o.absmax for o in operands if o.absmax is not None), default=None)
    finite = out[~bad]
    wrote = float(finite.abs().max()) if finite.numel() else 0.0
    limit = torch.finfo(out.dtype).max
    dtype = str(out.dtype).removeprefix("torch.")
    top = max([wrote, *(o.absmax for o in operands if o.dtype == dtype and o.absmax is not None)])
    counts = _counts(out)

    def at_failure(args: tuple, kwargs: dict) -> torch.Tensor | None:
        """The failed elements in float64, from these arguments."""
        exact = exactly(func, args, kwargs)
        values = as_real(exact[place]) if exact else None
        return values[own] if values is not None and values.shape == out.shape else None

    def nudged(sign: int) -> torch.Tensor:
        """The same with arguments moved a little; integers too, where the op computes with them (an index cannot move)."""
        moved = (at_failure(*_nudged(sign, tree)) for tree in (tree_map(_widen_integers, wide), wide))
        return next((values for values in moved if values is not None), exact)

    wide = in_float64(_with_float_scalars(func, args, kwargs))
    exact = at_failure(*wide)
    if exact is None:  # float64 has no such op, or it is not torch's own: by what it wrote
        cause, by_zero = "overflow" if bool(out[own].isinf().any()) else "invalid", 0
    else:
        known_zeros = at_failure(*unflushed) if unflushed is not None else None
        by_zero = int((~exact.isfinite() & nudged(0).isfinite()).sum())
        cause = _cause(exact, exact if known_zeros is None else known_zeros, limit)
        if (
            cause == "invalid"
            and bool(exact.isinf().any())
            and not node.constant
            and (node.fails_alone or not any(edge.kinds for edge in node.inputs))
        ):
            scaled = at_failure(*map_numbers(lambda t: t / largest, wide)) if largest else exact
            cause = _beyond_float64(exact, scaled, nudged(1), nudged(-1))
        elif cause == "overflow" and largest and largest < 1 and float(exact[exact.isfinite()].abs().max()) <= limit:
            scaled = _run(func, *map_numbers(lambda t: t / largest, (args, kwargs)))[place]
            cause = "underflow_then_divide" if bool(scaled.isfinite().all()) else cause  # inside the op
    return Diagnosis(
        cause=cause,
        kind=_kind(_counts(out[own])),
        counts=counts,
        input_absmax=largest,
        headroom_bits=math.log2(limit / top) if top else None,
        output=OutputRecord(
            shape=list(out.shape),
            dtype=dtype,
            nonfinite=int(bad.sum()),
            numel=out.numel(),
            exact_absmax=_finite_max(exact),
            zero_denominators=by_zero,
        ),
        operands=operands,
    )


TINY = 1e-30
"""Stands for zero where the question is whether an op is singular there."""


def _cause(exact: torch.Tensor, known_zeros: torch.Tensor, limit: float) -> str:
    """What holds for most of the failed elements, given what float64 makes of them: from the op's own inputs, and with the
    zeros that rounding made undone. ``underflow_then_divide``: finite then, and not before (or beyond the dtype's ``limit``
    before, and within it then); ``overflow``: finite in float64; else ``invalid``."""
    rescued = known_zeros.isfinite() & (~exact.isfinite() | (known_zeros.abs() <= limit) & (exact.abs() > limit))
    overflow = exact.isfinite() & ~rescued
    of_each = {"underflow_then_divide": int(rescued.sum()), "overflow": int(overflow.sum())}
    of_each["invalid"] = exact.numel() - sum(of_each.values())
    return max(of_each, key=of_each.__getitem__)


def _beyond_float64(exact: torch.Tensor, scaled: torch.Tensor, *nudged: torch.Tensor) -> str:
    """The cause of infinities in float64: ``overflow`` (``exp(1000)``) where they stay when the inputs move a little and not
    when the largest is 1; else it is infinite at a point (``1 / 0``, ``log1p(-1)``) or for all that is like it (the logarithm
    of a singular matrix' determinant), which is ``invalid``."""
    stay = exact.isinf() & torch.stack([~values.isfinite() for values in nudged]).all(0) & scaled.isfinite()
    return "overflow" if 2 * int(stay.sum()) > exact.numel() else "invalid"


def _nudged(sign: int, tree):
    """``tree`` with its real numbers, tensors and plain ones, moved a little up or down (0: only the zeros, up)."""
    zero, factor = TINY if sign >= 0 else -TINY, 1 + sign * 2.0**-30
    tree = map_numbers(lambda t: torch.where(t == 0, zero, t * factor), tree)
    return tree_map(lambda leaf: (leaf * factor or zero) if type(leaf) is float else leaf, tree)


@torch.no_grad()
def _run(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """What an op writes, on copies of its arguments."""
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    return outputs(func, args, kwargs, func(*args, **kwargs))


def fails_without(func, args: tuple, kwargs: dict) -> list[bool]:
    """Of each tensor that an op writes, whether it is not finite either when all the infinities that the op read are."""
    return [bool(kinds_of(t)) for t in _run(func, *_without_infinities(args, kwargs))]


def _without_infinities(*tree):
    """``tree`` with numbers between 1/2 and 1 for its infinities, not all the same, whose variance would be zero."""

    def finite(tensor: torch.Tensor) -> torch.Tensor:
        numbers = 0.5 + torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape) % 7 / 16
        return torch.where(tensor.isinf(), numbers.to(tensor.dtype), tensor)

    return map_numbers(finite, tree)


def _place(written: list[torch.Tensor], node: Node) -> int:
    """Which of the written tensors the node stands for: the first non-finite one of its shape, else the first of it."""
    numbers = [place for place, t in enumerate(written) if can_be_nonfinite(t)]
    like = [place for place in numbers if tuple(written[place].shape) == node.shape] or numbers
    return next((place for place in like if not bool(written[place].isfinite().all())), like[0])


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def map_numbers(change, tree):
    """``tree`` with its tensors of real and complex numbers changed."""

    def changed(leaf):
        numbers = isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        return change(leaf) if numbers else leaf

    return tree_map(changed, tree)


def _with_float_scalars(func, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments whose numbers are floats: ``x / 0`` has an integer for one."""
    number = {a.name for a in func._schema.arguments if str(a.type) in ("Tensor", "number")}
    names = [argument.name for argument in func._schema.arguments]

    def as_float(name: str, value: object) -> object:
        return float(value) if name in number and type(value) is int else value

    return (
        tuple(as_float(name, value) for name, value in zip(names, args, strict=False)),
        {name: as_float(name, value) for name, value in kwargs.items()},
    )


def _widen_integers(leaf):
    integers = isinstance(leaf, torch.Tensor) and not can_be_nonfinite(leaf) and leaf.dtype != torch.bool
    return leaf.double() if integers else leaf


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Real or complex numbers in float64."""
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


def in_float64(tree, wide=widened):
    """Arguments in float64; ``wide`` widens a tensor."""

    def dtype(leaf):
        known = isinstance(leaf, torch.dtype)
        return torch.complex128 if known and leaf.is_complex else torch.float64 if known and leaf.is_floating_point else leaf

    return tree_map(dtype, map_numbers(wide, tree))


def exactly(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """What an op writes from arguments in float64; nothing where float64 has no such op (or it is not torch's own)."""
    if func.namespace != "aten":
        return []
    if func._schema.name in ("aten::_softmax", "aten::_log_softmax"):
        args = (*args[:2], False)
    try:
        return _run(func, args, kwargs)
    except (RuntimeError, NotImplementedError, TypeError, IndexError):
        return []


def _operands(func, args: tuple, kwargs: dict):
    """What the op read; an op of somebody's own is taken not to read what it writes to."""
    written = {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write and func.namespace != "aten"}
    names = [argument.name for argument in func._schema.arguments]
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if name in written:
            continue
        for tensor in map(values_of, tree_leaves(value)):
            if can_be_nonfinite(tensor):
                finite = tensor[tensor.isfinite()]
                yield OperandRecord(
                    argument=name,
                    shape=list(tensor.shape),
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    absmax=float(finite.abs().max()) if finite.numel() else None,
                    nonfinite=tensor.numel() - finite.numel(),
                    zeros=int((finite == 0).sum()),
                )


def _counts(values: torch.Tensor) -> dict[str, int]:
    return {"nan": int(values.isnan().sum()), "inf": int((values == math.inf).sum()), "-inf": int((values == -math.inf).sum())}


def _kind(counts: dict[str, int]) -> str:
    """What prevails, NaN or the infinities; ``-inf`` when all of these are negative."""
    return "nan" if counts["nan"] > counts["inf"] + counts["-inf"] else "inf" if counts["inf"] else "-inf"


def _finite_max(values: torch.Tensor | None) -> float | None:
    finite = values[values.isfinite()] if values is not None else torch.empty(0)
    return float(finite.abs().max()) if finite.numel() else None
