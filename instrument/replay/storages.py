"""What the storages of a step hold: which op wrote each last, and what that left there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from instrument.replay.graph import NAN, POS_INF, Edge, StepGraph
from instrument.replay.ops import kinds_of


@dataclass
class Storages:
    """By storage. ``writers``: the last node of ``graph`` that wrote to it; ``kinds``: what it holds as far as the recorded
    ops know; ``trained``: weights, gradients and optimizer states."""

    graph: StepGraph
    writers: dict[int, int] = field(default_factory=dict)
    kinds: dict[int, int] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)
    _kept: dict[int, StorageWeakRef] = field(default_factory=dict)  # a freed storage's address is not used again
    _unwritten: dict[int, torch.Tensor | None] = field(default_factory=dict)
    _two_values: dict[int, bool] = field(default_factory=dict)

    def key(self, tensor: torch.Tensor) -> int:
        """A storage's number, which no other gets as long as this object lives."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._kept.setdefault(reference.cdata, reference)
        return reference.cdata

    def before(self, tensors: Iterable[object], *, trained: bool = False) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.layout == torch.strided:
                self.see(tensor)
                if trained:
                    self.trained.add(self.key(tensor))

    def see(self, tensor: torch.Tensor) -> bool:
        """Note what a storage holds that was not seen before; whether it was one."""
        key = self.key(tensor)
        if key in self.kinds:
            return False
        self.kinds[key] = kinds_of(_whole(tensor))
        return True

    def read(self, tensor: torch.Tensor, *, overwritten: bool = False, made_here: bool = False) -> tuple[Edge, int]:
        """The edge of a tensor that an op reads, and those of its kinds that no recorded op wrote: contents are looked at
        each time, for a tensor's version counts the dispatcher's writes alone. ``overwritten``: the op writes to it, too, so
        that memory which nobody has written yet is not looked at. ``made_here``: code inside of a module brought it up."""
        key = self.key(tensor)
        new = self.see(tensor)
        kinds = kinds_of(tensor.detach())
        if overwritten and key in self._unwritten:
            kinds &= self.kinds[key]
        unknown = kinds & ~self.kinds[key]
        if new and made_here and (kinds & NAN or (kinds & POS_INF and self.faults(key))):
            unknown, self.kinds[key] = kinds, 0
        return Edge(self.writers.get(key), key, kinds, key not in self.trained), unknown

    def faults(self, but: int) -> list[Edge]:
        """The other storages in use that recorded ops left non-finite, meant infinities aside."""
        alive = (key for key, kinds in self.kinds.items() if kinds and key != but and key in self.writers)
        edges = (Edge(self.writers[key], key, self.kinds[key]) for key in alive if not self._kept[key].expired())
        return [edge for edge in edges if not self.graph.meant(edge)]

    def written(self, tensor: torch.Tensor, node: int, kinds: int) -> None:
        key = self.key(tensor)
        self.writers[key], self.kinds[key] = node, kinds
        if not is_part(tensor):
            self._unwritten.pop(key, None)

    def allocated(self, tensor: torch.Tensor) -> None:
        """An op made it and wrote nothing: it holds whatever was in memory."""
        whole = _whole(tensor)
        self._unwritten[self.key(tensor)] = whole.clone() if kinds_of(whole) else None

    def is_unwritten(self, tensor: torch.Tensor) -> bool:
        """Whether no recorded op has written the whole of it since it was allocated."""
        return self.key(tensor) in self._unwritten

    def as_allocated(self, tensor: torch.Tensor) -> bool:
        """Whether its non-finite values are the very ones that the allocation found in memory."""
        found = self._unwritten.get(self.key(tensor))
        if found is None or found.dtype != tensor.dtype:
            return False
        bad = ~tensor.isfinite()
        was, now = (
            t[bad].view(torch.uint8) for t in (found.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()), tensor)
        )
        return torch.equal(was, now)

    def is_constant(self, edge: Edge, tensor: torch.Tensor) -> bool:
        """Whether what an op read goes back to constants, booleans and integers alone, or was handed in like a mask: an
        input or buffer from before the step of at most two values."""
        if edge.writer is not None:
            return self.graph.nodes[edge.writer].of_constants
        if not edge.given or tensor.is_complex() or not tensor.numel():
            return False
        if edge.storage not in self._two_values:
            tensor = tensor.float() if tensor.element_size() == 1 else tensor
            low, high = torch.aminmax(tensor)
            self._two_values[edge.storage] = bool(((tensor == low) | (tensor == high)).all())
        return self._two_values[edge.storage]


def is_part(tensor: torch.Tensor) -> bool:
    """Whether a tensor is less than its storage."""
    return tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage as numbers of its dtype."""
    storage = tensor.untyped_storage()
    n = storage.nbytes() // tensor.element_size()
    return tensor.new_empty(0).set_(storage, 0, (n,), (1,)) if is_part(tensor) else tensor.detach()
