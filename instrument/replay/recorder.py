"""Recording a step op by op, underneath autograd and autocast: every op that really runs, forward and
backward, in which phase and module, and whether what it wrote is finite.

Every output is read back, so this is for replays, never for training itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from instrument.hooks import call_with_hooks, tensors_in, wrap_unscale
from instrument.replay.captures import Captures
from instrument.replay.diagnosis import fails_without
from instrument.replay.graph import Edge, Node, StepGraph
from instrument.replay.ops import (
    BORN,
    SUM_OVER_RANKS,
    TRITON_PREFIX,
    UNINITIALISED,
    UNRECORDED_WRITE,
    can_be_nonfinite,
    is_dense,
    is_view,
    kinds_of,
    list_positions,
    mutated,
    repeatable,
    triton_launches,
    values_of,
    written_down_kinds,
)
from instrument.replay.position import StepPosition
from instrument.replay.storages import Storages, is_part

READ_OUT = "_local_scalar_dense"
"""What ``tensor.item()`` calls."""


class OpRecorder(TorchDispatchMode):
    """Records the ops inside of `recording` into ``graph``.

    ``capture`` names op indices whose inputs are kept (cloned before the op runs) in ``captured``:
    replaying a step twice gives the same indices, so a second pass can keep just what matters. Zeros that rounding made are
    followed through the ops in ``followed`` to the captured ones, whose inputs without them are in ``unflushed``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        capture: frozenset[int] = frozenset(),
        followed: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self.graph = StepGraph()
        self.failed: dict[str, list[Edge]] = {"loss": [], "grad": [], "param": []}
        """Edges of what a step must leave finite: the losses, the gradients, parameters and states."""
        self.names: dict[int, tuple[str, str]] = {}
        """Storage -> (parameter name, what it is of it: param, grad, exp_avg, ...)."""
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._parameters = dict(model.named_parameters())
        self._storages = Storages(self.graph)
        self._captures = Captures(self._storages, capture, followed)
        self.captured, self.unflushed = self._captures.captured, self._captures.unflushed
        self._literals: set[int] = set()
        self._read_out: list[Edge] = []  # non-finite values that became numbers of Python's
        self._last_scalar: Edge | None = None
        self._position = StepPosition(self._storages, self.names, self._turn)
        for name, parameter in self._parameters.items():
            self.names[self._storages.key(parameter)] = (name, "param")
            if parameter.requires_grad:
                self._storages.before([parameter, parameter.grad], trained=True)
        for module in model.modules():  # parameters, buffers and plain attributes
            self._storages.before(tree_leaves(vars(module)))

    # -- what the step reports ----------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[OpRecorder]:
        """Record everything inside, with the model's modules and the optimizer watched."""
        removers = [call_with_hooks(self._model, self._enter, self._leave)]
        if self._optimizer is not None:
            removers += [
                self._optimizer.register_step_pre_hook(lambda *_: self._enter_optimizer()).remove,
                self._optimizer.register_step_post_hook(lambda *_: self._leave_optimizer()).remove,
            ]
        if self._scaler is not None:
            removers.append(wrap_unscale(self._scaler, lambda: self.phase("unscale")))
        self._name_states()
        for state in self._optimizer.state.values() if self._optimizer is not None else ():
            self._storages.before(state.values(), trained=True)
        try:
            with triton_launches(self._recorded_launch), self:
                yield self
            self._note_gradients()
            self._name_states()
            self._note_parameters()
        finally:
            for remove in removers:
                remove()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase of what runs inside (``unscale``, ``clip``), where nothing can be hooked."""
        self._note_gradients()
        self._position.phase_asked = name
        try:
            yield
        finally:
            self._position.phase_asked = None

    def loss(self, loss: torch.Tensor) -> None:
        """A loss of the step; without this call, the last number computed before backward is taken for one."""
        with _disable_current_modes():
            self.failed["loss"].append(self._edge(loss))

    def _enter(self, name: str, arguments: object) -> None:
        self._look(arguments, unwritten=False)  # what is wrong with them is the caller's
        self._position.enter(name)

    def _leave(self, name: str, output: object) -> None:
        self._look(output)
        self._position.leave(name)

    def _enter_optimizer(self) -> None:
        self._note_gradients(before_update=True)
        self._name_states()
        self._position.update(begins=True)

    def _leave_optimizer(self) -> None:
        self._name_states()
        self._position.update(begins=False)

    def _turn(self, stage: str) -> None:
        if stage != "backward":
            self._note_gradients()
        elif not self.failed["loss"] and self._last_scalar is not None:
            self.failed["loss"].append(self._last_scalar)

    # -- naming -------------------------------------------------------------------------------

    def _note_gradients(self, *, before_update: bool = False) -> None:
        """Take the gradients as they are now for the ones that count: the first that are not finite, unless an update takes
        them repaired. They are freed before the step ends."""
        edges = []
        with _disable_current_modes():
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    self.names[self._storages.key(values := values_of(parameter.grad))] = (name, "grad")
                    edges.append(self._edge(values))
        if before_update or (any(e.kinds for e in edges) and not any(e.kinds for e in self.failed["grad"])):
            self.failed["grad"] = edges

    def _states(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Parameter name, state name and tensor of what the optimizer keeps, but for its step counters."""
        for name, parameter in self._parameters.items() if self._optimizer is not None else ():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and key != "step":
                    yield name, key, value

    def _name_states(self) -> None:
        self.names |= {self._storages.key(value): (name, key) for name, key, value in self._states()}

    def _note_parameters(self) -> None:
        states = (value for *_, value in self._states() if value.is_floating_point())
        self.failed["param"] = [self._edge(tensor) for tensor in (*self._parameters.values(), *states)]

    def _edge(self, tensor: torch.Tensor, *, overwritten: bool = False) -> Edge:
        """Who wrote a tensor, and whether what it holds now is finite; what nobody is known to have written gets a node."""
        edge, unknown = self._storages.read(tensor, overwritten=overwritten, made_here=self._position.in_module)
        if not unknown:
            return edge
        if edge.writer is not None and self._storages.as_allocated(tensor):
            self.graph.nodes[edge.writer].kinds |= unknown  # memory that is read before it is written
            return edge
        known, writer, where = self._storages.kinds[edge.storage], edge.writer, self._position.now()
        if writer is not None and torch._C._current_autograd_node() is not None and self._storages.is_unwritten(tensor):
            where = self.graph.nodes[writer].phase, self.graph.nodes[writer].module  # who allocates memory there fills it
        before = [Edge(writer, edge.storage, known, edge.given)] if known else []
        reads = [(one, None) for one in before + self._storages.faults(edge.storage)]
        self._add(UNRECORDED_WRITE, where, reads, [(tensor, None)], start_ns=time.time_ns())
        return self._storages.read(tensor)[0]

    def _look(self, tree: object, *, unwritten: bool = True) -> None:
        """Find the writes to a module's arguments or output that no op made, while that module is the one that runs."""
        with _disable_current_modes():
            for tensor in tensors_in(tree):
                plain = is_dense(tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
                if plain and (unwritten or not self._storages.is_unwritten(tensor)):
                    self._edge(tensor)

    # -- the ops ------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.replace("::", ".")
        if name == BORN and args[0].ndim == 0:  # a number of Python's
            self._literals.add(self._storages.key(args[0]))
        born = name == BORN and args[0].ndim > 0 and self._position.in_module
        if is_view(func) and not born:
            return func(*args, **kwargs)
        where = self._position.now()
        positions = list_positions(func, args)
        changed = mutated(func, args, kwargs)
        overwritten, unread = {id(t) for t in changed}, {id(t) for t in mutated(func, args, kwargs, unread=True)}
        leaves = tree_leaves((args, kwargs))
        read = [t for t in leaves if can_be_nonfinite(values_of(t)) and id(t) not in unread and not born]
        literals = {id(t) for t in read if self._storages.key(values_of(t)) in self._literals}
        reads = [
            (values := values_of(t), self._edge(values, overwritten=id(t) in overwritten), positions.get(id(t)))
            for t in read
            if id(t) not in literals
        ]
        self._storages.before(changed)
        bad = [edge for _, edge, _ in reads if edge.kinds]
        if func._opname == READ_OUT:
            self._read_out += bad
        written_down = 0 if born else reduce(or_, (written_down_kinds(leaf, literals) for leaf in leaves), 0)
        passed_on = [edge for edge in self._read_out if edge.kinds & written_down]
        alone = fails_without(func, args, kwargs) if bad and all(map(self.graph.meant, bad)) and repeatable(func) else []
        self._captures.hold(len(self.graph.nodes), func, args, kwargs, positions)
        start_ns = time.time_ns()
        out = func(*args, **kwargs)
        placed = [(t, positions.get(id(t))) for t in changed]
        placed += [(t, positions.get(id(t), i if positions else None)) for i, t in enumerate(tree_leaves(out))]
        written = [(values, position) for t, position in placed if is_dense(values := values_of(t))]
        if written:
            others = self._storages.faults(0) if born else passed_on
            of_constants = (
                repeatable(func)
                and func._opname not in UNINITIALISED
                and all(self._storages.is_constant(edge, tensor) for tensor, edge, _ in reads)
                and (not born or self._storages.is_constant(Edge(None, self._storages.key(out), 0), out))
            )
            nodes = self._add(
                name,
                where,
                [(edge, position) for _, edge, position in reads] + [(edge, None) for edge in others],
                written,
                alone,
                constant=kinds_of(out) if born else written_down,
                of_constants=of_constants,
                start_ns=start_ns,
            )
            for place, node in nodes:
                tensor = written[place][0]
                if node.kinds and not bad:
                    node.reads_zero = bool(changed) or any(bool((t == 0).any()) for t, *_ in reads)
                if func._opname in UNINITIALISED:
                    self._storages.allocated(tensor)
                self._captures.note(node, place, tensor)
        return out

    def _add(
        self,
        name: str,
        where: tuple[str, str | None],
        reads: Sequence[tuple[Edge, int | None]],
        written: Sequence[tuple[torch.Tensor, int | None]],
        alone: Sequence[bool] = (),
        **facts: int,
    ) -> list[tuple[int, Node]]:
        """Add the nodes of one op, one or one for every position of its lists, each with its place in ``written``."""
        phase, module = where
        if name == SUM_OVER_RANKS:  # where training makes it while the backward pass still runs
            phase = "backward"
        storages, seen, nodes = self._storages, set(), []
        for place, (tensor, element) in enumerate(written):
            key = storages.key(tensor)
            if key in seen:
                continue
            seen.add(key)
            kinds = 0 if name.rpartition(".")[2] in UNINITIALISED else kinds_of(tensor)
            edges = [edge for edge, position in reads if element is None or position in (None, element)]
            before = storages.kinds.get(key, 0)
            if before and is_part(tensor):
                edges.append(Edge(storages.writers.get(key), key, before))  # the rest is as it was
                kinds |= before
            node = Node(
                len(self.graph.nodes),
                name,
                phase,
                self._position.owner(edges, key) if module is None else module,
                self._position.microbatch_of(phase),
                tuple(edges),
                key,
                kinds,
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                element=element,
                fails_alone=bool(alone) and alone[place],
                **facts,
            )
            self.graph.add(node)
            storages.written(tensor, node.index, kinds)
            self._literals.discard(key)
            nodes.append((place, node))
            number = tensor.ndim == 0 and tensor.is_floating_point() and edges and not name.endswith("ones_like")
            if number and phase in ("forward", "loss"):
                self._last_scalar = Edge(node.index, key, kinds)
        return nodes

    def _recorded_launch(self, run):
        def launch(kernel, *args, **kwargs):
            if kwargs.get("warmup") or not torch._C._len_torch_dispatch_stack():  # inside of an op that is recorded
                return run(kernel, *args, **kwargs)
            with _disable_current_modes():
                where = self._position.now()
                tensors = [leaf for leaf in tree_leaves((args, kwargs)) if can_be_nonfinite(leaf)]
                reads = [(self._edge(tensor, overwritten=True), None) for tensor in tensors]
                start_ns, out = time.time_ns(), run(kernel, *args, **kwargs)
                known = self._storages.kinds
                changed = [
                    (t, None) for t in tensors if self._storages.is_unwritten(t) or kinds_of(t) & ~known[self._storages.key(t)]
                ]
                self._add(TRITON_PREFIX + kernel.__name__, where, reads, changed, start_ns=start_ns)
            return out

        return launch
