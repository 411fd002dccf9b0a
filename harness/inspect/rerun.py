"""A finished run again, from nothing but its own record and stored state: its settings, model and batches; then steps of it,
with one change in its configuration or with one module computed in fp32, and what the change costs in time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from torch.func import functional_call
from torch.utils._pytree import tree_map

from bench_cases import CASES, Case, DtypeConfig
from bench_cases.data import fingerprint
from bench_cases.data.batches import Batches
from bench_cases.models import build_model, weights_sha256
from harness.forensics.stored import RebuildError
from harness.inspect.changes import Change, with_fp32_moments, without_options
from harness.loss import training_loss
from harness.planning import choose_device, data_options, sources_fingerprint
from harness.precision import Precision
from harness.run.execute import load_run_data, make_batches, model_request
from harness.settings import RunSettings
from harness.training import Training
from instrument.environment import capture
from instrument.memory import memory_split, saved_for_backward
from instrument.replay.replays import Examination, examine
from instrument.replay.snapshot import NamedState, Snapshot
from instrument.results.read import differences, flat
from instrument.results.schemas import FirstNonfinite, RunRecord
from instrument.results.signature import is_own, key_file

SAME_ENVIRONMENT = ("torch_version", "gpu", "cpu", "cpu_capability")
"""What of a record's ``env`` decides whether the same settings give the same bits."""


@dataclass(frozen=True)
class Rebuilt:
    """A run's parts. ``warnings`` say what of the machine differs: the run may then go another way."""

    settings: RunSettings
    model: torch.nn.Module
    batches: Batches
    warnings: tuple[str, ...]

    def training(self, config: DtypeConfig) -> Training:
        """A training under a configuration, all of them over the one model: whoever is done with it closes its ``precision``,
        before the next is made."""
        settings = replace(self.settings, config=config, compile=False)  # replays are eager
        precision = Precision.of(settings)
        try:
            return Training.prepare(settings, self.model, self.batches, precision)
        except BaseException:
            precision.close()
            raise


def settings_of(record: RunRecord, *, trust: bool = False) -> RunSettings:
    """The run's settings; raises `RebuildError` naming what is not as it was (data, weights, the declaration), or what a run
    that somebody else made would load from outside this installation, unless ``trust``."""
    try:
        config = dict(record.config)
        case = msgspec.convert(config.pop("case") | {"scenario": record.scenario}, Case)
        dtype_config = msgspec.convert(config.pop("config"), DtypeConfig)
        settings = RunSettings(
            case=case, config=dtype_config, seed=record.seed, log_every=1, instrument=record.instrument or "light", **config
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RebuildError(f"{record.run_id} was recorded by another version of this program: {error}") from error
    if not trust and not is_own(record) and (sources := list(_outside_sources(settings))):
        raise RebuildError(
            f"{record.run_id} does not carry your signature (your key: {key_file()}): somebody else made it. Running it again "
            f"would load {'; '.join(sources)}. Nothing was loaded; --trust-run allows it"
        )
    choose_device(settings.device)  # a GPU's run needs a GPU
    now = replace(
        settings,
        data_fingerprint=fingerprint(settings.data, **data_options(case, settings)),
        sources_fingerprint=sources_fingerprint(settings.weights, case.architecture.hub_id, case.architecture.build),
    )
    if now.run_id != record.run_id:
        rows = differences(*(dict(flat(config)) for config in (record.config, now.as_config())))
        values = [f"{row['name']} {str(row['a'])[:12]!r} -> {str(row['b'])[:12]!r}" for row in rows]
        changed = ", ".join(values) or "how settings are hashed"
        raise RebuildError(f"{record.run_id} cannot be made again: it would be {now.run_id} now (differs: {changed})")
    return now


def _outside_sources(settings: RunSettings) -> Iterator[str]:
    """What making a run again takes from beyond this installation's registries and embedded data: code, files, the network."""
    architecture = settings.case.architecture
    if CASES.get(settings.case.id) != settings.case:
        yield f"a model built by {architecture.build!r} from {architecture.hub_id!r}, which is no case of this installation"
    if settings.data != "embedded":
        yield f"data from {settings.data!r}"
    if settings.weights != "scratch":
        yield f"weights from {architecture.hub_id if settings.weights == 'pretrained' else settings.weights!r}"


def rebuild(record: RunRecord, *, trust: bool = False) -> Rebuilt:
    """The run's model, batches and settings, proven to be the same by the hashes in its record; raises
    `RebuildError`, or what loading data and weights raises. ``trust`` a run that somebody else made."""
    settings = settings_of(record, trust=trust)
    data = load_run_data(settings)
    model = build_model(model_request(settings, data))
    batches = make_batches(settings, data)
    weights = ("initial weights", record.init_sha256, weights_sha256(model))
    for what, recorded, now in (weights, ("batches", record.data_sha256, batches.sha256(settings.max_steps))):
        if recorded is not None and recorded != now:
            hashes = f"sha256 {recorded[:12]} then, {now[:12]} now"
            torches = f"the run was made with torch {record.env.get('torch_version')}, this is {torch.__version__}"
            raise RebuildError(f"{record.run_id} cannot be made again: its {what} differ ({hashes}; {torches})")
    return Rebuilt(settings, model, batches, tuple(_other_machine(record, settings)))


def _other_machine(record: RunRecord, settings: RunSettings) -> Iterator[str]:
    here = capture(torch.device(settings.device))
    for name in SAME_ENVIRONMENT:
        if name in record.env and record.env[name] != here.get(name):
            yield f"{name} was {record.env[name]} and is {here.get(name)}"
    if settings.compile:
        yield "the run was compiled, and replays are eager"


def footprint_bytes(training: Training, step: int) -> int:
    """Weights, buffers, gradients (one a trainable weight), optimizer states as stored now, and what the forward
    pass of the step's first micro-batch keeps for backward (fp32 copies of weights among it)."""
    split = memory_split(training.model, training.optimizer)
    batch, case = training.batches.step(step), training.settings.case
    micro = next(iter(batch.micro_batches(training.settings.micro_batch))).to(training.precision.device)
    with saved_for_backward(training.model) as saved:
        with training.precision.forward():
            logits = training.model(micro.input_ids, micro.attention_mask, micro.last_token)
        loss = training_loss(
            logits,
            micro.targets,
            loss=case.task.loss,
            dtype=training.precision.loss_dtype,
            normalizer=batch.n_targets,
            valid_vocab=training.valid_vocab,
        )
    del logits, loss  # not before: the graph must live through the block, or freed storages count again
    stored = ("weights_bytes", "buffers_bytes", "optimizer_bytes", "gradients_complete_bytes")
    return sum(split[name] for name in stored) + saved.total()


NARROW = (torch.float16, torch.bfloat16)


@dataclass
class InFp32:
    """What is known of the module. ``calls`` of it; ``largest``: the largest finite |x| that its output had in
    fp32, before it was cast back (a device scalar, None without a cast)."""

    calls: int = 0
    largest: torch.Tensor | None = None


@contextmanager
def in_fp32(model: torch.nn.Module, name: str, cast_back: torch.dtype | None) -> Iterator[InFp32]:
    """Run the module ``name`` in fp32 inside: its weights and inputs cast, autocast off around it.

    Its output is cast to ``cast_back``, which a model of 16-bit weights needs; None leaves it in fp32, as
    code does that switches autocast off around a module (what reads it is under autocast and casts for itself).
    Gradients flow into the model's own parameters, rounded to their dtype.
    """
    module = model.get_submodule(name)
    replaced = vars(module).get("forward")  # somebody else's wrapper, or None for the class's own
    shell = _Shell(module)
    seen = InFp32()

    def forward(*args, **kwargs):
        seen.calls += 1
        wide = {f"inner.{n}": t.float() for n, t in (*module.named_parameters(), *module.named_buffers()) if t.dtype in NARROW}
        tensors = (*module.parameters(), *(a for a in args if isinstance(a, torch.Tensor)))
        with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
            out = functional_call(shell, wide, _cast(args, NARROW, torch.float32), _cast(kwargs, NARROW, torch.float32))
        if cast_back is None:
            return out
        _note_largest(out, seen)
        return _cast(out, (torch.float32,), cast_back)

    module.forward = forward
    try:
        yield seen
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced


class _Shell(torch.nn.Module):
    """Holds a module and its own forward, which `functional_call` can run with other weights."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.forward = inner.forward


def _cast(tree: Any, dtypes: tuple[torch.dtype, ...], dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype in dtypes else leaf, tree)


@torch.no_grad()
def _note_largest(out: Any, seen: InFp32) -> None:
    for leaf in torch.utils._pytree.tree_leaves(out):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel():
            largest = torch.where(leaf.isfinite(), leaf.detach().abs(), 0).amax()
            seen.largest = largest if seen.largest is None else torch.maximum(seen.largest, largest)


TIMED_SAMPLES = 10
"""Timings of a step are at least this many, over all rounds and steps."""


@dataclass
class ChangedRun:
    """Steps from the snapshot under one change. ``failed_at`` with ``first`` as it surfaced and ``found``, its
    producer, or None; ``applied``: updates that no scaler skipped."""

    failed_at: int | None = None
    first: FirstNonfinite | None = None
    found: Examination | None = None
    applied: int = 0
    skipped: int = 0
    step_time_s: float | None = None
    bytes: int | None = None
    in_fp32: InFp32 | None = None


def run_changed(rebuilt: Rebuilt, change: Change | None, state: NamedState, last: int, timed: list[int]) -> ChangedRun:
    """Run from the stored state up to ``last`` or to a failure, whose producer is then looked for; where the steps
    are survived, time the ``timed`` ones and weigh the memory. Without a ``change``, the control: its cost is measured whether
    it fails or not."""
    with _training(rebuilt, change or Change("unchanged", rebuilt.settings.config)) as (training, module):
        snapshot = _snapshot(state, rebuilt, training)
        result = _run(training, snapshot, last)
        result.in_fp32 = module
        if change is None or result.failed_at is None:
            result.step_time_s, result.bytes = _cost(training, snapshot, timed)
        elif result.first is not None:
            parts = training.model, training.optimizer, training.precision.scaler
            result.found = examine(result.failed_at, training.again, snapshot, *parts)
    return result


@contextmanager
def _training(rebuilt: Rebuilt, change: Change) -> Iterator[tuple[Training, InFp32 | None]]:
    """A training with the change in it."""
    training = rebuilt.training(change.config)
    precision = training.precision
    if change.module is not None:
        precision.check_logits = lambda logits: logits  # their dtype may be what is changed
        if change.stays_fp32:
            precision.loss_dtype = torch.float32
    cast_back = None if change.stays_fp32 else precision.weights_dtype
    try:
        with in_fp32(training.model, change.module, cast_back) if change.module else nullcontext() as seen:
            yield training, seen
    finally:
        precision.close()


def _snapshot(state: NamedState, rebuilt: Rebuilt, training: Training) -> Snapshot:
    """The stored state as this training keeps it; options stay the training's own, for they may be the change."""
    state = without_options(state)
    if training.settings.config.optimizer != rebuilt.settings.config.optimizer:
        state = with_fp32_moments(state)
    return Snapshot.from_named(state, training.model, training.optimizer, training.precision.scaler)


def _run(training: Training, snapshot: Snapshot, last: int) -> ChangedRun:
    snapshot.restore()
    result = ChangedRun()
    for step in range(snapshot.step + 1, last + 1):
        reading = training.again(step)
        if reading.divergence is not None:
            result.failed_at, result.first = step, reading.divergence.first_nonfinite
            break
        result.skipped += reading.steps[-1].step_skipped
        result.applied += not reading.steps[-1].step_skipped
    return result


def _cost(training: Training, snapshot: Snapshot, steps: list[int]) -> tuple[float, int]:
    """(seconds, bytes). The seconds are the sum over ``steps``, each at its fastest of several rounds from the
    snapshot; the caller has run them once already, so nothing is warmed up in here. The bytes are the allocator's
    peak on a GPU, and what is counted by `footprint_bytes` on a CPU."""
    device = training.precision.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    best = dict.fromkeys(steps, math.inf)
    for _ in range(max(2, math.ceil(TIMED_SAMPLES / len(steps)))):
        snapshot.restore()
        for step in steps:
            best[step] = min(best[step], training.again(step).steps[-1].step_time_s)
    nbytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else footprint_bytes(training, steps[0])
    return sum(best.values()), nbytes
