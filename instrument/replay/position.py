"""Where in a step the code is that runs now: its phase, the module that it belongs to, and the micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from instrument.replay.graph import AFTER, Edge
from instrument.replay.storages import Storages


class StepPosition:
    """Follows a step by the hooks on its modules and its optimizer and by autograd's nodes. ``names``: storage -> (parameter
    name, what it is of it: param, grad, exp_avg, ...); ``turn(stage)``: called when the backward pass begins
    (``backward``), and at the first op after it (``clip``)."""

    def __init__(self, storages: Storages, names: dict[int, tuple[str, str]], turn: Callable[[str], None]) -> None:
        self.phase_asked: str | None = None
        """What the loop calls the phase, where nothing can be hooked."""
        self._storages, self._names, self._turn = storages, names, turn
        self._stage = "forward"  # of code outside of autograd
        self._updating = False
        self._microbatch = -1
        self._modules: list[str] = []
        self._entered_by_autograd = False  # a checkpointed module runs again
        self._module_of_sequence: dict[int, str | None] = {}

    def enter(self, name: str) -> None:
        if not name and torch._C._current_autograd_node() is None:
            self._stage = "forward"
            self._microbatch += torch.is_grad_enabled()
        if self._modules:  # a checkpoint's node is made before the modules inside it run: it is the caller's
            self._made_by(self._modules[-1])
        else:
            self._entered_by_autograd = torch._C._current_autograd_node() is not None
        self._modules.append(name)

    def leave(self, name: str) -> None:
        while self._modules and self._modules.pop() != name:
            pass
        if not self._modules and torch._C._current_autograd_node() is None:
            self._stage = "loss"

    def update(self, *, begins: bool) -> None:
        self._stage, self._updating = ("optimizer", True) if begins else (AFTER, False)

    @property
    def _differentiates(self) -> bool:
        """Whether a module's forward asks autograd for a gradient (forces), which is no backward pass of the step."""
        return bool(self._modules) and not self._entered_by_autograd and self._stage in ("forward", "loss")

    @property
    def in_module(self) -> bool:
        """Whether code inside of a module runs, or its backward."""
        return bool(self._modules) or torch._C._current_autograd_node() is not None

    def now(self) -> tuple[str, str | None]:
        """Phase and module of the op that runs now."""
        node = torch._C._current_autograd_node()
        if node is not None and self.phase_asked is None and self._stage != "optimizer" and not self._differentiates:
            if self._stage in ("forward", "loss"):
                self._stage = "backward"
                self._turn("backward")
            variable = getattr(node, "variable", None)
            if self._modules:  # a checkpointed module runs again
                module = self._modules[-1]
            elif variable is not None:
                module = self._owner(self._storages.key(variable))
            else:
                module = self._module_of_sequence.get(node._sequence_nr())
            if torch.is_grad_enabled():  # what runs again, or create_graph, has a backward pass of its own
                self._made_by(module)
            return "backward", module
        if self._stage == "backward":
            self._stage = "optimizer" if self._updating else "clip"  # an optimizer resumes after its closure
            self._turn("clip")
        module = self._modules[-1] if self._modules else None
        if self._stage in ("forward", "loss"):
            self._made_by(module)
        return self.phase_asked or self._stage, module

    def microbatch_of(self, phase: str) -> int | None:
        """The micro-batch of an op in this phase, from 0; None outside of forward and backward."""
        return self._microbatch if phase in ("forward", "loss", "backward") and self._microbatch >= 0 else None

    def owner(self, edges: Iterable[Edge], key: int) -> str | None:
        """Outside of modules: the module whose parameter (or gradient, or state) an op works on that writes to ``key``, or all
        that it reads was computed from."""
        for storage in (key, *(edge.storage for edge in edges)):
            if storage in self._names:
                return self._owner(storage)
        if self._stage not in ("optimizer", AFTER):
            return None
        writers = (self._storages.graph.nodes[edge.writer] for edge in edges if edge.writer is not None)
        modules = {node.module for node in writers if node.phase == self._stage}
        return modules.pop() if len(modules) == 1 else None

    def _owner(self, storage: int) -> str | None:
        return self._names[storage][0].rpartition(".")[0] if storage in self._names else None

    def _made_by(self, module: str | None) -> None:
        self._module_of_sequence.setdefault(torch._C._autograd._get_sequence_nr() - 1, module)
