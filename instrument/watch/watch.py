"""`Watch`: the first non-finite value of any PyTorch training loop.

    watch = Watch(model, optimizer, scaler=scaler)
    for step, batch in enumerate(loader, start=1):
        with watch.step(step):
            ...forward, backward, optimizer.step() as you please...
    watch.first_nonfinite      # None, or step, phase, module, kind, ...

Statistics stay on the device; the host reads them every ``log_every`` steps. The step is exact all the same, because every step
has its own row. Give ``replay``, a function that runs one whole step again (``replay(step)``), and the failed step is repeated
from the last snapshot op by op: then op, cause and the exact producer are known, and what infinities were absorbed on the way.
The loop never fails for its watch: what that cannot do is a ``warning`` among its events. Only misuse raises, and
`NonfiniteError` where it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import msgspec
import torch

from instrument.hooks import Hook, after_any_update, tensors_in, wrap_unscale
from instrument.replay.recorder import OpRecorder
from instrument.replay.replays import Examination, Replayed, Replays, skip_surfaced
from instrument.replay.snapshot import Seen
from instrument.results.schemas import PHASES, EventRecord, FirstNonfinite
from instrument.watch.counters import StepCounters
from instrument.watch.surface import Surface
from instrument.watch.taps import Headroom, HeadroomTable, ModuleTaps


class NonfiniteError(FloatingPointError):
    """Raised by a watch that was asked to; ``record`` says where the value came from."""

    def __init__(self, record: FirstNonfinite) -> None:
        super().__init__(
            f"step {record.step}, {record.phase}, {record.module or 'outside of modules'}: {record.tensor} is "
            f"{record.kind}" + (f" ({record.op}, {record.cause})" if record.op else "")
        )
        self.record = record


class Watch:
    """Watches one model and optimizer; see the module's docstring.

    ``granularity``: ``module`` (blocks every step, leaf modules every ``every`` steps), ``block`` or ``off`` (loss, gradients,
    parameters and states only). ``replay``: runs a whole step again, given its number; weights, buffers, gradients, optimizer,
    scaler and random state (torch's, Python's, NumPy's) are put back by the watch, which keeps a copy of them in host memory
    every ``snapshot_every`` steps. Anything else that the function changes (a scheduler, a counter, a loader's place) stays
    changed: leave it out of it. A replay names the producer of a failure, and of the first ``explained_skips`` steps that the
    scaler skips. ``raise_on_nonfinite`` raises `NonfiniteError` at the end of the step in which a failure is read. Raises
    ValueError for an unknown granularity, a cadence below 1 or a model with nothing to train.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        granularity: str = "module",
        every: int = 16,
        log_every: int | None = None,
        replay: Callable[[int], object] | None = None,
        snapshot_every: int = 50,
        explained_skips: int = 1,
        raise_on_nonfinite: bool = False,
    ) -> None:
        for name, value in (("log_every", log_every), ("snapshot_every", snapshot_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.counters = StepCounters(model, optimizer, scaler, window=log_every or (1 if device.type == "cpu" else 10))
        self.taps = ModuleTaps(model, device, granularity=granularity, every=every, guard=self._guarded)
        self.events: list[EventRecord] = []
        self.examination: Examination | None = None
        self._scaler = scaler
        self._recorder: OpRecorder | None = None
        self._run_step: Any = replay  # called by a replay, which there is only with it
        self._replays = replay and Replays(
            self._recorded, model, optimizer, scaler, every=snapshot_every, explained_skips=explained_skips
        )
        self._raise = raise_on_nonfinite
        self._found: FirstNonfinite | None = None
        self._headroom = HeadroomTable()
        self._steps: list[int] = []
        self._before: int | None = None
        """The last step whose row was read."""
        self._failures: set[str] = set()
        self._replaying = self._backward_awaited = False
        self._removers: list[Callable[[], None]] = [
            part.register_forward_hook(Hook(self._guarded(self._await_backward))).remove for part in {model, *model.children()}
        ]
        if optimizer is not None:
            updating = self._guarded(self.counters.updating)
            self._removers.append(optimizer.register_step_pre_hook(lambda *_: updating()).remove)
            self._removers.append(after_any_update(self._updated))
        if scaler is not None:
            self._removers.append(wrap_unscale(scaler, self._unscaling))

    # -- in the loop --------------------------------------------------------------------------

    @contextmanager
    def step(self, step: int) -> Iterator[Watch]:
        """Around everything that belongs to one attempted update. Raises RuntimeError inside another step."""
        if self._replaying:
            yield self
            return
        if self.counters.open:
            raise RuntimeError(f"watch.step({step}) inside another step of the same watch; steps follow one another")
        if self._replays is not None and self._replays.due:
            self._read_and_raise()
            self._guarded(self._replays.keep)(step)
        self._guarded(self._begin)(step)
        try:
            yield self
        except BaseException:
            self.counters.drop()
            if self._replays is not None:
                self._replays.interrupted()
            raise
        finally:
            self._guarded(self.taps.end_step)()
        self._guarded(self._end)(step)
        if self.counters.full:
            self._read_and_raise()

    def _begin(self, step: int) -> None:
        self.counters.begin()
        self.counters.measure_between()
        self._backward_awaited = False
        self.taps.begin_step(step)

    def _end(self, step: int) -> None:
        if self.counters.open:  # a measurement that failed has closed it: the step has no row
            self.counters.measure_after()
            self.counters.end()
            self._steps.append(step)
        if self._replays is not None:
            self._replays.completed(step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name a phase that has no hook: ``with watch.phase("clip"): clip_grad_norm_(...)``."""
        if name not in PHASES:
            raise ValueError(f"phase is {name!r}; allowed: {', '.join(PHASES)}")
        with self._recorder.phase(name) if self._recorder is not None else nullcontext():
            yield
        if name in ("unscale", "clip"):
            self._guarded(self.counters.measure_gradients)(name)

    def loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Report the loss (each micro-batch's); returns it. Without it, a bad loss shows as bad gradients. Raises
        RuntimeError outside of a step."""
        if self._recorder is not None:
            self._recorder.loss(loss)
        elif self.counters.open:
            self._guarded(self.counters.loss)(loss)
        elif not self._replaying and not self._failures:
            raise RuntimeError("watch.loss(...) outside of a step; call it inside `with watch.step(number):`")
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
        """Decode the pending steps: the watch's only wait for the device. Inside a step, a watch that replays leaves
        them for later: a replay would pull the weights from under the step's backward pass."""
        if not (self.counters.open and self._replays is not None):
            self._guarded(self._read)()

    def _read(self) -> None:
        steps, self._steps = self._steps, []
        if not steps:
            return
        rows = self.counters.read()
        readings = self.taps.read()
        self._headroom.add(readings)
        if self._found is not None:
            return
        for index, (step, row) in enumerate(zip(steps, rows, strict=True)):
            surface = Surface(step, row, self.counters, modules=[r for r in readings if r.step == step], before=self._before)
            self._before = step
            if surface.repaired:
                self.events.append(self._repair(surface))
            if self._scaler is not None and surface.skipped:
                self.events.append(self._skip(surface, len(steps) - index))
            self._found = surface.first_nonfinite()
            if self._found is not None:
                self._examine(surface, len(steps) - index)
                break

    def close(self) -> None:
        """Take every hook off the model, the optimizer and the scaler."""
        self._guarded(self.taps.close)()
        for remove in self._removers:
            remove()
        self._removers = []

    # -- hooks --------------------------------------------------------------------------------

    def _guarded(self, call: Callable) -> Callable:
        """``call`` as a part of somebody else's loop: an error of it is a ``warning`` among the events, once of each kind, and
        the step that is open has no row."""

        def guarded(*args: object) -> object:
            try:
                return call(*args)
            except Exception as error:
                self.counters.drop()
                what = f"{getattr(call, '__name__', 'a measurement').strip('_')} failed: {type(error).__name__}: {error}"
                if what not in self._failures:
                    self._failures.add(what)
                    step = self._steps[-1] if self._steps else self._before or 0
                    self.events.append(EventRecord(step=step, kind="warning", detail={"what": what}))
                return None

        return guarded

    def _updated(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped, the watched one or another that owns watched parameters."""
        if self.counters.open and self.counters.is_updated_by(optimizer):
            self._guarded(self.counters.measure_update)()

    def _await_backward(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        """When an output of the model (or of a part that is called by itself) gets its gradient, ask autograd to
        call at the end of that backward pass."""
        if not self.counters.open or not torch.is_grad_enabled():
            return
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                tensor.register_hook(self._call_after_backward)

    def _call_after_backward(self, gradient: torch.Tensor) -> None:
        if not self._backward_awaited:
            self._backward_awaited = True
            torch.autograd.Variable._execution_engine.queue_callback(self._guarded(self._after_backward))

    def _after_backward(self) -> None:
        self._backward_awaited = False
        self.counters.measure_gradients("backward")

    @contextmanager
    def _unscaling(self) -> Iterator[None]:
        self._guarded(self.counters.note_scale)()
        yield
        self._guarded(self.counters.measure_gradients)("unscale")

    # -- replays ------------------------------------------------------------------------------

    def _read_and_raise(self) -> None:
        self.read()
        if self._raise and self._found is not None:
            raise NonfiniteError(self._found)

    def _repair(self, surface: Surface) -> EventRecord:
        """Gradients that were not finite and were made so before the update."""
        return EventRecord(step=surface.step, kind="gradient_repaired", detail=_place(surface.where_skipped()))

    def _skip(self, surface: Surface, steps_ago: int) -> EventRecord:
        """A scaler's skip; the first few with their producer, by replay."""
        found, scale = surface.where_skipped(), surface.row["loss_scale"]
        detail: dict[str, Any] = {"loss_scale": scale if scale >= 0 else None} | _place(found)
        if self._replays is not None and self._replays.explains_skip():
            replayed = self._replay(surface, steps_ago)
            if replayed.matched:
                detail["first_nonfinite"] = msgspec.to_builtins(replayed.completed(skip_surfaced(surface.step)))
            else:
                detail["replay"] = replayed.unexplained()
        return EventRecord(step=surface.step, kind="scaler_skip", detail=detail)

    def _examine(self, surface: Surface, steps_ago: int) -> None:
        """Replay the failed step from the last snapshot and complete the record; where it fails in another way (its
        examination is kept), the record stays as it surfaced."""
        found = self._found
        if self._replays is None or found is None:
            return
        if surface.between:
            why = "it was written between two steps, and a replay runs what is inside of them"
            self._found = msgspec.structs.replace(found, replay={"matched": False, "error": why})
            return
        replayed = self._replay(surface, steps_ago)
        self.examination = replayed.found
        self._found = (
            replayed.completed(found) if replayed.matched else msgspec.structs.replace(found, replay=replayed.unexplained())
        )

    def _replay(self, surface: Surface, steps_ago: int) -> Replayed:
        """Replay a step and put the run back. The loop's own code may fail outside of its loop: the run continues."""
        replays = self._replays
        assert replays is not None and replays.snapshot is not None
        self._replaying, self._backward_awaited = True, False
        try:
            with replays.undone():
                return replays.again(steps_ago, surface.seen(), self._measured)
        except Exception as error:
            return Replayed(None, False, replays.snapshot.step, error=f"{type(error).__name__}: {error}")
        finally:
            self._replaying, self._recorder = False, None
            self.counters.drop()

    def _measured(self, step: int, last: bool) -> Seen | None:
        """Run a step of a replay, the last one with its counters."""
        if not last:
            return self._run_step(step)
        self.counters.begin()
        self._run_step(step)
        self.counters.measure_after()
        self.counters.end()
        return Surface(step, self.counters.read()[0], self.counters).seen()

    def _recorded(self, step: int, recorder: OpRecorder | None) -> None:
        self._recorder = recorder
        self._run_step(step)


def _place(found: FirstNonfinite) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("phase", "module", "tensor", "kind")}
