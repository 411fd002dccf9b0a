"""One run: settings in, a row out. Every outcome is a row; a crash too."""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import torch

from bench_cases.data import load_data
from bench_cases.data.batches import Batches
from bench_cases.data.tokenized import TokenizedData
from bench_cases.models import ModelRequest, build_model, weights_sha256
from harness.failure import chain, failure_of
from harness.parallel.context import SINGLE_PROCESS, DistributedContext, RankFailed
from harness.planning import data_options
from harness.precision import Unsupported
from harness.run import resume
from harness.run.checkpoints import discard
from harness.run.heartbeat import OPENING
from harness.run.outcome import Outcome, machine_of, summarize
from harness.run.resume import ResumeState
from harness.run.signals import Stop, Stopped
from harness.run.trainer import Progress, Trainer
from harness.settings import RunSettings, asked_sizes
from instrument.results.claims import claim
from instrument.results.folder import RunFolder, output_error, require_writable, write_machine
from instrument.results.schemas import EventRecord, RunRecord


def execute(
    settings: RunSettings,
    out: Path,
    progress: Progress = lambda record: None,
    started_s: float | None = None,
    stop: Stop | None = None,
    *,
    fresh: bool = False,
    context: DistributedContext = SINGLE_PROCESS,
) -> RunRecord:
    """Run and write ``settings``' experiment into the results folder ``out``, from its last checkpoint on where
    it was stopped before, or with ``fresh`` from the beginning.

    ``started_s`` (``time.perf_counter``) is when the process began to work on it; ``stop`` may ask it to end with a
    checkpoint (``preempted``). Bad data and unreachable sources raise before anything is written (`DataError`,
    `DataUnavailable`, `ModelError`, `WeightsUnavailable`, `OutputError`; `RunClaimed` when another living process has the
    run), a folder that can no longer be written raises `OutputError`; whatever else happens later is a row. ``context``: the
    ranks of the run; all of them execute it, each into an ``out`` of its own, and rank 0's is the one that counts.
    """
    began_s, stop = time.perf_counter(), stop or Stop()
    started_s = began_s if started_s is None else started_s
    outcome = Outcome(timings_s={"imports": began_s - started_s}, began_s=started_s, machine=machine_of(settings))
    stop.heartbeat.draft(lambda: summarize(settings, outcome), out)
    stop.heartbeat.device = settings.device
    stop.heartbeat.enter("data")
    data = context.in_turn(lambda: load_run_data(settings))
    outcome.timings_s["data"] = time.perf_counter() - began_s
    stop.heartbeat.enter("build")
    model = build_model(model_request(settings, data))
    outcome.timings_s["model"] = time.perf_counter() - began_s - outcome.timings_s["data"]
    batches = make_batches(settings, data)
    outcome.facts |= {
        "n_params": sum(p.numel() for p in model.parameters()),
        "init_sha256": weights_sha256(model),
        "data_sha256": batches.sha256(settings.max_steps),
    }
    require_writable(out)
    try:
        own = claim(out, settings.run_id)
    except OSError as error:
        raise output_error(error, out) or error from error
    with own:
        if fresh:
            discard(out, settings.run_id)
        return _execute_claimed(settings, out, outcome, progress, stop, data, model, batches, context)


def _execute_claimed(
    settings: RunSettings,
    out: Path,
    outcome: Outcome,
    progress: Progress,
    stop: Stop,
    data: TokenizedData,
    model: torch.nn.Module,
    batches: Batches,
    context: DistributedContext,
) -> RunRecord:
    """The part of `execute` that writes: nobody else runs this run meanwhile."""
    resume_state, skipped = resume.find_on_rank_0(context, settings, out, outcome.facts)
    folder = resume.folder_of(out, settings.run_id, resume_state)
    _take_over(outcome, resume_state, skipped, progress)
    stop.heartbeat.draft(lambda: summarize(settings, outcome), out)
    stop.heartbeat.enter(OPENING, len(outcome.steps))
    stop.patient = True
    try:
        write_machine(out, outcome.machine[1])
        with context.reporting_failures(
            lambda failed: _finish(folder, summarize(settings, outcome.failed_with(failed))),
            lambda error: failure_of(error, phase=stop.heartbeat.phase),
        ):
            for name in ("init_sha256", "data_sha256"):
                context.same(name, outcome.facts[name])
            try:
                Trainer(settings, folder, outcome, progress, stop, resume_state, context).run(
                    data, model, batches, model_request(settings, data)
                )
            except (Unsupported, Stopped) as error:  # on every rank alike
                outcome.fail("unsupported" if isinstance(error, Unsupported) else "preempted", str(error), {})
    except RankFailed as error:
        outcome.failed_with(error)
    except KeyboardInterrupt:
        outcome.fail("preempted", "interrupted", {})
        folder.finish(summarize(settings, outcome))
        raise
    except (Exception, SystemExit) as error:  # a crash is a row with its cause, not a lost run
        if isinstance(error, OSError) and (unwritable := output_error(error, out)):
            raise unwritable from error
        failure = failure_of(error, settings.device, stop.heartbeat.phase)
        outcome.fail(failure.status, failure.error, failure.flags | {"traceback": "".join(traceback.format_exception(error))})
        for link in chain(error):  # the failed frames hold tensors
            traceback.clear_frames(link.__traceback__)
    outcome.timings_s = outcome.timings_now_s()
    return _finish(folder, summarize(settings, outcome))


def _take_over(outcome: Outcome, resume_state: ResumeState | None, skipped: list[str], progress: Progress) -> None:
    """Count what was done before the resume; report it, and which checkpoints could not be used."""
    if resume_state is None and not skipped:
        return
    resumed = {
        "behind_steps": resume_state.resumed_after if resume_state else [],
        "skipped": skipped,
        "instrument_before": resume_state.progress.instrument if resume_state else None,
    }
    outcome.flags["resumed"] = resumed
    progress(EventRecord(step=resume_state.step if resume_state else 0, kind="resumed", detail=resumed))
    if resume_state is not None:
        outcome.steps, outcome.evaluations = list(resume_state.steps), list(resume_state.evaluations)
        outcome.resumed_after = resume_state.resumed_after
        for name, seconds in resume_state.progress.timings_s.items():
            outcome.add_time(name, seconds)


def _finish(folder: RunFolder, record: RunRecord) -> RunRecord:
    """Write the terminal row; a run with nothing left to do needs no checkpoint any more."""
    try:
        folder.finish(record)
        if record.status in ("completed", "diverged", "unsupported"):
            discard(folder.out, record.run_id)
    except OSError as error:
        raise output_error(error, folder.out) or error from error
    return record


def load_run_data(settings: RunSettings) -> TokenizedData:
    """The tokenised documents of a run."""
    return load_data(settings.data, **data_options(settings.case, settings))


def model_request(settings: RunSettings, data: TokenizedData) -> ModelRequest:
    """What to build for a run on these data."""
    case = settings.case
    return ModelRequest(
        architecture=case.architecture,
        task=case.task,
        preset=settings.preset,
        vocabulary=data.valid_vocab,
        pad_id=data.special.pad,
        bos_id=data.special.bos,
        eos_id=data.special.eos,
        outputs={"multi_cls": data.n_labels, "single_cls": data.n_classes}.get(case.task.collate),
        weights=settings.weights,
        dropout=settings.dropout,
        seed=settings.seed,
        seq_len=settings.seq_len,
        prior=tuple(data.label_log_odds().tolist()) if case.head_prior == "log_odds" else None,
        size=asked_sizes(settings.size),
    )


def make_batches(settings: RunSettings, data: TokenizedData) -> Batches:
    """The run's batches: fixed by data, case, sizes and seed, whatever the configuration."""
    case = settings.case
    return Batches(
        data,
        case.task.collate,
        causal=case.architecture.causal,
        seq_len=settings.seq_len,
        batch_size=settings.batch_size,
        seed=settings.seed,
        loss_reduction=case.loss_reduction,
        bucket_by_length=settings.bucket_by_length,
    )
