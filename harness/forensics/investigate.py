"""What a failed run's forensics do: replay the failed step, record its culprit, trace it, and say it in one sentence.

Three passes. The first runs from the snapshot to the failure with every module measured at every
step: it gives the history, and whether the same failure comes again. The second records the failed
step's ops and names the culprit (`instrument.replay`). The third profiles it. Whatever fails in them costs what it would have
found, and never the run's status: the divergence is known already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from harness.failure import sentence as failure_sentence
from harness.forensics.evidence import chain_links, headroom_since, histograms, history_of, kernel_rows, save_operands
from harness.parallel.failure_location import first_of_all, of_this_rank
from harness.training import Training
from instrument.replay.ops import SUM_OVER_RANKS
from instrument.replay.replays import Examination, Replayed, Replays
from instrument.replay.snapshot import Seen
from instrument.results.files import replace
from instrument.results.measurements import ForensicsRecord, TapReading
from instrument.results.schemas import KIND_NAMES, FirstNonfinite, StepRecord
from instrument.trace.tracks import CounterSample, Marker, PhaseSlice
from instrument.trace.window import ModuleMagnitudes, TraceWindow, flows_from
from instrument.watch.meter import Divergence
from instrument.watch.taps import ModuleTaps

T = TypeVar("T")


@dataclass
class Attempts:
    """Calls parts of the forensics and keeps why one failed. ``alone``: no other rank takes part; where one does, an error that
    it would wait for is raised, and ends the run on all ranks."""

    alone: bool
    failed: dict[str, str] = field(default_factory=dict)

    def __call__(self, part: str, call: Callable[[], T], default: T, *, together: bool = False) -> T:
        """``call()``, or ``default`` where it fails; ``together``: all ranks do it at the same time."""
        try:
            return call()
        except Exception as error:
            if together and not self.alone:
                raise
            self.failed[part] = failure_sentence(error)
            return default


class PhaseTrace:
    """Wraps a training's precision and meter for one traced step: the loop itself knows nothing of it."""

    def __init__(self, trace: TraceWindow, step: int) -> None:
        self._trace, self._step = trace, step

    def enter(self, phase: str | None) -> None:
        """End the phase that is open and begin another (None: none)."""
        self._trace.enter(phase, self._step)

    @contextmanager
    def of(self, training: Training) -> Iterator[None]:
        """Trace the phases of what ``training`` runs inside."""
        precision = training.precision
        marks = {"forward": "forward", "measure_gradients": "unscale", "clip": "clip", "update": "optimizer"}
        for name, phase in marks.items():
            setattr(precision, name, self._entering(phase, getattr(precision, name)))
        make_meter = training.meter

        def meter(*args, **kwargs):
            made = make_meter(*args, **kwargs)
            made.next_logits = self._entering("loss", made.next_logits)
            made.add_loss = self._then("backward", made.add_loss)
            made.updated = self._entering(None, made.updated)
            return made

        training.meter = meter
        try:
            yield
        finally:
            self.enter(None)
            del training.meter
            for name in marks:
                delattr(precision, name)

    def _entering(self, phase: str | None, call):
        def wrapped(*args, **kwargs):
            self.enter(phase)
            return call(*args, **kwargs)

        return wrapped

    def _then(self, phase: str, call):
        def wrapped(*args, **kwargs):
            out = call(*args, **kwargs)
            self.enter(phase)
            return out

        return wrapped


def sentence(first: FirstNonfinite, found: Examination | None, headroom_since: int | None, spread_modules: int) -> str:
    """Step, micro-batch, phase, module, op, what happened, and what led to it."""
    where = [f"step {first.step}"]
    ranks = (first.replay or {}).get("ranks", [first.rank] if first.rank is not None else [])
    if ranks:
        where.append(f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}")
    if first.microbatch is not None:
        where.append(f"micro-batch {first.microbatch}")
    where.append("after the update" if first.phase == "after" else first.phase)
    parameter = found.parameter if found else None
    if parameter and first.tensor not in ("output",):
        where.append(f"{first.tensor} of {parameter}")
    elif first.module is not None:
        where.append(first.module or "the model's own forward")
    if first.op:
        where.append(first.op)
    what = {"output": "output", "grad": "gradient"}.get(first.tensor, first.tensor)
    failure = f"{', '.join(where)}: {what} is {KIND_NAMES[first.kind]}" + (f" in {first.dtype}" if first.dtype else "")
    if found is None:
        error = (first.replay or {}).get("error")
        why = f"its replay failed ({error})" if error else "a replay from the snapshot did not fail the same way"
        return f"{failure}; {why}, so the op is not known"
    n = found.culprit.alike
    alike = f"; {n:,} more {'fails' if n == 1 else 'fail'} likewise" if n else ""
    spread = f", first of {spread_modules} modules it spread to" if spread_modules > 1 else ""
    return failure + _why(first, found, headroom_since) + spread + alike


def _why(first: FirstNonfinite, found: Examination, headroom_since: int | None) -> str:
    diagnosis = found.diagnosis
    if first.op == SUM_OVER_RANKS:
        return ": finite on every rank, and not in their sum"
    if first.cause == "underflow_then_divide":
        source = f" from {first.source_tensor}" if first.source_tensor else ""
        output = diagnosis and diagnosis.output
        zeros = f" in {output.zero_denominators:,} of {output.numel:,} elements" if output and output.zero_denominators else ""
        return f", its denominator{source} underflowed to 0{zeros}; nothing overflowed"
    if first.cause is None:
        return ": written by no op of PyTorch's, so what led to it is not known"
    if first.cause == "from_input":
        return ", it came in from outside the step"
    largest = f", largest input {first.input_absmax:.3g}" if first.input_absmax is not None else ""
    if first.cause == "overflow":
        exact = f" (float64: {diagnosis.output.exact_absmax:.3g})" if diagnosis and diagnosis.output.exact_absmax else ""
        bits = f", {first.headroom_bits:.1f} bits of headroom left" if first.headroom_bits is not None else ""
        since = f" since step {headroom_since}" if headroom_since is not None and bits else ""
        return f": overflow{exact}{largest}{bits}{since}"
    return f": an invalid operation{largest}"


def investigate(
    training: Training,
    divergence: Divergence,
    replays: Replays,
    last: StepRecord,
    run_id: str,
    trace_path: Path | None,
    operands_path: Path | None,
    attempt: Attempts,
) -> ForensicsRecord:
    """Everything about one failure; leaves the training as it is after the failed step. The culprit's operands
    are kept in ``operands_path``; ``attempt.failed`` says what could not be found out and why."""
    strategy, micro_batches = training.replayed, training.settings.batch_size // training.settings.micro_batch
    replayed, modules = attempt("replay", lambda: _replay(training, divergence, replays, last), (None, []), together=True)
    if replayed is None:
        failed = Replayed(None, False, replays.snapshot.step, error=attempt.failed["replay"])
        mine = msgspec.structs.replace(divergence.first_nonfinite, replay=failed.unexplained())
        return _unexplained(run_id, mine, failed.from_step)
    mine = replayed.completed(divergence.first_nonfinite)
    winner = first_of_all(strategy, of_this_rank(mine, strategy, micro_batches) if replayed.found else None)
    if winner is None:
        return _unexplained(run_id, mine, replayed.from_step)
    rank, first = winner
    record = None
    if rank == training.context.ranks.rank:  # the other ranks know nothing of it
        record = _record(training, replayed, modules, first, run_id, trace_path, operands_path, attempt)
    elif trace_path is not None:
        replayed.before.restore()
        training.again(divergence.step)
    record = training.context.broadcast(record, rank)
    for path in (trace_path, operands_path):
        if path is not None and (content := training.context.hand_over(path, rank)) is not None:
            replace(path, content)
    return record


def _unexplained(run_id: str, first: FirstNonfinite, from_step: int) -> ForensicsRecord:
    """The record of a failure that did not come again."""
    said = sentence(first, None, None, 0)
    return ForensicsRecord(run_id=run_id, matched=False, first_nonfinite=first, sentence=said, snapshot_step=from_step)


def _replay(
    training: Training, divergence: Divergence, replays: Replays, last: StepRecord
) -> tuple[Replayed, list[TapReading]]:
    """The failed step again, with every module of every step since the snapshot."""
    from_step = replays.snapshot.step
    taps = ModuleTaps(training.model, training.precision.device, every=1, kept_steps=divergence.step - from_step + 1)
    modules: list[TapReading] = []

    def measured(step: int, is_last: bool) -> Seen | None:
        if step == from_step + 1:
            modules.clear()
        reading = training.again(step, taps=taps)
        modules.extend(reading.modules)
        if not is_last:
            return None
        modules.extend(taps.read())
        return _seen(reading.divergence, reading.steps[-1])

    try:
        return replays.again(1, _seen(divergence, last), measured), modules
    finally:
        taps.close()


def _seen(divergence: Divergence | None, record: StepRecord) -> Seen:
    return Seen(divergence and divergence.first_nonfinite, record.loss, record.grad_norm, not record.step_skipped)


def _record(
    training: Training,
    replayed: Replayed,
    modules: list[TapReading],
    first: FirstNonfinite,
    run_id: str,
    trace_path: Path | None,
    operands_path: Path | None,
    attempt: Attempts,
) -> ForensicsRecord:
    """The record of a failure by the process that produced it."""
    found, diagnosis = replayed.found, replayed.found.diagnosis
    if operands_path is not None:
        attempt("operands", lambda: save_operands(operands_path, found), None)
    history = attempt("history", lambda: history_of(found.module, modules), [])
    since = attempt("headroom", lambda: headroom_since(history, first.dtype, first.phase), None)
    events = None
    if trace_path is not None:
        events = attempt("trace", lambda: trace_step(training, first.step, trace_path, replayed), None, together=True)
    chain, absorbed = (
        attempt("chain", lambda nodes=nodes: tuple(chain_links(nodes, found)), ())
        for nodes in (found.culprit.chain, found.culprit.absorbed)
    )
    return ForensicsRecord(
        run_id=run_id,
        matched=replayed.matched,
        first_nonfinite=first,
        sentence=attempt(
            "sentence",
            lambda: sentence(first, found, since, found.culprit.spread),
            f"step {first.step}, {first.phase}, {first.module or 'outside of modules'}: {first.tensor} is {first.kind}",
        ),
        parameter=found.parameter,
        spread_modules=found.culprit.spread,
        chain=chain,
        absorbed=absorbed,
        operands=diagnosis.operands if diagnosis else (),
        output=diagnosis and diagnosis.output,
        history=tuple(history),
        headroom_since_step=since,
        histograms=attempt("histograms", lambda: tuple(histograms(found)), ()),
        kernels=attempt("kernels", lambda: tuple(kernel_rows(found, events)), ()),
        trace_file=trace_path.name if events is not None else None,
        snapshot_step=replayed.from_step,
    )


def trace_step(training: Training, step: int, path: Path, replayed: Replayed) -> list[dict] | None:
    """Profile the failed step into ``path``, with the modules' magnitudes, a marker at the culprit and arrows to
    what its value reached; torch's events, or None when there is no trace."""
    replayed.before.restore()
    found = replayed.found
    with TraceWindow(path, training.precision.device) as trace, ModuleMagnitudes(training.model) as magnitudes:
        with PhaseTrace(trace, step).of(training):
            training.again(step)
        samples = magnitudes.samples()
        trace.add(*samples, *flows_from(found.module or "", samples), *_marker(found, samples, trace.phases))
    return trace.events


def _marker(found: Examination, samples: Sequence[CounterSample], phases: Sequence[PhaseSlice]) -> list[Marker]:
    """A marker where the module's first non-finite value was seen, else where the culprit's phase began."""
    seen = [s.unix_ns for s in samples if s.name == found.module and not s.is_finite]
    began = [p.start_unix_ns for p in phases if p.name == found.phase]
    detail = {"module": found.module or "", "phase": found.phase, "cause": found.cause, "kind": found.kind}
    return [
        Marker(time_ns, f"first non-finite value: {found.op or found.tensor}", detail) for time_ns in (seen[:1] or began[-1:])
    ]
