"""A model's modules: their names, their calls, and which of them are blocks and leaves.

Hooks that stay behind when what carries them is copied or pickled.

How far every module's values stay from fp16's limits. Torch-free but for what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from kernels.float_formats import FP16


def call_with_hooks(model: nn.Module, entering: Callable[[str], None], leaving: Callable[[str], None]) -> Callable[[], None]:
    """Call ``entering(name)`` before and ``leaving(name)`` behind every module's forward, whatever other hooks
    there are and also when it raises; returns what takes the hooks off again. The model itself is ``""``."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: entering(name), prepend=True))
        handles.append(module.register_forward_hook(lambda *_, name=name: leaving(name), always_call=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The parts to watch at every step: the layers (members of outermost `ModuleList`s) and, where a
    model has some parameters outside of them, its direct children."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        a_list = isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList)
        if a_list and not any(name.startswith(layer + ".") for layer in layers):
            layers |= {f"{name}.{child}": part for child, part in module.named_children()}
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    around = {
        name: child
        for name, child in model.named_children()
        if not isinstance(child, nn.ModuleList) and any(id(p) not in inside for p in child.parameters())
    }
    return {name: module for name, module in model.named_modules() if name in layers or name in around}


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Every module without children."""
    return {name: module for name, module in model.named_modules() if name and next(module.children(), None) is None}


def tensors_in(output: object) -> Iterator[torch.Tensor]:
    """The floating-point tensors of a module's output: nested tuples, lists, dicts, model outputs, dataclasses."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            yield from tensors_in(getattr(output, name))


class Hook:
    """Calls ``call``; its copy does nothing: ``copy.deepcopy(model)`` (an average of weights) and
    ``torch.save(model)`` take a module's hooks along, and with a plain method the whole watch."""

    def __init__(self, call: Callable) -> None:
        self._call = call

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return _left_behind, ()


def _left_behind() -> Callable:
    return _nothing


def _nothing(*args: object, **kwargs: object) -> None:
    """What a copied hook does."""


@dataclass(frozen=True)
class Headroom:
    """One module and direction over all steps read. ``bits``: log2(65,504 / absmax), negative beyond fp16's
    range, null when all values were zero; ``flush_frac``: the largest share of nonzero values that fp16
    would flush to zero, null where only the range was taken; ``step``: of the largest value."""

    module: str
    direction: str
    absmax: float
    bits: float | None
    flush_frac: float | None
    nonfinite: int
    step: int


class HeadroomTable:
    """The running table behind `Watch.headroom`."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, str, str], Headroom] = {}

    def add(self, readings: Iterable) -> None:
        """Take in `taps.TapReading`s."""
        for r in readings:
            key = (r.order, r.module, r.direction)
            old = self._rows.get(key)
            larger = old is None or r.absmax > old.absmax
            absmax = r.absmax if larger else old.absmax
            shares = [share for share in (r.flush_frac, old and old.flush_frac) if share is not None]
            self._rows[key] = Headroom(
                r.module,
                r.direction,
                absmax,
                FP16.headroom_bits(absmax),
                max(shares, default=None),
                r.nan + r.inf + (old.nonfinite if old else 0),
                r.step if larger else old.step,
            )

    def rows(self) -> list[Headroom]:
        """In the model's order, forward before backward."""
        return [self._rows[key] for key in sorted(self._rows, key=lambda k: (k[0], k[2] == "bwd"))]
