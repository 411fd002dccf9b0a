"""``bench overhead``: what the instruments cost a training step, beside what others' cost.

Every arm has its own copy of one model (GPT-2, about 10 million parameters) and takes one step in
turn, in an order that is reversed from round to round; ratios are to the bare loop's step of the
same round. The arms behind the claim (bare twice, light) run in every round, the others in every
fourth. The second bare arm (A/A) shows how far two equal arms lie apart here. Processor time stands
beside wall time, since other work on the machine touches it less.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from harness.overhead.figure import Figure, half_width_95, summarize

TARGETS = {"cpu": 1.03, "cuda": 1.01}
A_A_INTERVAL = 0.01
LOG_WRITE_US = 20.0
WARMUP_ROUNDS = 3
SELDOM = 4
IN_EVERY_ROUND = ("bare", "bare_again", "light")
ARMS = ("bare", "bare_again", "light", "full", "watch", "debug_underflow_overflow", "detect_anomaly")


def measure(pairs: int, out: Path | None = None, at_most_s: float | None = None) -> list[Figure]:
    """Ratios of every arm's step time to the bare loop's; ``out`` gets ``overhead.json``. Behind ``at_most_s`` seconds of
    rounds no other begins: there are fewer pairs then, and wider intervals."""
    import tempfile

    import torch

    from harness.overhead.arms import make_arms

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        arms, facts, close = make_arms(device, Path(folder))
        try:
            wall_s, cpu_s = _rounds(arms, pairs, facts["steps_a_turn"], at_most_s)
        finally:
            close()
    figures = [*_figures(wall_s, "", facts, TARGETS[device.type]), *_figures(cpu_s, "_cpu", facts, None), log_write()]
    if out is not None:
        from instrument.results.files import replace

        rows = {
            "device": str(device),
            "pairs": len(wall_s["bare"]),
            **facts,
            "rows": [figure.as_row() for figure in figures],
            "wall_s": wall_s,
            "cpu_s": cpu_s,
        }
        replace(out / "overhead.json", json.dumps(rows, allow_nan=False).encode() + b"\n")
    return figures


def log_write(records: int = 2000) -> Figure:
    """What writing one step's record costs the training thread: encoded, one line, one system call."""
    import tempfile

    from instrument.results.log import JsonlLog
    from instrument.results.schemas import StepRecord

    record = StepRecord(
        step=812,
        loss=2.8173,
        lr=3e-4,
        grad_norm=1.2345,
        grad_absmax=0.25,
        grad_nonfinite=0,
        grad_underflow_frac=0.0123,
        logit_absmax=17.25,
        logit_nonfinite=0,
        logit_over_fp16=0,
        loss_scale=65_536,
        step_skipped=False,
        step_time_s=0.0971,
        samples=32,
        tokens=32768,
        real_tokens=31000,
        seq_len=1024,
        flops=27_998_388_486_144,
        mfu=0.41,
        allocated_bytes=41_000_000_000,
    )
    spent_us = []
    with tempfile.TemporaryDirectory() as folder, JsonlLog(Path(folder) / "log.jsonl") as log:
        for _ in range(records):
            began = time.perf_counter()
            log.write(record)
            spent_us.append(1e6 * (time.perf_counter() - began))
    return summarize("overhead", "log_write", spent_us, "us", at_most=LOG_WRITE_US, note=f"{records} records, one at a time")


def _rounds(
    arms: dict[str, Iterator[None]], pairs: int, steps_a_turn: int, at_most_s: float | None = None
) -> tuple[dict[str, list[float | None]], ...]:
    """Wall and processor seconds of every arm's step, a round at a time; None where an arm took no part. One round counts,
    whatever it takes."""
    wall_s, cpu_s = ({name: [] for name in arms} for _ in range(2))
    ends = math.inf if at_most_s is None else time.perf_counter() + at_most_s
    for turn in range(WARMUP_ROUNDS + pairs):
        if turn > WARMUP_ROUNDS and time.perf_counter() > ends:
            break
        whole = turn < WARMUP_ROUNDS or (turn - WARMUP_ROUNDS) % SELDOM == 0
        order = [name for name in arms if whole or name in IN_EVERY_ROUND]
        spent = {name: _step(arms[name]) for name in (order if turn % 2 == 0 else reversed(order))}
        for name in arms if turn >= WARMUP_ROUNDS else ():
            wall, cpu = spent.get(name, (None, None))
            wall_s[name].append(wall and wall / steps_a_turn)
            cpu_s[name].append(cpu and cpu / steps_a_turn)
    return wall_s, cpu_s


def _step(arm: Iterator[None]) -> tuple[float, float]:
    """Wall and processor seconds of an arm's next turn."""
    began, began_cpu = time.perf_counter(), time.process_time()
    next(arm)
    return time.perf_counter() - began, time.process_time() - began_cpu


def _figures(seconds: dict[str, list[float]], suffix: str, facts: dict[str, object], target: float | None) -> list[Figure]:
    """The bare step's time, and every other arm's ratio to it."""
    bare = seconds["bare"]
    figures = [summarize("overhead", f"bare_step_s{suffix}", bare, "s", note=str(facts["what"]))]
    for name in ARMS[1:]:
        ratios = [a / b for a, b in zip(seconds[name], bare, strict=True) if a is not None]
        note = _note(name, ratios, facts)
        figures.append(
            summarize("overhead", f"{name}{suffix}", ratios, "ratio", note=note, at_most=target if name == "light" else None)
        )
    added = {
        name: median(a - b for a, b in zip(seconds[name], bare, strict=True) if a is not None)
        for name in ("light", "debug_underflow_overflow")
    }
    if added["light"] > 0:
        figures.append(
            summarize(
                "overhead",
                f"added_debug_over_light{suffix}",
                [added["debug_underflow_overflow"] / added["light"]],
                "ratio",
                note="time added by DebugUnderflowOverflow over time added by light",
            )
        )
    return figures


def _note(name: str, ratios: list[float], facts: dict[str, object]) -> str:
    if name == "bare_again":
        half = half_width_95(ratios)
        width = math.inf if half is None else 2 * half
        verdict = "under" if width < A_A_INTERVAL else "not under"
        return f"A/A: the interval is {width:.2%} wide, {verdict} the {A_A_INTERVAL:.0%} that a claim of 1 % needs"
    return str(facts["notes"].get(name, ""))
