"""The run proper, in this process: trains, evaluates, writes down, and can be asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench_cases.data.batches import Batches
from bench_cases.data.tokenized import TokenizedData
from bench_cases.models import ModelRequest
from harness.evaluate import evaluate
from harness.failure import cleanup
from harness.forensics.stored import save_tensors
from harness.parallel.context import SINGLE_PROCESS, DistributedContext, facts_of_all, largest_peaks, peaks_by_rank
from harness.precision import Precision
from harness.run.checkpoints import Checkpointing
from harness.run.instruments import Instruments
from harness.run.outcome import Outcome, idle_since, summarize
from harness.run.resume import ResumeState
from harness.run.signals import Stop, Stopped
from harness.run.step_flops import attention_backend, dtypes_of, utilisation
from harness.settings import RunSettings
from harness.training import Training
from instrument.environment import capture
from instrument.memory import Snapshot as MemorySnapshot
from instrument.memory import snapshot_on_oom
from instrument.mfu import Utilisation
from instrument.results.files import replacing, require_there
from instrument.results.folder import RunFolder
from instrument.results.schemas import EvaluationRecord, EventRecord, StepRecord
from instrument.watch.meter import Reading

Progress = Callable[[StepRecord | EvaluationRecord | EventRecord], None]
STALL_SHARE = 10
"""A completed run that stood still for its last tenth of steps, which its final training loss is of, is stalled."""


class Trainer:
    """Trains and evaluates one run in this process, from its beginning or a checkpoint on; fills ``outcome`` as it goes."""

    def __init__(
        self,
        settings: RunSettings,
        folder: RunFolder,
        outcome: Outcome,
        progress: Progress,
        stop: Stop,
        resume_state: ResumeState | None,
        context: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        self.settings, self.folder, self.outcome, self.progress = settings, folder, outcome, progress
        self.stop, self.resume_state, self.context = stop, resume_state, context
        self.device = torch.device(settings.device)
        self.checkpointing: Checkpointing | None = None
        self.figures: Utilisation | None = None
        self.instruments: Instruments | None = None
        self.memory: MemorySnapshot | None = None
        self._weights_before: tuple[int, str] | None = None
        """Step and hash of the weights from which on a run that stands still is `stalled`."""
        self._emptied = {e.step for e in (resume_state.events if resume_state else ()) if e.kind == "clip_norm"}

    def run(self, data: TokenizedData, model: torch.nn.Module, batches: Batches, request: ModelRequest) -> None:
        """Train and evaluate. When asked to stop, writes a checkpoint and raises `Stopped` with a sentence."""
        s, outcome = self.settings, self.outcome
        error: BaseException | None = None
        outcome.flags["data"] = data.facts | {"vocabulary": data.valid_vocab}
        precision = Precision.of(s)
        try:
            outcome.flags |= precision.flags
            outcome.facts |= {
                "attention_backend": attention_backend(model, precision.attention),
                "attention_dtype": dtypes_of(model, s.config, precision.attention).attention if model.attention else None,
                "autocast": precision.autocast_name,
            }
            self.stop.heartbeat.enter("build")
            self.training = Training.prepare(s, model, batches, precision, self.context)
            if self.resume_state is not None:
                self.resume_state.restore(self.training)
            resumed_after = self.resume_state.step if self.resume_state else 0
            self.checkpointing = Checkpointing(s, self.training, self.folder, outcome, self.stop, resumed_after)
            try:
                self._evaluate(0)
                self._count_flops(request)
                self._train()
                self._conclude()
            except Stopped as stopped:
                raise Stopped(self._store_and_describe(stopped)) from None
            outcome.flags |= peaks_by_rank(self.context, self.device, self.instruments.own_bytes()["device"])
            if s.keep_weights and outcome.divergence is None:
                self._keep_weights()
            outcome.status = "diverged" if outcome.divergence else "completed"
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._memory_and_speed(error)
            with cleanup(error, outcome.flags, "taking back the switches"):
                precision.close()
            del error  # it refers to this frame

    def _evaluate(self, step: int) -> None:
        if any(done.step == step for done in self.outcome.evaluations):  # before the run was stopped
            return
        began_s, s, training = time.perf_counter(), self.settings, self.training
        self.stop.heartbeat.enter("evaluation", step)
        held_out = self.stop.between(training.batches.evaluation(s.validation_documents, s.micro_batch))
        record = evaluate(
            training.forward,
            held_out,
            s.case,
            training.precision,
            valid_vocab=training.valid_vocab,
            step=step,
            majority=training.batches.majority_answer(),
            context=self.context if training.strategy.deals_evaluations else SINGLE_PROCESS,
        )
        self.outcome.evaluations.append(record)
        self.folder.evaluations.write(record)
        self.progress(record)
        self.outcome.add_time("evaluation", time.perf_counter() - began_s)

    def _count_flops(self, request: ModelRequest) -> None:
        training = self.training
        self.stop.heartbeat.enter("counting", len(self.outcome.steps))
        self.figures = utilisation(
            self.settings,
            training.model,
            request,
            capture(self.device),
            self.folder.out,
            attention=training.precision.attention,
            threads=torch.get_num_threads(),
        )
        self.outcome.flags |= self.figures.flags()
        for step in self.outcome.steps:  # from before the resume: the log has their work, but not by dtype
            self.figures.fill(step, training.batches.step(step.step).lengths.tolist())
        if self.figures.warning() and self.resume_state is None:
            self.folder.events.write(EventRecord(step=0, kind="warning", detail={"what": self.figures.warning()}))

    def _train(self) -> None:
        s, outcome = self.settings, self.outcome
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with (
            snapshot_on_oom(
                self.folder.path / "memory_snapshot.pickle", self.device, history=s.memory_snapshot, always=s.memory_snapshot
            ) as self.memory,
            Instruments(s, self.training, self.folder, self.resume_state) as self.instruments,
        ):
            meter = self.training.meter(s.log_every, self.instruments.taps)
            meter.resume(outcome.steps)
            self._between_steps(len(outcome.steps))
            began_s = time.perf_counter()
            for reading in self.training.train(meter, range(len(outcome.steps) + 1, s.max_steps + 1), self._cut):
                reading.steps = [
                    self.figures.fill(step, lengths.tolist())
                    for step, lengths in zip(reading.steps, reading.lengths, strict=True)
                ]
                outcome.steps += reading.steps
                if reading.divergence is not None:  # whatever fails from here on, this run has diverged
                    outcome.diverged(reading.divergence)
                    self.stop.heartbeat.draft(lambda: summarize(s, outcome), self.folder.out)
                self._keep(self.instruments.after(reading))
                outcome.add_time("steps", time.perf_counter() - began_s)
                if outcome.divergence is None:
                    self._between_steps(len(outcome.steps))
                began_s = time.perf_counter()
        outcome.facts |= facts_of_all(self.context, self.instruments.facts(), self.device)
        outcome.facts["logits_dtype"] = self.training.precision.returned_dtype
        outcome.flags |= self.instruments.flags() | self.training.strategy.optimizer_facts(self.training.optimizer)

    def _cut(self, step: int) -> bool:
        """Read the meter before evaluating or checkpointing."""
        self.stop.heartbeat.alive(step)
        return self._evaluation_due(step) or step == self._last_stretch or self.checkpointing.cut(step)

    def _evaluation_due(self, step: int) -> bool:
        s = self.settings
        return s.eval_every > 0 and step % s.eval_every == 0 and step < s.max_steps

    @property
    def _last_stretch(self) -> int:
        """The step after which a run must move to be no stalled one."""
        return self.settings.max_steps - max(1, self.settings.max_steps // STALL_SHARE)

    def _keep(self, reading: Reading) -> None:
        """Write a log window, then show it."""
        for record in reading.steps:
            self.folder.steps.write(record)
        for event in reading.events:
            self.folder.events.write(event)
            if event.kind == "clip_norm":
                self._emptied.add(event.step)
        self.folder.check_logs()
        for record in (*reading.steps, *reading.events):
            self.progress(record)

    def _between_steps(self, step: int) -> None:
        """Evaluate, write a checkpoint, or stop, as due after ``step``; none of it counts as training."""
        evaluation, checkpoint = self._evaluation_due(step), self.checkpointing.due(step)
        remember = self._weights_before is None and self._last_stretch <= step < self.settings.max_steps
        if evaluation or checkpoint or remember:  # a pause wakes the sampler: not at every step
            with self.instruments.pause():
                if remember:
                    self._weights_before = step, self.training.strategy.weights_sha256(self.training.model)
                if evaluation:
                    self._evaluate(step)
                if checkpoint:
                    self.stop.heartbeat.enter("checkpoint", step)
                    self.checkpointing.write(self.instruments)
        if step < self.settings.max_steps:
            self.stop.heartbeat.enter("training", step)
            self.stop.check()

    def _conclude(self) -> None:
        """Evaluate for the last time, or find out what went wrong."""
        outcome, instruments = self.outcome, self.instruments
        if outcome.divergence is None:
            self._evaluate(self.settings.max_steps)
            self.stop.heartbeat.enter("closing", self.settings.max_steps)
            outcome.facts["final_weights_sha256"] = self.context.same(
                "final weights", self.training.strategy.weights_sha256(self.training.model)
            )
            outcome.flags |= self._stalled() | instruments.rounded_away()
            instruments.trace_steps()
        else:
            began_s = time.perf_counter()
            self.stop.heartbeat.enter("forensics", len(outcome.steps))
            outcome.divergence = instruments.investigate(outcome.divergence, outcome.steps[-1])
            outcome.add_time("forensics", time.perf_counter() - began_s)
        outcome.flags |= instruments.traced

    def _keep_weights(self) -> None:
        """Write ``weights.safetensors``, when nothing of the run can fail any more but the row that names it."""
        weights = self.training.strategy.whole_weights(self.training.model)  # gathered by all ranks
        if self.context.ranks.is_first:
            path, facts = self.folder.files.weights, self.outcome.facts
            require_there(path.parent)
            with replacing(path) as writing:
                about = {"run_id": self.settings.run_id, "weights_sha256": facts["final_weights_sha256"]}
                save_tensors(weights, writing, about)
            self.outcome.flags["weights"] = {"file": path.name, "bytes": path.stat().st_size}

    def _stalled(self) -> dict[str, object]:
        """The flag of a run that stood still for its last stretch, or since it was resumed in it."""
        since, idle = self._weights_before, idle_since(self.outcome.steps, self._emptied)
        if since is not None and since[1] == self.outcome.facts["final_weights_sha256"]:
            return {"stalled": {"since_step": since[0], "why": "weights"}}
        if idle is not None and idle <= self._last_stretch:
            return {"stalled": {"since_step": idle, "why": "gradients"}}
        return {}

    def _store_and_describe(self, stopped: Stopped) -> str:
        """Write a checkpoint; says where the run stopped and what the same command does next."""
        self.stop.heartbeat.enter("checkpoint", len(self.outcome.steps))
        name, step = self.checkpointing.write(self.instruments), len(self.outcome.steps)
        return (
            f"stopped by {stopped} {f'after step {step}' if step else 'before its first step'}; the same command "
            f"{f'resumes from {name}' if name else 'starts it over'}"
        )

    def _memory_and_speed(self, error: BaseException | None) -> None:
        """Facts of this process' part of the run, however it ended (with an ``error``)."""
        outcome, s = self.outcome, self.settings
        memory = self.memory
        if memory is not None and (memory.path is not None or s.memory_snapshot):
            outcome.flags["memory_snapshot"] = memory.path.name if memory.path else memory.why
        if self.checkpointing is not None:
            outcome.flags |= self.checkpointing.flags()
        if self.instruments is not None:
            outcome.flags |= self.instruments.failed
            if error is not None:  # who else used the GPU is part of why memory ran out
                outcome.flags |= self.instruments.hardware_flags()
        with cleanup(error, outcome.flags, "the figures of speed"):
            if self.figures is not None:
                outcome.facts |= self.figures.summary(outcome.warm_steps(s.untimed_steps), s.untimed_steps)
        with cleanup(error, outcome.flags, "the allocator's peaks"):
            if self.device.type == "cuda":
                ours_bytes = self.instruments.own_bytes()["device"] if self.instruments else 0  # published apart, in flags
                outcome.facts |= {
                    "peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device) - ours_bytes,
                    "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
                }
        outcome.facts |= largest_peaks(outcome.flags)
