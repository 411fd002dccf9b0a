"""What the machine did: memory, utilisation and disk over each run's time."""

from __future__ import annotations

import numpy as np

from instrument.results.contents import Folder
from report.tables.selection import one_a_cell
from report.tables.table import Table, data_text, long_frame
from report.text import gigabytes

NAME = "hardware"
READINGS = {
    "gpu_memory_bytes": "gpu_memory_used_bytes",
    "rss_bytes": "process_rss_bytes",
    "gpu_percent": "gpu_utilization_percent",
    "cpu_percent": "system_cpu_percent",
}
COLUMNS = ("case", "dtype_config", "seed", "time_s", *READINGS, "disk_growth_bytes")


def table(folder: Folder) -> Table:
    """Readings of ``hardware.jsonl`` of the lowest seed of every case and configuration that has one."""
    runs = one_a_cell(folder.runs, lambda run: folder.hardware(run.run_id) is not None)
    if not runs:
        why = "not measured: no run holds a hardware.jsonl."
        return Table.without_data(NAME, COLUMNS, "Memory, utilisation and disk", why, folder.marks)
    data = long_frame(runs, COLUMNS, lambda run: _readings(folder.hardware(run.run_id)))
    measure = "gpu_memory_bytes" if data["gpu_memory_bytes"].notna().any() else "rss_bytes"
    peaks = data.groupby("dtype_config", observed=True)[measure].max()
    what = "GPU memory" if measure == "gpu_memory_bytes" else "resident memory"
    title = (
        f"Highest {what}: {gigabytes(peaks.max())} ({peaks.idxmax()}); lowest peak of a configuration: "
        f"{gigabytes(peaks.min())} ({peaks.idxmin()})."
    )
    caption = (
        f"{data_text(folder, runs)} One seed a case and configuration. GPU memory is that of all processes and the "
        "driver; utilisation of the processor is that of all cores. Dashed: median. Disk: growth since the start."
    )
    return Table(NAME, NAME, data, title, caption, marks=folder.marks)


def _readings(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    time_s = columns["time_s"]
    absent = np.full(len(time_s), np.nan)
    disk = columns.get("disk_used_bytes", absent)
    known = disk[np.isfinite(disk)]
    return {
        "time_s": time_s,
        **{name: columns.get(field, absent) for name, field in READINGS.items()},
        "disk_growth_bytes": disk - (known[0] if len(known) else np.nan),
    }
