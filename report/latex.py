"""``--to latex`` (booktabs tables) and ``--to appendix`` (a TeX folder that compiles as it is, to be taken into a paper)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from instrument.results.contents import Folder
from instrument.results.files import make_folder, replace
from report import TEMPLATES
from report.hypotheses import judge
from report.tables import all_tables
from report.tables.selection import case_order, series_order
from report.tables.table import Table
from report.tables.trust import trust
from report.text import bracketed

SPECIAL = {
    "\\": r"\textbackslash{}",
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "—": "---",
    "’": "'",
    "·": r"\textperiodcentered{}",
    "µ": r"\textmu{}",
    "×": r"\texttimes{}",
    "±": r"\textpm{}",
    "…": r"\ldots{}",
}
BREAKABLE = "_-/"
NOTHING = "--"


def escape(text: object, limit: int = 2_000) -> str:
    """Text for LaTeX: special characters escaped, whatever pdfLaTeX's fonts lack shown as ``?``."""
    text = " ".join(str(text)[:limit].split())
    return "".join(SPECIAL.get(c, c if " " <= c <= "~" else "?") for c in text)


def identifier(text: object) -> str:
    """An identifier in typewriter, which may break after underscores and dashes."""
    pieces = "".join(escape(c) + (r"\allowbreak{}" if c in BREAKABLE else "") for c in str(text)[:200])
    return rf"\texttt{{{pieces}}}"


def tabular(head: Sequence[str], rows: Sequence[Sequence[str]], columns: str) -> str:
    """A booktabs table of cells that are already LaTeX."""
    lines = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def export_latex(folder: Folder, out: Path) -> list[Path]:
    """``stability.tex``, ``throughput.tex``, ``efficiency.tex``, ``findings.tex``: each a tabular to \\input."""
    tables = all_tables(folder)
    paths = [out / f"{name}.tex" for name in TABULARS]
    for path, (_, made) in zip(paths, TABULARS.values(), strict=True):
        marks = ", ".join(folder.marks) or "measured"
        replace(path, f"% {escape(folder.device)}: {escape(marks)}; needs booktabs\n{made(folder, tables)}".encode())
    return paths


def stability(folder: Folder, tables: dict[str, Table]) -> str:
    """Configurations by cases: state as text, never by colour alone."""
    data = tables["A"].data
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


def throughput(folder: Folder, tables: dict[str, Table]) -> str:
    """Relative speed with its interval, samples/s, or the word that stands for a bar."""
    rows = [
        [
            identifier(row["case"]),
            identifier(row["dtype_config"]),
            _number(row["relative"], ".2f") + bracketed(row["low"], row["high"], ".2f"),
            _number(row["samples_per_s"], ".3g"),
            str(row["n"]),
            escape(row["word"]) if isinstance(row["word"], str) else "",
        ]
        for row in tables["C"].data.to_dict("records")
    ]
    return tabular(["case", "configuration", r"speed over fp32\_true", "samples/s", "$n$", ""], rows, "llrrrl")


def efficiency(folder: Folder, tables: dict[str, Table]) -> str:
    """MFU against the common and the own peak, and peak memory."""
    rows = [
        [
            *(identifier(row[name]) for name in ("case", "dtype_config")),
            *(_number(100 * row[name], ".1f") for name in ("mfu_bf16_peak", "mfu_own")),
            _number(row["peak_bytes"] / 1e9, ".1f"),
            *(escape(row[name]) for name in ("y_kind", "peak_kind")),
        ]
        for row in tables["B"].data.to_dict("records")
    ]
    return tabular(["case", "configuration", r"MFU (\%)", r"own dtype (\%)", "peak (GB)", "against", "memory"], rows, "llrrrll")


def findings(folder: Folder, tables: dict[str, Table]) -> str:
    """The claims with verdict, effect and interval."""
    rows = [
        [escape(f.id), escape(f.claim), escape(f.verdict), _number(f.effect, ".3g") + bracketed(f.low, f.high, ".3g"), str(f.n)]
        for f in judge(folder)
    ]
    return tabular(["", "claim", "verdict", "effect [95\\,\\% interval]", "$n$"], rows, r"lp{0.42\linewidth}lrr")


TABULARS: dict[str, tuple[str, Callable[[Folder, dict[str, Table]], str]]] = {
    "stability": ("Stability", stability),
    "throughput": ("Throughput", throughput),
    "efficiency": ("Efficiency", efficiency),
    "findings": ("Claims", findings),
}
"""File -> caption, and what makes the tabular."""


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:{form}}"


def export_appendix(folder: Folder, out: Path) -> list[Path]:
    """``appendix.tex``, ``references.bib``, ``figures/*.pdf`` and ``tables/*.tex``."""
    from report.plots.draw import draw_all

    tables = all_tables(folder)
    make_folder(out / "figures")
    draw_all(tables, out / "figures", ("pdf",), 300, lambda letter: None)
    written = export_latex(folder, out / "tables")
    shutil.copyfile(TEMPLATES / "references.bib", out / "references.bib")
    replace(out / "appendix.tex", document(folder, tables, out).encode())
    return [out / "appendix.tex", out / "references.bib", *written, *sorted((out / "figures").glob("*.pdf"))]


def document(folder: Folder, tables: dict[str, Table], out: Path) -> str:
    """The whole appendix: each figure with its finding and caption, or one line that says why there is none."""
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        **{"block_start_string": "(*", "block_end_string": "*)", "variable_start_string": "((", "variable_end_string": "))"},
    )
    jinja.filters["tex"] = escape
    drawn = [(table, not table.empty and (out / "figures" / f"{table.name}.pdf").exists()) for table in tables.values()]
    marks, device = ", ".join(folder.marks), identifier(folder.device)
    values = {"device": device, "marks": marks, "checks": trust(folder), "tabulars": TABULARS, "figures": drawn}
    return jinja.get_template("appendix.tex.j2").render(values)
