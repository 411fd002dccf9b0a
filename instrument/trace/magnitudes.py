"""Largest |x| of every module's output and of its gradient while a window is traced, as counters with the time
at which they were made.

Only for the few steps of a trace: one reduction per module and direction. The numbers stay on the
device until `samples` reads them, so no wait is added. Times are the host's (on CUDA: of the launch).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn
from torch.profiler import record_function

from instrument.trace.tracks import CounterSample, Flow
from instrument.watch.modules import blocks, leaves, tensors_in

OURS = "ddb.ours.magnitudes"
"""The annotation by which `time_table` knows these reductions as ours, not the model's."""


class ModuleMagnitudes:
    """A context around traced steps of ``model``: watches its blocks and leaves (`instrument.watch.modules`)."""

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
        if not self._handles:  # a backward pass behind the window
            return
        with torch.no_grad(), record_function(OURS):
            lowest, highest = torch.aminmax(tensor.detach())
            self._found.append((time.time_ns(), name, direction, torch.maximum(-lowest, highest).float()))


def flows_from(producer: str, samples: Sequence[CounterSample], *, limit: int = 8) -> list[Flow]:
    """Arrows from the first non-finite sample of ``producer`` to the first modules that are non-finite behind it.

    ``producer`` is the diagnosis' to name: the first in time may have been absorbed. None when it has
    no non-finite sample.
    """
    bad = [sample for sample in samples if not all(_finite(value) for value in (sample.fwd, sample.bwd))]
    start = next((sample for sample in bad if sample.name == producer), None)
    if start is None:
        return []
    reached: dict[str, int] = {}
    for sample in bad:
        if sample.unix_ns >= start.unix_ns and sample.name != producer:
            reached.setdefault(sample.name, sample.unix_ns)
    return [Flow(producer, start.unix_ns, name, unix_ns) for name, unix_ns in list(reached.items())[:limit]]


def _finite(value: float | None) -> bool:
    return value is None or abs(value) < float("inf")  # NaN compares false
