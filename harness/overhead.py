"""``bench overhead``: what the instruments cost a training step, beside what others' cost.

Every arm has its own copy of one model (GPT-2, about 10 million parameters on a CPU) and takes one step in turn, in an order
that is reversed from round to round; ratios are to the bare loop's step of the same round. The arms of the claim (bare
twice, light) run in every round, the others in every fourth. The second bare arm (A/A) shows how far two equal arms lie
apart here. Processor time stands beside wall time, since other work on the machine touches it less.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from bench_cases import CASES, DTYPE_CONFIGS
from bench_cases.models import build_model
from harness.exit_codes import OK
from harness.figures import Figure, half_width_95, machine, show, show_machine, summarize
from harness.optimizer import learning_rate
from harness.planning import choose_device, plan_run
from harness.precision import Precision
from harness.run.execute import load_run_data, make_batches, model_request
from harness.run.instruments import Instruments
from harness.settings import MAX_NORM, Request, RunSettings, SettingsError
from harness.training import Training
from instrument.results.files import replace as replace_file
from instrument.results.folder import RunFolder
from instrument.results.log import JsonlLog
from instrument.results.schemas import StepRecord
from instrument.terminal import count as words_for
from instrument.watch.watch import Watch

TARGETS = {"cpu": 1.03, "cuda": 1.01}
A_A_INTERVAL = 0.01
LOG_WRITE_US = 20.0
WARMUP_ROUNDS = 3
SELDOM = 4
IN_EVERY_ROUND = ("bare", "bare_again", "light")
ARMS = ("bare", "bare_again", "light", "full", "watch", "debug_underflow_overflow", "detect_anomaly")
BARE = ("bare", "bare_again", "watch", "debug_underflow_overflow", "detect_anomaly")
"""The arms whose loop is written by hand."""
ELSEWHERE = {"forensics": "tests.soak.forensics", "reliability": "tests.soak.reliability"}
ELSEWHERE |= {name: f"benchmarks {name}" for name in ("help", "run", "matrix", "trainer")}
"""Benchmarks that are no part of the package, and the module of a clone that runs each."""


def bench_command(options: argparse.Namespace) -> int:
    """Measure and print; a missed target is a result, not an error. Raises `SettingsError` for another benchmark."""
    for name in sorted(set(options.what) - {"overhead"}):
        where = f"; in a clone of the project it is `python -m {ELSEWHERE[name]}`" if name in ELSEWHERE else ""
        raise SettingsError(f"no benchmark {name!r}; allowed: overhead{where}")
    here = machine()
    show_machine(here, options.pairs)
    figures = measure(options.pairs, options.out, options.at_most)
    show("overhead", figures)
    if options.json:
        rows = [figure.as_row() for figure in figures]
        sys.stdout.write(json.dumps({"machine": here, "repeats": options.pairs, "rows": rows}, allow_nan=False) + "\n")
    return OK


def measure(pairs: int, out: Path | None = None, at_most_s: float | None = None) -> list[Figure]:
    """Ratios of every arm's step time to the bare loop's; ``out`` gets ``overhead.json``. No round begins after
    ``at_most_s`` seconds of rounds: there are fewer pairs then, and wider intervals."""
    device = choose_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        arms, facts, close = make_arms(device, Path(folder))
        try:
            wall_s, cpu_s = _rounds(arms, pairs, facts["steps_a_turn"], at_most_s)
        finally:
            close()
    figures = [*_figures(wall_s, "", facts, TARGETS[device.type]), *_figures(cpu_s, "_cpu", facts, None), log_write()]
    if out is not None:
        rows = {"device": str(device), "pairs": len(wall_s["bare"]), **facts, "rows": [figure.as_row() for figure in figures]}
        rows |= {"wall_s": wall_s, "cpu_s": cpu_s}
        replace_file(out / "overhead.json", json.dumps(rows, allow_nan=False).encode() + b"\n")
    return figures


def log_write(records: int = 2000) -> Figure:
    """What writing one step's record costs the training thread: encoded, one line, one system call."""
    loss = {"step": 812, "loss": 2.8173, "lr": 3e-4, "logit_absmax": 17.25, "logit_nonfinite": 0, "logit_over_fp16": 0}
    gradients = {"grad_norm": 1.2345, "grad_absmax": 0.25, "grad_nonfinite": 0, "grad_underflow_frac": 0.0123}
    sizes = {"samples": 32, "tokens": 32_768, "real_tokens": 31_000, "seq_len": 1024, "flops": 27_998_388_486_144}
    step = {"loss_scale": 65_536, "step_skipped": False, "step_time_s": 0.0971, "mfu": 0.41, "allocated_bytes": 41_000_000_000}
    record = StepRecord(**loss, **gradients, **sizes, **step)
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
    at_most_s, began_s = math.inf if at_most_s is None else at_most_s, time.perf_counter()
    warm, turn = WARMUP_ROUNDS, -1
    while (turn := turn + 1) < warm + pairs:
        spent_s = time.perf_counter() - began_s
        if 0 < turn < warm and spent_s > at_most_s / 2:  # on a machine that is busy one must do, or nothing would be measured
            warm = turn
        if turn > warm and spent_s > at_most_s:
            break
        whole = turn < warm or (turn - warm) % SELDOM == 0
        order = [name for name in arms if whole or name in IN_EVERY_ROUND]
        spent = {name: _step(arms[name]) for name in (order if turn % 2 == 0 else reversed(order))}
        for name in arms if turn >= warm else ():
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
    added = {}
    for name in ARMS[1:]:
        pairs = [(a, b) for a, b in zip(seconds[name], bare, strict=True) if a is not None]
        ratios, added[name] = [a / b for a, b in pairs], median(a - b for a, b in pairs)
        note = _width(ratios) if name == "bare_again" else str(facts["notes"].get(name, ""))
        at_most = target if name == "light" else None
        figures.append(summarize("overhead", f"{name}{suffix}", ratios, "ratio", note=note, at_most=at_most))
    if added["light"] > 0:
        over, note = (
            added["debug_underflow_overflow"] / added["light"],
            "time added by DebugUnderflowOverflow over that by light",
        )
        figures.append(summarize("overhead", f"added_debug_over_light{suffix}", [over], "ratio", note=note))
    return figures


def _width(ratios: list[float]) -> str:
    """Of the A/A arm's interval."""
    half = half_width_95(ratios)
    width = math.inf if half is None else 2 * half
    verdict = "under" if width < A_A_INTERVAL else "not under"
    return f"A/A: the interval is {width:.2%} wide, {verdict} the {A_A_INTERVAL:.0%} that a claim of 1 % needs"


CPU_SIZES = {"n_embd": 256, "n_layer": 12, "n_head": 4}
"""GPT-2 with about 10 million parameters; on a GPU the full preset's."""


def make_arms(device: torch.device, folder: Path) -> tuple[dict[str, Iterator[None]], dict[str, object], Callable[[], None]]:
    """(steps of every arm, facts about them, what ends them)."""
    settings = _settings(device)
    data = load_run_data(settings)
    model = build_model(model_request(settings, data))
    made = _Repeating(make_batches(settings, data))
    closing = ExitStack()
    arms: dict[str, Iterator[None]] = {}
    notes: dict[str, str] = {}
    for name in BARE:
        arms[name] = _bare(name, copy.deepcopy(model).to(device), made, settings, closing)
    for name in ("light", "full"):
        arms[name] = _ours(replace(settings, instrument=name), copy.deepcopy(model), made, folder, closing, notes)
    what = (
        f"gpt2_clm fp32_true, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {settings.batch_size} x "
        f"{settings.seq_len} tokens, micro-batch {settings.micro_batch}, {words_for(torch.get_num_threads(), 'thread')}"
    )
    return arms, {"what": what, "notes": notes, "steps_a_turn": settings.log_every}, closing.close


def _settings(device: torch.device) -> RunSettings:
    case, preset, config, seq_len = CASES["gpt2_clm"], "full", "amp_bf16", 1024
    if device.type == "cpu":
        sizes = {**case.architecture.sizes, "tiny": {**case.architecture.sizes["tiny"], **CPU_SIZES}}
        case = replace(case, architecture=replace(case.architecture, sizes=sizes))
        preset, config, seq_len = "tiny", "fp32_true", 256
    made = {"data": "embedded", "weights": "scratch", "batch_size": 8, "micro_batch": 4, "threads": 1, "max_steps": 10_000}
    return plan_run(case, DTYPE_CONFIGS[config], 0, Request(preset=preset, seq_len=seq_len, **made), device)


def _bare(name: str, model: nn.Module, batches: _Repeating, settings: RunSettings, closing: ExitStack) -> Iterator[None]:
    """The loop that one would write by hand: eager loss, `clip_grad_norm_`, AdamW; nothing is measured."""
    precision, schedule = Precision.of(settings), {"warmup_steps": settings.warmup_steps, "max_steps": settings.max_steps}
    closing.callback(precision.close)
    model = precision.prepare(model)
    optimizer = precision.make_optimizer(lr=settings.lr, weight_decay=settings.case.weight_decay, seed=0)
    if name == "debug_underflow_overflow":
        from transformers.debug_utils import DebugUnderflowOverflow

        DebugUnderflowOverflow(model)
    watch = Watch(model, optimizer, log_every=settings.log_every) if name == "watch" else None

    def step(number: int) -> None:
        batch = batches.step(number)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, peak=settings.lr, **schedule)
        for micro in batch.micro_batches(settings.micro_batch):
            micro = micro.to(precision.device)
            with precision.forward():
                logits = model(micro.input_ids, micro.attention_mask, micro.last_token)
                loss = F.cross_entropy(
                    logits.flatten(0, 1)[:, : batches.data.valid_vocab].float(), micro.targets.flatten(), reduction="sum"
                )
            (loss / batch.n_targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def steps() -> Iterator[None]:
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        for number in count(1):
            around = watch.step(number) if watch else nullcontext()
            with torch.autograd.detect_anomaly(check_nan=True) if name == "detect_anomaly" else around:
                step(number)
            if number % settings.log_every == 0:  # where our loop reads the device, too
                if precision.device.type == "cuda":
                    torch.cuda.synchronize()
                yield

    return steps()


def _ours(
    settings: RunSettings, model: nn.Module, batches: _Repeating, folder: Path, closing: ExitStack, notes: dict[str, str]
) -> Iterator[None]:
    """The harness's loop with everything that a run has on: meter, taps, snapshots, sampler, logs."""
    precision = Precision.of(settings)
    closing.callback(precision.close)
    training = Training.prepare(settings, model, batches, precision)
    run_folder = RunFolder(folder / settings.instrument, settings.run_id)
    closing.callback(run_folder.close)
    instruments = closing.enter_context(Instruments(settings, training, run_folder))
    held = instruments.own_bytes()
    notes[settings.instrument] = f"holds {held['device'] / 1e6:.1f} MB on the device, {held['host'] / 1e6:.1f} MB on the host"

    def steps() -> Iterator[None]:
        for reading in training.train(training.meter(settings.log_every, instruments.taps)):
            reading = instruments.after(reading)
            for record in reading.steps:
                run_folder.steps.write(record)
            yield

    return steps()


class _Repeating:
    """The first four batches, again and again: making batches is no instrument's cost."""

    def __init__(self, batches) -> None:
        self._made, self.data = [batches.step(step) for step in range(1, 5)], batches.data

    def step(self, step: int):
        return self._made[(step - 1) % len(self._made)]
