"""Planted results: small folders whose truth is known, all marked SIMULATED."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench_cases import CASES
from benchmarks.simulated_results import simulate
from instrument.results.contents import Folder, load
from instrument.results.schemas import EvaluationRecord, FirstNonfinite, RunRecord, StepRecord, encode
from report.dossier import build

STEPS, UNTIMED, BATCH, SEQ_LEN = 60, 5, 8, 64
SAMPLES_PER_S = 100.0
PEAK_BYTES = {"fp32_true": 20 * 10**9, "bf16_pure": 10 * 10**9}
ADAMW = FirstNonfinite(
    step=1,
    microbatch=None,
    phase="optimizer",
    phase_surfaced="optimizer",
    module="h.0",
    op=None,
    tensor="param",
    source_tensor="exp_avg_sq",
    kind="nan",
    dtype="float16",
    cause="underflow_then_divide",
    input_absmax=None,
    headroom_bits=None,
)

Change = Callable[[str, str, int], dict]


def noise(*key: object) -> float:
    """A fixed number between -1 and 1 for a key: seeds differ, and every run of the tests is the same."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4]) / 2**31 - 1


def planted_run(
    case_id: str,
    config: str,
    seed: int,
    /,
    speed: float = 1.0,
    gap: float = 0.0,
    start: float = 9.0,
    end: float = 3.0,
    f1: float | None = None,
    logit: float = 10.0,
    real: float = 1.0,
    diverges_at: int | None = None,
    first: FirstNonfinite | None = ADAMW,
    mfu: float | None = 0.2,
    steps: int = STEPS,
    **row,
) -> tuple[RunRecord, list[StepRecord], list[EvaluationRecord]]:
    """One run. ``speed`` relative to 100 samples/s, ``gap`` added to the final validation loss, ``real`` the
    share of tokens that are not padding; ``row`` replaces fields of the record."""
    case = CASES[case_id]
    n = steps if diverges_at is None else diverges_at
    rate = SAMPLES_PER_S * speed
    wobble = np.random.default_rng(abs(hash_of(case_id, seed))).normal(0, 0.02, n).tolist()
    tokens = BATCH * SEQ_LEN
    log = []
    for index in range(n):
        share = min(1.0, real * (1 + wobble[index])) if real < 1 else 1.0
        used = None if mfu is None else mfu * speed
        log.append(
            StepRecord(
                step=index + 1,
                loss=start + (end - start) * index / steps,
                lr=1e-3,
                grad_norm=1.0,
                grad_absmax=0.1,
                grad_nonfinite=0,
                grad_underflow_frac=0.0,
                logit_absmax=logit,
                logit_nonfinite=0,
                logit_over_fp16=int(logit > 65_504),
                loss_scale=None,
                step_skipped=False,
                step_time_s=BATCH / rate * (1 + 0.01 * wobble[index]),
                samples=BATCH,
                tokens=tokens,
                real_tokens=int(tokens * share),
                seq_len=SEQ_LEN,
                mfu=used,
                mfu_bf16_peak=used,
                mfu_real_tokens=used and used * share,
                mfu_bf16_peak_real_tokens=used and used * share,
            )
        )
    died = diverges_at is not None
    if died:
        log[-1] = msgspec.structs.replace(log[-1], grad_norm=float("nan"))
    settings = {"untimed_steps": UNTIMED, "lr": 1e-3, "device": "cuda", "config": {"id": config}, "bucket_by_length": False}
    fields = {
        "run_id": f"{case_id}-{config}-s{seed}-0badcafe",
        "case": case_id,
        "scenario": case.scenario,
        "arch": case.architecture.id,
        "task": case.task.id,
        "loss": case.task.loss,
        "loss_reduction": case.loss_reduction,
        "dtype_config": config,
        "seed": seed,
        "preset": "full",
        "device": "planted",
        "data_source": "planted",
        "weights_source": "scratch",
        "status": "diverged" if died else "completed",
        "divergence_step": diverges_at,
        "first_nonfinite": msgspec.structs.replace(first, step=diverges_at) if died and first else None,
        "steps_done": n,
        "max_steps": steps,
        "timed_steps": max(0, n - UNTIMED),
        "batch_size": BATCH,
        "micro_batch": BATCH,
        "seq_len": SEQ_LEN,
        "loss_initial": start,
        "train_loss_final": end + gap,
        "val_loss": None if died else end + gap,
        "f1_micro": None if died else f1,
        "samples_per_s": rate if n > UNTIMED else None,
        "mfu": mfu and mfu * speed,
        "mfu_bf16_peak": mfu and mfu * speed,
        "peak_allocated_bytes": PEAK_BYTES.get(config, 15 * 10**9),
        "init_sha256": f"init-{case_id}-{seed}",
        "data_sha256": f"data-{case_id}-{seed}",
        "attention_backend": "math",
        "config": settings,
        "flags": {"simulated": True},
    } | row
    first_evaluation = EvaluationRecord(
        step=0,
        val_loss=start,
        perplexity=None,
        f1_micro=None,
        f1_macro=None,
        f1_micro_tuned=None,
        tuned_threshold=None,
        labels_absent=None,
        samples=8,
        targets=8,
        duration_s=0.1,
    )
    return RunRecord(**fields), log, [first_evaluation]


def hash_of(*key: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4])


def write_run(path: Path, record: RunRecord, log: list[StepRecord], evaluations: list[EvaluationRecord]) -> None:
    """The run's own files."""
    for file, lines in (
        (path / "training_logs" / f"run_{record.run_id}.jsonl", log),
        (path / "runs" / record.run_id / "evaluations.jsonl", evaluations),
        (path / "runs" / record.run_id / "run.json", [record]),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"".join(encode(line) + b"\n" for line in lines))


def write_index(path: Path) -> None:
    """results.jsonl from the runs' own rows."""
    rows = [file.read_bytes() for file in sorted((path / "runs").glob("*/run.json"))]
    (path / "results.jsonl").write_bytes(b"".join(rows))


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> Path:
    """The folder of a small made-up campaign; nobody writes into it."""
    place = tmp_path_factory.mktemp("simulated") / "results"
    simulate(place, seeds=3, steps=60)
    return place


@pytest.fixture(scope="session")
def built(simulated, tmp_path_factory) -> Path:
    """Its dossier, without a PDF."""
    out = tmp_path_factory.mktemp("built")
    build(load(simulated), out, pdf=False, formats=("svg",), dpi=72)
    return out


@pytest.fixture
def plant(tmp_path):
    """``plant(cases, configs, seeds, change)``: a loaded folder. ``change(case, config, seed)`` returns
    arguments of `planted_run`, or None to leave a run out. Speeds wobble by 0.1 % from seed to seed."""

    def make(cases, configs, seeds=(0, 1, 2), change: Change = lambda case, config, seed: {}, name="results") -> Folder:
        path = tmp_path / name
        for case in cases:
            for config in configs:
                for seed in seeds:
                    given = change(case, config, seed)
                    if given is not None:
                        speed = given.pop("speed", 1.0) * (1 + 0.001 * noise(case, config, seed))
                        write_run(path, *planted_run(case, config, seed, speed, **given))
        write_index(path)
        return load(path)

    return make


@pytest.fixture
def add_row():
    """``add_row(folder, record)``: the folder with one more row, loaded again."""

    def add(folder: Folder, record: RunRecord) -> Folder:
        write_run(folder.path, record, [], [])
        write_index(folder.path)
        return load(folder.path)

    return add


@pytest.fixture
def small(plant) -> Folder:
    """Two cases, three configurations, two seeds, nothing wrong."""
    return plant(
        ("gpt2_clm", "gpt2_multi_cls"),
        ("fp32_true", "amp_bf16", "bf16_pure"),
        (0, 1),
        lambda case, config, seed: {"speed": {"amp_bf16": 2.0, "bf16_pure": 3.0}.get(config, 1.0)},
    )
