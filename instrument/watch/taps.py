"""The always-on statistics of module outputs and of their gradients, into a ring on the device.

Blocks are measured at every step (largest value, non-finite counts), every leaf module at a cadence (zeros and what fp16 would
flush as well). Gradients are taken by tensor hooks on the outputs: full backward hooks never fire for modules that return a
model output, and break on in-place residuals. Nothing waits for the device; reading is the caller's, at its log points.

Readings of modules combined: those of several processes as one, and the headroom that all of them leave to fp16's limits.
Torch-free.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import torch

from instrument.hooks import Hook, blocks, leaves, tensors_in
from instrument.replay.ops import is_dense
from instrument.results.measurements import TapReading, totals
from kernels import ActivationRing, activation_stats
from kernels.float_formats import FP16


def merge_readings(ranks: Sequence[list[TapReading]]) -> list[TapReading]:
    """Those of several processes as one, since each saw its own micro-batches: the largest ``absmax`` and ``flush_frac``,
    the sums of ``nan`` and ``inf``, by step, module and direction in the first rank's order."""
    if len(ranks) == 1:
        return ranks[0]
    alike: dict[tuple[int, str, str], list[TapReading]] = {}
    for reading in chain(*ranks):
        alike.setdefault((reading.step, reading.module, reading.direction), []).append(reading)
    return [replace(group[0], absmax=max(r.absmax for r in group), **totals(group)) for group in alike.values()]


@dataclass(frozen=True)
class Headroom:
    """One module and direction over all steps read. ``bits``: log2(65,504 / absmax), negative beyond fp16's
    range, null when all values were zero; ``flush_frac``: the largest share of nonzero values that fp16
    would flush to zero, null where only the range was taken; ``step``: of the largest value."""

    module: str
    direction: str
    absmax: float
    bits: float | None
    flush_frac: float | None
    nonfinite: int
    step: int


class HeadroomTable:
    """The running table of `Watch.headroom`."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, str, str], Headroom] = {}

    def add(self, readings: Iterable[TapReading]) -> None:
        for r in readings:
            key = (r.order, r.module, r.direction)
            old = self._rows.get(key)
            absmax, step = (r.absmax, r.step) if old is None or r.absmax > old.absmax else (old.absmax, old.step)
            shares = [known.flush_frac for known in (r, old) if known is not None and known.flush_frac is not None]
            self._rows[key] = Headroom(
                r.module,
                r.direction,
                absmax,
                FP16.headroom_bits(absmax),
                max(shares, default=None),
                r.nan + r.inf + (old.nonfinite if old else 0),
                step,
            )

    def rows(self) -> list[Headroom]:
        """In the model's order, forward before backward."""
        return [self._rows[key] for key in sorted(self._rows, key=lambda k: (k[0], k[2] == "bwd"))]


GRANULARITIES = ("off", "block", "module")
MEASURED = (torch.float32, torch.bfloat16, torch.float16)
KEPT_STEPS = 64


class ModuleTaps:
    """Hooks on a model's modules. ``every``: the cadence of leaf modules in steps (0: never).

    ``skip_output``: the model's own output is measured elsewhere (a fused loss measures its logits), so modules that return
    that very tensor are left out from the second forward pass on. ``kept_steps``: how many steps can wait to be read.
    ``gather``: every process' readings by rank, where several share a run and all read at the same time; they come out as one.
    ``guard``: goes around what a hook calls.

    Use as ``begin_step(step)`` ... ``end_step()``; outside of steps and under ``torch.no_grad`` nothing is measured.
    ``close()`` takes every hook off.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        device: torch.device,
        *,
        granularity: str = "module",
        every: int = 16,
        skip_output: bool = False,
        kept_steps: int = KEPT_STEPS,
        gather: Callable[[list[TapReading]], list[list[TapReading]]] = lambda mine: [mine],
        guard: Callable[[Callable], Callable] = lambda call: call,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity is {granularity!r}; allowed: {', '.join(GRANULARITIES)}")
        if every < 0:
            raise ValueError(f"every is {every}; it must be at least 0 (0: leaf modules are never measured)")
        self._blocks = {} if granularity == "off" else blocks(model)
        self._leaves = leaves(model) if granularity == "module" and every else {}
        order = [name for name, _ in model.named_modules() if name in self._blocks or name in self._leaves]
        self._order = {name: place for place, name in enumerate(order)}
        self._names = order
        self._every = every
        self.mine: list[TapReading] = []
        """This process' own readings, of the last `read`."""
        self._gather = gather
        self._guard = guard
        self._dtypes: dict[int, str] = {}
        self._running = False
        self._counts = "range"
        self._kept_steps = kept_steps
        self._step_of_tick: deque[int] = deque(maxlen=kept_steps)
        self._addresses: dict[int, tuple[weakref.ref, int]] = {}
        self._skipped: set[int] = set()
        self._ticks = 0
        self._read_ticks = 0
        self._called_in_tick: deque[dict[int, int]] = deque(maxlen=kept_steps)
        self._turns = 0
        self._measured: set[int] = set()  # in this step's forward passes
        self._skip_output = skip_output
        self._block_handles: list[Any] = []
        self._step_handles: list[Any] = []
        self._earlier: list[TapReading] = []
        self._earlier_steps = 0
        if order:
            self._ring = ActivationRing(2 * len(order), steps=kept_steps, device=device)
            self._slots = [self._ring.at(slot) for slot in range(2 * len(order))]
            self._block_handles = [m.register_forward_hook(Hook(guard(self._hook(n)))) for n, m in self._blocks.items()]
            if skip_output:
                self._block_handles.append(model.register_forward_hook(Hook(guard(self._find_output))))

    def begin_step(self, step: int) -> None:
        """What modules do from here on belongs to ``step``."""
        if not self._names:
            return
        self._running = True
        due = bool(self._every) and (step - 1) % self._every == 0
        self._counts = "all" if due else "range"
        if due:
            self._step_handles = [
                m.register_forward_hook(Hook(self._guard(self._hook(n))))
                for n, m in self._leaves.items()
                if n not in self._blocks
            ]
        self._ring.tick()
        self._ticks += 1
        self._step_of_tick.append(step)
        self._called_in_tick.append({})
        self._measured.clear()

    def end_step(self) -> None:
        """The step is over; leaf modules lose their hooks until the next time they are due."""
        self._running = False
        for handle in self._step_handles:
            handle.remove()
        self._step_handles = []

    def close(self) -> None:
        self.end_step()
        for handle in self._block_handles:
            handle.remove()
        self._block_handles = []

    @property
    def pending_steps(self) -> int:
        """Steps begun since the last `read`; more than ``kept_steps`` of them cannot be kept."""
        return self._earlier_steps + self._ticks - self._read_ticks

    @property
    def nearly_full(self) -> bool:
        """Whether half of the ring waits to be read."""
        return 2 * self.pending_steps >= self._kept_steps

    @property
    def nbytes(self) -> int:
        """Device memory of the ring."""
        return self._ring.cells.nbytes if self._names else 0

    def read(self) -> list[TapReading]:
        """The readings since the last call, by step and module; waits for the device."""
        readings = self._unread()
        self._read_ticks, self._earlier, self._earlier_steps = self._ticks, [], 0
        return readings

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data: the readings that wait, which still wait afterwards, and which
        modules return the model's own output."""
        return {
            "steps": self.pending_steps,
            "skipped": sorted(self._skipped),
            "readings": [asdict(reading) for reading in self._unread()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of another process' taps on the same model."""
        self._earlier_steps, self._skipped = state["steps"], set(state["skipped"])
        self._earlier = [TapReading(**reading) for reading in state["readings"]]

    def stop_gathering(self) -> None:
        """From now on read this process' own modules only: the other ranks no longer take part."""
        self._gather = lambda mine: [mine]

    def _unread(self) -> list[TapReading]:
        if not self._names or not self.pending_steps:
            return []
        newest = self._ticks
        readings: list[TapReading] = []
        for cell in self._ring.read():
            if cell.step <= self._read_ticks:
                continue
            step, called = self._step_of_tick[cell.step - newest - 1], self._called_in_tick[cell.step - newest - 1]
            place, direction = divmod(cell.slot, 2)
            nonzero = None if cell.zeros is None else cell.numel - cell.zeros
            readings.append(
                TapReading(
                    step=step,
                    module=self._names[place],
                    order=place,
                    direction="bwd" if direction else "fwd",
                    dtype=self._dtypes.get(cell.slot, ""),
                    absmax=cell.absmax,
                    nan=cell.nan,
                    inf=cell.inf,
                    flush_frac=cell.fp16_flush / nonzero if nonzero and cell.fp16_flush is not None else None,
                    called=called[cell.slot],
                )
            )
        self.mine = readings
        return self._earlier + merge_readings(self._gather(readings))

    def _hook(self, name: str):
        slot = 2 * self._order[name]
        measure_gradient = self._guard(lambda gradient: self._measure_gradient(gradient, slot + 1))

        def measure(module: torch.nn.Module, args: tuple, output: object) -> None:
            if not self._running:
                return
            again = torch._C._current_autograd_node() is not None  # a checkpointed module runs a second time
            if not again:
                self._call(slot)
            if not torch.is_grad_enabled() or slot in self._skipped or (again and slot in self._measured):
                return  # an evaluation, the first pass of a reentrant checkpoint, the second of another
            if not again:
                self._measured.add(slot)
            for tensor in tensors_in(output):
                if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                    continue  # inside vmap or grad: it has no memory of its own
                if self._skip_output:
                    self._addresses[slot] = weakref.ref(tensor), tensor.data_ptr()
                self._measure(tensor, slot)
                if tensor.requires_grad:
                    handle = tensor.register_hook(measure_gradient)
                    if tensor.is_leaf:  # a module that returns its parameter: the hook would outlive the step
                        self._step_handles.append(handle)

        return measure

    def _find_output(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        """Leave out what returned the model's own output, from the next pass on. A tensor that is gone by then only had its
        memory: which of those the allocator gives to the output differs from process to process."""
        outputs = {tensor.data_ptr() for tensor in tensors_in(output)}
        self._skipped |= {
            slot for slot, (tensor, address) in self._addresses.items() if address in outputs and tensor() is not None
        }
        self._addresses.clear()

    def _call(self, slot: int) -> None:
        """Note a slot's turn in this step; the last one counts: what is called again and again (a dropout) mostly
        passes on what others made."""
        called = self._called_in_tick[-1]
        called[slot] = self._turns = self._turns + 1

    def _measure_gradient(self, gradient: torch.Tensor, slot: int) -> None:
        self._call(slot)
        self._measure(gradient, slot)

    @torch.no_grad()
    def _measure(self, tensor: torch.Tensor, slot: int) -> None:
        if tensor.dtype not in MEASURED or not is_dense(tensor):
            return
        self._dtypes.setdefault(slot, str(tensor.dtype).removeprefix("torch."))
        activation_stats([tensor], self._slots[slot], counts=self._counts)
