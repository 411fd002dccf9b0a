"""A run's settings, resolved: what was asked, completed by case, preset and device. Torch-free.

Everything that can change a result is a field here and part of the settings hash, so two runs
with the same `run_id` are the same experiment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from bench_cases import PRESETS, Case, DtypeConfig, lookup

ATTENTION_CHOICES = ("auto", "math", "efficient", "flash", "cudnn")
DEVICES = ("auto", "cpu", "cuda")
ENGINES = ("local", "ray")
PARALLEL = ("ddp", "fsdp")
INSTRUMENT_LEVELS = ("off", "light", "full")
MAX_NORM = 1.0
SHORTEST_SEQUENCE = 4
"""<s>, a token, another, </s>."""


class SettingsError(ValueError):
    """Settings that contradict themselves, the case or the device."""


@dataclass(frozen=True)
class Request:
    """What a person asked for; None means the preset's or the case's own value."""

    preset: str = "auto"
    device: str = "auto"
    data: str | None = None
    weights: str | None = None
    lr: float | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    seq_len: int | None = None
    max_steps: int | None = None
    eval_every: int | None = None
    log_every: int | None = None
    threads: int | None = None
    documents: int | None = None
    validation_documents: int | None = None
    dropout: float = 0.0
    attention: str = "auto"
    compile: bool = False
    bucket_by_length: bool = False
    text_field: str = "text"
    label_field: str = "labels"
    instrument: str = "light"
    trace_steps: int = 0
    memory_snapshot: bool = False
    checkpoint_every: int = 0
    mtbf_s: float | None = None


@dataclass(frozen=True)
class RunSettings:
    """One run, fully decided. ``eval_every`` 0 evaluates at the start and at the end only;
    ``log_every`` is the number of steps between two reads of the device; ``instrument`` is one of
    `INSTRUMENT_LEVELS`, and ``trace_steps`` how many of the last steps are run again under the profiler.
    Checkpoints: behind every ``checkpoint_every`` steps, or as often as a machine that lasts ``mtbf_s``
    seconds on average makes worth it; 0 and None: on a signal only. ``world``: processes that share the run, in the
    manner of ``parallel``, one of `PARALLEL`; None for one process."""

    case: Case
    config: DtypeConfig
    seed: int
    preset: str
    device: str
    data: str
    data_fingerprint: str
    sources_fingerprint: str
    weights: str
    lr: float
    batch_size: int
    micro_batch: int
    seq_len: int
    max_steps: int
    warmup_steps: int
    untimed_steps: int
    eval_every: int
    log_every: int
    threads: int
    documents: int
    validation_documents: int
    dropout: float
    attention: str
    compile: bool
    bucket_by_length: bool
    text_field: str
    label_field: str
    instrument: str = "light"
    trace_steps: int = 0
    memory_snapshot: bool = False
    checkpoint_every: int = 0
    mtbf_s: float | None = None
    world: int = 1
    parallel: str | None = None

    @property
    def run_id(self) -> str:
        """``{case}-{config}-s{seed}-{8 hex of the settings}``: a safe file name by construction."""
        return f"{self.case.id}-{self.config.id}-s{self.seed}-{self.settings_hash}"

    @property
    def settings_hash(self) -> str:
        """First 8 hex digits of the SHA-256 of everything but the seed and the logging."""
        numerics = self.as_config()
        # A path can be spelled in several ways; its content is in the fingerprints.
        if self.data != "embedded" and not self.data.startswith("hub"):
            numerics["data"] = "files"
        if self.weights not in ("scratch", "pretrained"):
            numerics["weights"] = "files"
        text = json.dumps(numerics, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def as_config(self) -> dict[str, Any]:
        """The settings as plain data, for the record's ``config`` and for the hash."""
        plain = dataclasses.asdict(self)
        for not_numerics in ("seed", "log_every", "instrument", "trace_steps", "memory_snapshot", "checkpoint_every", "mtbf_s"):
            del plain[not_numerics]
        if self.world == 1:  # as it was before there could be more: the same settings keep their run id
            del plain["world"], plain["parallel"]
        for only_words in ("scenario", "in_default_matrix", "spelled"):
            del plain["case"][only_words]
        for only_words in ("note", "controls", "in_default_matrix"):
            del plain["config"][only_words]
        return plain


def resolve(
    case: Case,
    config: DtypeConfig,
    seed: int,
    asked: Request,
    *,
    device: str,
    data_fingerprint: str,
    sources_fingerprint: str = "",
) -> RunSettings:
    """Complete a request; raises `SettingsError` naming what was given and what is allowed.

    ``device`` is ``cpu`` or ``cuda``, already decided; ``data_fingerprint`` identifies the
    content of the data and ``sources_fingerprint`` that of files from outside (weights, a model's
    configuration, a case's own file), so that a changed file is a new experiment.
    """
    preset = lookup("preset", choose_preset(asked.preset, device), PRESETS)
    data = choose_data(asked.data, preset.id)
    weights = asked.weights or ("pretrained" if preset.id == "full" and data.startswith("hub") else "scratch")
    for name in ("batch_size", "micro_batch", "seq_len", "max_steps", "log_every", "documents", "validation_documents"):
        value = getattr(asked, name)
        if value is not None and value <= 0:
            raise SettingsError(f"{name} is {value}; it must be at least 1")
    for name in ("eval_every", "threads", "trace_steps", "checkpoint_every"):
        value = getattr(asked, name)
        if value is not None and value < 0:
            raise SettingsError(f"{name} is {value}; it must be at least 0")
    if asked.instrument not in INSTRUMENT_LEVELS:
        raise SettingsError(f"instrument is {asked.instrument!r}; allowed: {', '.join(INSTRUMENT_LEVELS)}")
    if asked.mtbf_s is not None and not (math.isfinite(asked.mtbf_s) and asked.mtbf_s > 0):
        raise SettingsError(f"mtbf is {asked.mtbf_s:g} s; it must be a positive number of seconds")
    if asked.mtbf_s is not None and asked.checkpoint_every:
        raise SettingsError("--checkpoint-every and --mtbf both say how often to write a checkpoint; give one of them")
    if seed < 0:
        raise SettingsError(f"seed is {seed}; it must be at least 0")
    batch_size = asked.batch_size or preset.batch_size
    micro_batch = asked.micro_batch or math.gcd(batch_size, preset.micro_batch)
    if batch_size % micro_batch:
        raise SettingsError(f"micro_batch {micro_batch} does not divide batch_size {batch_size}")
    seq_len = asked.seq_len or preset.sequence_length(case.id)
    positions = case.architecture.positions(preset.id if weights == "scratch" else "full")
    if seq_len < SHORTEST_SEQUENCE:
        raise SettingsError(f"seq_len is {seq_len}; allowed: {SHORTEST_SEQUENCE} to {positions}")
    if seq_len > positions:
        raise SettingsError(
            f"seq_len {seq_len} is longer than the {positions} positions of "
            f"{case.architecture.name} ({preset.id}); allowed: {SHORTEST_SEQUENCE} to {positions}"
        )
    lr = asked.lr if asked.lr is not None else case.lr.of(preset.id, weights)
    if not (math.isfinite(lr) and lr > 0):
        raise SettingsError(f"lr is {lr}; it must be a positive number")
    if not 0 <= asked.dropout < 1:
        raise SettingsError(f"dropout is {asked.dropout}; allowed: 0 up to but not including 1")
    if asked.attention not in ATTENTION_CHOICES:
        raise SettingsError(f"sdpa policy {asked.attention!r}; allowed: {', '.join(ATTENTION_CHOICES)}")
    if device == "cpu" and asked.attention in ("efficient", "cudnn"):
        raise SettingsError(f"sdpa policy {asked.attention!r} exists on CUDA only; allowed here: auto, math, flash")
    max_steps = asked.max_steps or preset.max_steps
    return RunSettings(
        case=case,
        config=config,
        seed=seed,
        preset=preset.id,
        device=device,
        data=data,
        data_fingerprint=data_fingerprint,
        sources_fingerprint=sources_fingerprint,
        weights=weights,
        lr=lr,
        batch_size=batch_size,
        micro_batch=micro_batch,
        seq_len=seq_len,
        max_steps=max_steps,
        warmup_steps=max(1, round(max_steps * preset.warmup_steps / preset.max_steps)),
        untimed_steps=min(preset.untimed_steps, max_steps // 2),
        eval_every=asked.eval_every or 0,
        log_every=min(max_steps, asked.log_every or (1 if device == "cpu" else 10)),
        threads=preset.threads if asked.threads is None else asked.threads,
        documents=asked.documents or preset.documents,
        validation_documents=asked.validation_documents or preset.validation_documents,
        dropout=asked.dropout,
        attention=asked.attention,
        compile=asked.compile,
        bucket_by_length=asked.bucket_by_length,
        text_field=asked.text_field,
        label_field=asked.label_field,
        instrument=asked.instrument,
        trace_steps=asked.trace_steps,
        memory_snapshot=asked.memory_snapshot,
        checkpoint_every=asked.checkpoint_every,
        mtbf_s=asked.mtbf_s,
    )


def choose_preset(asked: str, device: str) -> str:
    """``auto`` is ``full`` on a GPU and ``tiny`` on a CPU."""
    return asked if asked != "auto" else "full" if device == "cuda" else "tiny"


def choose_data(asked: str | None, preset: str) -> str:
    """The default data of a preset: the hub's for ``full``, the embedded ones for ``tiny``."""
    return asked or ("hub" if preset == "full" else "embedded")
