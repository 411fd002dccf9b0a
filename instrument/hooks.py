"""Hooks on what a loop owns: a model's modules (which of them are blocks, which leaves) and its loss scaler.

A copied or pickled model has no hooks, and each one comes with what takes it off again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.optimizer import register_optimizer_step_post_hook


def call_with_hooks(
    model: nn.Module, entering: Callable[[str, object], None], leaving: Callable[[str, object], None]
) -> Callable[[], None]:
    """Call ``entering(name, arguments)`` before and ``leaving(name, output)`` after every module's forward, whatever other
    hooks there are and also when it raises; returns what takes the hooks off again. The model itself is ``""``."""
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: entering(name, (args, kwargs)), prepend=True, with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda *_, name=name: leaving(name, _[-1]), always_call=True))

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
        return _no_hook, ()


def _no_hook() -> Callable:
    return _nothing


def _nothing(*args: object, **kwargs: object) -> None:
    """What a copied hook does."""


def after_any_update(call: Callable[[torch.optim.Optimizer], None]) -> Callable[[], None]:
    """Call the method ``call(optimizer)`` after every step of any optimizer, as long as its object lives; returns what ends
    that."""
    method = weakref.WeakMethod(call)

    def updated(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if (alive := method()) is not None:
            alive(optimizer)

    return register_optimizer_step_post_hook(updated).remove


class _Unscale:
    """``scaler.unscale_`` with others around it; a copy of the scaler gets the plain method, bound to itself."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.original: Callable | None = vars(scaler).get("unscale_")  # somebody else's replacement
        self.around: list[Callable[[], AbstractContextManager]] = []

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        with ExitStack() as stack:
            for around in self.around:
                stack.enter_context(around())
            (self.original or _plain(self.scaler))(optimizer)

    def __reduce__(self) -> tuple:
        return _plain, (self.scaler,)


def _plain(scaler: torch.amp.GradScaler) -> Callable:
    return type(scaler).unscale_.__get__(scaler)


def wrap_unscale(scaler: torch.amp.GradScaler, around: Callable[[], AbstractContextManager]) -> Callable[[], None]:
    """Run every ``scaler.unscale_`` (``step`` calls it, too) inside ``around()``, whoever else wraps it; returns
    what undoes it, in any order."""
    wrapped = vars(scaler).get("unscale_")
    if not isinstance(wrapped, _Unscale):
        wrapped = scaler.unscale_ = _Unscale(scaler)
    wrapped.around.append(around)

    def remove() -> None:
        if around in wrapped.around:
            wrapped.around.remove(around)
        if not wrapped.around and vars(scaler).get("unscale_") is wrapped:
            del scaler.unscale_
            if wrapped.original is not None:
                scaler.unscale_ = wrapped.original

    return remove
