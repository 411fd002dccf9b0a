"""A results folder as large as a campaign's, made up: every row and figure of it is marked SIMULATED.

The curves have the shape of real ones (warm-up, spikes, an early death in fp16, padding that varies
from batch to batch) so that drawing them costs what drawing real ones costs. They say nothing
about any GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bench_cases import CASES, DTYPE_CONFIGS
from instrument.results.schemas import FirstNonfinite, RunRecord, StepRecord, encode

DEVICE = "simulated"
SPEED = {
    "fp32_true": 1.0,
    "amp_fp16": 2.1,
    "amp_bf16": 2.2,
    "fp16_naive": 2.6,
    "bf16_pure": 2.5,
    "amp_bf16_8bit": 2.0,
    "amp_bf16_fp32_head": 2.1,
}
MEMORY = {"fp32_true": 1.0, "bf16_pure": 0.52, "fp16_naive": 0.52, "amp_bf16_8bit": 0.62}
DEATH_STEP = 50
BATCH, PARAMS, PEAK_FLOPS_PER_S = 32, 124_439_808, 9.89e14


def simulate(out: Path, *, seeds: int = 3, steps: int = 1_000) -> list[str]:
    """Write the default matrix (7 configurations x 6 cases) with ``seeds`` x ``steps`` to ``out``;
    returns the run ids."""
    (out / "training_logs").mkdir(parents=True)
    (out / "machine.json").write_text(json.dumps({"device": DEVICE, "note": "simulated by report bench"}))
    ids, rows = [], []
    for number, case in enumerate(case for case in CASES.values() if case.in_default_matrix):
        for config in (config for config in DTYPE_CONFIGS.values() if config.in_default_matrix):
            for seed in range(seeds):
                row, log = _run(case, config, seed, number, steps)
                folder = out / "runs" / row.run_id
                folder.mkdir(parents=True)
                (folder / "run.json").write_bytes(encode(row) + b"\n")
                (out / "training_logs" / f"run_{row.run_id}.jsonl").write_bytes(b"".join(encode(step) + b"\n" for step in log))
                rows.append(encode(row) + b"\n")
                ids.append(row.run_id)
    (out / "results.jsonl").write_bytes(b"".join(rows))
    return ids


def _run(case, config, seed: int, number: int, max_steps: int) -> tuple[RunRecord, list[StepRecord]]:
    """One run's row and log."""
    random = np.random.default_rng([seed, number])  # the same batches under every configuration
    noise = np.random.default_rng([seed, number, sorted(DTYPE_CONFIGS).index(config.id)])
    died = config.id == "fp16_naive"
    n = min(DEATH_STEP, max_steps) if died else max_steps
    at = np.arange(1, n + 1)
    lm = case.task.head != "classification"
    seq_len = np.full(n, 512) if lm else random.integers(420, 513, n)
    real = seq_len * BATCH if lm else (seq_len * BATCH * np.clip(random.normal(0.62, 0.1, n), 0.2, 1.0)).astype(int)
    start, end = {"causal_lm": (10.8, 3.4), "masked_lm": (10.9, 2.9)}.get(case.task.head, (0.69, 0.05))
    loss = end + (start - end) * np.exp(-at / 120) + random.normal(0, 0.02 * end, n) + noise.normal(0, 0.003 * end, n)
    grad_norm = 1.2 * np.exp(noise.normal(0, 0.25, n)) * np.where(noise.random(n) < 0.004, 9.0, 1.0)
    logits = (18 if lm else 6) * (1 + np.log1p(at) / 3) * np.exp(noise.normal(0, 0.08, n))
    logits *= 60 if config.optimizer == "8bit" else 1
    step_time_s = 0.31 / SPEED[config.id] * (seq_len / 512) * np.exp(noise.normal(0.01 * seed, 0.02, n))
    flops = 6 * PARAMS * BATCH * seq_len
    mfu = flops / step_time_s / PEAK_FLOPS_PER_S
    own = mfu * (2.0 if config.compute == "fp32" else 1.0)
    if died:
        loss[-1], grad_norm[-1] = np.nan, np.inf
    log = [
        StepRecord(
            step=int(s),
            loss=float(loss[i]),
            lr=3e-4,
            grad_norm=float(grad_norm[i]),
            grad_absmax=None,
            grad_nonfinite=0,
            grad_underflow_frac=None,
            logit_absmax=float(logits[i]),
            logit_nonfinite=int(died and i == n - 1),
            logit_over_fp16=0,
            loss_scale=65536.0 if config.scaler else None,
            step_skipped=bool(config.scaler and i < 2),
            step_time_s=float(step_time_s[i]),
            samples=BATCH,
            tokens=int(seq_len[i] * BATCH),
            real_tokens=int(real[i]),
            seq_len=int(seq_len[i]),
            flops=int(flops[i]),
            mfu=float(own[i]),
            mfu_bf16_peak=float(mfu[i]),
            mfu_real_tokens=float(own[i] * real[i] / seq_len[i] / BATCH),
            mfu_bf16_peak_real_tokens=float(mfu[i] * real[i] / seq_len[i] / BATCH),
        )
        for i, s in enumerate(at)
    ]
    return _row(case, config, seed, log, step_time_s, died, max_steps), log


def _row(case, config, seed: int, log: list[StepRecord], step_time_s: np.ndarray, died: bool, max_steps: int) -> RunRecord:
    timed = log[3:]
    seconds = float(step_time_s[3:].sum())
    mean = {
        name: float(np.mean([getattr(step, name) for step in timed]))
        for name in ("mfu", "mfu_bf16_peak", "mfu_real_tokens", "mfu_bf16_peak_real_tokens")
    }
    tail = log[-max(1, len(log) // 10) :]
    finite = [step.loss for step in tail if np.isfinite(step.loss)]
    final = float(np.mean(finite)) if finite else None
    first = (
        FirstNonfinite(
            step=len(log),
            microbatch=0,
            phase="optimizer",
            phase_surfaced="forward",
            module="lm_head",
            op=None,
            tensor="param",
            source_tensor="exp_avg_sq",
            kind="inf",
            dtype="fp16",
            cause="underflow_then_divide",
            input_absmax=None,
            headroom_bits=None,
        )
        if died
        else None
    )
    lm = case.task.head != "classification"
    return RunRecord(
        run_id=f"{case.id}-{config.id}-s{seed}-{seed:08x}",
        case=case.id,
        scenario=case.scenario,
        arch=case.architecture.id,
        task=case.task.id,
        loss=case.task.loss,
        loss_reduction=case.loss_reduction,
        dtype_config=config.id,
        seed=seed,
        preset="full",
        device=DEVICE,
        data_source="hub",
        weights_source="scratch",
        status="diverged" if died else "completed",
        divergence_step=len(log) if died else None,
        first_nonfinite=first,
        steps_done=len(log),
        max_steps=max_steps,
        timed_steps=len(timed),
        batch_size=BATCH,
        micro_batch=8,
        seq_len=512,
        n_params=PARAMS,
        loss_initial=log[0].loss,
        train_loss_final=final,
        val_loss=None if died else 1.02 * final,
        perplexity=None,
        f1_micro=None if lm or died else 0.61,
        f1_macro=None if lm or died else 0.22,
        samples_per_s=BATCH * len(timed) / seconds,
        tokens_per_s=sum(s.tokens for s in timed) / seconds,
        real_tokens_per_s=sum(s.real_tokens for s in timed) / seconds,
        step_time_p50_s=float(np.median(step_time_s)),
        step_time_p95_s=float(np.percentile(step_time_s, 95)),
        flops_per_step=log[0].flops,
        peak_flops_per_s=PEAK_FLOPS_PER_S,
        peak_flops_source="simulated",
        peak_allocated_bytes=int(
            2.1e10 * MEMORY.get(config.id, 0.75) * (1 + 0.01 * seed) * (1.3 if case.architecture.causal else 1.0)
        ),
        peak_rss_bytes=3_000_000_000,
        energy_j=None,
        init_sha256=f"{case.id}-{seed}",
        data_sha256=f"{case.id}-{seed}",
        **mean,
        config={"device": "cuda", "seed": seed},
        flags={"simulated": True},
        env={"gpu": "none: simulated"},
    )
