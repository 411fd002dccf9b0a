"""The record schemas, used to write, read, validate and document a run's records; run ids; strict JSON. Torch-free.

Every line is strict JSON. A non-finite number is written ``null`` and named in the line's ``nonfinite`` map by its dotted path
(``{"loss": "nan"}``; ``nan``, ``inf``, ``-inf``), so that nothing is lost and every JSON reader can read it; `decode` puts it
back. A value that is absent is ``null``, never -1. Base units, the unit in the name. Steps count from 1. Run ids become names
of folders and files, so they are safe names or they are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

LONGEST = 200
"""Characters: ``run_<id>.jsonl`` and a temporary name beside it must fit the 255 bytes of a file name."""
ALLOWED = "letters a to z, digits and . _ + = @ , ~ -, not beginning with . or -"
_SAFE = re.compile(r"[A-Za-z0-9_+=@,~][A-Za-z0-9._+=@,~-]*")


def is_safe(run_id: object) -> bool:
    """Whether a run id stays one plain file name wherever it is made part of a path."""
    return isinstance(run_id, str) and len(run_id) <= LONGEST and _SAFE.fullmatch(run_id) is not None


def require_safe(run_id: object) -> None:
    """Raise ValueError, in one sentence, unless the id is a safe name."""
    if not is_safe(run_id):
        shown = repr(run_id)
        shown = shown if len(shown) <= 80 else shown[:80] + "..."
        raise ValueError(f"run_id {shown} is no safe file name; allowed: up to {LONGEST} {ALLOWED}")


SCHEMA = 1
"""Version on every line. Older versions are migrated by `decode`, newer ones refused."""

STATUSES = ("completed", "diverged", "oom", "unsupported", "error", "preempted", "hung")
PHASES = ("forward", "loss", "backward", "unscale", "clip", "unscale_or_clip", "optimizer", "after")
"""``unscale_or_clip``: a loop that is not ours, where the two are one step. ``after``: between the update and the next forward
pass (a renormalised weight, a moving average)."""


def phase_text(phase: str) -> str:
    """A phase within a sentence: ``in the backward``, ``after the update``."""
    return "after the update" if phase == "after" else f"in the {phase.replace('_', ' ')}"


CAUSES = ("overflow", "underflow_then_divide", "invalid", "from_input")
KINDS = ("nan", "inf", "-inf")
EVENTS = ("scaler_skip", "clip_norm", "gradient_repaired", "warning", "resumed")

STALLED = {"weights": "no weight changed", "gradients": "every gradient that entered an update was 0"}
"""Why a completed run stood still (``flags["stalled"]["why"]``), and how it is said."""
_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RecordError(ValueError):
    """A line that is not a record of this program, or a record that breaks its schema."""


UNREADABLE = (ValueError, RecursionError)
"""What a hostile line makes the decoder raise: a broken schema (`RecordError`), a number out of range, endless nesting."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records: frozen, keyword-only, unknown fields refused."""

    schema: int = SCHEMA


KIND_NAMES = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}
"""The kinds of non-finite values, for people."""


class FirstNonfinite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the first non-finite value was produced.

    ``phase`` is where it was produced, ``phase_surfaced`` where it was first seen; ``source_tensor`` is what it came from (an
    ``exp_avg_sq`` that underflowed to 0 makes ``param`` infinite). Fields that only the op-level replay can fill are null.
    ``rank``: the process that produced it, where several share a run; null for one process, and where the counters alone do not
    know it (a gradient after the sum over ranks). ``microbatch`` counts through the whole step's batch.
    """

    step: int
    microbatch: int | None
    phase: str
    phase_surfaced: str
    module: str | None
    op: str | None
    tensor: str
    source_tensor: str | None
    kind: str
    dtype: str | None
    cause: str | None
    input_absmax: float | None
    headroom_bits: float | None
    absorbed: list[str] = []
    replay: dict[str, Any] | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        _one_of("first_nonfinite.phase", self.phase, PHASES)
        _one_of("first_nonfinite.phase_surfaced", self.phase_surfaced, PHASES)
        _one_of("first_nonfinite.kind", self.kind, KINDS)
        if self.cause is not None:
            _one_of("first_nonfinite.cause", self.cause, CAUSES)

    @classmethod
    def surfaced(cls, step: int, phase: str, tensor: str, kind: str, **known: Any) -> FirstNonfinite:
        """A failure as the counters show it, with what is ``known`` of module, microbatch, dtype and rank; op, cause and
        headroom are the replay's to fill."""
        unknown: dict[str, Any] = dict.fromkeys(
            ("microbatch", "module", "op", "source_tensor", "dtype", "cause", "input_absmax", "headroom_bits", "rank")
        )
        return cls(step=step, phase=phase, phase_surfaced=phase, tensor=tensor, kind=kind, **unknown | known)


class StepRecord(Record, frozen=True, kw_only=True):
    """One attempted update: a line of ``training_logs/run_<run_id>.jsonl``.

    ``loss`` is the step's training loss before the update. ``grad_norm`` is the global L2 norm before clipping, after
    unscaling. ``logit_absmax`` is over finite logits of rows whose target is not ignored; ``logit_over_fp16`` counts finite
    ones beyond 65,504; ``grad_underflow_frac`` is the share of nonzero gradients below 2^-24 at the scale at which backward
    ran. ``tokens`` counts padding, ``real_tokens`` does not; ``targets`` are what the loss is a mean over.
    """

    step: int
    loss: float | None
    lr: float
    grad_norm: float | None
    grad_absmax: float | None
    grad_nonfinite: int | None
    grad_underflow_frac: float | None
    logit_absmax: float | None
    logit_nonfinite: int | None
    logit_over_fp16: int | None
    loss_scale: float | None
    step_skipped: bool
    step_time_s: float | None
    samples: int
    tokens: int
    real_tokens: int
    seq_len: int
    flops: int | None = None
    mfu: float | None = None
    mfu_bf16_peak: float | None = None
    mfu_measured_peak: float | None = None
    mfu_real_tokens: float | None = None
    mfu_bf16_peak_real_tokens: float | None = None
    mfu_measured_peak_real_tokens: float | None = None
    allocated_bytes: int | None = None
    targets: int | None = None
    nonfinite: dict[str, str] = {}


class EvaluationRecord(Record, frozen=True, kw_only=True):
    """One evaluation: a line of ``runs/<run_id>/evaluations.jsonl``. ``step`` 0 is the start.

    ``val_loss``: fp32 loss from upcast logits, mean over real targets (nats), reduced as the case's ``loss_reduction`` says.
    F1: threshold 0.5, labels absent from the split left out of macro and counted in ``labels_absent``; ``f1_micro_tuned`` uses
    ``tuned_threshold``, chosen on this very split, so it is an upper bound. ``f1_*_majority``: of the constant answer that the
    training split alone gives, its most frequent class, or its k most frequent labels with the k of the best micro-F1 there.
    """

    step: int
    val_loss: float | None
    perplexity: float | None
    f1_micro: float | None
    f1_macro: float | None
    f1_micro_tuned: float | None
    tuned_threshold: float | None
    labels_absent: int | None
    f1_micro_majority: float | None = None
    f1_macro_majority: float | None = None
    samples: int
    targets: int
    duration_s: float
    nonfinite: dict[str, str] = {}


class EventRecord(Record, frozen=True, kw_only=True):
    """Something worth knowing that is no divergence: a line of ``runs/<run_id>/events.jsonl``.

    ``kind``, one of `EVENTS` when it is written: ``scaler_skip``, the loss scaler skipped the step's update; ``clip_norm``,
    the norm that clipping used overflowed though every gradient was finite, so that all of them became 0;
    ``gradient_repaired``, a gradient was not finite and was made so before the update; ``warning``, in ``detail["what"]``;
    ``resumed``, said by the run and not logged: its ``detail`` is the row's ``flags["resumed"]``.
    """

    step: int
    kind: str
    detail: dict[str, Any]


class RunRecord(Record, frozen=True, kw_only=True):
    """One run: ``runs/<run_id>/run.json`` (the truth) and a line of ``results.jsonl``.

    ``loss_initial`` is the training loss of step 1, before any update; ``train_loss_final`` the
    mean over the last tenth of the finite steps. Rates are total over total of the timed steps.
    ``attention_dtype``: in what attention's two products ran (``fp32`` under every configuration where the backend is ``math``,
    as on a CPU), null in a model without attention, whose backend is ``none``. ``logits_dtype``: in what the model returned its
    logits; ``fp32`` under a configuration with a 16-bit head where the model widens its head's product. Memory is the run's
    own process. Fields of measurements not yet made are null.

    ``flags["death"]`` of a run that failed: ``cause`` (`harness.failure.CAUSES`), ``goes_on`` (whether the same
    command resumes from its checkpoint) and what is known of phase, step, signal, stack and memory; ``flags["oom"]``: how
    memory stood when it ran out. ``flags["hardware"]``: ``throttled`` and ``contended`` are true, false, or null for unknown.
    ``flags["case_spelled"]``: a case from outside the project, as the command line spells it. ``flags["unhashed"]``: the
    settings that are in no run id (``log_every``, ``trace_steps``, ...), absent in older rows.
    ``flags["weights"]``: ``file`` in the run's folder and ``bytes`` of the final weights, where they are kept.
    ``flags["stalled"]`` of a completed run that stood still for at least its last tenth: ``since_step``, after which no weight
    changed, or no gradient other than 0 entered an update, and ``why`` (`STALLED`).
    ``flags["signature"]``: of the user who made the run (`instrument.results.signature`).
    """

    run_id: str
    case: str
    scenario: str
    arch: str
    task: str
    loss: str
    loss_reduction: str
    dtype_config: str
    seed: int
    preset: str
    device: str
    data_source: str
    weights_source: str
    status: str
    divergence_step: int | None = None
    first_nonfinite: FirstNonfinite | None = None
    steps_done: int = 0
    max_steps: int
    timed_steps: int = 0
    batch_size: int
    micro_batch: int
    seq_len: int
    n_params: int | None = None
    loss_initial: float | None = None
    train_loss_final: float | None = None
    val_loss: float | None = None
    perplexity: float | None = None
    f1_micro: float | None = None
    f1_macro: float | None = None
    f1_micro_tuned: float | None = None
    f1_micro_majority: float | None = None
    f1_macro_majority: float | None = None
    samples_per_s: float | None = None
    tokens_per_s: float | None = None
    real_tokens_per_s: float | None = None
    step_time_p50_s: float | None = None
    step_time_p95_s: float | None = None
    flops_per_step: int | None = None
    mfu: float | None = None
    mfu_bf16_peak: float | None = None
    mfu_measured_peak: float | None = None
    mfu_real_tokens: float | None = None
    mfu_bf16_peak_real_tokens: float | None = None
    mfu_measured_peak_real_tokens: float | None = None
    peak_flops_per_s: float | None = None
    peak_flops_source: str | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_device_bytes: int | None = None
    peak_rss_bytes: int | None = None
    energy_j: float | None = None
    scaler_skips: int = 0
    attention_backend: str | None = None
    attention_dtype: str | None = None
    logits_dtype: str | None = None
    autocast: str | None = None
    instrument: str | None = None
    init_sha256: str | None = None
    data_sha256: str | None = None
    final_weights_sha256: str | None = None
    env: dict[str, Any] = {}
    config: dict[str, Any] = {}
    flags: dict[str, Any] = {}
    error: str | None = None
    nonfinite: dict[str, str] = {}

    def __post_init__(self) -> None:
        require_safe(self.run_id)  # it becomes the name of files
        _one_of("status", self.status, STATUSES)
        if self.status == "diverged" and self.divergence_step is None:
            raise ValueError("a diverged run needs its divergence_step")

    @property
    def stalled(self) -> str | None:
        """What a completed run that stood still did, as a phrase (``no weight changed after step 54``); None for any other."""
        found = self.flags.get("stalled")
        if self.status != "completed" or not isinstance(found, dict):
            return None
        why, since = STALLED.get(str(found.get("why")), "it stood still"), found.get("since_step")
        return f"{why} after step {since:,}" if isinstance(since, int) else why


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")


AnyRecord = TypeVar("AnyRecord", bound=Record)


def encode(record: Record) -> bytes:
    """One strict-JSON line without its newline; raises `RecordError` when the schema is broken."""
    if isinstance(record, EventRecord) and record.kind not in EVENTS:
        raise RecordError(f"an event is {record.kind!r}; allowed: {', '.join(EVENTS)}")
    row = msgspec.to_builtins(record)
    if "nonfinite" in row:
        row["nonfinite"] = dict(_nonfinite(row))
    line = msgspec.json.encode(row)  # writes a non-finite float as null
    _typed(row, type(record))
    return line


def decode(line: bytes | str, kind: type[AnyRecord]) -> AnyRecord:
    """The record in one line, its non-finite numbers restored; raises `RecordError`."""
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RecordError(f"a record is a JSON object, and this is a {type(row).__name__}")
    schema = row.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise RecordError(f"schema {schema!r} is not one that this version reads (up to {SCHEMA})")
    try:
        for path, name in (row.get("nonfinite") or {}).items():
            *parents, last = path.split(".")
            place = row
            for key in parents:
                place = place[key]
            if place[last] is not None:
                raise KeyError(path)
            place[last] = _NAMES[name]
    except (AttributeError, KeyError, TypeError) as error:
        raise RecordError(f"nonfinite map {row['nonfinite']} names a value or a field that is not there") from error
    return _typed(row, kind)


def _nonfinite(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and name of every non-finite number in a row."""
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield prefix + key, nonfinite_name(value)
        elif isinstance(value, dict):
            yield from _nonfinite(value, f"{prefix}{key}.")


def _typed(row: dict[str, Any], kind: type[AnyRecord]) -> AnyRecord:
    try:
        return msgspec.convert(row, type=kind)
    except msgspec.ValidationError as error:
        raise RecordError(f"not a {kind.__name__}: {error}") from error


def nonfinite_name(value: float) -> str:
    """``nan``, ``inf`` or ``-inf``."""
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def strict_json(found: Any) -> str:
    """Any findings as one line of JSON; a non-finite number is written by its name (``"nan"``, ``"inf"``, ``"-inf"``)."""
    return msgspec.json.encode(_named(msgspec.to_builtins(found))).decode()


def _named(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else nonfinite_name(value)
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list) else value
