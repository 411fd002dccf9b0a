"""``--to tensorboard`` and ``--to wandb``: the runs' settings and numbers step by step, replayed for a tracker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from report.errors import need

SCALARS = tuple(
    "loss lr grad_norm grad_absmax logit_absmax loss_scale step_time_s mfu mfu_bf16_peak mfu_measured_peak "
    "allocated_bytes".split()
)
SETTINGS = tuple(
    "case arch task dtype_config seed preset device data_source weights_source batch_size micro_batch seq_len "
    "max_steps loss_reduction status divergence_step".split()
)
PROJECT = "datatype-dynamics-bench"


def settings(run: RunRecord) -> dict[str, Any]:
    """The run's settings and outcome."""
    return {name: getattr(run, name) for name in SETTINGS}


def points(folder: Folder, run: RunRecord) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(step, seconds since the start, finite numbers) of every step. A number that is not finite has no
    point: trackers draw it as 0 or drop the line."""
    columns = folder.steps(run.run_id)
    time_s = np.cumsum(np.nan_to_num(columns["step_time_s"]))
    for index, step in enumerate(columns["step"]):
        numbers = {name: float(columns[name][index]) for name in SCALARS if np.isfinite(columns[name][index])}
        yield int(step), float(time_s[index]), numbers


def export_tensorboard(folder: Folder, out: Path) -> list[Path]:
    """``<run_id>/events.out.tfevents.*``; raises `MissingTool` when tensorboard is not installed."""
    writers = need("tensorboard.summary.writer.event_file_writer", "track", "--to tensorboard")
    protos = need("tensorboard.compat.proto.event_pb2", "track", "--to tensorboard")
    summaries = need("tensorboard.compat.proto.summary_pb2", "track", "--to tensorboard")
    paths = []
    for run in folder.runs:
        writer = writers.EventFileWriter(str(out / run.run_id))
        for step, time_s, numbers in points(folder, run):
            values = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
            writer.add_event(protos.Event(wall_time=time_s, step=step, summary=summaries.Summary(value=values)))
        writer.close()
        paths.append(out / run.run_id)
    return paths


def export_wandb(folder: Folder, out: Path) -> list[Path]:
    """One W&B run a run, under ``out/wandb``; raises `MissingTool` when wandb is not installed."""
    wandb = need("wandb", "track", "--to wandb")
    out.mkdir(parents=True, exist_ok=True)
    mode = os.environ.get("WANDB_MODE", "offline")
    for run in folder.runs:
        replayed = wandb.init(
            project=PROJECT,
            id=run.run_id,
            name=run.run_id,
            group=run.case,
            dir=str(out),
            mode=mode,
            config=settings(run),
            tags=list(folder.marks),
            reinit="finish_previous",
        )
        for step, _, numbers in points(folder, run):
            replayed.log(numbers, step=step)
        replayed.finish()
    return [out / "wandb"]
