"""``--to latex``: the stability matrix, throughput, efficiency and findings as booktabs tables."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from instrument.results.contents import Folder
from instrument.results.files import replace
from report.export.tex import escape, identifier, tabular
from report.hypotheses import judge
from report.tables import all_tables
from report.tables.columns import case_order, series_order

NOTHING = "--"


def export(folder: Folder, out: Path) -> list[Path]:
    """``stability.tex``, ``throughput.tex``, ``efficiency.tex``, ``findings.tex``: each a tabular to \\input."""
    tables = all_tables(folder)
    texts = {
        "stability": stability(tables["A"].data),
        "throughput": throughput(tables["C"].data),
        "efficiency": efficiency(tables["B"].data),
        "findings": findings(folder),
    }
    paths = [out / f"{name}.tex" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        replace(path, f"% {folder.device}: {', '.join(folder.marks) or 'measured'}; needs booktabs\n{text}".encode())
    return paths


def stability(data: pd.DataFrame) -> str:
    """Configurations by cases: state in words, never by colour alone."""
    cases = case_order(data["case"].unique())
    rows = []
    for config in series_order(data["dtype_config"].unique()):
        cells = {row["case"]: row for row in data[data["dtype_config"] == config].to_dict("records")}
        rows.append([identifier(config), *(_state(cells[case]) for case in cases)])
    return tabular(["configuration", *(identifier(case) for case in cases)], rows, "l" + "l" * len(cases))


def _state(cell: dict) -> str:
    if cell["state"] in ("completed", "missing"):
        return escape(cell["line1"] or cell["state"])
    return escape(f"{cell['state']}: {cell['line1']}" if cell["line1"] not in ("", cell["state"]) else cell["state"])


def throughput(data: pd.DataFrame) -> str:
    """Relative speed with its interval, samples/s, or the word that stands for a bar."""
    rows = [
        [
            identifier(row["case"]),
            identifier(row["dtype_config"]),
            _interval(row["relative"], row["low"], row["high"], ".2f"),
            _number(row["samples_per_s"], ".3g"),
            str(row["n"]),
            escape(row["word"]) if row["word"] else "",
        ]
        for row in data.astype(object).where(data.notna(), None).to_dict("records")
    ]
    return tabular(["case", "configuration", r"speed over fp32\_true", "samples/s", "$n$", ""], rows, "llrrrl")


def efficiency(data: pd.DataFrame) -> str:
    """MFU against the common and the own peak, and peak memory."""
    rows = [
        [
            identifier(row["case"]),
            identifier(row["dtype_config"]),
            _percent(row["mfu_bf16_peak"]),
            _percent(row["mfu_own"]),
            _number(row["peak_bytes"] / 1e9, ".1f"),
            escape(row["y_kind"]),
            escape(row["peak_kind"]),
        ]
        for row in data.to_dict("records")
    ]
    return tabular(["case", "configuration", r"MFU (\%)", r"own dtype (\%)", "peak (GB)", "against", "memory"], rows, "llrrrll")


def findings(folder: Folder) -> str:
    """The claims with verdict, effect and interval."""
    rows = [
        [escape(f.id), escape(f.claim), escape(f.verdict), _interval(f.effect, f.low, f.high), str(f.n)] for f in judge(folder)
    ]
    return tabular(["", "claim", "verdict", "effect [95\\,\\% interval]", "$n$"], rows, r"lp{0.42\linewidth}lrr")


def _interval(value: float | None, low: float | None, high: float | None, form: str = ".3g") -> str:
    if value is None or math.isnan(value):
        return NOTHING
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"{value:{form}}" + (f" [{low:{form}}, {high:{form}}]" if known else "")


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:{form}}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{100 * value:.1f}"
