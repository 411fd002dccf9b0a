"""A step's counters: device scalars that are gathered while the step runs and read once per window.

Every step has a row of its own in a ring on the device, so the step of the first non-finite value is exact at any
window, and nothing waits for the device but `StepCounters.read`. A loop that knows its phases reports them
(`instrument.watch.meter`); in any other loop hooks measure (`instrument.watch.watch`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels import TensorStats, multi_tensor_stats

STATE_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq", "absmax1": "exp_avg", "absmax2": "exp_avg_sq"}
"""bitsandbytes' names. Its 8-bit states are integers with fp32 block scales (``absmax1``, ``absmax2``): an
overflow shows in the scales, so those stand for them."""
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
GRADIENTS = ("backward", "unscale", "clip", "update")
"""After which of these gradients can be measured, in order; ``update``: just before the optimizer's step."""


def _places(*kinds: str) -> tuple[str, ...]:
    return tuple(f"{kind}_{what}" for kind in kinds for what in ("tensor", "nan"))


HOOKED = ("loss", "loss_scale", "updated", *_places(*GRADIENTS, "state", "param", "after", "between"))
"""A row, float64, where hooks measure. ``*_tensor``: index of the first non-finite tensor or -1; ``*_nan``: how many more
NaN than infinities it holds. ``loss_scale``: -1 without one. ``updated``: how often the optimizer stepped. Parameters are
measured as the update leaves them (``param``), at the end of the step (``after``), and at its beginning (``between``)."""
REPORTED = (
    *"loss loss_microbatch loss_scale grad_norm grad_absmax grad_nonfinite grad_below grad_nonzero clip_norm".split(),
    *_places("backward", "state", "param"),
)
"""A row where the loop reports. ``loss_microbatch``: the first one with a non-finite loss, or -1; ``grad_below``: gradients
that underflow; ``clip_norm``: the norm that clipping used. Such a loop's tensors are dense, of 16 or 32 bits."""


class StepCounters:
    """The rows of ``window`` steps on the device, one of them open between ``begin()`` and ``end()``; outside of that it
    measures nothing.

    ``names`` and ``parameters``: those that require a gradient, in the model's order (``named_parameters`` where the
    optimizer updates others); ``states``: (parameter name, state name, tensor) of the optimizer. Raises ValueError for
    a model with nothing to train.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        window: int,
        columns: tuple[str, ...] = HOOKED,
        named_parameters: Sequence[tuple[str, torch.Tensor]] | None = None,
    ) -> None:
        named = named_parameters or [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the model has no parameter that requires a gradient: there is nothing to watch")
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self._ids = {id(p) for p in self.parameters}
        self.device = self.parameters[0].device
        self.states: list[tuple[str, str, torch.Tensor]] = []
        self.window = window
        self._columns, self._optimizer, self._scaler = columns, optimizer, scaler
        self._hooked = "updated" in columns
        self._state_tensors: list[torch.Tensor] = []
        self._states_of: tuple[object, int] = (None, 0)
        self._ring = torch.zeros(window, len(columns), dtype=torch.float64, device=self.device)
        self._used = 0
        self._none = torch.full((), -1.0, dtype=torch.float64, device=self.device)
        self._zero = torch.zeros((), dtype=torch.float64, device=self.device)
        unset = {name for name in columns if name.endswith("_tensor")} | {"loss_scale", "loss_microbatch"}
        self._empty_row = {name: self._none if name in unset else self._zero for name in columns}
        self._row: dict[str, torch.Tensor] = {}
        self._as_seen: list[tuple[int, int] | None] = []
        self._gradients = self._none, self._zero
        self._weights_seen: list[tuple[int, int]] = []
        self._micro_batches = 0

    @property
    def open(self) -> bool:
        return bool(self._row)

    @property
    def full(self) -> bool:
        return self._used == self.window

    def begin(self, loss_scale: torch.Tensor | None = None) -> None:
        """A step begins, at a loss scale (a device scalar) where it is known; what an interrupted one left is dropped."""
        self._as_seen, self._micro_batches, self._gradients = [], 0, (self._none, self._zero)
        self._row = self._empty_row | ({} if loss_scale is None else {"loss_scale": loss_scale})

    def drop(self) -> None:
        """The step was interrupted: it has no row."""
        self._row = {}

    @torch.no_grad()
    def loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss; the sum is float64, which finite shares do not overflow."""
        row, mine = self._row, loss.detach()
        total = row["loss"] + (mine if mine.ndim == 0 else mine.double().sum()).to(self.device)
        if "loss_microbatch" in row:
            first_bad = (row["loss_microbatch"] < 0) & ~total.isfinite()
            row["loss_microbatch"] = torch.where(first_bad, float(self._micro_batches), row["loss_microbatch"])
        row["loss"] = total
        self._micro_batches += 1

    # -- what a loop reports ------------------------------------------------------------------

    @torch.no_grad()
    def report_gradients(self, stats: TensorStats, *, clip_norm: torch.Tensor) -> None:
        """Statistics of the true gradients before clipping, in the order of ``parameters``, and the norm that clipping
        used (another where it is computed in fp16)."""
        self._row |= {
            "grad_norm": stats.total_norm,
            "grad_absmax": stats.total_absmax,
            "grad_nonfinite": stats.total_nan + stats.total_inf,
            "grad_below": stats.total_below,
            "grad_nonzero": stats.total_numel - stats.total_zeros,
            "clip_norm": clip_norm,
            **_first_of("backward", stats),
        }

    # -- what hooks measure -------------------------------------------------------------------

    @torch.no_grad()
    def measure_gradients(self, where: str) -> None:
        """The gradients after ``backward``, ``unscale``, ``clip`` or just before the ``update``. Of several such
        places in a step (two backward passes with the gradients cleared between them) the first bad one counts."""
        if not self._row:
            return
        as_seen = [
            None if p.grad is None else (p.grad.data_ptr(), p.grad._version)
            for p in self.parameters
            if p.grad is None or p.grad.layout == torch.strided
        ]
        unwritten = len(as_seen) == len(self.parameters) and as_seen == self._as_seen
        # What enters the update may have been repaired through ``.data``, which no version counts.
        if unwritten and (where != "update" or (self.device.type == "cpu" and self._gradients[0] < 0)):
            return
        self._as_seen = as_seen
        nothing = torch.empty(0, device=self.device)
        found = self._first_bad(where, [nothing if p.grad is None else p.grad for p in self.parameters])
        self._gradients = found[f"{where}_tensor"], found[f"{where}_nan"]
        before = self._row[f"{where}_tensor"]
        if before is not self._none:
            found = {name: torch.where(before >= 0, self._row[name], value) for name, value in found.items()}
        self._row |= found

    def updating(self) -> None:
        """Just before the optimizer's step. A fused optimizer unscales by itself and is called for a skipped step,
        too: its ``found_inf`` says so."""
        if not self._row:
            return
        self.note_scale()
        self.measure_gradients("update")
        overflowed = getattr(self._optimizer, "found_inf", None)
        happens = 1.0 if overflowed is None else (overflowed.sum() == 0).double().to(self.device)
        self._row["updated"] = self._row["updated"] + happens

    def note_scale(self) -> None:
        if self._row and self._scaler is not None:
            self._row["loss_scale"] = self._scaler.scale(torch.ones((), device=self.device))

    def is_updated_by(self, optimizer: torch.optim.Optimizer) -> bool:
        return optimizer is self._optimizer or any(id(p) in self._ids for g in optimizer.param_groups for p in g["params"])

    # -- parameters ---------------------------------------------------------------------------

    @torch.no_grad()
    def measure_update(self) -> None:
        """Parameters and optimizer states as the update leaves them."""
        if not self._row:
            return
        self._refresh_states()
        self._row |= self._first_bad("param", self.parameters)
        self._row |= self._first_bad("state", self._state_tensors)

    @torch.no_grad()
    def measure_after(self) -> None:
        """Parameters at the end of a step, which something may have written to since the update. An update by hand, which
        no hook sees, is measured here; its gradients are taken to be those that were measured last."""
        if self._optimizer is None and self._scaler is None:
            self._row["updated"] = self._zero + 1.0
            self._row["update_tensor"], self._row["update_nan"] = self._gradients
            self.measure_update()
        else:
            self._row |= self._first_bad("after", self.parameters)
        self._weights_seen = self._versions()

    @torch.no_grad()
    def measure_between(self) -> None:
        """Parameters at the beginning of a step, which something may have written to since the end of the one before. On a
        GPU they are looked at only where their versions say so."""
        if self._weights_seen and (self.device.type == "cpu" or self._versions() != self._weights_seen):
            self._row |= self._first_bad("between", self.parameters)

    def _versions(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for p in self.parameters if p.layout == torch.strided]

    @torch.no_grad()
    def end(self) -> None:
        """Close the step: one small stack on the device."""
        self._ring[self._used] = torch.stack([self._row[name].double() for name in self._columns])
        self._row = {}
        self._used += 1

    def read(self) -> list[dict[str, float]]:
        """The rows since the last call, oldest first: the only wait for the device."""
        rows, self._used = self._ring[: self._used].tolist(), 0
        return [dict(zip(self._columns, values, strict=True)) for values in rows]

    def _first_bad(self, kind: str, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """``{kind}_tensor`` and ``{kind}_nan`` of a list."""
        if self._hooked:
            tensors = [_countable(tensor) for tensor in tensors]
        if not tensors or (self.device.type == "cpu" and _all_finite(tensors)):
            return {
                f"{kind}_tensor": torch.full((), -1.0, dtype=torch.float64, device=self.device),
                f"{kind}_nan": torch.zeros((), dtype=torch.float64, device=self.device),
            }
        return _first_of(kind, multi_tensor_stats(tensors, counts="none"))

    def _refresh_states(self) -> None:
        """States are made by the first update that is not skipped, and anew by ``load_state_dict``. Step counters and
        bitsandbytes' lookup tables are left out."""
        if self._optimizer is None:
            return
        of = (self._optimizer.state, sum(map(len, self._optimizer.state.values())))
        if of[0] is self._states_of[0] and of[1] == self._states_of[1]:
            return
        self._states_of = of
        self.states = [
            (name, STATE_NAMES.get(key, key), value)
            for name, parameter in zip(self.names, self.parameters, strict=True)
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if torch.is_tensor(value) and value.is_floating_point() and key not in ("step", "qmap1", "qmap2")
        ]
        self._state_tensors = [tensor for *_, tensor in self.states]


def _first_of(kind: str, stats: TensorStats) -> dict[str, torch.Tensor]:
    index = stats.first_nonfinite_index
    surplus = (stats.nan - stats.inf).index_select(0, index.clamp(min=0).view(1)).squeeze(0)
    return {f"{kind}_tensor": index, f"{kind}_nan": surplus}


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """On a CPU, where reading a number is free, a finite norm proves a list finite at a tenth of the cost."""
    return bool(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).isfinite().all())


def _countable(tensor: torch.Tensor) -> torch.Tensor:
    """What stands for a tensor where non-finite values are counted: a sparse one's values, a complex one's parts;
    of float64, which has a wider range, only whether each value is finite."""
    if tensor.layout != torch.strided:
        tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    if tensor.dtype in PLAIN:
        return tensor
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype == torch.float64:
        tensor = torch.where(tensor.isfinite(), 0.0, tensor).float()
    return tensor
