"""One run: settings in, a row out. Every outcome is a row; a crash too."""

from __future__ import annotations

import resource
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench_cases.data import load_data
from bench_cases.data.batches import Batches
from bench_cases.data.tokenized import TokenizedData
from bench_cases.models import ModelRequest, build_model, weights_sha256
from harness.evaluate import evaluate
from harness.loop import LoopOptions, train
from harness.optimizer import state_dtypes, zero_share
from harness.planning import data_options
from harness.precision import Precision, Unsupported
from harness.run_folder import RunFolder, write_machine
from harness.settings import MAX_NORM, RunSettings
from instrument.environment import capture, device_slug
from instrument.records import EvaluationRecord, EventRecord, RunRecord, StepRecord
from instrument.step_meter import Divergence, Reading, StepMeter

Progress = Callable[[StepRecord | EvaluationRecord | EventRecord], None]


@dataclass
class Outcome:
    """What a run has produced so far; a crash keeps what was reached."""

    status: str = "error"
    error: str | None = None
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    divergence: Divergence | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)


def execute(settings: RunSettings, out: Path, progress: Progress = lambda record: None,
            started_s: float | None = None) -> RunRecord:
    """Run and write ``settings``' experiment into the results folder ``out``.

    ``started_s`` (``time.perf_counter``) is when the process began to work on it. Bad data and
    unreachable sources raise before anything is written (`DataError`, `DataUnavailable`,
    `ModelError`, `WeightsUnavailable`, `OutputError`); whatever happens later is a row.
    """
    began_s = time.perf_counter()
    started_s = began_s if started_s is None else started_s
    outcome = Outcome(timings_s={"imports": began_s - started_s})
    data = load_run_data(settings)
    outcome.timings_s["data"] = time.perf_counter() - began_s
    model = build_model(model_request(settings, data))
    outcome.timings_s["model"] = time.perf_counter() - began_s - outcome.timings_s["data"]
    batches = make_batches(settings, data)
    folder = RunFolder(out, settings.run_id)
    write_machine(out, capture(torch.device(settings.device)))
    try:
        _train_and_evaluate(settings, data, model, batches, folder, outcome, progress)
    except Unsupported as error:
        outcome.status, outcome.error = "unsupported", str(error)
    except torch.OutOfMemoryError as error:
        outcome.status, outcome.error = "oom", str(error).splitlines()[0]
    except KeyboardInterrupt:
        outcome.status, outcome.error = "preempted", "interrupted"
        folder.finish(summarize(settings, outcome))
        raise
    except Exception as error:  # a crash is a row with its cause, not a lost run
        outcome.status, outcome.error = "error", f"{type(error).__name__}: {error}"
        outcome.flags["traceback"] = traceback.format_exc()
    outcome.timings_s["total"] = time.perf_counter() - started_s
    record = summarize(settings, outcome)
    folder.finish(record)
    return record


def load_run_data(settings: RunSettings) -> TokenizedData:
    """The tokenised documents of a run."""
    return load_data(settings.data, **data_options(settings.case, settings))


def model_request(settings: RunSettings, data: TokenizedData) -> ModelRequest:
    """What to build for a run on these data."""
    outputs = {"multi_cls": data.n_labels, "single_cls": data.n_classes}.get(settings.case.task.collate)
    return ModelRequest(
        architecture=settings.case.architecture, task=settings.case.task, preset=settings.preset,
        vocabulary=data.valid_vocab, pad_id=data.special.pad, bos_id=data.special.bos,
        eos_id=data.special.eos, outputs=outputs, weights=settings.weights, dropout=settings.dropout,
        seed=settings.seed, seq_len=settings.seq_len)


def make_batches(settings: RunSettings, data: TokenizedData) -> Batches:
    """The run's batches: fixed by data, case, sizes and seed, whatever the configuration."""
    case = settings.case
    return Batches(data, case.task.collate, causal=case.architecture.causal, seq_len=settings.seq_len,
                   batch_size=settings.batch_size, seed=settings.seed, loss_reduction=case.loss_reduction,
                   bucket_by_length=settings.bucket_by_length)


def _train_and_evaluate(settings: RunSettings, data: TokenizedData, model: torch.nn.Module, batches: Batches,
                        folder: RunFolder, outcome: Outcome, progress: Progress) -> None:
    """The run proper: fills ``outcome`` as it goes."""
    device = torch.device(settings.device)
    outcome.facts |= {"n_params": sum(p.numel() for p in model.parameters()),
                      "init_sha256": weights_sha256(model), "data_sha256": batches.sha256(settings.max_steps)}
    outcome.flags["data"] = data.facts
    precision = Precision(settings.config, device, attention=settings.attention, threads=settings.threads,
                          compiled=settings.compile)
    try:
        outcome.flags |= precision.flags
        own_attention = getattr(model, "attention", "sdpa")  # an architecture without SDPA says what it runs
        outcome.facts |= {"attention_backend": precision.attention if own_attention == "sdpa" else own_attention,
                          "autocast": precision.autocast_name}
        model = precision.prepare(model)
        optimizer = precision.make_optimizer(lr=settings.lr, weight_decay=settings.case.weight_decay, seed=settings.seed)
        run = torch.compile(model) if settings.compile else model
        valid_vocab = data.valid_vocab if settings.case.task.head != "classification" else None

        def evaluation(step: int) -> None:
            began = time.perf_counter()
            held_out = batches.evaluation(settings.validation_documents, settings.micro_batch)
            record = evaluate(run, held_out, settings.case, precision, valid_vocab=valid_vocab, step=step)
            outcome.evaluations.append(record)
            folder.evaluations.write(record)
            progress(record)
            _add(outcome.timings_s, "evaluation", time.perf_counter() - began)

        evaluation(0)
        meter = StepMeter(model, optimizer, device, window=_window(settings),
                          micro_batches=settings.batch_size // settings.micro_batch, warmup_steps=settings.warmup_steps)
        options = LoopOptions(max_steps=settings.max_steps, warmup_steps=settings.warmup_steps,
                              micro_batch=settings.micro_batch, peak_lr=settings.lr, max_norm=MAX_NORM,
                              valid_vocab=valid_vocab, seed=settings.seed)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        for reading in train(settings.case, run, optimizer, batches, precision, meter, options):
            _keep(reading, folder, outcome, progress)
            step = reading.steps[-1].step
            _add(outcome.timings_s, "steps", time.perf_counter() - began)
            if outcome.divergence is None and settings.eval_every and step % settings.eval_every == 0 \
                    and step < settings.max_steps:
                evaluation(step)
            began = time.perf_counter()
        outcome.flags |= {"optimizer_states": state_dtypes(optimizer), "exp_avg_sq_zero_frac": zero_share(optimizer)}
        if outcome.divergence is None:
            evaluation(settings.max_steps)
            outcome.facts["final_weights_sha256"] = weights_sha256(model)
        outcome.status = "diverged" if outcome.divergence else "completed"
    finally:
        if device.type == "cuda":
            outcome.facts |= {"peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
                              "peak_reserved_bytes": torch.cuda.max_memory_reserved(device)}
        precision.close()


def _window(settings: RunSettings) -> int:
    """Steps between two reads of the device; evaluations must fall on log points."""
    return int(np.gcd(settings.log_every, settings.eval_every)) if settings.eval_every else settings.log_every


def _keep(reading: Reading, folder: RunFolder, outcome: Outcome, progress: Progress) -> None:
    """Keep and write a log window, then show it."""
    outcome.steps += reading.steps
    outcome.divergence = reading.divergence
    for record in reading.steps:
        folder.steps.write(record)
    for event in reading.events:
        folder.events.write(event)
    for record in (*reading.steps, *reading.events):
        progress(record)


def _add(timings_s: dict[str, float], name: str, seconds: float) -> None:
    timings_s[name] = timings_s.get(name, 0.0) + seconds


def summarize(settings: RunSettings, outcome: Outcome) -> RunRecord:
    """The run's row from what happened."""
    device = torch.device(settings.device)
    finite = [s.loss for s in outcome.steps if s.loss is not None and np.isfinite(s.loss)]
    last = outcome.evaluations[-1] if outcome.status == "completed" else None
    divergence = outcome.divergence
    return RunRecord(
        run_id=settings.run_id, case=settings.case.id, scenario=settings.case.scenario,
        arch=settings.case.architecture.id, task=settings.case.task.id, loss=settings.case.task.loss,
        loss_reduction=settings.case.loss_reduction, dtype_config=settings.config.id, seed=settings.seed,
        preset=settings.preset, device=device_slug(device), data_source=settings.data,
        weights_source=settings.weights, status=outcome.status,
        divergence_step=divergence.step if divergence else None,
        first_nonfinite=divergence.first_nonfinite if divergence else None,
        steps_done=len(outcome.steps), max_steps=settings.max_steps, batch_size=settings.batch_size,
        micro_batch=settings.micro_batch, seq_len=settings.seq_len,
        loss_initial=outcome.steps[0].loss if outcome.steps else None,
        train_loss_final=statistics.fmean(finite[-max(1, len(outcome.steps) // 10):]) if finite else None,
        val_loss=last and last.val_loss, perplexity=last and last.perplexity, f1_micro=last and last.f1_micro,
        f1_macro=last and last.f1_macro, f1_micro_tuned=last and last.f1_micro_tuned,
        **throughput(outcome.steps[settings.untimed_steps:]),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        scaler_skips=sum(s.step_skipped for s in outcome.steps), instrument="light",
        env=capture(device), config=settings.as_config(),
        flags={**outcome.flags, "timings_s": {k: round(v, 4) for k, v in outcome.timings_s.items()}},
        error=outcome.error or (divergence.reason if divergence else None), **outcome.facts)


def throughput(steps: list[StepRecord]) -> dict[str, float | int | None]:
    """Rates over the timed steps: total over total, never a mean of ratios."""
    times = [s.step_time_s for s in steps if s.step_time_s is not None]
    if not times:
        return {"timed_steps": 0}
    total_s = sum(times)
    p50, p95 = np.percentile(times, (50, 95))
    return {"timed_steps": len(times), "samples_per_s": sum(s.samples for s in steps) / total_s,
            "tokens_per_s": sum(s.tokens for s in steps) / total_s,
            "real_tokens_per_s": sum(s.real_tokens for s in steps) / total_s,
            "step_time_p50_s": float(p50), "step_time_p95_s": float(p95)}
