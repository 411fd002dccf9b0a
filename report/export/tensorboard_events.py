"""``--to tensorboard``: one event folder a run, written with tensorboard's own writer (no torch)."""

from __future__ import annotations

from pathlib import Path

from instrument.results.contents import Folder
from report.errors import need
from report.export.replay import points


def export(folder: Folder, out: Path) -> list[Path]:
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
