"""Estimated duration of a run, in seconds, from its products and the rate of this device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from harness.estimate.model import Trace
from harness.precision import DTYPES
from harness.settings import RunSettings
from instrument.count import count
from instrument.flops import StepFlops
from instrument.gpus import known_card
from instrument.mfu import weighted_peak

GPU_EFFICIENCY = 0.4
"""Share of a card's dense peak that a plain eager training step reaches: an assumption, shown with the estimate."""
TANH_PER_ELEMENT = 2.0
"""What a step spends on one kept number besides products, in units of one fp32 tanh: chosen on tiny runs on two
shared cores of an EPYC. Three fp32_true runs tried afterwards took 1.2 to 1.4 times the estimated step."""


def duration(settings: RunSettings, traced: Trace, step_flops: StepFlops) -> dict[str, object]:
    """``flops_per_step`` (rows of full length), the rate and its source, ``step_s``, ``evaluation_s``, ``total_s``
    (without start-up and data). Null seconds for a GPU whose peak is not known."""
    by_dtype = step_flops.of(settings.batch_size, settings.seq_len)
    flops = sum(by_dtype.values())
    found: dict[str, object] = {"flops_per_step": flops, "step_s": None, "evaluation_s": None, "total_s": None}
    micro_batches = settings.batch_size // settings.micro_batch
    forwards = evaluations(settings) * -(-settings.validation_documents // settings.micro_batch)
    if settings.device == "cuda":
        rate, source = gpu_rate(by_dtype, torch.cuda.get_device_name())
        found |= {"rate_flops_per_s": rate, "rule": source}
        if rate is None:
            return found
        step_s = flops / rate
    else:
        rate, tanh_s = cpu_product_rate(settings), cpu_tanh_s()
        step_s = flops / rate + TANH_PER_ELEMENT * tanh_s * traced.kept_elements * micro_batches
        found |= {
            "rate_flops_per_s": rate,
            "tanh_s": tanh_s,
            "rule": f"products, and {TANH_PER_ELEMENT:g} tanh for every number that autograd keeps, both as measured "
            f"here on one thread, over {count(torch.get_num_threads(), 'thread')}",
        }
    evaluation_s = forwards * step_s / micro_batches / 3  # the forward pass is a third of a step
    return found | {"step_s": step_s, "evaluation_s": evaluation_s, "total_s": step_s * settings.max_steps + evaluation_s}


def evaluations(settings: RunSettings) -> int:
    """At the start, at the end, and every ``eval_every`` steps between."""
    between = (settings.max_steps - 1) // settings.eval_every if settings.eval_every else 0
    return 2 + between


def gpu_rate(flops: Mapping[str, int], name: str) -> tuple[float | None, str]:
    """(FLOP/s, rule) of a card for work by dtype; None for one whose peak is not known."""
    card, dtypes = known_card(name), " and ".join(flops)
    peak = weighted_peak(flops, card and card.peaks())
    if peak is None:
        return None, f"no published peak is known for {name!r} in {dtypes}, and none is guessed"
    return GPU_EFFICIENCY * peak, f"{GPU_EFFICIENCY:.0%} (assumed) of the {card.name}'s dense {dtypes} peak"


def cpu_product_rate(settings: RunSettings, budget_s: float = 0.1) -> float:
    """FLOP/s of a product of the run's own kind: 512 rows, 256 by 1,024, random numbers."""
    dtype = DTYPES[settings.config.compute]
    left, right = torch.randn(512, 256).to(dtype), torch.randn(256, 1024).to(dtype)
    return 2 * 512 * 256 * 1024 / _on_all_threads_s(lambda: left @ right, budget_s)


def cpu_tanh_s(budget_s: float = 0.05) -> float:
    """Seconds for one number of an fp32 tanh over 2^18 numbers."""
    numbers = torch.randn(1 << 18)
    return _on_all_threads_s(lambda: torch.tanh(numbers), budget_s) / (1 << 18)


def _on_all_threads_s(work: Callable[[], object], budget_s: float) -> float:
    """Seconds on one thread, divided by the run's threads. Threads that wait for each other on a busy
    machine measure its scheduler: a product on two of them came out 40 times too slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _best(work, budget_s) / threads
    finally:
        torch.set_num_threads(threads)


def _best(work: Callable[[], object], budget_s: float, at_least: int = 5) -> float:
    """The shortest of the repetitions that fit into the budget, after one that warms up: the longer
    ones measure what else runs on the machine."""
    work()
    times_s, ends = [], time.perf_counter() + budget_s
    while len(times_s) < at_least or time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - started)
    return min(times_s)
