"""``--to wandb``: the runs replayed. Offline unless WANDB_MODE says otherwise; `wandb sync` uploads them."""

from __future__ import annotations

import os
from pathlib import Path

from instrument.results.contents import Folder
from report.errors import need
from report.export.replay import points, settings

PROJECT = "datatype-dynamics-bench"


def export(folder: Folder, out: Path) -> list[Path]:
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
