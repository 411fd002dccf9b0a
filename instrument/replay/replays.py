"""From a snapshot to the culprit: run to the failed step again, see that it fails the same way, record it, say why.

`examine` runs the failed step twice from the same state: the first pass finds the culprit in the graph of ops, the
second keeps the inputs of just that op, follows the zeros that rounding made on the way to it, and diagnoses it. `Replays`
keeps the snapshot that a run's replays start from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import msgspec
import torch

from instrument.replay.diagnosis import Diagnosis, diagnose
from instrument.replay.graph import NAN, Culprit, Node, StepGraph
from instrument.replay.ops import BORN, SUM_OVER_RANKS, UNRECORDED_WRITE, runs_again
from instrument.replay.recorder import OpRecorder
from instrument.replay.snapshot import Seen, Snapshot
from instrument.results.schemas import FirstNonfinite

StepFunction = Callable[[int, OpRecorder | None], None]
"""Runs one whole step of training; the recorder, when there is one, is already recording."""
MOST_FOLLOWED = 32
"""Ops before the culprit through which zeros are followed, the newest."""
MOST_ABSORBED = 16


@dataclass(frozen=True)
class Examination:
    """The culprit of a step. ``tensor`` is what it wrote (``output``, ``grad``, ``param``, ``exp_avg``, ...),
    ``source_tensor`` the optimizer state that its zero denominator came from; ``parameter`` the
    parameter's name where there is one. ``cause`` is None where nobody saw what was read; ``diagnosis`` where the op
    cannot be run again alone, and for a value that was there before the step."""

    culprit: Culprit
    graph: StepGraph
    names: dict[int, tuple[str, str]]
    phase: str
    module: str | None
    tensor: str
    parameter: str | None
    cause: str | None
    kind: str
    source_tensor: str | None = None
    diagnosis: Diagnosis | None = None
    captured: tuple | None = None

    @property
    def op(self) -> str | None:
        return None if self.culprit.node is None else self.culprit.node.op


def examine(
    step: int,
    run_step: StepFunction,
    snapshot: Snapshot,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    scaler: torch.amp.GradScaler | None = None,
    any_rank: Callable[[bool], bool] = bool,
) -> Examination | None:
    """Replay ``step`` from ``snapshot``; None when everything stays finite this time. Several processes that share a
    run replay together: ``any_rank`` says whether something is so for one of them.

    Model, optimizer and scaler are left as they are after the replayed step.
    """
    snapshot.restore()
    for earlier in range(snapshot.step + 1, step):
        run_step(earlier, None)
    before = snapshot if snapshot.step == step - 1 else Snapshot(step - 1, model, optimizer, scaler)
    first = _record(step, run_step, OpRecorder(model, optimizer, scaler=scaler))
    culprit = first.graph.culprit([edge for edges in first.failed.values() for edge in edges])
    node = culprit and culprit.node
    wanted = [node] if node and runs_again(node.op) else []
    followed = first.graph.ancestors(node, MOST_FOLLOWED) if wanted and node.reads_zero else []
    second = first
    if any_rank(bool(wanted)):
        before.restore()
        capture, follow = (frozenset(n.index for n in nodes) for nodes in (wanted, followed))
        second = _record(step, run_step, OpRecorder(model, optimizer, scaler=scaler, capture=capture, followed=follow))
    if node is None:
        return culprit and _from_before(culprit, first)
    return _conclude(culprit, first, second)


def _record(step: int, run_step: StepFunction, recorder: OpRecorder) -> OpRecorder:
    with recorder.recording():
        run_step(step, recorder)
    return recorder


def _conclude(culprit: Culprit, first: OpRecorder, second: OpRecorder) -> Examination:
    node, names = culprit.node, first.names | second.names
    named = first.names.get(node.storage)
    tensor = named[1] if named else "grad" if node.phase in ("backward", "unscale", "clip") else "output"
    captured = second.captured.get(node.index)
    diagnosis = diagnose(node, captured, second.unflushed[node.index]) if captured else None
    if diagnosis:
        cause = diagnosis.cause
    else:  # it cannot run again: by what it wrote
        cause = "invalid" if node.kinds & NAN and node.op != SUM_OVER_RANKS else "overflow"
        cause = None if node.op in (UNRECORDED_WRITE, BORN) else cause
    source = _state_in_denominator(first, node) if cause == "underflow_then_divide" else None
    phase = "optimizer" if node.phase == "clip" and named and named[1] != "grad" else node.phase  # who writes to states
    kind = diagnosis.kind if diagnosis else kind_name(node.kinds)
    known = culprit, first.graph, names, phase, node.module, tensor, named[0] if named else None, cause, kind
    return Examination(*known, source, diagnosis, captured)


def _state_in_denominator(recorder: OpRecorder, node: Node) -> str | None:
    """The second moment that a denominator was made of, by its name."""
    storages = {edge.storage for edge in node.inputs}
    storages |= {n.storage for n in recorder.graph.ancestors(node, MOST_FOLLOWED) if n.phase == node.phase}
    states = {recorder.names[s][1] for s in storages if s in recorder.names}
    return next((name for name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg") if name in states), None)


def _from_before(culprit: Culprit, recorder: OpRecorder) -> Examination:
    """The value was there before the step began: in a named tensor, or in what came in with the data."""
    inputs = ((node, edge) for node in recorder.graph.nodes for edge in node.inputs if edge.storage == culprit.storage)
    reader = next((node for node, edge in inputs if edge.kinds and edge.writer is None), None)
    name, what = recorder.names.get(culprit.storage, (None, "input"))
    module = name.rpartition(".")[0] if name else reader.module if reader else None
    if name is None and reader is not None and reader.storage in recorder.names:  # a number written into a named tensor
        name, what = recorder.names[reader.storage]
    phase = "optimizer" if reader is None or (reader.phase == "clip" and what != "grad") else reader.phase
    kinds = next((e.kinds for e in (reader.inputs if reader else ()) if e.storage == culprit.storage), 1)
    seen = culprit if name else replace(culprit, node=reader)
    return Examination(seen, recorder.graph, recorder.names, phase, module, what, name, "from_input", kind_name(kinds))


def kind_name(kinds: int) -> str:
    """``nan``, ``inf`` or ``-inf`` from bits."""
    return "nan" if kinds & 1 else "inf" if kinds & 2 else "-inf"


CUDA_TOLERANCE = 1e-3
"""Relative difference of loss and gradient norm that still counts as the same failure on CUDA, where sums in
another order round differently. On a CPU they must be equal."""
ATTEMPTS = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Replayed:
    """``matched``: the step failed as the first time; ``found``: its culprit, None where the step stayed finite;
    ``before``: the state just before the step; ``error``: what the step function raised."""

    found: Examination | None
    matched: bool
    from_step: int
    before: Snapshot | None = None
    error: str | None = None

    def completed(self, seen: FirstNonfinite) -> FirstNonfinite:
        """The record of the failure with what the replay found; ``replay.matched`` is false when the replayed step stayed
        finite (then the rest is as it surfaced) or failed in another way."""
        if (e := self.found) is None:
            return msgspec.structs.replace(seen, replay={"matched": False, "from_step": self.from_step})
        node, diagnosis = e.culprit.node, e.diagnosis
        known = {name: getattr(e, name) for name in ("phase", "module", "op", "tensor", "source_tensor", "kind", "cause")}
        return msgspec.structs.replace(
            seen,
            **known,
            microbatch=node and node.microbatch,
            dtype=node.dtype if node else seen.dtype,
            input_absmax=diagnosis and diagnosis.input_absmax,
            headroom_bits=diagnosis and diagnosis.headroom_bits,
            absorbed=[f"{n.phase}:{n.module or ''}:{n.op}" for n in e.culprit.absorbed][:MOST_ABSORBED],
            replay={
                "matched": self.matched,
                "from_step": self.from_step,
                "ops": len(e.graph.nodes),
                "spread_modules": e.culprit.spread,
                "alike": e.culprit.alike,
                "parameter": e.parameter,
                "element": node and node.element,
            },
        )

    def unexplained(self) -> dict[str, object]:
        """``replay`` of a record that the replay cannot complete."""
        return {"matched": False, "from_step": self.from_step} | ({"error": self.error} if self.error else {})


class Replays:
    """The last snapshot of a run, and the numbers of the steps completed since (they may start anywhere, skip and
    repeat). A snapshot is due every ``every`` steps; the first ``explained_skips`` steps that a scaler skips are
    replayed. ``any_rank``: as `examine`'s; ``exact``: a replay must repeat every bit (None: on a CPU)."""

    def __init__(
        self,
        run_step: StepFunction,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        every: int = 50,
        explained_skips: int = 1,
        any_rank: Callable[[bool], bool] = bool,
        exact: bool | None = None,
    ) -> None:
        self._run_step, self._parts, self._any_rank = run_step, (model, optimizer, scaler), any_rank
        self._every, self._skips_left = every, explained_skips
        device = next(model.parameters()).device.type
        self._attempts = ATTEMPTS.get(device, 1)
        self._tolerance = 0.0 if (device == "cpu" if exact is None else exact) else CUDA_TOLERANCE
        self._snapshot: Snapshot | None = None
        self._since: list[int] = []
        self._gap = False

    @property
    def snapshot(self) -> Snapshot:
        """What replays start from; `keep` takes the first one."""
        return self._snapshot

    @property
    def due(self) -> bool:
        """Whether the next step needs a new snapshot; what is pending must be read before, from the old one."""
        return self._snapshot is None or self._gap or len(self._since) >= self._every

    def keep(self, step: int) -> None:
        """Take the state before ``step``."""
        self._snapshot, self._since, self._gap = Snapshot(step - 1, *self._parts), [], False

    def completed(self, step: int) -> None:
        self._since.append(step)

    def interrupted(self) -> None:
        """A step raised: a replay cannot cross it."""
        self._gap = True

    def again(
        self, steps_ago: int, seen: Seen | None = None, measure: Callable[[int, bool], Seen | None] | None = None
    ) -> Replayed:
        """Replay the step that was completed ``steps_ago`` steps ago (1: the last one) and leave the run after it.

        ``measure(step, last)`` runs a step; of the ``last`` one it returns what is compared with ``seen``, the first
        time's. Without them, whatever the replayed step does is taken for the same.
        """
        *earlier, step = self._since[: len(self._since) - steps_ago + 1]
        before, matched = self._snapshot, True
        for _ in range(self._attempts if measure else 0):
            self._snapshot.restore()
            for number in earlier:
                measure(number, False)
            before = Snapshot(step - 1, *self._parts) if earlier else self._snapshot
            matched = seen.same_as(measure(step, True), self._tolerance)
            if matched:
                break
        found = examine(step, self._run_step, before, *self._parts, self._any_rank)
        return Replayed(found, matched and found is not None, self._snapshot.step, before)

    def explains_skip(self) -> bool:
        """Whether one more skipped step is replayed to name its producer; counts them."""
        self._skips_left -= 1
        return self._skips_left >= 0

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put the run back afterwards to where it is now."""
        now = Snapshot(self._since[-1], *self._parts)
        try:
            yield
        finally:
            now.restore()


def skip_surfaced(step: int) -> FirstNonfinite:
    """A skipped step as the loss scaler shows it, for a replay to complete."""
    return FirstNonfinite.surfaced(step, "unscale", "grad", "inf")
