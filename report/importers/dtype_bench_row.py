"""One dtype-bench run as our `RunRecord`, recomputed from its steps."""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench_cases import Case, DtypeConfig
from instrument.mfu import Peaks, figures
from instrument.results.schemas import RunRecord, StepRecord

SOURCE = "dtype-bench"
UNTIMED_STEPS = 1
MAX_STEPS = 1_000
WEIGHTS = {"gpt2": "scratch", "roberta": "pretrained"}
NOT_RECORDED = ("GPU name", "learning rate", "initial weights' hash", "batches' hash", "validation loss", "phase of death")


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
