"""What is measured around a run's loop, by level.

``off``: loss, gradients, logits and states of every step, as the loop itself reports them.
``light``, the default: module outputs and gradients as well, the hardware sampler, snapshots, and
the replay of a failure. ``full``: every leaf module at every step, snapshots more often.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from harness.forensics.investigate import investigate, scaler_skip
from harness.forensics.phase_trace import PhaseTrace
from harness.forensics.stored import store
from harness.run_folder import RunFolder
from harness.settings import RunSettings
from harness.training import Training
from instrument.forensics_record import ForensicsRecord
from instrument.log import replace
from instrument.memory import memory_split
from instrument.records import EventRecord, StepRecord, encode
from instrument.sampler.sampler import Sampler
from instrument.step_meter import Divergence, Reading
from instrument.trace.window import TraceWindow
from instrument.watch.module_log import ModuleLog
from instrument.watch.taps import KEPT_STEPS, ModuleTaps


@dataclass(frozen=True)
class Level:
    """Cadences in steps. ``leaf_every``: leaf modules; ``snapshot_every``: host copies of the state that replays
    start from; ``explained_skips``: how many of a scaler's skipped steps are replayed to name their producer."""

    leaf_every: int
    snapshot_every: int
    explained_skips: int


LEVELS = {"off": None, "light": Level(leaf_every=16, snapshot_every=50, explained_skips=1),
          "full": Level(leaf_every=1, snapshot_every=10, explained_skips=8)}


class Instruments:
    """Everything beside the meter; a context around the training steps."""

    def __init__(self, settings: RunSettings, training: Training, folder: RunFolder) -> None:
        self.level: Level | None = LEVELS[settings.instrument]
        self.training, self.folder, self.settings = training, folder, settings
        self.forensics: ForensicsRecord | None = None
        self.traced: dict[str, object] = {}
        self.taps: ModuleTaps | None = None
        self.sampler: Sampler | None = None
        self._snapshot = None
        self._skips = 0
        if self.level is None:
            return
        if not settings.compile:  # hooks would break the compiled graph
            self.taps = ModuleTaps(training.model, training.precision.device, every=self.level.leaf_every, skip_output=True,
                                   kept_steps=max(KEPT_STEPS, 2 * settings.log_every))
        self._modules = ModuleLog(folder.path / "activations.jsonl")
        self.sampler = Sampler(folder.path / "hardware.jsonl", gpu_uuid=_gpu_uuid(training.precision.device))
        self._snapshot = training.snapshot(0)

    def __enter__(self) -> Instruments:
        if self.sampler is not None:
            self.sampler.start()
        return self

    def __exit__(self, *_) -> None:
        if self.sampler is not None:
            self.hardware = self.sampler.stop(window="timed")
        if self.taps is not None:
            self._modules.add(self.taps.read())
            self.taps.close()
        if self.level is not None:
            self._modules.close()

    def after(self, reading: Reading) -> Reading:
        """Take in a log window: keep the modules' values, explain skips, take the next snapshot."""
        if self.level is None:
            return reading
        self._modules.add(reading.modules)
        step = reading.steps[-1].step
        if reading.divergence is None:
            reading.events = [self._explained(event) for event in reading.events]
            if step - self._snapshot.step >= self.level.snapshot_every:
                self._snapshot = self.training.snapshot(step)
        return reading

    def _explained(self, event: EventRecord) -> EventRecord:
        """A scaler's skip with its producer, for the first few of a run."""
        if event.kind != "scaler_skip" or self._skips >= self.level.explained_skips:
            return event
        self._skips += 1
        now = self.training.snapshot(event.step)
        first = scaler_skip(self.training, event.step, self._snapshot, now)
        if first is None:
            return event
        return msgspec.structs.replace(event, detail=event.detail | {"first_nonfinite": msgspec.to_builtins(first)})

    def facts(self) -> dict[str, object]:
        """Fields of the run's row."""
        if self.sampler is None:
            return {}
        return {"energy_j": self.hardware.get("energy_j"), "peak_device_bytes": self.hardware.get("peak_device_bytes")}

    def flags(self) -> dict[str, object]:
        """What goes into the row's ``flags``."""
        if self.sampler is None:
            return {}
        return {"hardware": self.hardware, "memory_split": memory_split(self.training.model, self.training.optimizer),
                "instrument_bytes": self.own_bytes()}

    def own_bytes(self) -> dict[str, int]:
        """Memory that the instruments hold: the module ring on the device, the snapshot on the host."""
        return {"device": self.taps.nbytes if self.taps else 0, "host": self._snapshot.nbytes if self._snapshot else 0}

    def trace_steps(self) -> None:
        """Run the last steps again under the profiler, where asked; weights and states are put back."""
        n = self.settings.trace_steps
        if not n:
            return
        last = self.settings.max_steps
        path = self.folder.out / "traces" / f"{self.settings.run_id}.json.gz"
        now = self.training.snapshot(last)
        with TraceWindow(path, self.training.precision.device) as trace:
            for step in range(max(1, last - n + 1), last + 1):
                with PhaseTrace(trace, step).of(self.training):
                    self.training.again(step)
        now.restore()
        self.traced = {"trace": {"file": path.name, "failure": trace.failure}}
        if trace.failure is None:
            self.traced["time_by_kernel"] = trace.table()

    def investigate(self, divergence: Divergence, last: StepRecord) -> Divergence:
        """Replay a failure and write what it was; the divergence with a completed record."""
        if self.level is None or divergence.first_nonfinite is None:
            return divergence
        run_id = self.settings.run_id
        trace = self.folder.out / "traces" / f"{run_id}-step{divergence.step}.json.gz"
        stored = store(self._snapshot, self.folder.path, run_id)
        self.traced["snapshot"] = {"file": stored.file, "bytes": stored.nbytes, "why": stored.why}
        self.forensics = investigate(self.training, divergence, self._snapshot, last, run_id, trace,
                                     self.folder.path / "culprit.safetensors")
        self.forensics = msgspec.structs.replace(self.forensics, snapshot_file=stored.file)
        replace(self.folder.path / "forensics.json", encode(self.forensics) + b"\n")
        return Divergence(divergence.step, self.forensics.first_nonfinite, self.forensics.sentence)


def _gpu_uuid(device: torch.device) -> str | None:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


