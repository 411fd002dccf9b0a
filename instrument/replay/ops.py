"""What an op reads, writes and repeats over lists, by its schema; and what a tensor holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves

from instrument.replay.graph import NAN, NEG_INF, POS_INF

OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_"}
"""Ops that do not read what they write to."""
UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
"""Ops whose output is whatever was in memory."""

SUM_OVER_RANKS = "ddb.sum_over_ranks_"
"""Gradients summed over the processes of a run: what comes out is other processes' too, so that it can neither be
explained by what this one put in nor run again alone."""
UNRECORDED_WRITE = "ddb.unrecorded_write"
"""A write that no op made: through NumPy's view of a tensor, by a C extension, by a kernel launched past the dispatcher."""
BORN = "aten.lift_fresh"
"""What ``torch.tensor(...)`` and ``torch.from_numpy(...)`` call on numbers that Python or NumPy made."""
TRITON_PREFIX = "triton."
TRITON_LAUNCHERS = {"triton.runtime.jit": "JITFunction", "triton.runtime.interpreter": "InterpretedFunction"}


def runs_again(op: str) -> bool:
    """Whether a recorded op can be run again alone from its inputs."""
    return op not in (SUM_OVER_RANKS, UNRECORDED_WRITE, BORN) and not op.startswith(TRITON_PREFIX)


def kinds_of(tensor: torch.Tensor) -> int:
    """Bits of the non-finite values in a tensor; 0 for integers, empty tensors and other than plain ones."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0 or tensor.is_meta:
        return 0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.element_size() == 1:
        tensor = tensor.float()
    low, high = torch.aminmax(tensor.detach())
    low, high = float(low), float(high)
    if math.isnan(low) or math.isnan(high):  # a NaN hides the infinities
        return NAN | POS_INF * bool((tensor == math.inf).any()) | NEG_INF * bool((tensor == -math.inf).any())
    return POS_INF * (high == math.inf) | NEG_INF * (low == -math.inf)


def written_down_kinds(leaf: object, literals: set[int]) -> int:
    """The kind of an argument that is a non-finite number, or a tensor that was made of one."""
    if id(leaf) in literals:
        return kinds_of(leaf)
    return (
        0 if not isinstance(leaf, float) or math.isfinite(leaf) else NAN if leaf != leaf else POS_INF if leaf > 0 else NEG_INF
    )


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


BATCH_NORMS = ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")
"""Ops that write to their running statistics, which their schemas do not say."""


def mutated(func, args: tuple, kwargs: dict, *, unread: bool = False) -> list[torch.Tensor]:
    """The tensors among the arguments that an op writes to; with ``unread`` those of them that it does not read."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        statistics = func._schema.name in BATCH_NORMS and argument.name in ("running_mean", "running_var")
        if statistics or (argument.alias_info is not None and argument.alias_info.is_write):
            if unread and not argument.is_out and func._opname not in OVERWRITES:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def outputs(func, args: tuple, kwargs: dict, out: object) -> list[torch.Tensor]:
    """The dense tensors that an op wrote: to its arguments, then what it returned."""
    return [t for t in map(values_of, (*mutated(func, args, kwargs), *tree_leaves(out))) if is_dense(t)]


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


def repeatable(func) -> bool:
    """Whether torch's own op can be run a second time without a trace: another's may write elsewhere, a random one draws."""
    return func.namespace == "aten" and torch.Tag.nondeterministic_seeded not in func.tags


@contextmanager
def triton_launches(through: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, Triton kernels are launched by ``through(run)`` in place of ``run``: they go past the dispatcher."""
    launchers = [getattr(sys.modules[name], kind) for name, kind in TRITON_LAUNCHERS.items() if name in sys.modules]
    plain = [launcher.run for launcher in launchers]
    for launcher, run in zip(launchers, plain, strict=True):
        launcher.run = through(run)
    try:
        yield
    finally:
        for launcher, run in zip(launchers, plain, strict=True):
            launcher.run = run
