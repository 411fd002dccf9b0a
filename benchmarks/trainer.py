"""``python -m benchmarks trainer``: our loop against `transformers.Trainer`, arms interleaved in one process."""

from __future__ import annotations

from importlib import util
from statistics import median

import torch

from bench_cases import CASES, DTYPE_CONFIGS
from harness.figures import Figure, summarize
from harness.planning import plan_run
from harness.settings import Request
from instrument.terminal import count

TARGET_RATIO = 1.0
CASE_IDS = ("gpt2_clm", "gpt2_multi_cls")
EARLY_STEPS, EARLY_TOLERANCE = 5, 1e-5
"""Largest relative difference of the first steps' losses (measured: 1e-7). A different batch, rate,
normaliser or clipping shows here, before rounding has had time to grow."""
TOLERANCE = 5e-3
"""Of every step's loss and of the mean final weight (measured: up to 8e-4 and 9e-4 in 60 steps of
gpt2_clm). The arms round the gradient norm and the loss differently, and AdamW divides small
gradients by their own size, so that 1e-7 grows tenfold every ten steps or so."""


class UnfairComparison(RuntimeError):
    """The arms did not do the same work, so their times say nothing."""


class BenchUnavailable(Exception):
    """A benchmark that needs a package which is not installed."""


def measure(repeats: int, case_ids: tuple[str, ...] = CASE_IDS, **sizes) -> list[Figure]:
    """Steps per second of both arms and their ratio, for each case; ``sizes`` go into the request.

    The arms take turns step by step, and a repetition's ratio is that of the median step times
    after the preset's untimed steps; beside it stands the ratio of processor time, which other
    work on the machine touches less.
    """
    if util.find_spec("accelerate") is None:
        raise BenchUnavailable("bench trainer needs accelerate, which only the Trainer uses: pip install accelerate")
    figures = []
    for case_id in case_ids:
        figures += _measure_case(case_id, repeats, sizes)
    return figures


def _measure_case(case_id: str, repeats: int, sizes: dict) -> list[Figure]:
    from benchmarks.trainer_arms import run_both, work_for

    settings = plan_run(
        CASES[case_id],
        DTYPE_CONFIGS["fp32_true"],
        0,
        Request(preset="tiny", data="embedded", device="cpu", **sizes),
        torch.device("cpu"),
    )
    work = work_for(settings)
    untimed = settings.untimed_steps
    ours, theirs, ratios, cpu_ratios, difference = [], [], [], [], 0.0
    for _ in range(repeats):
        our_arm, their_arm = run_both(work)
        difference = max(difference, require_same_work(our_arm, their_arm))
        ours.append(1 / median(our_arm.wall_s[untimed:]))
        theirs.append(1 / median(their_arm.wall_s[untimed:]))
        ratios.append(ours[-1] / theirs[-1])
        cpu_ratios.append(sum(their_arm.cpu_s[untimed:]) / sum(our_arm.cpu_s[untimed:]))
    note = (
        f"{count(settings.max_steps - untimed, 'step')} of {settings.batch_size} x {settings.seq_len}, "
        f"micro-batch {settings.micro_batch}, {count(torch.get_num_threads(), 'thread')}, fp32_true"
    )
    return [
        summarize("trainer", f"{case_id}_ours", ours, "steps/s", note=note),
        summarize("trainer", f"{case_id}_trainer", theirs, "steps/s", note=note),
        summarize(
            "trainer",
            f"{case_id}_ratio",
            ratios,
            "ratio",
            at_least=TARGET_RATIO,
            note=f"ours over Trainer, median step; losses agree to {difference:.1e}",
        ),
        summarize("trainer", f"{case_id}_cpu_ratio", cpu_ratios, "ratio", note="the same by processor time, all timed steps"),
    ]


def require_same_work(ours, theirs) -> float:
    """The largest relative difference of the arms' losses; raises `UnfairComparison` when the
    steps, the losses or how far the weights moved say that the arms did different work."""
    if len(ours.losses) != len(theirs.losses):
        raise UnfairComparison(f"our loop took {len(ours.losses)} steps and the Trainer {len(theirs.losses)}")
    apart = [abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    for step, difference in enumerate(apart, start=1):
        allowed = EARLY_TOLERANCE if step <= EARLY_STEPS else TOLERANCE
        if not difference <= allowed:  # a NaN is no agreement
            raise UnfairComparison(
                f"the arms' losses differ: step {step} by {difference:.1e} (relative; "
                f"allowed {allowed:.0e}; ours {ours.losses[step - 1]:.6g}, "
                f"Trainer {theirs.losses[step - 1]:.6g})"
            )
    pairs = list(zip(ours.weights, theirs.weights, strict=True))
    moved = sum(float((a - b).abs().sum()) for a, b in pairs) / sum(float(a.abs().sum()) for a, _ in pairs)
    if not moved <= TOLERANCE:
        raise UnfairComparison(f"the arms' final weights differ by {moved:.1e} of their size on average")
    return max(apart)
