"""A model's modules: their names, their calls, and which of them are blocks and leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList


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
