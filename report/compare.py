"""Several GPU types side by side: a row a device, case and configuration, as a frame and on a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from instrument.results.contents import Folder
from instrument.results.schemas import RunRecord
from instrument.terminal import count, printable
from report.errors import UsageError
from report.tables import a_stability, b_efficiency, c_throughput
from report.tables.cells import memory_kind, peak_of
from report.tables.selection import TASK_COLUMNS, by_cell, case_order, select, series_order, settings_of
from report.tables.speed import eligible, pooled_rate
from report.text import gigabytes, joined
from report.verdict.decision import plain_number

COLUMNS = tuple(
    "device case column dtype_config state line1 n samples_per_s relative low high mfu y_kind peak_bytes peak_kind "
    "over_first price_per_hour cost_per_million_samples cost_per_billion_real_tokens".split()
)
SAME = ("preset", "data_source", "weights_source", "batch_size", "micro_batch", "seq_len", "max_steps", "loss_reduction")
"""Settings that two devices' runs of a case must share for their speeds to be compared."""
JUDGED = ("completed", "poor", "diverged", "failed")


@dataclass(frozen=True)
class Comparison:
    """``data`` with ``COLUMNS``; ``devices`` in the order given; ``notes``: what is not compared and why;
    ``differences``: cells whose state is not the same on every device that ran them."""

    devices: tuple[str, ...]
    data: pd.DataFrame
    differences: tuple[str, ...]
    notes: tuple[str, ...]
    currency: str = ""


def compare(folders: Sequence[Folder], prices_per_hour: Sequence[float] | None = None, currency: str = "") -> Comparison:
    """Two folders or more, of different devices. ``over_first``: samples/s over the first device's,
    where both ran the case with the same settings. Raises `UsageError`."""
    devices = [folder.device for folder in folders]
    if len(folders) < 2:
        raise UsageError(f"compare takes two results folders or more, and {len(folders)} was given")
    if len(set(devices)) < len(devices):
        twice = next(device for device in devices if devices.count(device) > 1)
        raise UsageError(f"two folders hold runs of {twice}; give one folder a device")
    if prices_per_hour is not None and len(prices_per_hour) != len(folders):
        raise UsageError(
            f"{count(len(prices_per_hour), 'price')} for {count(len(folders), 'folder')}; give one a folder, in their order"
        )
    prices = dict(zip(devices, prices_per_hour, strict=True)) if prices_per_hour else {}
    data = pd.concat([_device(folder, prices.get(folder.device)) for folder in folders], ignore_index=True)
    differ = _settings_differ(folders)
    data = _over_first(data, devices[0], differ)
    marks = [f"{folder.device}: {', '.join(folder.marks)}." for folder in folders if folder.marks]
    return Comparison(tuple(devices), _ordered(data), _differences(data), (*_notes(differ), *marks), currency)


def _device(folder: Folder, price: float | None) -> pd.DataFrame:
    """A device's cells: state from A, speed from C, efficiency from B."""
    keys = ["case", "dtype_config"]
    states = a_stability.table(folder).data.query("n_seeds > 0")[[*keys, "column", "state", "line1"]]
    speed = c_throughput.table(folder).data[[*keys, "n", "samples_per_s", "relative", "low", "high"]]
    mfu = b_efficiency.table(folder).data.rename(columns={"mfu_bf16_peak": "mfu"})[[*keys, "mfu", "y_kind"]]
    rows = states
    for columns in (speed, mfu, _memory(folder)):
        rows = rows.merge(columns, on=keys, how="left")
    rows.insert(0, "device", folder.device)
    rows["price_per_hour"] = math.nan if price is None else price
    rows["cost_per_million_samples"] = rows["price_per_hour"] * 1e6 / rows["samples_per_s"] / 3600
    rows["cost_per_billion_real_tokens"] = rows["price_per_hour"] * 1e9 / rows.pop("real_tokens_per_s") / 3600
    return rows


def _memory(folder: Folder) -> pd.DataFrame:
    """Peak memory and rate of real tokens of every cell that finished, whether its MFU is known or not."""
    runs, _ = eligible(folder, select(folder))
    kind = memory_kind(runs)
    rows = [(*key, peak_of(cell, kind) if kind else math.nan, kind, _token_rate(cell)) for key, cell in by_cell(runs).items()]
    return pd.DataFrame(rows, columns=["case", "dtype_config", "peak_bytes", "peak_kind", "real_tokens_per_s"])


def _token_rate(runs: Sequence[RunRecord]) -> float:
    """Tokens a second without padding, over seeds as samples are; nan unless every run counted them."""
    rates = [run.real_tokens_per_s for run in runs]
    return pooled_rate(rates) if rates and all(rates) else math.nan


def _settings_differ(folders: Sequence[Folder]) -> dict[tuple[str, str], str]:
    """(device, case) -> why its speed is not compared with the first device's."""
    first = {run.case: run for run in select(folders[0]).runs}
    found = {}
    for folder in folders[1:]:
        for case, run in {run.case: run for run in select(folder).runs}.items():
            if case in first:
                ours, theirs = settings_of(run), settings_of(first[case])
                changed = [f"{name} {ours[name]} against {theirs[name]}" for name in SAME if ours[name] != theirs[name]]
                if changed:
                    found[folder.device, case] = f"that of {folders[0].device} ({', '.join(changed)})"
    return found


def _notes(differ: dict[tuple[str, str], str]) -> list[str]:
    """One note for all cases of a device that differ alike."""
    cases: dict[tuple[str, str], list[str]] = {}
    for (device, case), why in differ.items():
        cases.setdefault((device, why), []).append(case)
    return [f"{joined(names)}: the speed of {device} is not compared with {why}." for (device, why), names in cases.items()]


def _over_first(data: pd.DataFrame, first: str, differ: dict[tuple[str, str], str]) -> pd.DataFrame:
    base = data[data["device"] == first].set_index(["case", "dtype_config"])["samples_per_s"].to_dict()
    data["over_first"] = [
        math.nan if (row.device, row.case) in differ else row.samples_per_s / base.get((row.case, row.dtype_config), math.nan)
        for row in data.itertuples()
    ]
    return data


def _differences(data: pd.DataFrame) -> tuple[str, ...]:
    found = []
    for (case, config), rows in data.groupby(["case", "dtype_config"], sort=False):
        rows = rows[rows["state"].isin(JUDGED)]
        if rows["state"].nunique() > 1:
            states = ", ".join(
                f"{row.device} {row.state}" + (f" ({row.line1})" if row.state == "diverged" else "")
                for row in rows.itertuples()
            )
            found.append(f"{case}, {config}: {states}")
    return tuple(found)


def _ordered(data: pd.DataFrame) -> pd.DataFrame:
    """Tasks, then cases, configurations and devices, in the registries' orders."""
    cases, configs = case_order(data["case"].unique()), series_order(data["dtype_config"].unique())
    places = {"column": TASK_COLUMNS.index, "case": cases.index, "dtype_config": configs.index}
    ordered = data.sort_values(list(places), key=lambda column: column.map(places[column.name]), kind="stable")
    return ordered[list(COLUMNS)].reset_index(drop=True)


STYLES = {"diverged": "red", "poor": "dark_orange", "failed": "red", "unjudged": "dim", "completed": "green"}
WORDS = {"completed": "ok", "unjudged": "not judged"}
NOTHING = "-"


def show(comparison: Comparison, console: Console) -> None:
    """Print it. ``vs fp32``: relative to fp32_true on the same device; ``vs first``: to the first device."""
    for case, rows in comparison.data.groupby("case", sort=False):
        priced = bool(rows["price_per_hour"].notna().any())
        title = f"[bold]{escape(printable(case))}[/] · {rows['column'].iloc[0]}"
        table = Table(title=title, title_justify="left", title_style="", header_style="dim", box=None, pad_edge=False)
        table.add_column("configuration", no_wrap=True, overflow="ellipsis", max_width=28)
        for head in ("state", "vs fp32", "vs first", "MFU", "memory", *(["cost/M"] if priced else [])):
            table.add_column(head, justify="right", no_wrap=True)
        for config, cells in rows.groupby("dtype_config", sort=False):
            table.add_row(escape(printable(config)))
            for cell in cells.to_dict("records"):
                table.add_row(f"  {escape(printable(cell['device']))}", *_cells(cell, priced))
        console.print(table)
        console.print()
    if comparison.data["price_per_hour"].notna().any():
        unit = f"cost/M: {comparison.currency or 'price'} per million samples; per 10^9 real tokens: see --json"
        console.print(unit, style="dim", markup=False)
    if comparison.differences:
        console.print("[bold]not the same on every device[/]")
    for line in comparison.differences:
        console.print(f"  {printable(line)}", markup=False)
    for note in comparison.notes:
        console.print(printable(note), style="dim", markup=False)


def _cells(cell: dict, priced: bool) -> list[str]:
    state = cell["line1"] if cell["state"] == "diverged" else WORDS.get(cell["state"], cell["state"])
    numbers = [
        _known(cell["relative"], "{:.2f}x".format),
        _known(cell["over_first"], "{:.2f}x".format),
        _known(100 * cell["mfu"], "{:.0f} %".format),
        _known(cell["peak_bytes"], gigabytes),
        *([_known(cell["cost_per_million_samples"], plain_number)] if priced else []),
    ]
    return [f"[{STYLES.get(cell['state'], 'default')}]{escape(state)}[/]", *numbers]


def _known(value: float, text: Callable[[float], str]) -> str:
    return NOTHING if math.isnan(value) else text(value)
