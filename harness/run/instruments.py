"""What is measured around a run's loop, by level.

``off``: loss, gradients, logits and states of every step, as the loop itself reports them.
``light``, the default: module outputs and gradients as well, the hardware sampler, snapshots, and
the replay of a failure. ``full``: every leaf module at every step, snapshots more often.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import torch

from harness.failure import FORENSICS_ERRORS, cleanup
from harness.forensics.investigate import Attempts, PhaseTrace, investigate
from harness.forensics.stored import Stored, store
from harness.optimizer import rounded_away_share
from harness.parallel.failure_location import first_of_all, located, of_this_rank
from harness.run.resume import ResumeState
from harness.run.signals import Stopped
from harness.settings import RunSettings
from harness.training import Training
from instrument.memory import memory_split, with_activations
from instrument.replay.replays import Replays, skip_surfaced
from instrument.results.files import replace
from instrument.results.folder import RunFolder
from instrument.results.log import JsonlLog
from instrument.results.measurements import ForensicsRecord, TapReading, module_records
from instrument.results.schemas import EventRecord, StepRecord, encode
from instrument.sampler.sampler import Sampler
from instrument.sampler.summary import energy_per
from instrument.trace.window import ModuleMagnitudes, TraceWindow
from instrument.watch.meter import Divergence, Reading
from instrument.watch.taps import KEPT_STEPS, ModuleTaps


@dataclass(frozen=True)
class Level:
    """Cadences in steps. ``leaf_every``: leaf modules; ``snapshot_every``: host copies of the state that replays
    start from; ``explained_skips``: how many of a scaler's skipped steps are replayed to name their producer."""

    leaf_every: int
    snapshot_every: int
    explained_skips: int


TIMED = "timed"
"""The sampler's window: training steps after the preset's untimed ones, evaluations left out."""
NOT_OURS = Stored(None, 0, "rank 0 keeps the snapshot, which is the same on every rank")
LEVELS = {
    "off": None,
    "light": Level(leaf_every=16, snapshot_every=50, explained_skips=1),
    "full": Level(leaf_every=1, snapshot_every=10, explained_skips=8),
}


class Instruments:
    """Everything beside the meter; a context around the training steps."""

    def __init__(
        self, settings: RunSettings, training: Training, folder: RunFolder, resume_state: ResumeState | None = None
    ) -> None:
        self.level: Level | None = LEVELS[settings.instrument]
        self.training, self.folder, self.settings = training, folder, settings
        self.forensics: ForensicsRecord | None = None
        self.traced: dict[str, object] = {}
        self.failed: dict[str, object] = {}
        """For the row's ``flags``: what could not be closed after an error, and what of the forensics failed."""
        self.taps: ModuleTaps | None = None
        self.sampler: Sampler | None = None
        self.replays: Replays | None = None
        """None: nothing is replayed, as where no rank has the whole state."""
        self.hardware: dict[str, object] | None = None
        self._resume_state = resume_state
        self._taps_state: dict[str, object] | None = None
        self._running = False
        self._timed: list[int] | None = None
        """Steps and real tokens since the sampler's window began."""
        if self.level is None:
            return
        device, context = training.precision.device, training.context
        if not settings.compile:  # hooks would break the compiled graph
            self.taps = ModuleTaps(
                training.model,
                device,
                every=self.level.leaf_every,
                skip_output=True,
                kept_steps=max(KEPT_STEPS, 2 * settings.log_every),
                gather=context.gather,
            )
            if resume_state and resume_state.progress.taps is not None:
                self.taps.load_state_dict(resume_state.progress.taps)
        self._modules = JsonlLog(folder.files.log("activations"), fresh=resume_state is None)
        self.sampler = Sampler(folder.files.log("hardware"), gpu_uuid=_gpu_uuid(device))
        if training.strategy.keeps_state:
            self.replays = Replays(
                training.again,
                training.model,
                training.optimizer,
                training.precision.scaler,
                every=self.level.snapshot_every,
                explained_skips=self.level.explained_skips - (resume_state.scaler_skips if resume_state else 0),
                any_rank=context.any,
                exact=device.type == "cpu" and context.ranks.world <= 2,  # more have an order
            )
            self.replays.keep(1 + (resume_state.step if resume_state else 0))

    def __enter__(self) -> Instruments:
        if self.sampler is not None:
            self.sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_) -> None:
        self._clock(False)
        if self.sampler is not None:
            self.hardware = self.sampler.stop(window=TIMED)
        with cleanup(error, self.failed, "the last module statistics"):
            if self.taps is not None:
                if kind not in (None, Stopped):  # the other ranks of the run are somewhere else
                    self.taps.stop_gathering()
                if kind is not Stopped:  # then what waits goes into the checkpoint, and is summed up with what follows
                    self._log_modules(self.taps.read())
                self._taps_state = self.taps.state_dict()
        with cleanup(error, self.failed, "closing the instruments"):
            if self.taps is not None:
                self.taps.close()
            if self.level is not None:
                self._modules.close()

    def _log_modules(self, readings: list[TapReading]) -> None:
        for record in module_records(readings):
            self._modules.write(record)

    def after(self, reading: Reading) -> Reading:
        """Take in a log window: keep the modules' values, explain skips, take the next snapshot."""
        if self.level is None:
            return reading
        self._log_modules(reading.modules)
        step = reading.steps[-1].step
        if self._timed is None and step >= self.settings.untimed_steps:
            self._clock(True)
        elif self._timed is not None:
            self._timed = [self._timed[0] + len(reading.steps), self._timed[1] + sum(s.real_tokens for s in reading.steps)]
        if self.replays is not None:
            for record in reading.steps:
                self.replays.completed(record.step)
            if reading.divergence is None:
                reading.events = [self._explained(event, step) for event in reading.events]
                if self.replays.due:
                    self.replays.keep(step + 1)
        return reading

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training (an evaluation): its energy is not counted."""
        running = self._timed is not None
        self._clock(False)
        yield
        if running:
            self._clock(True)

    def state_dict(self) -> dict[str, object] | None:
        """What of the modules' readings waits to be written, for a checkpoint."""
        return self._taps_state if self.taps is None or self._taps_state is not None else self.taps.state_dict()

    def _clock(self, running: bool) -> None:
        """Begin or end a window of timed steps for the sampler."""
        if self.sampler is None or running == self._running:
            return
        self._timed = [0, 0] if self._timed is None else self._timed
        self._running = running
        self.sampler.mark(TIMED, "begin" if running else "end")

    def _explained(self, event: EventRecord, now: int) -> EventRecord:
        """A scaler's skip with its producer, for the first few of a run."""
        if event.kind != "scaler_skip" or not self.replays.explains_skip():
            return event
        training = self.training
        with self.replays.undone():
            replayed = self.replays.again(now - event.step + 1)
        mine = replayed.completed(skip_surfaced(event.step)) if replayed.found is not None else None
        strategy, micro_batches = training.replayed, self.settings.batch_size // self.settings.micro_batch
        found = first_of_all(strategy, mine and of_this_rank(mine, strategy, micro_batches))
        if found is None:
            return event
        _, first = found
        return msgspec.structs.replace(event, detail=event.detail | {"first_nonfinite": msgspec.to_builtins(first)})

    def facts(self) -> dict[str, object]:
        """Fields of the run's row."""
        if self.sampler is None:
            return {}
        # A part's joules under the run's name would disguise that the others are missing; its peak is one of equals.
        energy_j = None if self._resume_state else self.hardware.get("energy_j")
        return {"energy_j": energy_j, "peak_device_bytes": self.hardware.get("peak_device_bytes")}

    def flags(self) -> dict[str, object]:
        """What goes into the row's ``flags``."""
        if self.sampler is None:
            return {}
        training, device, own_bytes, split = self.training, self.training.precision.device, self.own_bytes(), None
        if training.strategy.keeps_state:
            peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            split = memory_split(training.model, training.optimizer)
            split = with_activations(split, peak_bytes, instrument_bytes=own_bytes["device"])
        return {**self.hardware_flags(), "memory_split": split, "instrument_bytes": own_bytes}

    def hardware_flags(self) -> dict[str, object]:
        """What the sampler saw, once it has ended."""
        if self.hardware is None:
            return {}
        steps, real_tokens = self._timed or (0, 0)
        hardware = self.hardware | energy_per(self.hardware.get("energy_j"), steps=steps, real_tokens=real_tokens)
        if self._resume_state:
            step = self._resume_state.step
            hardware |= {"part": f"after step {step}; what was before is in hardware.until-{step}.jsonl"}
        return {"hardware": hardware}

    def own_bytes(self) -> dict[str, int]:
        """Memory that the instruments hold: the module ring on the device, the snapshot on the host."""
        return {"device": self.taps.nbytes if self.taps else 0, "host": self.replays.snapshot.nbytes if self.replays else 0}

    @torch.no_grad()
    def rounded_away(self) -> dict[str, object]:
        """How much of an update rounds to nothing, by running the last step once more and putting it back."""
        if self.replays is None:
            return {}
        training, step = self.training, self.settings.max_steps
        now, before = training.snapshot(step), [p.clone() for p in training.precision.parameters]
        with torch.enable_grad():
            training.again(step)
        share = rounded_away_share(before, training.precision.parameters, training.optimizer)
        now.restore()
        return {"updates_rounded_away_frac": share}

    def trace_steps(self) -> None:
        """Run the last steps again under the profiler, where asked; weights and states are put back."""
        n = self.settings.trace_steps
        if not n:
            return
        last, path = self.settings.max_steps, self.folder.files.trace()
        steps, now = range(max(1, last - n + 1), last + 1), self.training.snapshot(last)
        with TraceWindow(path, self.training.precision.device) as trace, ModuleMagnitudes(self.training.model) as magnitudes:
            for step in steps:
                with PhaseTrace(trace, step).of(self.training):
                    self.training.again(step)
            trace.add(*magnitudes.samples())
        now.restore()
        self.traced = {"trace": {"file": path.name, "failure": trace.failure, "steps": len(steps)}}
        if trace.failure is None:
            self.traced["time_by_kernel"] = trace.table()

    def investigate(self, divergence: Divergence, last: StepRecord) -> Divergence:
        """Replay a failure and write what it was; the divergence with a completed record. What fails in it is kept in
        ``failed``."""
        if self.level is None or divergence.first_nonfinite is None:
            return divergence
        context = self.training.context
        if self.replays is None:
            return located(divergence, context, self.taps)
        run_id, files = self.settings.run_id, self.folder.files
        attempt = Attempts(alone=context.ranks.world == 1)
        stored = NOT_OURS
        if context.ranks.is_first:
            stored = attempt("snapshot", lambda: store(self.replays.snapshot, self.folder.path, run_id), Stored(None, 0))
        self.traced["snapshot"] = {"file": stored.file, "bytes": stored.nbytes, "why": stored.why}
        forensics = attempt(
            "forensics",
            lambda: investigate(
                self.training, divergence, self.replays, last, run_id, files.trace(divergence.step), files.culprit, attempt
            ),
            None,
            together=True,
        )
        if forensics is not None:
            self.forensics = forensics = msgspec.structs.replace(forensics, snapshot_file=stored.file)
            attempt("writing", lambda: replace(files.forensics, encode(forensics) + b"\n"), None)
            divergence = Divergence(divergence.step, forensics.first_nonfinite, forensics.sentence)
        if attempt.failed:
            self.failed[FORENSICS_ERRORS] = attempt.failed
        return divergence


def _gpu_uuid(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
