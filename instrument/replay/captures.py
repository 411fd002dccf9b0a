"""What is kept of the ops of a step: the inputs of the culprit, and the zeros that rounding made on the way to it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from instrument.replay.diagnosis import as_real, exactly, in_float64, widened
from instrument.replay.graph import Node
from instrument.replay.ops import can_be_nonfinite, is_dense, mutated, pick_element, repeatable
from instrument.replay.storages import Storages


class Captures:
    """Keeps the arguments of the nodes in ``capture`` (by index) as they are before the op runs, in ``captured``, and in
    ``unflushed`` in float64, with what float64 gives for the zeros that the ops in ``followed`` rounded to. Values that are not
    zero are taken as they are, so that only what was flushed differs."""

    def __init__(self, storages: Storages, capture: frozenset[int], followed: frozenset[int]) -> None:
        self.captured: dict[int, tuple[Any, tuple, dict]] = {}
        self.unflushed: dict[int, tuple[tuple, dict]] = {}
        self._capture, self._followed = capture, followed
        self._key, self._exact = storages.key, {}
        self._held: dict[int, tuple[Any, tuple, dict]] = {}

    def hold(self, first: int, func, args: tuple, kwargs: dict, positions: dict[int, int]) -> None:
        """Keep the arguments of the op whose nodes begin at ``first``: of an op over lists, those of each node's position."""
        if not self._capture:
            return
        overwritten = {self._key(t): positions.get(id(t)) for t in mutated(func, args, kwargs) if is_dense(t)}
        elements = [
            *overwritten.values(),
            *(range(1 + max(positions.values())) if positions else [None] * len(func._schema.returns)),
        ]
        for index, element in enumerate(elements, start=first):
            mine = pick_element(args, element), kwargs
            self._held.pop(index, None)  # an op that writes fewer tensors than it returns is overwritten by the next
            if index in self._capture:
                self.captured[index] = (func, *tree_map(_clone, mine))
                self.unflushed[index] = self._undone(mine)
            elif index in self._followed and repeatable(func):
                self._held[index] = (func, *self._undone(mine))

    def note(self, node: Node, place: int, tensor: torch.Tensor) -> None:
        """A node wrote ``tensor``, the op's output at ``place``: which of its zeros are none in float64."""
        if not self._followed or not can_be_nonfinite(tensor):
            return
        written = exactly(*self._held.pop(node.index)) if node.index in self._held else []
        alike = [t for t in written if tuple(t.shape) == node.shape] if node.element is not None else written[place : place + 1]
        flushed, key, tensor = None, self._key(tensor), as_real(tensor)
        alike = [as_real(t) for t in alike]
        if alike and alike[0].shape == tensor.shape:
            flushed = torch.where((tensor == 0) & alike[0].isfinite(), alike[0], 0.0)
            if bool(flushed.any()) and key not in self._exact:
                n = tensor.untyped_storage().nbytes() // tensor.element_size()
                self._exact[key] = torch.zeros(n, dtype=torch.float64, device=tensor.device)
        if key in self._exact:
            _like(self._exact[key], tensor).copy_(torch.zeros(()) if flushed is None else flushed)

    def _undone(self, tree):
        """Arguments in float64, with the flushed zeros as they would be."""
        return in_float64(tree, self._wide)

    def _wide(self, tensor: torch.Tensor) -> torch.Tensor:
        exact = self._exact.get(self._key(tensor))
        if exact is None:
            return widened(tensor)
        if tensor.is_conj():
            return self._wide(tensor.conj()).conj()
        parts = as_real(tensor)
        parts = torch.where(parts == 0, _like(exact, parts), parts)
        return torch.view_as_complex(parts) if tensor.is_complex() else parts


def _like(flat: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a flat tensor that ``tensor`` is of its storage."""
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _clone(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
