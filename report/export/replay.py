"""What a tracker is told of a run: its settings, and its numbers step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord

SCALARS = (
    "loss",
    "lr",
    "grad_norm",
    "grad_absmax",
    "logit_absmax",
    "loss_scale",
    "step_time_s",
    "mfu",
    "mfu_bf16_peak",
    "mfu_measured_peak",
    "allocated_bytes",
)
SETTINGS = (
    "case",
    "arch",
    "task",
    "dtype_config",
    "seed",
    "preset",
    "device",
    "data_source",
    "weights_source",
    "batch_size",
    "micro_batch",
    "seq_len",
    "max_steps",
    "loss_reduction",
    "status",
    "divergence_step",
)


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
