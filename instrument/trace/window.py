"""A window of steps under torch.profiler: one gzipped Chrome/Perfetto JSON with our own tracks in it.

    with TraceWindow(path, device) as trace:
        trace.enter("forward", step)
        ...
    trace.table()                                # seconds by kernel class and phase

Open the file at https://ui.perfetto.dev. Profiling slows the window down: never inside a timed one.
`ModuleMagnitudes` adds the largest |x| of every module's output and of its gradient as counters. Only for the few steps
of a trace: one reduction per module and direction. The numbers stay on the device until `samples` reads them, so no wait
is added. Times are the host's (on CUDA: of the launch).
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from instrument.hooks import blocks, leaves, tensors_in
from instrument.results.files import replace
from instrument.results.schemas import PHASES
from instrument.trace.time_table import PHASE_PREFIX, WINDOW, time_table
from instrument.trace.tracks import CounterSample, Flow, Marker, PhaseSlice, events_of


class TraceWindow:
    """A context that profiles what runs inside, then writes ``path`` (``.json.gz``).

    An exception inside still leaves a trace and is raised again; a trace that cannot be written leaves its
    reason in ``failure``. Phase slices are the host's times: on CUDA the kernels run later.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.device = device
        self.failure: str | None = None
        self._running = False
        self.events: list[dict[str, Any]] | None = None
        """torch's events, once the window has been stopped and written."""
        self._ours: list[CounterSample | Marker | PhaseSlice | Flow] = []
        self._now: tuple[record_function, str, int | None, int] | None = None
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints every start and stop
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        # Accumulating would parse every event in Python at the end of the window, for tables that nobody asks for here.
        self._profile = profile(activities=activities, record_shapes=True, acc_events=False)
        self._window = record_function(WINDOW)

    def __enter__(self) -> TraceWindow:
        """Begin to profile. A profiler that cannot start (another one runs, CUPTI is missing) is a ``failure``."""
        self._synchronize()
        try:
            with warnings.catch_warnings():  # torch 2.11 warns of every profile that does not accumulate, even of one cycle
                warnings.filterwarnings("ignore", "Warning: Profiler clears events")
                self._profile.start()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
        else:
            self._running = True
            self._window.__enter__()
        return self

    def __exit__(self, *_) -> None:
        """End the window, wait for the device, and write the file. Never raises: an error that ended the window
        must be raised on, and neither a broken device nor a full disk may hide it."""
        if not self._running:
            return
        self._running = False
        try:
            self.enter(None)
            self._synchronize()
            self._window.__exit__(None, None, None)
            self._profile.stop()
            self._write()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def enter(self, phase: str | None, step: int | None = None) -> None:
        """The phase before ends and ``phase`` (one of `PHASES`; None: no phase) begins: an annotation in
        torch's part of the trace, and a slice on our track."""
        if phase is not None and phase not in PHASES:
            raise ValueError(f"phase is {phase!r}; allowed: {', '.join(PHASES)}, or None")
        if self._now is not None:
            annotation, name, of_step, start_ns = self._now
            annotation.__exit__(None, None, None)
            self.add(PhaseSlice(name, start_ns, time.time_ns(), of_step))
            self._now = None
        if phase is not None:
            self._now = (record_function(PHASE_PREFIX + phase), phase, step, time.time_ns())
            self._now[0].__enter__()

    def add(self, *ours: CounterSample | Marker | PhaseSlice | Flow) -> None:
        """Put these on our tracks; inside the window."""
        self._ours += ours

    @property
    def phases(self) -> tuple[PhaseSlice, ...]:
        """The phases that have ended so far."""
        return tuple(one for one in self._ours if isinstance(one, PhaseSlice))

    def table(self, *, top: int = 20) -> dict[str, Any]:
        """Seconds by kernel class and phase (`time_table`); raises RuntimeError when there is no trace."""
        if self.events is None:
            raise RuntimeError(f"there is no trace: {self.failure or 'the window has not been stopped'}")
        return time_table(self.events, top=top)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".trace-") as folder:
            raw = Path(folder) / "torch.json"
            self._profile.export_chrome_trace(str(raw))
            trace = json.loads(raw.read_bytes())
        self.events = trace["traceEvents"]
        trace["traceEvents"] = [*self.events, *events_of(self._ours, int(trace["baseTimeNanoseconds"]))]
        replace(self.path, gzip.compress(msgspec.json.encode(trace), compresslevel=6, mtime=0))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


OURS = "ddb.ours.magnitudes"
"""The annotation by which `time_table` knows these reductions as ours, not the model's."""


class ModuleMagnitudes:
    """A context around traced steps of ``model``: watches its blocks and leaves (`instrument.hooks`)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._found: list[tuple[int, str, str, torch.Tensor]] = []

    def __enter__(self) -> ModuleMagnitudes:
        for name, module in (blocks(self._model) | leaves(self._model)).items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def samples(self) -> list[CounterSample]:
        """What was seen, in the order of time; reads the device."""
        values = torch.stack([value for *_, value in self._found]).tolist() if self._found else []
        return [
            CounterSample(unix_ns, name, **{direction: value})
            for (unix_ns, name, direction, _), value in zip(self._found, values, strict=True)
        ]

    def _hook(self, name: str):
        def after_forward(module: nn.Module, arguments: tuple, output: object) -> None:
            for tensor in (tensor for tensor in tensors_in(output) if tensor.numel()):
                self._keep(name, "fwd", tensor)
                if tensor.requires_grad:  # a hook on the tensor: full backward hooks miss nested outputs
                    tensor.register_hook(lambda gradient: self._keep(name, "bwd", gradient))

        return after_forward

    def _keep(self, name: str, direction: str, tensor: torch.Tensor) -> None:
        if not self._handles:  # a backward pass after the window
            return
        with torch.no_grad(), record_function(OURS):
            lowest, highest = torch.aminmax(tensor.detach())
            self._found.append((time.time_ns(), name, direction, torch.maximum(-lowest, highest).float()))


def flows_from(producer: str, samples: Sequence[CounterSample], *, limit: int = 8) -> list[Flow]:
    """Arrows from the first non-finite sample of ``producer`` to the first modules that are non-finite after it.

    ``producer`` is the diagnosis' to name: the first in time may have been absorbed. None when it has no non-finite sample.
    """
    bad = [sample for sample in samples if not sample.is_finite]
    start = next((sample for sample in bad if sample.name == producer), None)
    if start is None:
        return []
    reached: dict[str, int] = {}
    for sample in bad:
        if sample.unix_ns >= start.unix_ns and sample.name != producer:
            reached.setdefault(sample.name, sample.unix_ns)
    return [Flow(producer, start.unix_ns, name, unix_ns) for name, unix_ns in list(reached.items())[:limit]]
