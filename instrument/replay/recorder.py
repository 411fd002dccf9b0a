"""Recording a step op by op, underneath autograd and autocast: every op that really runs, forward and
backward, in which phase and module, and whether what it wrote is finite.

Every output is read back, so this is for replays, never for training itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from instrument.replay.diagnosis import (
    OVERWRITES,
    SUM_OVER_RANKS,
    UNINITIALISED,
    can_be_nonfinite,
    is_dense,
    is_view,
    kinds_of,
    list_positions,
    mutated,
    pick_element,
    values_of,
)
from instrument.replay.graph import AFTER, Edge, Node, StepGraph
from instrument.watch.hooks import call_with_hooks, wrap_unscale


class OpRecorder(TorchDispatchMode):
    """Records the ops between ``begin()`` and ``end()`` into ``graph``.

    ``capture`` names op indices whose inputs are kept (cloned before the op runs) in ``captured``:
    replaying a step twice gives the same indices, so a second pass can keep just what matters.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        capture: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self.graph = StepGraph()
        self.capture = capture
        self.captured: dict[int, tuple[Any, tuple, dict]] = {}
        self.failed: dict[str, list[Edge]] = {"loss": [], "grad": [], "param": []}
        """Edges of what a step must leave finite: the losses, the gradients, parameters and states."""
        self.names: dict[int, tuple[str, str]] = {}
        """Storage -> (parameter name, what it is of it: param, grad, exp_avg, ...)."""
        self._model, self._optimizer, self._scaler = model, optimizer, scaler
        self._parameters = dict(model.named_parameters())
        self._writers: dict[int, int] = {}
        self._known: dict[int, int] = {}  # storage -> kinds of its last write
        self._kept: dict[int, StorageWeakRef] = {}  # holds the keys: a freed storage's address is not used again
        self._modules: list[str] = []
        self._module_of_sequence: dict[int, str | None] = {}
        self._microbatch = -1
        self._stage = "forward"  # of code outside of autograd
        self._phase_asked: str | None = None
        self._updating = False
        self._last_scalar: Edge | None = None
        self._states_named = False
        for name, parameter in self._parameters.items():
            self.names[self._key(parameter)] = (name, "param")

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
        try:
            with self:
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

    def _enter(self, name: str) -> None:
        if not name and torch._C._current_autograd_node() is None:
            self._stage = "forward"
            self._microbatch += torch.is_grad_enabled()
        if self._modules:  # a checkpoint's node is made before the modules inside it run: it is the caller's
            self._module_of_sequence.setdefault(torch._C._autograd._get_sequence_nr() - 1, self._modules[-1])
        self._modules.append(name)

    def _leave(self, name: str) -> None:
        while self._modules and self._modules.pop() != name:
            pass
        if not self._modules and torch._C._current_autograd_node() is None:
            self._stage = "loss"

    def _enter_optimizer(self) -> None:
        self._note_gradients()
        self._name_states()
        self._stage, self._updating = "optimizer", True

    def _leave_optimizer(self) -> None:
        self._name_states()
        self._stage, self._updating = AFTER, False

    # -- naming -------------------------------------------------------------------------------

    def _note_gradients(self) -> None:
        """Take the gradients as they are now for the ones that count; they are freed before the step ends."""
        edges = []
        with _disable_current_modes():
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    edges.append(self._edge(values_of(parameter.grad)))
                    self.names[edges[-1].storage] = (name, "grad")
        if any(edge.kinds for edge in edges) and not any(edge.kinds for edge in self.failed["grad"]):
            self.failed["grad"] = edges

    def _name_states(self) -> None:
        if self._optimizer is None:
            return
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value) and key != "step":
                    self.names[self._key(value)] = (name, key)

    def _note_parameters(self) -> None:
        edges = [self._edge(parameter) for parameter in self._parameters.values()]
        for parameter in self._parameters.values() if self._optimizer is not None else ():
            edges += [
                self._edge(value)
                for key, value in self._optimizer.state.get(parameter, {}).items()
                if torch.is_tensor(value) and value.is_floating_point() and key != "step"
            ]
        self.failed["param"] = edges

    def _key(self, tensor: torch.Tensor) -> int:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._kept.setdefault(reference.cdata, reference)
        return reference.cdata

    def _edge(self, tensor: torch.Tensor) -> Edge:
        """Who wrote a tensor, and whether what it holds now is finite."""
        key = self._key(tensor)
        kinds = 0 if self._known.get(key, -1) == 0 else kinds_of(tensor.detach())
        return Edge(self._writers.get(key), key, kinds)

    # -- the ops ------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_view(func):
            return func(*args, **kwargs)
        name = func._schema.name.replace("::", ".")
        positions = list_positions(func, args)
        replaced = {id(t) for t in mutated(func, args, kwargs)} if name.rpartition(".")[2] in OVERWRITES else set()
        reads = [
            (self._edge(values), positions.get(id(leaf)))
            for leaf in tree_leaves((args, kwargs))
            if can_be_nonfinite(values := values_of(leaf)) and id(leaf) not in replaced
        ]
        if self.capture:
            self._hold(func, args, kwargs, positions)
        start_ns = time.time_ns()
        out = func(*args, **kwargs)
        written = [
            (values, positions.get(id(t), i if positions else None))
            for i, t in enumerate(tree_leaves(out))
            if is_dense(values := values_of(t))
        ]
        written = [
            (values, positions.get(id(t))) for t in mutated(func, args, kwargs) if is_dense(values := values_of(t))
        ] + written
        if written:
            constant = any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in tree_leaves((args, kwargs)))
            self._record(name, reads, written, constant, start_ns)
        return out

    def _record(
        self,
        name: str,
        reads: list[tuple[Edge, int | None]],
        written: list[tuple[torch.Tensor, int | None]],
        constant: bool,
        start_ns: int,
    ) -> None:
        """Add the nodes of one op: one, or one for every position of its lists."""
        phase, module = self._where()
        if name == SUM_OVER_RANKS:  # where training makes it while the backward pass still runs
            phase = "backward"
        seen: set[int] = set()
        for tensor, element in written:
            key = self._key(tensor)
            if key in seen:
                continue
            seen.add(key)
            kinds = 0 if name.rpartition(".")[2] in UNINITIALISED else kinds_of(tensor)
            edges = [edge for edge, position in reads if element is None or position in (None, element)]
            before = self._known.get(key, 0)
            if before and tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes():
                edges.append(Edge(self._writers.get(key), key, before))  # a part was written: the rest is as it was
                kinds |= before
            owner = self._owner(edges, key) if module is None else module
            node = Node(
                len(self.graph.nodes),
                name,
                phase,
                owner,
                self._microbatch_of(phase),
                tuple(edges),
                key,
                kinds,
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                start_ns,
                element,
                constant,
            )
            self.graph.add(node)
            self._writers[key], self._known[key] = node.index, kinds
            number = tensor.ndim == 0 and tensor.is_floating_point() and edges and not name.endswith("ones_like")
            if number and phase in ("forward", "loss"):
                self._last_scalar = Edge(node.index, key, kinds)

    def _hold(self, func, args: tuple, kwargs: dict, positions: dict[int, int]) -> None:
        """Keep an op's arguments as they are before it runs, where a node of it is to be captured: of an op
        over lists, those of the node's position."""
        overwritten = {self._key(t): positions.get(id(t)) for t in mutated(func, args, kwargs) if is_dense(t)}
        elements = [
            *overwritten.values(),
            *(range(1 + max(positions.values())) if positions else [None] * len(func._schema.returns)),
        ]
        for index, element in enumerate(elements, start=len(self.graph.nodes)):
            if index in self.capture:  # an op that writes fewer tensors than it returns is overwritten by the next
                self.captured[index] = (func, *tree_map(_clone, (pick_element(args, element), kwargs)))

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
        named = self.names.get(self._key(parameter))
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


def _clone(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
