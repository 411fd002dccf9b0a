"""One run: settings in, a row out. Every outcome is a row; a crash too."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench_cases.data import load_data
from bench_cases.data.batches import Batches
from bench_cases.data.tokenized import TokenizedData
from bench_cases.models import ModelRequest, build_model, weights_sha256
from harness.evaluate import evaluate
from harness.flops.for_run import utilisation
from harness.instruments import Instruments
from harness.optimizer import state_dtypes, zero_share
from harness.planning import data_options
from harness.precision import Precision, Unsupported
from harness.run_folder import RunFolder, write_machine
from harness.settings import RunSettings
from harness.summary import Outcome, summarize
from harness.training import Training
from instrument.environment import capture
from instrument.memory import snapshot_on_oom
from instrument.records import EvaluationRecord, EventRecord, RunRecord, StepRecord
from instrument.step_meter import Reading

Progress = Callable[[StepRecord | EvaluationRecord | EventRecord], None]


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
    outcome.flags["data"] = data.facts | {"vocabulary": data.valid_vocab}
    precision = Precision(settings.config, device, attention=settings.attention, threads=settings.threads,
                          compiled=settings.compile)
    figures = memory = instruments = None
    try:
        outcome.flags |= precision.flags
        own_attention = getattr(model, "attention", "sdpa")  # an architecture without SDPA says what it runs
        outcome.facts |= {"attention_backend": precision.attention if own_attention == "sdpa" else own_attention,
                          "autocast": precision.autocast_name}
        training = Training.prepare(settings, model, batches, precision,
                                    data.valid_vocab if settings.case.task.head != "classification" else None)

        def evaluation(step: int) -> None:
            began = time.perf_counter()
            held_out = batches.evaluation(settings.validation_documents, settings.micro_batch)
            record = evaluate(training.forward, held_out, settings.case, precision, valid_vocab=training.valid_vocab, step=step)
            outcome.evaluations.append(record)
            folder.evaluations.write(record)
            progress(record)
            _add(outcome.timings_s, "evaluation", time.perf_counter() - began)

        evaluation(0)
        figures = utilisation(settings, training.model, model_request(settings, data), capture(device), folder.out,
                              attention=precision.attention, threads=torch.get_num_threads())
        outcome.flags |= figures.flags()
        if figures.warning():
            folder.events.write(EventRecord(step=0, kind="warning", detail={"what": figures.warning()}))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with snapshot_on_oom(folder.path / "memory_snapshot.pickle", device, history=settings.memory_snapshot,
                             always=settings.memory_snapshot) as memory, Instruments(settings, training, folder) as instruments:
            began = time.perf_counter()
            for reading in training.train(training.meter(_window(settings), instruments.taps)):
                reading.steps = [figures.fill(step, lengths.tolist())
                                 for step, lengths in zip(reading.steps, reading.lengths, strict=True)]
                _keep(instruments.after(reading), folder, outcome, progress)
                step = reading.steps[-1].step
                _add(outcome.timings_s, "steps", time.perf_counter() - began)
                if outcome.divergence is None and settings.eval_every and step % settings.eval_every == 0 \
                        and step < settings.max_steps:
                    with instruments.pause():
                        evaluation(step)
                began = time.perf_counter()
        outcome.facts |= instruments.facts()
        outcome.flags |= instruments.flags() | {"optimizer_states": state_dtypes(training.optimizer),
                                                "exp_avg_sq_zero_frac": zero_share(training.optimizer)}
        if outcome.divergence is None:
            evaluation(settings.max_steps)
            outcome.facts["final_weights_sha256"] = weights_sha256(training.model)
            outcome.flags |= instruments.rounded_away()
            instruments.trace_steps()
        else:
            began = time.perf_counter()
            outcome.divergence = instruments.investigate(outcome.divergence, outcome.steps[-1])
            outcome.timings_s["forensics"] = time.perf_counter() - began
        outcome.flags |= instruments.traced
        outcome.status = "diverged" if outcome.divergence else "completed"
    finally:
        if memory is not None and (memory.path is not None or settings.memory_snapshot):
            outcome.flags["memory_snapshot"] = memory.path.name if memory.path else memory.why
        if figures is not None:
            outcome.facts |= figures.summary(outcome.steps, settings.untimed_steps)
        if device.type == "cuda":
            ours_bytes = instruments.own_bytes()["device"] if instruments else 0  # published apart, in flags
            outcome.facts |= {"peak_allocated_bytes": torch.cuda.max_memory_allocated(device) - ours_bytes,
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
