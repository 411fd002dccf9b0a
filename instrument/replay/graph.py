"""The ops of one step as a graph of who read what from whom, and the rule that finds the culprit. Torch-free.

An op *produces* a non-finite value when none of the values it read explains it. The culprit is the earliest producer, in order
of execution, from which a chain of non-finite values leads to what failed: a loss, a gradient, a parameter or a state. Tensors
saved for backward are edges like any other. Other producers were *absorbed*: their infinities died out (``tanh`` of an infinite
``pow``) and are reported, not blamed.

What explains an op's non-finite output, the first of these that it read:

1. NaN, or infinities with +Inf among them, that nobody meant;
2. minus infinities that nobody meant (``exp`` maps them to 0, so they are the weaker evidence);
3. *meant* infinities, where the op is finite once ordinary numbers replace them: written down (``masked_fill(mask, -inf)``,
   ``full(inf)``), computed from constants, booleans and integers alone (``log(mask)``, ``(1 - mask) * -1e9`` in fp16), or there
   before the step in an input or a buffer. An op that makes NaN of a mask's minus infinities alone is itself the producer.

   +Inf and what goes back to it explain before a mask's.

A chain that ends in meant infinities names them only where no other chain ends in a fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

NAN, POS_INF, NEG_INF = 1, 2, 4
"""Bits of ``kinds``: which non-finite values a tensor holds."""


AFTER = "after"
"""The phase of ops after the update: measurements, which no value spreads to."""


@dataclass(slots=True)
class Edge:
    """A tensor that an op read: who wrote its storage last (None: it was there before the step). ``given``: of such a
    tensor, whether it is an input or a buffer, which may hold infinities in health; not a weight, a gradient or a state."""

    writer: int | None
    storage: int
    kinds: int
    given: bool = True


@dataclass(slots=True)
class Node:
    """One op (for an op over lists of tensors: one position of the lists, ``element``).

    ``module`` is the dotted name of the module that called it, or whose forward op it differentiates; None outside of modules.
    ``constant``: the kinds of its non-finite arguments, plain numbers (``masked_fill(mask, -inf)``); ``of_constants``: it read
    nothing that was learned or measured; ``fails_alone``: without the meant infinities that it read, its output is not finite
    either; ``reads_zero``: of a producer, whether one of its inputs held a zero. ``meant``: the non-finite kinds that its
    infinities go back to where somebody meant them, 0 where nobody did.
    """

    index: int
    op: str
    phase: str
    module: str | None
    microbatch: int | None
    inputs: tuple[Edge, ...]
    storage: int
    kinds: int
    dtype: str
    shape: tuple[int, ...]
    start_ns: int = 0
    element: int | None = None
    constant: int = 0
    of_constants: bool = False
    fails_alone: bool = False
    reads_zero: bool = False
    meant: int = 0


@dataclass(frozen=True)
class Culprit:
    """What the rule found. ``node`` is None when the value was there before the step: then ``storage``
    says which tensor. ``chain``: the first op of each phase and module that the value reached, itself
    first; ``spread``: how many modules; ``alike``: how many other producers ran the same op in the same
    phase (an optimizer that fails for one parameter fails for many)."""

    node: Node | None
    storage: int
    chain: tuple[Node, ...] = ()
    spread: int = 0
    absorbed: tuple[Node, ...] = ()
    alike: int = 0


@dataclass
class StepGraph:
    """The recorded ops of a step, in order of execution."""

    nodes: list[Node] = field(default_factory=list)

    def add(self, node: Node) -> None:
        """Append the next op and note whether its infinities are meant."""
        read = [self.meant(edge) for edge in node.inputs if edge.kinds]
        if node.kinds and not node.kinds & NAN and all(read):
            if node.constant or node.of_constants:
                node.meant = reduce(or_, read, node.constant & ~NAN or node.kinds)
            elif not node.fails_alone:
                node.meant = reduce(or_, read, 0)
        self.nodes.append(node)

    def meant(self, edge: Edge) -> int:
        """The kinds that an edge's infinities go back to where somebody meant them, else 0."""
        if edge.kinds & NAN:
            return 0
        if edge.writer is None:
            return edge.kinds if edge.given else 0
        return self.nodes[edge.writer].meant

    def to_blame(self, node: Node) -> list[Edge]:
        """The inputs that explain a node's non-finite output; none of a producer."""
        read = [edge for edge in node.inputs if edge.kinds]
        faults = [edge for edge in read if not self.meant(edge)]
        if faults:
            return [edge for edge in faults if edge.kinds != NEG_INF] or faults
        no_masks = [edge for edge in read if self.meant(edge) != NEG_INF]
        return [] if node.fails_alone or (node.kinds & NAN and not no_masks) else no_masks or read

    def culprit(self, failed: Iterable[Edge]) -> Culprit | None:
        """The earliest producer that the ``failed`` tensors lead back to; None when they are all finite."""
        stack = [edge for edge in failed if edge.kinds]
        if not stack:
            return None
        visited: set[int] = set()
        producers: list[Node] = []
        before: list[Edge] = []
        while stack:
            edge = stack.pop()
            if edge.writer is None:
                before.append(edge)
                continue
            if edge.writer in visited:
                continue
            visited.add(edge.writer)
            node = self.nodes[edge.writer]
            causes = self.to_blame(node)
            if causes:
                stack += causes
            else:
                producers.append(node)
        for allowed in ((0,), (POS_INF, POS_INF | NEG_INF)):  # faults, else what goes back to +Inf, else masks
            mine = [n for n in producers if n.meant in allowed], [e for e in before if self.meant(e) in allowed]
            if any(mine):
                producers, before = mine
                break
        first = None if before else min(producers, key=lambda node: node.index)
        storage = before[-1].storage if before else first.storage
        reached = self._reached(first, {edge.storage for edge in before})
        absorbed = [n for n in self.nodes if n.kinds and n.index not in visited and not n.meant and not self.to_blame(n)]
        modules = {node.module for node in reached if node.module}
        alike = sum(n is not first and (n.op, n.phase) == (first.op, first.phase) for n in producers) if first else 0
        return Culprit(
            first, storage, _firsts(reached, "phase", "module"), len(modules), _firsts(absorbed, "phase", "module", "op"), alike
        )

    def _reached(self, first: Node | None, before: set[int]) -> list[Node]:
        """The nodes with non-finite values that the culprit's spread to, itself included."""
        reached: set[int] = set() if first is None else {first.index}
        found = [] if first is None else [first]

        def carries(edge: Edge) -> bool:
            return bool(edge.kinds) and (edge.writer in reached or (edge.writer is None and edge.storage in before))

        for node in self.nodes:
            if node.kinds and node.phase != AFTER and node.index not in reached and any(map(carries, node.inputs)):
                reached.add(node.index)
                found.append(node)
        return found

    def ancestors(self, node: Node, limit: int) -> list[Node]:
        """The ops that an op's inputs were computed from, finite ones too: newest first, at most ``limit``."""
        found: dict[int, Node] = {}
        pending = {edge.writer for edge in node.inputs if edge.writer is not None}
        while pending and len(found) < limit:
            writer = max(pending)
            pending.remove(writer)
            found[writer] = self.nodes[writer]
            pending |= {e.writer for e in found[writer].inputs if e.writer is not None and e.writer not in found}
        return list(found.values())


def _firsts(nodes: Sequence[Node], *alike: str) -> tuple[Node, ...]:
    """Of the nodes that have the same in these attributes the first, in order."""
    seen: dict[tuple, Node] = {}
    for node in nodes:
        seen.setdefault(tuple(getattr(node, name) for name in alike), node)
    return tuple(seen.values())
