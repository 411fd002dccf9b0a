"""``report import dtype-bench``: real runs of an earlier benchmark of this matrix, recomputed from their steps by our rules.

What its source (ParkerWilliams/dtype-bench, ``src/benchmark.py``) does, and what we make of it:

- Steps count from 0; ours from 1. ``nan_step`` is the step whose forward pass gave a NaN loss.
- ``samples_per_sec`` is the batch size over the mean step time, compile step included; so the batch
  size, which is not logged, is their product, a whole number for every run.
- ``mfu`` is three times too high and against one 16-bit peak. We count FLOPs by the closed form of
  `instrument.flops` and divide by the dense peak of the dtype; the first step compiles and is not timed.
- ``loss_scale`` is read after the scaler's update; ours is the scale at which backward ran, so it is
  shifted by a step. A non-finite gradient under the scaler is a skipped step.
- All runs shared a process: a peak holds what earlier runs did not free.
- The card's name, the learning rate, hashes and (masked LM pads to 512) real tokens are not in the logs.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import statistics
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench_cases import CASES, DTYPE_CONFIGS, Case, DtypeConfig
from instrument.flops import CLOSED_FORMS, Sizes
from instrument.mfu import Peaks, datasheet_peaks, figures
from instrument.results.files import replace
from instrument.results.layout import INDEX, RunFiles, runs_of
from instrument.results.lines import Defect, defect
from instrument.results.schemas import RunRecord, StepRecord, encode
from instrument.terminal import count
from report.errors import ImportRefused

SOURCE = "dtype-bench"
UNTIMED_STEPS = 1
MAX_STEPS = 1_000
WEIGHTS = {"gpt2": "scratch", "roberta": "pretrained"}
NOT_RECORDED = ("GPU name", "learning rate", "initial weights' hash", "batches' hash", "validation loss", "phase of death")
DEFAULT_GPU = "RTX A6000"
"""The card whose peak the source divides by: its ``mfu`` reproduces with 155 TFLOP/s."""
CONFIGS = {
    "amp_bf16_8bit_adam": "amp_bf16_8bit",
    "fp32_tf32_matmul": "fp32_tf32",
    **{name: name for name in ("fp32_true", "amp_fp16", "amp_bf16", "bf16_pure", "fp16_naive")},
}
"""Their configurations that are ours. ``amp_bf16_fp32_head`` is not: its head ran in bf16."""
SIZES = {"gpt2": (12, 768, 3072, 50_257), "roberta": (12, 768, 3072, 50_265)}
"""Layers, width, inner width, vocabulary without pad columns."""
INITIAL_SCALE = 65_536.0


ROW_FIELDS = tuple(
    "run_id model_arch task dtype_config seed completed nan_step peak_memory_gb samples_per_sec tokens_per_sec".split()
)
STEP_FIELDS = ("step", "loss", "grad_norm_l2", "grad_norm_max", "loss_scale", "max_logit", "memory_gb", "step_time_ms")


@dataclass(frozen=True)
class RunFacts:
    """What a run's rows are made from. ``step_flops``: model FLOPs of one step; every one of them runs
    in the configuration's compute dtype (the logs' configurations have no head of another dtype)."""

    row: dict[str, Any]
    case: Case
    config: DtypeConfig
    gpu: str
    batch_size: int
    seq_len: int
    step_flops: int
    peaks: Peaks
    real_tokens_known: bool

    def mfu(self, flops: int, time_s: float | None) -> dict[str, float | None]:
        """The six MFU figures for ``flops`` done in ``time_s``; over real tokens only where they are known."""
        work = {"tf32" if self.config.tf32 else self.config.compute: flops}
        found = figures(work, work, time_s, self.peaks)
        return {
            name: value if self.real_tokens_known or not name.endswith("_real_tokens") else None
            for name, value in found.items()
        }


def run_record(facts: RunFacts, steps: list[StepRecord]) -> RunRecord:
    """The row: rates total over total of the timed steps, losses by our definitions."""
    row, case, config = facts.row, facts.case, facts.config
    status = "completed" if row["completed"] else "diverged" if row["nan_step"] is not None else "error"
    losses = [s.loss for s in steps if np.isfinite(s.loss)]
    return RunRecord(
        run_id=f"{case.id}-{config.id}-s{row['seed']}-{_hash(row)}",
        case=case.id,
        scenario=case.scenario,
        arch=case.architecture.id,
        task=case.task.id,
        loss=case.task.loss,
        loss_reduction=case.loss_reduction,
        dtype_config=config.id,
        seed=row["seed"],
        preset=SOURCE,
        device=_slug(facts.gpu),
        data_source="openwebtext",
        weights_source=WEIGHTS[row["model_arch"]],
        status=status,
        divergence_step=row["nan_step"] + 1 if status == "diverged" else None,
        steps_done=len(steps),
        max_steps=MAX_STEPS,
        batch_size=facts.batch_size,
        micro_batch=facts.batch_size,
        seq_len=facts.seq_len,
        loss_initial=steps[0].loss,
        train_loss_final=statistics.fmean(losses[-max(1, len(steps) // 10) :]) if losses else None,
        **_rates(facts, steps),
        flops_per_step=facts.step_flops,
        peak_flops_per_s=facts.peaks.of("mfu", {"tf32" if config.tf32 else config.compute: facts.step_flops}),
        peak_flops_source=facts.peaks.datasheet_source,
        peak_allocated_bytes=round(row["peak_memory_gb"] * 1e9),
        scaler_skips=sum(s.step_skipped for s in steps),
        autocast="cuda" if config.autocast else None,
        env={"gpu": facts.gpu},
        config={
            "device": "cuda",
            "compile": True,
            "bucket_by_length": False,
            "untimed_steps": UNTIMED_STEPS,
            "dropout": None,
            "config": {"id": config.id, "theirs": row["dtype_config"]},
        },
        flags={
            "imported": {
                "source": SOURCE,
                "run_id": row["run_id"],
                "memory_shares_process": True,
                "divergence_kind": "nan",
                "real_tokens_known": facts.real_tokens_known,
                "gpu_taken_to_be": facts.gpu,
                "not_recorded": [*NOT_RECORDED, *([] if facts.real_tokens_known else ["real tokens"])],
                "theirs": {name: row.get(name) for name in ("mfu", "samples_per_sec", "final_loss", "best_loss")},
            },
            "data": {"vocabulary": {"gpt2": 50_304, "roberta": 50_265}[row["model_arch"]]},
        },
        error="the loss of the forward pass was NaN" if status == "diverged" else None,
    )


def _rates(facts: RunFacts, steps: list[StepRecord]) -> dict[str, Any]:
    times_s = [s.step_time_s for s in steps if s.step_time_s is not None]
    if not times_s:
        return {"timed_steps": 0}
    total_s, n = sum(times_s), len(times_s)
    tokens_per_s = n * facts.batch_size * facts.seq_len / total_s
    p50, p95 = np.percentile(times_s, (50, 95))
    return {
        "timed_steps": n,
        "samples_per_s": n * facts.batch_size / total_s,
        "tokens_per_s": tokens_per_s,
        "real_tokens_per_s": tokens_per_s if facts.real_tokens_known else None,
        "step_time_p50_s": float(p50),
        "step_time_p95_s": float(p95),
        **facts.mfu(n * facts.step_flops, total_s),
    }


def _hash(row: dict[str, Any]) -> str:
    """8 hex digits of the row: the same row imported twice is the same run."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:8]


def _slug(gpu: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())


def import_dtype_bench(path: Path, out: Path, gpu: str = DEFAULT_GPU) -> tuple[list[RunRecord], list[Defect]]:
    """Write the runs under ``path`` as the results folder ``out``; returns them and what was left out.

    Raises `ImportRefused`. The same logs give the same files; the originals are only read."""
    if not path.is_dir():
        raise ImportRefused(f"{path} is no folder; give the one that holds dtype-bench's results.jsonl")
    if out.resolve().is_relative_to(path.resolve()):
        raise ImportRefused(f"{out} lies inside {path}, which is only read; choose another folder with --out")
    peaks = Peaks(**datasheet_peaks(gpu))
    defects: list[Defect] = []
    imported: list[tuple[RunRecord, list[StepRecord]]] = []
    for row, steps in _read_source(path, defects):
        try:
            imported.append(_convert(row, steps, peaks, gpu))
        except (ValueError, TypeError, KeyError) as error:
            defects.append(defect(INDEX, None, f"run {row['run_id']!r} left out: {error}"))
    if not imported:
        first = f"; the first of {count(len(defects), 'defect')}: {defects[0]}" if defects else ""
        raise ImportRefused(f"{path} holds no run of dtype-bench that can be imported{first}")
    _write(out, imported)
    return [record for record, _ in imported], defects


def _read_source(path: Path, defects: list[Defect]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """All runs of every ``results.jsonl`` under ``path``, each once, with its steps."""
    seen: set[str] = set()
    for index in sorted(path.rglob("results.jsonl")):
        name = str(index.relative_to(path))
        for line, row in _objects(index, name, ROW_FIELDS, defects):
            if row["run_id"] in seen:
                defects.append(defect(name, line, f"run {row['run_id']!r} stands there more than once; counted once"))
                continue
            seen.add(row["run_id"])
            log = _log_of(index.parent, str(row["run_id"]))
            if log is None:
                defects.append(defect(name, line, f"run {row['run_id']!r} has no log in training_logs/: left out"))
                continue
            yield row, [step for _, step in _objects(log, str(log.relative_to(path)), STEP_FIELDS, defects)]


def _log_of(folder: Path, run_id: str) -> Path | None:
    if "/" in run_id or "\0" in run_id:
        return None
    files = (folder / "training_logs" / f"{run_id}.jsonl{suffix}" for suffix in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _objects(path: Path, name: str, fields: tuple[str, ...], defects: list[Defect]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The file's objects that have all ``fields``, with their line numbers."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)  # the standard library reads bare NaN and Infinity
                    missing = [field for field in fields if field not in row]
                except (ValueError, TypeError, RecursionError) as error:
                    defects.append(defect(name, number, f"not JSON: {error}"))
                    continue
                if missing:
                    defects.append(defect(name, number, f"has no {', '.join(missing)}"))
                else:
                    yield number, row
    except (OSError, EOFError, zlib.error) as error:
        defects.append(defect(name, number + 1, f"cannot be read on: {error}"))


def _convert(row: dict[str, Any], steps: list[dict[str, Any]], peaks: Peaks, gpu: str) -> tuple[RunRecord, list[StepRecord]]:
    """One run in our records; raises ValueError with the reason when it is not one of ours."""
    case = CASES.get(f"{row['model_arch']}_{row['task']}")
    config = DTYPE_CONFIGS.get(CONFIGS.get(row["dtype_config"], ""))
    if case is None or row["model_arch"] not in SIZES or case.task.head == "classification":
        raise ValueError(f"{row['model_arch']}_{row['task']} is no case that this importer knows the sizes of")
    if config is None:
        raise ValueError(f"configuration {row['dtype_config']!r} is none of {', '.join(CONFIGS)}")
    if not steps:
        raise ValueError("its log holds no step")
    batch_size = _whole(row["samples_per_sec"] * sum(s["step_time_ms"] for s in steps) / 1e3 / len(steps), "batch size")
    seq_len = _whole(row["tokens_per_sec"] / row["samples_per_sec"], "sequence length")
    row_flops = CLOSED_FORMS[case.architecture.id, case.task.id](Sizes(*SIZES[row["model_arch"]]))
    step_flops = batch_size * sum(getattr(row_flops, part.name)(seq_len) for part in dataclasses.fields(row_flops))
    facts = RunFacts(
        row, case, config, gpu, batch_size, seq_len, step_flops, peaks, real_tokens_known=case.task.head == "causal_lm"
    )
    records = [_step(step, before, facts) for step, before in zip(steps, [None, *steps], strict=False)]
    return run_record(facts, records), records


def _whole(value: float, what: str) -> int:
    """A number that must be whole to be believed."""
    if not math.isfinite(value) or abs(value - round(value)) > 1e-3 * value or round(value) < 1:
        raise ValueError(f"its rates and step times give a {what} of {value:.3f}, which is no whole number")
    return round(value)


def _step(step: dict[str, Any], before: dict[str, Any] | None, facts: RunFacts) -> StepRecord:
    """One logged step; the first one compiled, so it has no time."""
    first = before is None
    time_s = None if first else step["step_time_ms"] / 1e3
    norm, logit = step["grad_norm_l2"], step["max_logit"]
    scale = None
    if facts.config.scaler:
        scale = INITIAL_SCALE if first else before["loss_scale"]
    tokens = facts.batch_size * facts.seq_len
    return StepRecord(
        step=step["step"] + 1,
        loss=step["loss"],
        lr=math.nan,
        grad_norm=norm,
        grad_absmax=step["grad_norm_max"],
        grad_nonfinite=None,
        grad_underflow_frac=None,
        logit_absmax=logit if math.isfinite(logit) else None,
        logit_nonfinite=None if not math.isfinite(logit) else 0,
        logit_over_fp16=None,
        loss_scale=scale,
        step_skipped=facts.config.scaler and not math.isfinite(norm),
        step_time_s=time_s,
        samples=facts.batch_size,
        tokens=tokens,
        real_tokens=tokens,
        seq_len=facts.seq_len,
        flops=facts.step_flops,
        allocated_bytes=round(step["memory_gb"] * 1e9),
        **facts.mfu(facts.step_flops, time_s),
    )


def _write(out: Path, imported: list[tuple[RunRecord, list[StepRecord]]]) -> None:
    """The results folder: logs first, then rows, then the index; refused where other runs lie."""
    ids = {record.run_id for record, _ in imported}
    others = [run.run_id for run in runs_of(out) if run.run_id not in ids]
    if others:
        raise ImportRefused(f"{out} holds other runs ({others[0]}, ...); choose an empty folder with --out")
    try:
        for record, steps in imported:
            run = RunFiles(out, record.run_id)
            replace(run.log("steps"), b"".join(encode(s) + b"\n" for s in steps))
            replace(run.row, encode(record) + b"\n")
        rows = sorted((record for record, _ in imported), key=lambda record: record.run_id)
        replace(out / INDEX, b"".join(encode(record) + b"\n" for record in rows))
    except OSError as error:
        raise ImportRefused(
            f"cannot write {error.filename or out}: {error.strerror}; choose another folder with --out"
        ) from error
