"""Recording a step op by op, underneath autograd and autocast: every op that really runs, forward and
backward, in which phase and module, and whether what it wrote is finite.

Every output is read back, so this is for replays, never for training itself.
"""

from __future__ import annotations

import math
import sys
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
from instrument.replay.graph import AFTER, NAN, NEG_INF, POS_INF, Edge, Node, StepGraph
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
    values_of,
)
from instrument.replay.storages import Storages, is_part

READ_OUT = "_local_scalar_dense"
"""What ``tensor.item()`` calls."""
TRITON_LAUNCHERS = {"triton.runtime.jit": "JITFunction", "triton.runtime.interpreter": "InterpretedFunction"}


class OpRecorder(TorchDispatchMode):
    """Records the ops between ``begin()`` and ``end()`` into ``graph``.

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
        self._modules: list[str] = []
        self._module_of_sequence: dict[int, str | None] = {}
        self._microbatch = -1
        self._stage = "forward"  # of code outside of autograd
        self._phase_asked: str | None = None
        self._updating = False
        self._last_scalar: Edge | None = None
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
            with self._launches_recorded(), self:
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
        self._phase_asked = name
        try:
            yield
        finally:
            self._phase_asked = None

    def loss(self, loss: torch.Tensor) -> None:
        """A loss of the step; without this call, the last number computed before backward is taken for one."""
        with _disable_current_modes():
            self.failed["loss"].append(self._edge(loss))

    def _enter(self, name: str, arguments: object) -> None:
        self._look(arguments, unwritten=False)  # what is wrong with them is the caller's
        if not name and torch._C._current_autograd_node() is None:
            self._stage = "forward"
            self._microbatch += torch.is_grad_enabled()
        if self._modules:  # a checkpoint's node is made before the modules inside it run: it is the caller's
            self._module_of_sequence.setdefault(torch._C._autograd._get_sequence_nr() - 1, self._modules[-1])
        self._modules.append(name)

    def _leave(self, name: str, output: object) -> None:
        self._look(output)
        while self._modules and self._modules.pop() != name:
            pass
        if not self._modules and torch._C._current_autograd_node() is None:
            self._stage = "loss"

    def _enter_optimizer(self) -> None:
        self._note_gradients(before_update=True)
        self._name_states()
        self._stage, self._updating = "optimizer", True

    def _leave_optimizer(self) -> None:
        self._name_states()
        self._stage, self._updating = AFTER, False

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

    def _name_states(self) -> None:
        if self._optimizer is None:
            return
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and key != "step":
                    self.names[self._storages.key(value)] = (name, key)

    def _note_parameters(self) -> None:
        edges = [self._edge(parameter) for parameter in self._parameters.values()]
        for parameter in self._parameters.values() if self._optimizer is not None else ():
            edges += [
                self._edge(value)
                for key, value in self._optimizer.state.get(parameter, {}).items()
                if torch.is_tensor(value) and value.is_floating_point() and key != "step"
            ]
        self.failed["param"] = edges

    def _edge(self, tensor: torch.Tensor, *, overwritten: bool = False) -> Edge:
        """Who wrote a tensor, and whether what it holds now is finite; what nobody is known to have written gets a node."""
        edge, unknown = self._storages.read(tensor, overwritten=overwritten, made_here=self._in_module)
        if not unknown:
            return edge
        if edge.writer is not None and self._storages.as_allocated(tensor):
            self.graph.nodes[edge.writer].kinds |= unknown  # memory that is read before it is written
            return edge
        known, writer, where = self._storages.kinds[edge.storage], edge.writer, self._where()
        if writer is not None and torch._C._current_autograd_node() is not None and self._storages.is_unwritten(tensor):
            where = self.graph.nodes[writer].phase, self.graph.nodes[writer].module  # who allocates memory there fills it
        before = [Edge(writer, edge.storage, known, edge.given)] if known else []
        self._add(UNRECORDED_WRITE, where, before + self._storages.faults(edge.storage), [(tensor, None)])
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
        born = name == BORN and args[0].ndim > 0 and self._in_module
        if is_view(func) and not born:
            return func(*args, **kwargs)
        where = self._where()
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
        written_down = 0 if born else reduce(or_, (_written_down(leaf, literals) for leaf in leaves), 0)
        passed_on = [edge for edge in self._read_out if edge.kinds & written_down]
        alone = fails_without(func, args, kwargs) if bad and all(map(self.graph.meant, bad)) and repeatable(func) else []
        self._captures.hold(len(self.graph.nodes), func, args, kwargs, positions)
        start_ns = time.time_ns()
        out = func(*args, **kwargs)
        written = [
            (values, positions.get(id(t), i if positions else None))
            for i, t in enumerate(tree_leaves(out))
            if is_dense(values := values_of(t))
        ]
        written = [(values, positions.get(id(t))) for t in changed if is_dense(values := values_of(t))] + written
        if written:
            nodes = self._add(
                name,
                where,
                self._storages.faults(0) if born else [*(edge for _, edge, _ in reads), *passed_on],
                written,
                positions=[*(position for *_, position in reads), *(None for _ in passed_on)] or None,
                alone=alone,
                constant=kinds_of(out) if born else written_down,
                of_constants=repeatable(func)
                and func._opname not in UNINITIALISED
                and all(self._is_constant(edge, tensor) for tensor, edge, _ in reads)
                and (not born or self._is_constant(Edge(None, self._storages.key(out), 0), out)),
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
        reads: Sequence[Edge],
        written: Sequence[tuple[torch.Tensor, int | None]],
        *,
        positions: Sequence[int | None] | None = None,
        alone: Sequence[bool] = (),
        constant: int = 0,
        of_constants: bool = False,
        start_ns: int = 0,
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
            edges = [
                e
                for e, p in zip(reads, positions or [None] * len(reads), strict=True)
                if element is None or p in (None, element)
            ]
            before = storages.kinds.get(key, 0)
            if before and is_part(tensor):
                edges.append(Edge(storages.writers.get(key), key, before))  # the rest is as it was
                kinds |= before
            node = Node(
                len(self.graph.nodes),
                name,
                phase,
                self._owner(edges, key) if module is None else module,
                self._microbatch_of(phase),
                tuple(edges),
                key,
                kinds,
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                start_ns or time.time_ns(),
                element,
                constant,
                of_constants,
                bool(alone) and alone[place],
            )
            self.graph.add(node)
            storages.written(tensor, node.index, kinds)
            self._literals.discard(key)
            nodes.append((place, node))
            number = tensor.ndim == 0 and tensor.is_floating_point() and edges and not name.endswith("ones_like")
            if number and phase in ("forward", "loss"):
                self._last_scalar = Edge(node.index, key, kinds)
        return nodes

    def _is_constant(self, edge: Edge, tensor: torch.Tensor) -> bool:
        """Whether what an op read goes back to constants, booleans and integers alone, or was handed in like a mask."""
        if edge.writer is not None:
            return self.graph.nodes[edge.writer].of_constants
        return self._storages.like_a_mask(edge, tensor)

    @contextmanager
    def _launches_recorded(self) -> Iterator[None]:
        """Record the Triton kernels that are launched past the dispatcher."""
        launchers = [getattr(sys.modules[name], kind) for name, kind in TRITON_LAUNCHERS.items() if name in sys.modules]
        plain = [launcher.run for launcher in launchers]
        for launcher, run in zip(launchers, plain, strict=True):
            launcher.run = self._recorded_launch(run)
        try:
            yield
        finally:
            for launcher, run in zip(launchers, plain, strict=True):
                launcher.run = run

    def _recorded_launch(self, run):
        def launch(kernel, *args, **kwargs):
            if kwargs.get("warmup") or not torch._C._len_torch_dispatch_stack():  # inside of an op that is recorded
                return run(kernel, *args, **kwargs)
            with _disable_current_modes():
                where = self._where()
                tensors = [leaf for leaf in tree_leaves((args, kwargs)) if can_be_nonfinite(leaf)]
                reads = [self._edge(tensor, overwritten=True) for tensor in tensors]
                start_ns, out = time.time_ns(), run(kernel, *args, **kwargs)
                known = self._storages.kinds
                changed = [
                    (t, None) for t in tensors if self._storages.is_unwritten(t) or kinds_of(t) & ~known[self._storages.key(t)]
                ]
                self._add(TRITON_PREFIX + kernel.__name__, where, reads, changed, start_ns=start_ns)
            return out

        return launch

    @property
    def _in_module(self) -> bool:
        return bool(self._modules) or torch._C._current_autograd_node() is not None

    def _where(self) -> tuple[str, str | None]:
        """Phase and module of the op that runs now."""
        node = torch._C._current_autograd_node()
        if node is not None and self._phase_asked is None and self._stage != "optimizer":
            if self._stage in ("forward", "loss"):
                self._stage = "backward"
                if not self.failed["loss"] and self._last_scalar is not None:
                    self.failed["loss"].append(self._last_scalar)
            variable = getattr(node, "variable", None)
            if self._modules:  # a checkpointed module runs again
                module = self._modules[-1]
            elif variable is not None:
                module = self._owner_of_parameter(variable)
            else:
                module = self._module_of_sequence.get(node._sequence_nr())
            if torch.is_grad_enabled():  # what runs again, or create_graph, has a backward pass of its own
                self._module_of_sequence.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
            return "backward", module
        if self._stage == "backward":
            self._stage = "optimizer" if self._updating else "clip"  # an optimizer resumes after its closure
            self._note_gradients()
        module = self._modules[-1] if self._modules else None
        if self._stage in ("forward", "loss"):
            self._module_of_sequence.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
        return self._phase_asked or self._stage, module

    def _microbatch_of(self, phase: str) -> int | None:
        return self._microbatch if phase in ("forward", "loss", "backward") and self._microbatch >= 0 else None

    def _owner_of_parameter(self, parameter: torch.Tensor) -> str | None:
        named = self.names.get(self._storages.key(parameter))
        return named[0].rpartition(".")[0] if named else None

    def _owner(self, edges: list[Edge], key: int) -> str | None:
        """Outside of modules: the module whose parameter (or gradient, or state) an op works on."""
        for storage in (key, *(edge.storage for edge in edges)):
            if storage in self.names:
                return self.names[storage][0].rpartition(".")[0]
        if self._stage != "optimizer":
            return None
        writers = (self.graph.nodes[edge.writer] for edge in edges if edge.writer is not None)
        return next((n.module for n in writers if n.phase == "optimizer" and n.module is not None), None)


def _written_down(leaf: object, literals: set[int]) -> int:
    """The kind of an argument that is a non-finite number, or a tensor that was made of one."""
    if id(leaf) in literals:
        return kinds_of(leaf)
    return (
        0 if not isinstance(leaf, float) or math.isfinite(leaf) else NAN if leaf != leaf else POS_INF if leaf > 0 else NEG_INF
    )
