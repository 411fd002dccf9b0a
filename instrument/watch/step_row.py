"""The counters of one step of a loop that is not ours, as device scalars: nothing here waits for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from instrument.finite import first_bad, float_states
from instrument.watch.surface import COLUMNS


class StepRow:
    """Open between ``begin()`` and ``end()``; outside of that it measures nothing.

    ``names`` and ``parameters``: those that require a gradient, in the model's order; ``states``: (parameter
    name, state name, tensor) of the optimizer. Raises ValueError for a model with nothing to train.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, scaler: torch.amp.GradScaler | None
    ) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the model has no parameter that requires a gradient: there is nothing to watch")
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.device = self.parameters[0].device
        self.states: list[tuple[str, str, torch.Tensor]] = []
        self._optimizer, self._scaler = optimizer, scaler
        self._states_of: tuple[object, int] = (None, 0)
        self._row: dict[str, torch.Tensor | float] = {}
        self._as_seen: list[tuple[int, int] | None] = []

    @property
    def open(self) -> bool:
        """Whether a step is under way."""
        return bool(self._row)

    def begin(self) -> None:
        """A step begins; what an interrupted one left is dropped."""
        self._as_seen = []
        self._row = {name: -1.0 if name.endswith("_tensor") else 0.0 for name in COLUMNS} | {"loss_scale": -1.0}

    def drop(self) -> None:
        """The step was interrupted: it has no row."""
        self._row = {}

    @torch.no_grad()
    def loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss."""
        self._row["loss"] = self._row["loss"] + loss.detach().double().sum().to(self.device)

    @torch.no_grad()
    def gradients(self, where: str) -> None:
        """The gradients behind ``backward``, ``unscale``, ``clip`` or just before the ``update``. Of several such
        places in a step (two backward passes with the gradients cleared between them) the first bad one counts."""
        if not self._row:
            return
        as_seen = [
            None if p.grad is None else (p.grad.data_ptr(), p.grad._version)
            for p in self.parameters
            if p.grad is None or p.grad.layout == torch.strided
        ]
        if len(as_seen) == len(self.parameters) and as_seen == self._as_seen:
            return  # nobody has written to them since they were last looked at
        self._as_seen = as_seen
        nothing = torch.empty(0, device=self.device)
        found = first_bad(where, [nothing if p.grad is None else countable(p.grad) for p in self.parameters], self.device)
        before = self._row[f"{where}_tensor"]
        if isinstance(before, torch.Tensor):
            found = {name: torch.where(before >= 0, self._row[name], value) for name, value in found.items()}
        self._row |= found

    @contextmanager
    def unscaling(self) -> Iterator[None]:
        """Around ``scaler.unscale_``."""
        self._note_scale()
        yield
        self.gradients("unscale")

    def updating(self) -> None:
        """Just before the optimizer's step. A fused optimizer unscales by itself and is called for a skipped step,
        too: then the scaler tells it so."""
        if not self._row:
            return
        self._note_scale()
        self.gradients("update")
        overflowed = getattr(self._optimizer, "found_inf", None)
        happens = 1.0 if overflowed is None else (overflowed.sum() == 0).double().to(self.device)
        self._row["updated"] = self._row["updated"] + happens

    @torch.no_grad()
    def end(self) -> torch.Tensor:
        """Parameters and states as the step leaves them; the row, float64, in the order of `COLUMNS`."""
        if self._optimizer is None and self._scaler is None:
            self._row["updated"] = 1.0  # by hand: no hook tells
        self._row |= first_bad("param", [countable(p) for p in self.parameters], self.device)
        self._refresh_states()
        self._row |= first_bad("state", [countable(tensor) for *_, tensor in self.states], self.device)
        values, self._row = [self._row[name] for name in COLUMNS], {}
        return torch.stack(
            [
                v.double() if isinstance(v, torch.Tensor) else torch.full((), v, dtype=torch.float64, device=self.device)
                for v in values
            ]
        )

    def _note_scale(self) -> None:
        if self._row and self._scaler is not None:
            self._row["loss_scale"] = self._scaler.scale(torch.ones((), device=self.device))

    def _refresh_states(self) -> None:
        """States are made by the first update that is not skipped, and anew by ``load_state_dict``."""
        if self._optimizer is None:
            return
        of = (self._optimizer.state, sum(map(len, self._optimizer.state.values())))
        if of[0] is not self._states_of[0] or of[1] != self._states_of[1]:
            self.states, self._states_of = float_states(self._optimizer, self.parameters, self.names), of


def countable(tensor: torch.Tensor) -> torch.Tensor:
    """What stands for a tensor where non-finite values are counted: a sparse one's values, a complex one's parts;
    of float64, which has a wider range, only whether each value is finite."""
    if tensor.layout != torch.strided:
        tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype == torch.float64:
        tensor = torch.where(tensor.isfinite(), 0.0, tensor).float()
    return tensor
