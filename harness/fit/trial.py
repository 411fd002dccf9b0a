"""Trials of one batch size: a few steps in a process of its own, so that one that runs out of memory, crashes or hangs costs
only itself. Preloaded by the fork server: importing this imports torch and the models, and initialises nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers.models.gpt2.modeling_gpt2
import transformers.models.roberta.modeling_roberta  # noqa: F401  (paid here, once)

from bench_cases.data.batches import Batches
from bench_cases.models import build_model
from harness.failure import of_exception, sentence
from harness.fit.search import BatchTrial
from harness.precision import Precision, Unsupported
from harness.run.execute import load_run_data, make_batches, model_request
from harness.settings import RunSettings
from harness.supervisor.child_process import ForkServerProcess
from harness.training import Training

LONGEST_STEPS, WARM_STEPS = 2, 2
"""Steps of the longest rows (the second has the optimizer's states), then ordinary ones, untimed."""
LEAST_TIMED, MOST_TIMED, ENOUGH_S = 3, 20, 5.0
"""Timed steps: as many as take `ENOUGH_S`."""
TRIAL_S = 180.0
"""A trial that takes longer is ended: it counts as one that does not run."""


class LongestFirst:
    """A run's batches after two of the longest rows there are."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.longest, self.data = batches.longest(), batches.data

    def step(self, step: int):
        return self.longest if step <= LONGEST_STEPS else self.batches.step(step)


class TrialProcesses:
    """Starts one trial at a time. ``memory_limit_bytes``: how much of the device's memory, or of a CPU process' addresses, a
    trial may use; None: all."""

    def __init__(self, memory_limit_bytes: int | None, at_most_s: float = TRIAL_S) -> None:
        self.memory_limit_bytes, self.at_most_s = memory_limit_bytes, at_most_s

    def trial(self, settings: RunSettings, *, timed: bool) -> BatchTrial:
        """Run one, and wait for it."""
        trial, why = self._run(enter, settings, timed, self.memory_limit_bytes)
        return trial if trial is not None else BatchTrial(settings.batch_size, "crashed", why)

    def facts(self) -> tuple[str, str, int | None]:
        """(device slug, device name, its memory in bytes), without touching the GPU from here."""
        facts, why = self._run(device_facts)
        if facts is None:
            raise RuntimeError(f"the process that asks the device for its name failed: {why}")
        return facts

    def _run(self, target: Callable, *arguments: Any) -> tuple[Any, str | None]:
        """What the process sent, or None and how it ended."""
        with ForkServerProcess(target, arguments, preload=[__name__]) as child:
            if (result := child.result(self.at_most_s)) is not None:
                return result, None
            if child.connected:
                return None, f"it did not end within {self.at_most_s:.0f} s"
            return None, child.failure().error


def enter(settings: RunSettings, timed: bool, memory_limit_bytes: int | None, reports: Connection) -> None:
    """The process's first function: sends one `BatchTrial`."""
    try:
        if memory_limit_bytes is not None:
            _limit(memory_limit_bytes, settings.device)
        trial = measure(settings, timed=timed)
    except Unsupported as error:
        trial = BatchTrial(settings.batch_size, "unsupported", str(error))
    except Exception as error:
        status = "oom" if of_exception(error).status == "oom" else "error"
        trial = BatchTrial(settings.batch_size, status, sentence(error)[:300])
    reports.send(trial)
    reports.close()


def measure(settings: RunSettings, *, timed: bool) -> BatchTrial:
    """Train a few steps; with ``timed`` long enough to tell the speed. Raises what training raises."""
    data = load_run_data(settings)
    batches = LongestFirst(make_batches(settings, data))
    precision = Precision.of(settings)
    try:
        training = Training.prepare(settings, build_model(model_request(settings, data)), batches, precision)
        gc.collect()
        _steps(training, 1, LONGEST_STEPS)
        warm_s, _, _ = _steps(training, LONGEST_STEPS + 1, WARM_STEPS if timed else 1)
        if not timed:
            return BatchTrial(settings.batch_size, "fits", peak_bytes=_peak(settings))
        count = max(LEAST_TIMED, min(MOST_TIMED, round(ENOUGH_S / warm_s)))
        seconds, tokens, real = _steps(training, LONGEST_STEPS + WARM_STEPS + 1, count)
        return BatchTrial(settings.batch_size, "fits", None, _peak(settings), seconds, count, tokens / seconds, real / seconds)
    finally:
        precision.close()


def _steps(training: Training, first: int, count: int) -> tuple[float, float, float]:
    """Seconds, tokens and real tokens a step, over ``count`` steps that the device is waited for once, after the last. A
    configuration that diverges on the way, as fp16_naive does, computes on with what is not finite, and as fast."""
    meter = training.meter(count)
    _wait(training.precision.device)
    began_s = time.perf_counter()
    rows = [step for reading in training.train(meter, range(first, first + count)) for step in reading.steps]
    _wait(training.precision.device)
    seconds = (time.perf_counter() - began_s) / count
    return seconds, sum(row.tokens for row in rows) / count, sum(row.real_tokens for row in rows) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(settings: RunSettings) -> int | None:
    return torch.cuda.max_memory_reserved() if settings.device == "cuda" else None


def _limit(memory_bytes: int, device: str) -> None:
    """Less memory than there is: the allocator's share of the GPU, or of a CPU process's addresses beside its libraries'."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / torch.cuda.get_device_properties(0).total_memory))
        return
    import resource

    import psutil

    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory_bytes, resource.RLIM_INFINITY))


def device_facts(reports: Connection) -> None:
    """What only a process that touches the GPU can tell: (slug, name, total bytes); of a CPU the name, and no total."""
    from instrument.environment import device_slug

    if not torch.cuda.is_available():
        reports.send((device_slug(torch.device("cpu")), "cpu", None))
    else:
        properties = torch.cuda.get_device_properties(0)
        reports.send((device_slug(torch.device("cuda")), properties.name, properties.total_memory))
    reports.close()
