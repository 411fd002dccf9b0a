"""A folder's results in the formats of other tools: csv (every table, the rows, the findings), bencher (Bencher Metric Format),
tensorboard and wandb (the runs' settings and numbers step by step, replayed for a tracker), and LaTeX (`report.latex`)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from instrument.results.contents import Folder
from instrument.results.files import replace
from instrument.results.schemas import RunRecord
from report.errors import need
from report.hypotheses import judge
from report.latex import export_appendix, export_latex
from report.tables import all_tables, b_efficiency, c_throughput

NESTED = ("env", "config", "flags", "nonfinite", "first_nonfinite")
MEASURES = {
    "samples_per_s": ("C", "samples_per_s", None, None),
    "speed_over_fp32_true": ("C", "relative", "low", "high"),
    "mfu": ("B", "mfu_bf16_peak", "low", "high"),
    "peak_bytes": ("B", "peak_bytes", None, None),
}
"""Measure -> table, column, and the columns of its interval."""


def runs_frame(folder: Folder) -> pd.DataFrame:
    """One row a run: the flat fields of its record, and where its first non-finite value was."""
    fields = [field for field in RunRecord.__struct_fields__ if field not in NESTED]
    rows = []
    for run in folder.runs:
        first = run.first_nonfinite
        place = {
            f"first_nonfinite_{name}": getattr(first, name) if first else None
            for name in ("phase", "module", "tensor", "kind", "cause")
        }
        rows.append({field: getattr(run, field) for field in fields} | place)
    return pd.DataFrame(rows)


def findings_frame(folder: Folder) -> pd.DataFrame:
    """One row a hypothesis or claim; the rows that it rests on as one cell."""
    rows = [
        {
            name: getattr(finding, name)
            for name in ("id", "claim", "verdict", "sentence", "effect", "low", "high", "unit", "n", "would_decide", "plot")
        }
        | {"run_ids": " ".join(finding.run_ids)}
        for finding in judge(folder)
    ]
    return pd.DataFrame(rows)


def export_csv(folder: Folder, out: Path) -> list[Path]:
    """``<table>.csv`` and ``<table>_summary.csv`` for A to H, ``runs.csv``, ``findings.csv``."""
    from report.plots.write import write_csv

    frames: dict[str, pd.DataFrame] = {"runs": runs_frame(folder), "findings": findings_frame(folder)}
    for table in all_tables(folder).values():
        frames[table.name] = table.data
        if len(table.summary.columns):
            frames[f"{table.name}_summary"] = table.summary
    paths = [out / f"{name}.csv" for name in frames]
    for path, frame in zip(paths, frames.values(), strict=True):
        write_csv(frame, path)
    return paths


def export_bencher(folder: Folder, out: Path) -> list[Path]:
    """``bencher.json``: ``{"device/case/configuration": {measure: {value, lower_value, upper_value}}}``."""
    path = out / "bencher.json"
    replace(path, json.dumps(metrics(folder), indent=1, allow_nan=False).encode() + b"\n")
    return [path]


def metrics(folder: Folder) -> dict[str, dict[str, dict[str, float]]]:
    """Every measured figure; what was not measured is absent."""
    tables = {"C": c_throughput.table(folder).data, "B": b_efficiency.table(folder).data}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for measure, (letter, column, low, high) in MEASURES.items():
        for row in tables[letter].to_dict("records"):
            name = f"{folder.device}/{row['case']}/{row['dtype_config']}"
            metric = {
                key: float(row[field])
                for key, field in (("value", column), ("lower_value", low), ("upper_value", high))
                if field is not None and math.isfinite(row[field])
            }
            if "value" in metric:
                found.setdefault(name, {})[measure] = metric
    return found


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


Export = Callable[[Folder, Path], list[Path]]
EXPORTERS: dict[str, Export] = {
    "csv": export_csv,
    "latex": export_latex,
    "appendix": export_appendix,
    "tensorboard": export_tensorboard,
    "wandb": export_wandb,
    "bencher": export_bencher,
}
"""Format -> the function that writes it into a folder and returns its files."""
