"""Why an op with finite inputs wrote a non-finite value: computed again in float64 from the same inputs. Before that, what
an op reads, writes and repeats over lists, by its schema, and what a tensor holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from instrument.replay.graph import NAN, NEG_INF, POS_INF, Node
from instrument.results.measurements import OperandRecord, OutputRecord

OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_"}
"""Ops that do not read what they write to."""
UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
"""Ops whose output is whatever was in memory."""

SUM_OVER_RANKS = "ddb.sum_over_ranks_"
"""Gradients summed over the processes of a run: what comes out is other processes' too, so that it can neither be
explained by what this one put in nor run again alone."""


def kinds_of(tensor: torch.Tensor) -> int:
    """Bits of the non-finite values in a tensor; 0 for integers, empty tensors and other than plain ones."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0 or tensor.is_meta:
        return 0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.element_size() == 1:
        tensor = tensor.float()
    low, high = torch.aminmax(tensor)
    low, high = float(low), float(high)
    if math.isnan(low) or math.isnan(high):  # a NaN hides the infinities
        return NAN | POS_INF * bool((tensor == math.inf).any()) | NEG_INF * bool((tensor == -math.inf).any())
    return POS_INF * (high == math.inf) | NEG_INF * (low == -math.inf)


def is_dense(leaf: object) -> bool:
    """A tensor with memory of its own kind: strided, and not on the meta device."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.layout == torch.strided


def values_of(leaf: object) -> object:
    """A sparse tensor's values, which have memory of their own; anything else as it is."""
    sparse = isinstance(leaf, torch.Tensor) and leaf.layout == torch.sparse_coo
    return leaf._values() if sparse else leaf


def can_be_nonfinite(leaf: object) -> bool:
    """A dense tensor of real or complex numbers."""
    return is_dense(leaf) and (leaf.is_floating_point() or leaf.is_complex())


def is_view(func) -> bool:
    """An op that hands out memory it was given and writes none."""
    returns = [r.alias_info for r in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def mutated(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors among the arguments that an op writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def pick_element(args: tuple, element: int | None) -> tuple:
    """The arguments of one position of an op over lists, as lists of one; all of them for any other op."""
    if element is None:
        return args
    return tuple([arg[element]] if isinstance(arg, (list, tuple)) and len(arg) == len(args[0]) else arg for arg in args)


def list_positions(func, args: tuple) -> dict[int, int]:
    """``id`` of a tensor -> its position, for an op that works on lists of tensors position by position;
    empty for any other op (``cat`` takes a list, too, but writes one tensor)."""
    first = func._schema.arguments[0] if func._schema.arguments else None
    writes_lists = any(str(r.type) == "List[Tensor]" for r in func._schema.returns) or (
        first is not None and str(first.type) == "List[Tensor]" and first.alias_info is not None
    )
    if not writes_lists or not args or not isinstance(args[0], (list, tuple)):
        return {}
    return {
        id(leaf): position
        for argument in args
        if isinstance(argument, (list, tuple)) and len(argument) == len(args[0])
        for position, leaf in enumerate(argument)
        if isinstance(leaf, torch.Tensor)
    }


DENOMINATOR = (
    dict.fromkeys(("div", "div_", "true_divide", "_foreach_div", "_foreach_div_"), 1)
    | dict.fromkeys(("addcdiv", "addcdiv_", "_foreach_addcdiv", "_foreach_addcdiv_"), 2)
    | dict.fromkeys(("reciprocal", "reciprocal_", "rsqrt", "rsqrt_", "_foreach_reciprocal"), 0)
)
"""Position of the argument that an op divides by."""
FUSED_ADAM = ("_fused_adamw_", "_fused_adam_")
EXP_AVG_SQ_OF_FUSED = 3


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


def diagnose(node: Node, captured: tuple[Any, tuple, dict]) -> Diagnosis:
    """Diagnose one captured op (the function and its arguments as they were before it ran)."""
    func, args, kwargs = captured
    written = _run(func, args, kwargs)
    out = _the_output(written, node)
    bad = ~out.isfinite()
    exact = _exact(func, args, kwargs, node)
    operands = tuple(_operands(func, args, kwargs))
    largest = max((o.absmax for o in operands if o.absmax is not None), default=None)
    finite = out[~bad]
    wrote = float(finite.abs().max()) if finite.numel() else 0.0
    denominator = _denominator(func, args, out.shape)
    zero = int(((denominator == 0) & bad).sum()) if denominator is not None else 0
    limit = torch.finfo(out.dtype).max
    dtype = str(out.dtype).removeprefix("torch.")
    top = max([wrote, *(o.absmax for o in operands if o.dtype == dtype and o.absmax is not None)])
    counts = {"nan": int(out.isnan().sum()), "inf": int((out == math.inf).sum()), "-inf": int((out == -math.inf).sum())}
    at_failure = None if exact is None or exact.shape != out.shape else exact[bad]
    return Diagnosis(
        cause=_cause(node, at_failure, zero, out[bad]),
        kind=_kind(counts),
        counts=counts,
        input_absmax=largest,
        headroom_bits=math.log2(limit / top) if top else None,
        output=OutputRecord(
            shape=list(out.shape),
            dtype=dtype,
            nonfinite=int(bad.sum()),
            numel=out.numel(),
            exact_absmax=_finite_max(at_failure),
            zero_denominators=zero,
        ),
        operands=operands,
    )


def _cause(node: Node, at_failure: torch.Tensor | None, zero: int, bad: torch.Tensor) -> str:
    """``overflow``: finite in float64. ``underflow_then_divide`` is for the caller to distinguish from a true division
    by zero, which is ``invalid`` as 0/0 and inf - inf are."""
    if (
        any(edge.kinds and edge.writer is None for edge in node.inputs)
        and not node.constant
        and (at_failure is None or not at_failure.isfinite().any())
    ):
        return "from_input"
    if zero:
        return "invalid"
    if at_failure is not None and at_failure.numel():
        return "overflow" if bool(at_failure.isfinite().any()) else "invalid"
    return "overflow" if bool(bad.isinf().any()) else "invalid"  # an op that float64 cannot run: by what it wrote


def underflowed(node: Node, captured: tuple[Any, tuple, dict]) -> bool:
    """Whether an op rounded a value to zero that float64 does not."""
    func, args, kwargs = captured
    exact = _exact(func, args, kwargs, node)
    if exact is None:
        return False
    out = _the_output(_run(func, args, kwargs), node)
    return out.shape == exact.shape and bool(((out == 0) & (exact != 0)).any())


def divides(op: str) -> bool:
    return op.rpartition(".")[2] in DENOMINATOR


@torch.no_grad()
def _run(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """What an op writes, on copies of its arguments."""
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
    out = func(*args, **kwargs)
    return [values_of(t) for t in (*mutated(func, args, kwargs), *tree_leaves(out)) if isinstance(t, torch.Tensor)]


def _the_output(written: list[torch.Tensor], node: Node) -> torch.Tensor:
    """The written tensor that the node stands for: the first non-finite one of its shape, else the first of it."""
    like = [t for t in written if tuple(t.shape) == node.shape and t.is_floating_point()] or [
        t for t in written if t.is_floating_point()
    ]
    return next((t for t in like if not bool(t.isfinite().all())), like[0])


def _exact(func, args: tuple, kwargs: dict, node: Node) -> torch.Tensor | None:
    """The op in float64; None where float64 has no such op (or it is not torch's own)."""
    if func.namespace != "aten":
        return None

    def wide(leaf):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.double()
        if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return torch.float64
        return leaf

    wide_args, wide_kwargs = tree_map(wide, (args, kwargs))
    if func._schema.name in ("aten::_softmax", "aten::_log_softmax"):
        wide_args = (*wide_args[:2], False)
    try:
        return _the_output(_run(func, wide_args, wide_kwargs), node)
    except (RuntimeError, NotImplementedError, TypeError, IndexError):
        return None


def _denominator(func, args: tuple, shape: torch.Size) -> torch.Tensor | None:
    """What an op divides by, in the output's shape; for a fused AdamW what its root comes from."""
    name = func._schema.name.partition("::")[2]
    position = EXP_AVG_SQ_OF_FUSED if name in FUSED_ADAM else DENOMINATOR.get(name)
    if position is None or position >= len(args):
        return None
    value = args[position]
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    if not isinstance(value, torch.Tensor):
        return None
    return value.expand(shape) if value.shape != shape and value.numel() == 1 else value if value.shape == shape else None


def _operands(func, args: tuple, kwargs: dict):
    """What the op read; an op of somebody's own is taken not to read what it writes to."""
    written = {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write and func.namespace != "aten"}
    names = [argument.name for argument in func._schema.arguments]
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if name in written:
            continue
        for tensor in map(values_of, tree_leaves(value)):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                finite = tensor[tensor.isfinite()]
                yield OperandRecord(
                    argument=name,
                    shape=list(tensor.shape),
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    absmax=float(finite.abs().max()) if finite.numel() else None,
                    nonfinite=tensor.numel() - finite.numel(),
                    zeros=int((finite == 0).sum()),
                )


def _kind(counts: dict[str, int]) -> str:
    """What prevails, NaN or the infinities; ``-inf`` when all of these are negative."""
    return "nan" if counts["nan"] > counts["inf"] + counts["-inf"] else "inf" if counts["inf"] else "-inf"


def _finite_max(values: torch.Tensor | None) -> float | None:
    finite = values[values.isfinite()] if values is not None else torch.empty(0)
    return float(finite.abs().max()) if finite.numel() else None
