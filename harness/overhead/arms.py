"""The arms of ``bench overhead``: one training step of the same model, bare and under each instrument."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bench_cases import CASES, DTYPE_CONFIGS
from bench_cases.models import build_model
from harness.optimizer import learning_rate
from harness.planning import plan_run
from harness.precision import Precision
from harness.run.execute import load_run_data, make_batches, model_request
from harness.run.instruments import Instruments
from harness.settings import MAX_NORM, Request, RunSettings
from harness.training import Training
from instrument.results.folder import RunFolder
from instrument.terminal import count as words_for
from instrument.watch.watch import Watch

SIZES = {"cpu": {"n_embd": 256, "n_layer": 12, "n_head": 4}}
"""On a CPU, GPT-2 with about 10 million parameters; on a GPU, the full preset's."""


def make_arms(device: torch.device, folder: Path) -> tuple[dict[str, Iterator[None]], dict[str, object], Callable[[], None]]:
    """(steps of every arm, facts about them, what ends them)."""
    settings = _settings(device)
    data = load_run_data(settings)
    model = build_model(model_request(settings, data))
    batches = make_batches(settings, data)
    made = _Repeating(batches)
    closing = ExitStack()
    arms: dict[str, Iterator[None]] = {}
    notes: dict[str, str] = {}
    for name in ("bare", "bare_again", "watch", "debug_underflow_overflow", "detect_anomaly"):
        arms[name] = _bare(name, copy.deepcopy(model).to(device), made, settings, data.valid_vocab, closing)
    for name in ("light", "full"):
        arms[name] = _ours(
            replace(settings, instrument=name), copy.deepcopy(model), batches, data.valid_vocab, folder, closing, notes
        )
    what = (
        f"gpt2_clm fp32_true, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {settings.batch_size} x "
        f"{settings.seq_len} tokens, micro-batch {settings.micro_batch}, {words_for(torch.get_num_threads(), 'thread')}"
    )
    return arms, {"what": what, "notes": notes, "steps_a_turn": settings.log_every}, closing.close


def _settings(device: torch.device) -> RunSettings:
    case = CASES["gpt2_clm"]
    if device.type == "cpu":
        sizes = {**case.architecture.sizes, "tiny": {**case.architecture.sizes["tiny"], **SIZES["cpu"]}}
        case = replace(case, architecture=replace(case.architecture, sizes=sizes))
    asked = Request(
        preset="tiny" if device.type == "cpu" else "full",
        data="embedded",
        weights="scratch",
        batch_size=8,
        micro_batch=4,
        seq_len=256 if device.type == "cpu" else 1024,
        threads=1,
        max_steps=10_000,
    )
    return plan_run(case, DTYPE_CONFIGS["fp32_true" if device.type == "cpu" else "amp_bf16"], 0, asked, device)


def _bare(
    name: str, model: nn.Module, batches: _Repeating, settings: RunSettings, valid_vocab: int, closing: ExitStack
) -> Iterator[None]:
    """The loop that one would write by hand: eager loss, `clip_grad_norm_`, AdamW; nothing is measured."""
    from transformers.debug_utils import DebugUnderflowOverflow

    precision = Precision(settings.config, torch.device(settings.device), threads=settings.threads)
    closing.callback(precision.close)
    model = precision.prepare(model)
    optimizer = precision.make_optimizer(lr=settings.lr, weight_decay=settings.case.weight_decay, seed=0)
    if name == "debug_underflow_overflow":
        DebugUnderflowOverflow(model)
    watch = Watch(model, optimizer, log_every=settings.log_every) if name == "watch" else None

    def step(number: int) -> None:
        batch = batches.step(number)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                number, peak=settings.lr, warmup_steps=settings.warmup_steps, max_steps=settings.max_steps
            )
        for micro in batch.micro_batches(settings.micro_batch):
            micro = micro.to(precision.device)
            with precision.forward():
                logits = model(micro.input_ids, micro.attention_mask, micro.last_token)
                loss = F.cross_entropy(logits.flatten(0, 1)[:, :valid_vocab].float(), micro.targets.flatten(), reduction="sum")
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
    settings: RunSettings, model: nn.Module, batches, valid_vocab: int, folder: Path, closing: ExitStack, notes: dict[str, str]
) -> Iterator[None]:
    """The harness's loop with everything that a run has on: meter, taps, snapshots, sampler, logs."""
    precision = Precision(settings.config, torch.device(settings.device), threads=settings.threads)
    closing.callback(precision.close)
    training = Training.prepare(settings, model, _Repeating(batches), precision, valid_vocab)
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
        self._made = [batches.step(step) for step in range(1, 5)]

    def step(self, step: int):
        return self._made[(step - 1) % len(self._made)]
