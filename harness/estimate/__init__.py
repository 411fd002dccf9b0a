"""``case ... --dry-run``: the resolved run, its model, and an estimate of its memory and time.

The estimate runs one micro-batch, forward and loss, on fake tensors: they have shapes, dtypes and
devices but no memory. What autograd keeps is then counted, in the dtypes of the configuration and
with its attention backend, for any architecture; FLOPs are those of `harness.flops`. Nothing is
written into the results folder.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from harness.run_folder import finished_run
from harness.settings import RunSettings
from instrument.records import RunRecord


def print_estimate(settings: RunSettings, out: Path, as_json: bool) -> None:
    """Text on standard error, and one JSON object on standard output when asked."""
    from harness.estimate.terminal import show

    findings = estimate(settings, out)
    show(findings)
    if as_json:
        sys.stdout.write(json.dumps(findings, allow_nan=False) + "\n")


def estimate(settings: RunSettings, out: Path) -> dict[str, object]:
    """The resolved run as plain data. Memory and time are null when the device cannot run it (the reason
    stands in ``unsupported``) or when its model cannot be traced (``not_estimated``: its forward pass
    asks for values, as some models of other people do). Raises what a run would raise about its data."""
    import torch

    from bench_cases.models import ModelError, WeightsUnavailable
    from harness.estimate.memory import memory
    from harness.estimate.model import data_facts, trace
    from harness.estimate.time import duration
    from harness.flops.model import meaningful_outputs, step_flops
    from harness.flops.shapes import shapes_of
    from harness.precision import Precision, Unsupported

    facts = data_facts(settings)
    findings = resolved(settings, out) | {
        "model": facts.as_row(),
        "unsupported": None,
        "not_estimated": None,
        "memory": None,
        "time": None,
    }
    try:
        precision = Precision(
            settings.config, torch.device(settings.device), attention=settings.attention, threads=settings.threads
        )
    except Unsupported as error:
        return findings | {"unsupported": str(error)}
    try:
        traced = trace(settings, facts, precision)
        findings["model"] |= traced.as_row()
        findings["memory"] = memory(settings, traced)
        flops = step_flops(
            shapes_of(facts.request),
            settings.case,
            settings.config,
            attention=precision.attention,
            outputs=meaningful_outputs(facts.request),
            seq_len=settings.seq_len,
        )
        findings["time"] = duration(settings, traced, flops)
    except (ModelError, WeightsUnavailable):
        raise
    except Exception as error:
        findings["not_estimated"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    finally:
        precision.close()
    return findings


def resolved(settings: RunSettings, out: Path) -> dict[str, object]:
    """What would run, and whether it already has."""
    config = dataclasses.asdict(settings.config)
    plain = (
        "seed",
        "preset",
        "device",
        "lr",
        "batch_size",
        "micro_batch",
        "seq_len",
        "max_steps",
        "warmup_steps",
        "eval_every",
        "log_every",
        "threads",
        "documents",
        "validation_documents",
        "dropout",
        "attention",
        "compile",
        "bucket_by_length",
    )
    return {
        "run_id": settings.run_id,
        "case": settings.case.id,
        "task": settings.case.task.name,
        "architecture": settings.case.architecture.name,
        "loss": settings.case.task.loss,
        "loss_reduction": settings.case.loss_reduction,
        "dtype_config": settings.config.id,
        "configuration": {
            name: config[name] for name in ("weights", "compute", "head", "loss", "optimizer", "eps", "scaler", "clip", "tf32")
        }
        | {"autocast": settings.config.autocast},
        "data_source": settings.data,
        "weights_source": settings.weights,
        "tokens_per_step": settings.batch_size * settings.seq_len,
        **{name: getattr(settings, name) for name in plain},
        "results_folder": str(out),
        "already_done": done(finished_run(out, settings.run_id)),
    }


def done(record: RunRecord | None) -> dict[str, object] | None:
    """How this very run ended in the results folder; null when it has not run there."""
    return None if record is None else {"status": record.status, "steps_done": record.steps_done}
