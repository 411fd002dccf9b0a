"""One module of a model computed in fp32, whatever runs around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_map

NARROW = (torch.float16, torch.bfloat16)


@dataclass
class InFp32:
    """What is known of the module. ``calls`` of it; ``largest``: the largest finite |x| that its output had in
    fp32, before it was cast back (a device scalar, None without a cast)."""

    calls: int = 0
    largest: torch.Tensor | None = None


@contextmanager
def in_fp32(model: torch.nn.Module, name: str, cast_back: torch.dtype | None) -> Iterator[InFp32]:
    """Run the module ``name`` in fp32 inside: its weights and inputs cast, autocast off around it.

    Its output is cast to ``cast_back``, which a model of 16-bit weights needs; None leaves it in fp32, as
    code does that switches autocast off around a module (what reads it is under autocast and casts for itself).
    Gradients flow into the model's own parameters, rounded to their dtype.
    """
    module = model.get_submodule(name)
    replaced = vars(module).get("forward")  # somebody else's wrapper, or None for the class's own
    shell = _Shell(module)
    seen = InFp32()

    def forward(*args, **kwargs):
        seen.calls += 1
        wide = {f"inner.{n}": t.float() for n, t in (*module.named_parameters(), *module.named_buffers()) if t.dtype in NARROW}
        with torch.autocast(_device_type(module, args), enabled=False):
            out = functional_call(shell, wide, _cast(args, NARROW, torch.float32), _cast(kwargs, NARROW, torch.float32))
        if cast_back is None:
            return out
        _note_largest(out, seen)
        return _cast(out, (torch.float32,), cast_back)

    module.forward = forward
    try:
        yield seen
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced


class _Shell(torch.nn.Module):
    """Holds a module and its own forward, which `functional_call` can run with other weights."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.forward = inner.forward


def _cast(tree: Any, dtypes: tuple[torch.dtype, ...], dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype in dtypes else leaf, tree)


@torch.no_grad()
def _note_largest(out: Any, seen: InFp32) -> None:
    for leaf in torch.utils._pytree.tree_leaves(out):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel():
            largest = torch.where(leaf.isfinite(), leaf.detach().abs(), 0).amax()
            seen.largest = largest if seen.largest is None else torch.maximum(seen.largest, largest)


def _device_type(module: torch.nn.Module, args: tuple) -> str:
    tensors = (*module.parameters(), *(a for a in args if isinstance(a, torch.Tensor)))
    return tensors[0].device.type if tensors else "cpu"
