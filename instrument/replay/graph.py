"""The ops of one step as a graph of who read what from whom, and the rule that finds the culprit. Torch-free.

An op *produces* a non-finite value when none of the values it read explains it: they are finite, or are infinities on purpose
(the -inf of a mask). The culprit is the earliest producer from which a chain of non-finite values leads to what failed: a loss,
a gradient, a parameter or a state. Tensors saved for backward are edges like any other. Other producers were *absorbed*: their
infinities died out (``tanh`` of an infinite ``pow``) and are reported, not blamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

NAN, POS_INF, NEG_INF = 1, 2, 4
"""Bits of ``kinds``: which non-finite values a tensor holds."""


AFTER = "after"
"""The phase of ops after the update: measurements, which no value spreads to."""


@dataclass(slots=True)
class Edge:
    """A tensor that an op read: who wrote its storage last (None: it was there before the step)."""

    writer: int | None
    storage: int
    kinds: int


@dataclass(slots=True)
class Node:
    """One op (for an op over lists of tensors: one position of the lists, ``element``).

    ``module`` is the dotted name of the module that called it, or whose forward op it differentiates; None outside of modules.
    ``constant``: a non-finite number was written down in its arguments (``masked_fill(mask, -inf)``).
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
    constant: bool = False
    on_purpose: bool = False


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
        """Append the next op and note whether its infinities are on purpose."""
        unexplained = [edge for edge in node.inputs if edge.kinds and not self.on_purpose(edge)]
        explained = any(edge.kinds for edge in node.inputs) and not unexplained
        node.on_purpose = node.kinds == NEG_INF and (node.constant or explained)
        self.nodes.append(node)

    def on_purpose(self, edge: Edge) -> bool:
        """Whether an edge's non-finite values are a mask's: -inf only, written down or handed in."""
        if edge.kinds != NEG_INF:
            return False
        return edge.writer is None or self.nodes[edge.writer].on_purpose

    def to_blame(self, node: Node) -> list[Edge]:
        """The inputs that may explain a node's non-finite output: NaN and +inf before -inf, masks never."""
        edges = [edge for edge in node.inputs if edge.kinds and not self.on_purpose(edge)]
        strong = [edge for edge in edges if edge.kinds != NEG_INF]
        return strong or edges

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
        first = None if before else min(producers, key=lambda node: node.index)
        storage = before[-1].storage if before else first.storage
        reached = self._reached(first, {edge.storage for edge in before})
        absorbed = [n for n in self.nodes if n.kinds and n.index not in visited and not n.on_purpose and not self.to_blame(n)]
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

    def ancestors(self, edge: Edge, limit: int) -> list[Node]:
        """The ops that a tensor was computed from, finite ones too: newest first, at most ``limit``."""
        found: dict[int, Node] = {}
        pending = [edge]
        while pending and len(found) < limit:
            pending.sort(key=lambda e: -1 if e.writer is None else e.writer)
            writer = pending.pop().writer
            if writer is None or writer in found:
                continue
            found[writer] = self.nodes[writer]
            pending += self.nodes[writer].inputs
        return list(found.values())


def _firsts(nodes: Sequence[Node], *alike: str) -> tuple[Node, ...]:
    """Of the nodes that have the same in these attributes the first, in order."""
    seen: dict[tuple, Node] = {}
    for node in nodes:
        seen.setdefault(tuple(getattr(node, name) for name in alike), node)
    return tuple(seen.values())
