"""`Watch`: the first non-finite value of any PyTorch training loop.

    watch = Watch(model, optimizer, scaler=scaler)
    for step, batch in enumerate(loader, start=1):
        with watch.step(step):
            ...forward, backward, optimizer.step() as you please...
    watch.first_nonfinite      # None, or step, phase, module, kind, ...

Statistics stay on the device; the host reads them every ``log_every`` steps. The step is exact
all the same, because every step has its own row. Give ``replay``, a function that runs one whole
step again (``replay(step)``), and the failed step is repeated from the last snapshot op by op:
then op, cause and the exact producer are known, and what infinities were absorbed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import msgspec
import torch

from instrument.finite import first_bad, float_states
from instrument.records import PHASES, EventRecord, FirstNonfinite
from instrument.replay.examine import Examination, completed, examine, explain_skip
from instrument.replay.recorder import OpRecorder
from instrument.replay.snapshot import Snapshot
from instrument.watch.headroom import Headroom, HeadroomTable
from instrument.watch.modules import tensors_in
from instrument.watch.scaler import wrap_unscale
from instrument.watch.surface import COLUMNS, Surface
from instrument.watch.taps import ModuleTaps


class NonfiniteError(FloatingPointError):
    """Raised by a watch that was asked to; ``record`` says where the value came from."""

    def __init__(self, record: FirstNonfinite) -> None:
        super().__init__(f"step {record.step}, {record.phase}, {record.module or 'outside of modules'}: {record.tensor} is "
                         f"{record.kind}" + (f" ({record.op}, {record.cause})" if record.op else ""))
        self.record = record


class Watch:
    """Watches one model and optimizer; see the module's docstring.

    ``granularity``: ``module`` (blocks every step, leaf modules every ``every`` steps), ``block`` or
    ``off`` (loss, gradients, parameters and states only). ``replay``: runs a whole step again, given
    its number; random state, weights, optimizer and scaler are put back by the watch, which keeps a
    copy of them in host memory every ``snapshot_every`` steps; it names the producer behind a failure,
    and behind the first ``explained_skips`` steps that the scaler skips. ``raise_on_nonfinite`` raises
    `NonfiniteError` at the end of the step in which a failure is read.
    Raises ValueError for an unknown granularity or a cadence below 1.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None, *,
                 scaler: torch.amp.GradScaler | None = None, granularity: str = "module", every: int = 16,
                 log_every: int | None = None, replay: Callable[[int], object] | None = None, snapshot_every: int = 50,
                 explained_skips: int = 1, raise_on_nonfinite: bool = False) -> None:
        for name, value in (("log_every", log_every), ("snapshot_every", snapshot_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.device = self.parameters[0].device
        self.events: list[EventRecord] = []
        self.examination: Examination | None = None
        self.taps = ModuleTaps(model, self.device, granularity=granularity, every=every)
        self.log_every = log_every or (1 if self.device.type == "cpu" else 10)
        self._replay, self._snapshot_every, self._raise = replay, snapshot_every, raise_on_nonfinite
        self._explained_skips, self._skips = explained_skips, 0
        self._snapshot: Snapshot | None = None
        self._found: FirstNonfinite | None = None
        self._headroom = HeadroomTable()
        self._steps: list[int] = []
        self._ring = torch.zeros(self.log_every, len(COLUMNS), dtype=torch.float64, device=self.device)
        self._states: list[tuple[str, str, torch.Tensor]] = []
        self._row: dict[str, torch.Tensor | float] = {}
        self._recorder: OpRecorder | None = None
        self._replaying = False
        self._removers: list[Callable[[], None]] = [model.register_forward_hook(self._await_backward).remove]
        if optimizer is not None:
            self._removers += [optimizer.register_step_pre_hook(lambda *_: self._before_update()).remove,
                               optimizer.register_step_post_hook(lambda *_: self._after_update()).remove]
        if scaler is not None:
            self._removers.append(wrap_unscale(scaler, self._around_unscale))

    # -- in the loop --------------------------------------------------------------------------

    @contextmanager
    def step(self, step: int) -> Iterator[Watch]:
        """Around everything that belongs to one attempted update."""
        if self._replaying:
            yield self
            return
        if self._replay is not None and (self._snapshot is None or step - self._snapshot.step > self._snapshot_every):
            self._snapshot = Snapshot(step - 1, self.model, self.optimizer, self.scaler)
        self._row = {name: -1.0 if name.endswith("_tensor") else 0.0 for name in COLUMNS} | {"loss_scale": -1.0}
        self.taps.begin_step(step)
        try:
            yield self
        finally:
            self.taps.end_step()
        self._ring[len(self._steps)] = self._row_on_device()
        self._steps.append(step)
        if len(self._steps) == self.log_every:
            self.read()
            if self._raise and self._found is not None:
                raise NonfiniteError(self._found)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name a phase that has no hook: ``with watch.phase("clip"): clip_grad_norm_(...)``."""
        if name not in PHASES:
            raise ValueError(f"phase is {name!r}; allowed: {', '.join(PHASES)}")
        if self._replaying:
            with self._recorder.phase(name) if self._recorder else nullcontext():
                yield
            return
        yield
        if name in ("unscale", "clip"):
            self._measure_gradients(name)

    @torch.no_grad()
    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Tell the loss (each micro-batch's); returns it. Without it, a bad loss shows as bad gradients."""
        if self._replaying:
            if self._recorder:
                self._recorder.loss(loss)
        else:
            self._row["loss"] = self._row["loss"] + loss.detach().double().sum()
        return loss

    # -- what was seen ------------------------------------------------------------------------

    @property
    def first_nonfinite(self) -> FirstNonfinite | None:
        """The first failure so far, or None; reads what is pending."""
        self.read()
        return self._found

    def headroom(self) -> list[Headroom]:
        """Per module and direction: largest |x|, bits to 65,504, share that fp16 would flush to zero."""
        self.read()
        return self._headroom.rows()

    def read(self) -> None:
        """Decode the pending steps: the watch's only wait for the device."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        rows = self._ring[:len(steps)].tolist()
        readings = self.taps.read()
        self._headroom.add(readings)
        if self._found is not None:
            return
        for step, values in zip(steps, rows, strict=True):
            surface = Surface(step, dict(zip(COLUMNS, values, strict=True)), [r for r in readings if r.step == step],
                              self.names, [(name, tensor) for name, tensor, _ in self._states])
            if self.scaler is not None and surface.skipped:
                self.events.append(self._skip(surface, steps[-1]))
            self._found = surface.first_nonfinite()
            if self._found is not None:
                break
        if self._found is not None and self._replay is not None:
            self._examine(self._found)

    def close(self) -> None:
        """Take every hook off the model, the optimizer and the scaler."""
        self.taps.close()
        for remove in self._removers:
            remove()
        self._removers = []

    # -- hooks --------------------------------------------------------------------------------

    def _await_backward(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        """When the model's output gets its gradient, ask autograd to call at the end of that backward pass."""
        if self._replaying or not torch.is_grad_enabled() or not self._row:
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(
                    lambda: self._measure_gradients("backward")))
                return

    def _measure_gradients(self, name: str) -> None:
        """Where the gradients stand behind ``backward``, ``unscale``, ``clip`` or just before the ``update``."""
        if self._replaying or not self._row:
            return
        gradients = [torch.empty(0, device=self.device) if p.grad is None else p.grad for p in self.parameters]
        self._row |= first_bad(name, gradients, self.device)

    @contextmanager
    def _around_unscale(self) -> Iterator[None]:
        if not self._replaying and self._row:
            self._row["loss_scale"] = self.scaler.scale(torch.ones((), device=self.device))
        yield
        self._measure_gradients("unscale")

    def _before_update(self) -> None:
        self._measure_gradients("update")
        if not self._replaying and self._row:
            self._row["updated"] = 1.0

    def _after_update(self) -> None:
        if self._replaying or not self._row:
            return
        if not self._states:  # made by the first update that is not skipped
            self._states = float_states(self.optimizer, self.parameters, self.names)
        self._row |= first_bad("param", self.parameters, self.device)
        self._row |= first_bad("state", [tensor for *_, tensor in self._states], self.device)

    def _row_on_device(self) -> torch.Tensor:
        values = [self._row[name] for name in COLUMNS]
        self._row = {}
        return torch.stack([v.double() if isinstance(v, torch.Tensor) else
                            torch.full((), v, dtype=torch.float64, device=self.device) for v in values])

    def _skip(self, surface: Surface, now: int) -> EventRecord:
        """A scaler's skip; the first few with their producer, by replay."""
        detail = surface.skip_detail()
        if self._replay is not None and self._skips < self._explained_skips:
            self._skips += 1
            with self._replays() as run_step:
                first = explain_skip(surface.step, run_step, self._snapshot, self.model, self.optimizer, self.scaler, now=now)
            if first is not None:
                detail["first_nonfinite"] = msgspec.to_builtins(first)
        return EventRecord(step=surface.step, kind="scaler_skip", detail=detail)

    def _examine(self, seen: FirstNonfinite) -> None:
        """Replay the failed step from the last snapshot and complete the record."""
        after = Snapshot(seen.step, self.model, self.optimizer, self.scaler)
        with self._replays() as run_step:
            self.examination = examine(seen.step, run_step, self._snapshot, self.model, self.optimizer, self.scaler)
        after.restore()
        self._found = completed(seen, self.examination, from_step=self._snapshot.step)

    @contextmanager
    def _replays(self) -> Iterator[Callable[[int, OpRecorder | None], None]]:
        """The caller's step function, with this watch's own hooks silent."""
        def run_step(step: int, recorder: OpRecorder | None) -> None:
            self._recorder = recorder
            self._replay(step)

        self._replaying = True
        try:
            yield run_step
        finally:
            self._replaying, self._recorder = False, None
