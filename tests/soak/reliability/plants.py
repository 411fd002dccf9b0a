"""What the planted faults do, inside a run's process. `build` is an architecture's builder: GPT-2, which dies at a given
place. No hook in the harness is needed, and none is there.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench_cases import ARCHITECTURES, Architecture
from bench_cases.models import ModelRequest
from bench_cases.transformers_models import build_transformers

PHASES = ("build", "evaluation", "forward", "backward")
SEPARATOR = "|"
FOR_EVER_S = 10**6
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.72 GiB of which 3.12 MiB is free."
)


@dataclass(frozen=True)
class Plant:
    """A fault: ``what`` (a key of `STRIKES`), in ``phase``, of the ``step``-th training step where it is one.
    ``counter``: the file that stands for the kernel's count of out-of-memory kills."""

    what: str
    phase: str
    step: int
    counter: str = ""

    @property
    def name(self) -> str:
        """As an architecture's name, which carries it to the run's process."""
        return SEPARATOR.join((self.what, self.phase, str(self.step), self.counter))

    @classmethod
    def named(cls, name: str) -> Plant:
        """The plant of a name."""
        what, phase, step, counter = name.split(SEPARATOR)
        return cls(what, phase, int(step), counter)

    def strike(self, *_: object) -> None:
        """Do it."""
        STRIKES[self.what](self)


@dataclass(frozen=True, eq=False)
class PlantedArchitecture(Architecture):
    """A registered model with a fault. It equals the registered one, so that its FLOPs are that one's closed form: to count
    them, as an unknown model's, takes two seconds of a processor."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and self.id == other.id


def planted_architecture(id: str, build: str, **changes: object) -> Architecture:
    """The registered architecture ``id``, built by ``build`` (``module:function``)."""
    return PlantedArchitecture(**vars(ARCHITECTURES[id]) | {"build": build} | changes)


def build(request: ModelRequest) -> tuple[str, torch.nn.Module, torch.nn.Module]:
    """GPT-2, and the fault in it."""
    plant = Plant.named(request.architecture.name)
    if plant.phase == "build":
        plant.strike()
    name, encoder, head = build_transformers(replace(request, architecture=ARCHITECTURES["gpt2"]))
    encoder.register_forward_hook(_Countdown(plant))
    return name, encoder, head


def build_on_rank_1(request: ModelRequest) -> tuple[str, torch.nn.Module, torch.nn.Module]:
    """As `build`, under torchrun: the other ranks are healthy."""
    healthy = replace(request.architecture, name=Plant("none", "forward", 1).name)
    return build(request if os.environ["RANK"] == "1" else replace(request, architecture=healthy))


class _Countdown:
    """A forward hook that counts the training steps (one micro-batch each) and strikes in the plant's."""

    def __init__(self, plant: Plant) -> None:
        self.plant, self.steps = plant, 0

    def __call__(self, encoder: torch.nn.Module, inputs: tuple, outputs: tuple) -> None:
        hidden = outputs[0]
        if not encoder.training and self.plant.phase == "evaluation":
            self.plant.strike()
        if encoder.training and hidden.requires_grad:
            self.steps += 1
            if self.steps == self.plant.step and self.plant.phase == "forward":
                self.plant.strike()
            if self.steps == self.plant.step and self.plant.phase == "backward":
                hidden.register_hook(self.plant.strike)


def _raise(error: BaseException) -> None:
    raise error


def _host_memory(plant: Plant) -> None:
    """All the address space there is left, and some more: by torch in one place, by Python in another."""
    limit_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    if plant.step % 2:
        torch.empty(1 << 33, dtype=torch.uint8)
    else:
        bytearray(1 << 33)


def _killed_by_the_kernel(plant: Plant) -> None:
    Path(plant.counter).write_text("low 0\noom_kill 1\n")
    os.kill(os.getpid(), signal.SIGKILL)


def _hang_with_the_lock(plant: Plant) -> None:
    """`ctypes.PyDLL` does not release the interpreter's lock; a signal ends one sleep."""
    while True:
        ctypes.PyDLL(None).sleep(FOR_EVER_S)


def _hang_deaf(plant: Plant) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(1)


def _poison(message: str) -> Callable[[Plant], None]:
    """A device error, after which every call into torch.cuda raises, as in a poisoned context."""

    def strike(plant: Plant) -> None:
        def fails(*_: object, **__: object) -> None:
            raise torch.AcceleratorError("CUDA error: the context is poisoned")

        for name in (
            "synchronize",
            "memory_stats",
            "max_memory_allocated",
            "max_memory_reserved",
            "mem_get_info",
            "get_device_properties",
            "get_device_name",
            "empty_cache",
            "current_stream",
        ):
            setattr(torch.cuda, name, fails)
        raise torch.AcceleratorError(message)

    return strike


STRIKES: dict[str, Callable[[Plant], None]] = {
    "none": lambda plant: None,
    "segfault": lambda plant: ctypes.string_at(0),
    "abort": lambda plant: os.abort(),
    "os_exit": lambda plant: os._exit(plant.step),
    "sys_exit": lambda plant: sys.exit(plant.step),
    "exception": lambda plant: _raise(ZeroDivisionError("a planted fault")),
    "import_failure": lambda plant: importlib.import_module("a_module_that_is_not_there"),
    "device_oom": lambda plant: _raise(torch.OutOfMemoryError(OUT_OF_MEMORY)),
    "host_oom": _host_memory,
    "kernel_kill": _killed_by_the_kernel,
    "sigkill": lambda plant: os.kill(os.getpid(), signal.SIGKILL),
    "hang_asleep": lambda plant: time.sleep(FOR_EVER_S),
    "hang_with_the_lock": _hang_with_the_lock,
    "hang_deaf": _hang_deaf,
    "hang_stopped": lambda plant: os.kill(os.getpid(), signal.SIGSTOP),
    "illegal_access": _poison("CUDA error: an illegal memory access was encountered"),
    "device_assert": _poison("CUDA error: device-side assert triggered"),
}
