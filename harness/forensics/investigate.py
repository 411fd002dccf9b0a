"""The failed step again: from the last snapshot, op by op, then under the profiler.

Three passes. The first runs from the snapshot to the failure with every module measured at every
step: it gives the history, and whether the same failure comes again. The second records the failed
step's ops and names the culprit (`instrument.replay`). The third profiles it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.forensics.evidence import (
    chain_links,
    headroom_since,
    histograms,
    history_of,
    kernel_rows,
    operand_records,
    output_record,
)
from harness.forensics.phase_trace import PhaseTrace
from harness.forensics.repro import save_operands
from harness.forensics.words import sentence
from harness.training import Training
from instrument.forensics_record import ForensicsRecord
from instrument.records import FirstNonfinite, StepRecord
from instrument.replay.examine import Examination, completed, examine
from instrument.replay.snapshot import Snapshot
from instrument.step_meter import Divergence, Reading
from instrument.trace.tracks import CounterSample, Flow, Marker
from instrument.trace.window import TraceWindow
from instrument.watch.taps import ModuleTaps, TapReading

CUDA_TOLERANCE = 1e-3
"""Relative difference of loss and gradient norm that still counts as the same failure on CUDA, where sums in
another order round differently. On a CPU they must be equal."""
ATTEMPTS = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Rerun:
    """The first pass: the failed step's reading, the state just before it, and every module's values."""

    reading: Reading
    before: Snapshot
    modules: list[TapReading]


def investigate(training: Training, divergence: Divergence, snapshot: Snapshot, last: StepRecord, run_id: str,
                trace_path: Path | None, operands_path: Path | None = None) -> ForensicsRecord:
    """Everything about one failure; leaves the training as it is behind the failed step. The culprit's operands
    are kept in ``operands_path``."""
    surfaced = divergence.first_nonfinite
    device = training.precision.device.type
    for _ in range(ATTEMPTS[device]):
        rerun = run_again(training, snapshot, divergence.step)
        matched = is_same(rerun.reading, divergence, last, 0.0 if device == "cpu" else CUDA_TOLERANCE)
        if matched:
            break
    found = examine(divergence.step, training.again, rerun.before, training.model, training.optimizer,
                    training.precision.scaler)
    first = completed(surfaced, found, from_step=snapshot.step, matched=matched)
    if found is None:
        return ForensicsRecord(run_id=run_id, matched=False, first_nonfinite=first,
                               sentence=sentence(first, None, None, 0), snapshot_step=snapshot.step)
    if operands_path is not None:
        save_operands(operands_path, found)
    history = history_of(found.module, rerun.modules)
    since = headroom_since(history, first.dtype, first.phase)
    events = None
    if trace_path is not None:
        rerun.before.restore()
        events = trace_step(training, divergence.step, trace_path, found, rerun.modules)
    return ForensicsRecord(
        run_id=run_id, matched=matched, first_nonfinite=first, sentence=sentence(first, found, since, found.culprit.spread),
        parameter=found.parameter, spread_modules=found.culprit.spread, chain=tuple(chain_links(found.culprit.chain, found)),
        absorbed=tuple(chain_links(found.culprit.absorbed, found)), operands=tuple(operand_records(found.diagnosis)),
        output=output_record(found.diagnosis), history=tuple(history), headroom_since_step=since,
        histograms=tuple(histograms(found)), kernels=tuple(kernel_rows(found, events)),
        trace_file=trace_path.name if events is not None else None, snapshot_step=snapshot.step)


def run_again(training: Training, snapshot: Snapshot, step: int) -> Rerun:
    """From the snapshot up to and with ``step``, all modules measured."""
    snapshot.restore()
    taps = ModuleTaps(training.model, training.precision.device, every=1, kept_steps=step - snapshot.step + 1)
    try:
        before, modules = snapshot, []
        for current in range(snapshot.step + 1, step + 1):
            if current == step and step - 1 != snapshot.step:
                before = training.snapshot(step - 1)
            reading = training.again(current, taps=taps)
            modules += reading.modules
        return Rerun(reading, before, modules + taps.read())
    finally:
        taps.close()


def is_same(reading: Reading, divergence: Divergence, last: StepRecord, tolerance: float) -> bool:
    """Whether the replayed step failed as the first time: same tensor, kind and phase, same loss and norm."""
    again = reading.divergence
    if again is None or again.first_nonfinite is None:
        return False
    seen, before = again.first_nonfinite, divergence.first_nonfinite
    if (seen.phase, seen.tensor, seen.module, seen.kind) != (before.phase, before.tensor, before.module, before.kind):
        return False
    replayed = reading.steps[-1]
    return all(_equal(getattr(replayed, name), getattr(last, name), tolerance) for name in ("loss", "grad_norm"))


def _equal(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return a == b or (a != a and b != b) or abs(a - b) <= tolerance * max(abs(a), abs(b))


def trace_step(training: Training, step: int, path: Path, found: Examination, modules: list[TapReading]) -> list[dict] | None:
    """Profile the failed step into ``path``, our tracks with it; its events, or None when it cannot be written."""
    with TraceWindow(path, training.precision.device) as trace:
        phases = PhaseTrace(trace, step)
        with phases.of(training):
            training.again(step)
        trace.add(*_tracks(found, modules, trace, step))
    return trace.events


def _tracks(found: Examination, modules: list[TapReading], trace: TraceWindow, step: int):
    """Counters of every module in the failed step, a marker at the culprit and flows to what it reached, laid over
    the profiled step in proportion to the op's place in the recorded one."""
    nodes = found.graph.nodes
    slices = trace.phases
    if not slices or not nodes:
        return
    start_ns, end_ns = slices[0].start_unix_ns, slices[-1].end_unix_ns

    def at(index: int) -> int:
        return start_ns + (end_ns - start_ns) * index // len(nodes)

    first_of = {}
    for node in nodes:
        first_of.setdefault((node.module, "bwd" if node.phase == "backward" else "fwd"), node.index)
    for r in modules:
        if r.step == step and (r.module, r.direction) in first_of:
            yield CounterSample(at(first_of[r.module, r.direction]), r.module, **{r.direction: r.absmax})
    culprit = found.culprit.node
    if culprit is None:
        return
    yield Marker(at(culprit.index), f"first non-finite value: {culprit.op}",
                 {"module": culprit.module or "", "phase": found.phase, "cause": found.cause, "kind": found.kind})
    for node in found.culprit.chain[1:6]:
        yield Flow(culprit.module or culprit.op, at(culprit.index), node.module or node.op, at(node.index))


def scaler_skip(training: Training, step: int, snapshot: Snapshot, now: Snapshot) -> FirstNonfinite | None:
    """The producer behind a scaler's skipped step; puts the training back to ``now``."""
    try:
        found = examine(step, training.again, snapshot, training.model, training.optimizer, training.precision.scaler)
    finally:
        now.restore()
    if found is None:
        return None
    blank = FirstNonfinite(step=step, microbatch=None, phase="backward", phase_surfaced="unscale", module=None, op=None,
                           tensor="grad", source_tensor=None, kind="inf", dtype=None, cause=None, input_absmax=None,
                           headroom_bits=None)
    return completed(blank, found, from_step=snapshot.step)
