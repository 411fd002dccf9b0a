"""``--to latex`` (booktabs tables) and ``--to appendix`` (a TeX folder that compiles as it is, to be taken into a paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from instrument.results.contents import Folder
from instrument.results.files import make_folder, replace
from report.hypotheses import judge
from report.tables import all_tables
from report.tables.selection import case_order, series_order
from report.tables.table import Table
from report.tables.trust import trust

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
PREAMBLE = r"""\documentclass[10pt]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{textcomp,booktabs,graphicx,url}
\usepackage[margin=2.2cm]{geometry}
\begin{document}
\appendix
"""
METHODS = r"""Every configuration of a case and seed starts from the same fp32 weights and sees the same batches in the same
order under the same schedule, clipping and evaluation (hashes of weights and batches are compared, and rows that differ are
not). Speed is total samples over total time of the timed steps, relative to fp32\_true of the same case and seed; intervals
are 95\,\% $t$-intervals on paired differences (of logarithms, for ratios) over seeds, within a run moving-block
bootstrap~\cite{kuensch1989jackknife}; rank correlation is Kendall's $\tau_b$ with the interval of Fieller et
al.~\cite{fieller1957tests}. MFU counts matrix products, attention included in full, forward and
backward~\cite{chowdhery2023palm}, against dense peaks. A configuration is of poor quality
when the seeds show that its loss exceeds that of fp32\_true by more than 0.02 nats (language models) or 5\,\% (classification),
or that its micro- or macro-F1 falls by more than one point (Holm's rule over a case's configurations). Claims about rates rest
on exact binomial tests against 1 seed in 10, claims about differences on paired $t$-tests of three seeds or more against a
margin of 2\,\%."""
BIBLIOGRAPHY = """@article{kuensch1989jackknife,
  author = {K{\\"u}nsch, Hans R.}, title = {The Jackknife and the Bootstrap for General Stationary Observations},
  journal = {The Annals of Statistics}, volume = {17}, number = {3}, pages = {1217--1241}, year = {1989}
}
@article{fieller1957tests,
  author = {Fieller, E. C. and Hartley, H. O. and Pearson, E. S.}, title = {Tests for Rank Correlation Coefficients. {I}},
  journal = {Biometrika}, volume = {44}, number = {3/4}, pages = {470--481}, year = {1957}
}
@article{chowdhery2023palm,
  author = {Chowdhery, Aakanksha and others}, title = {{PaLM}: Scaling Language Modeling with Pathways},
  journal = {Journal of Machine Learning Research}, volume = {24}, number = {240}, pages = {1--113}, year = {2023}
}
"""


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
    """Configurations by cases: state as text, never by colour alone."""
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


def export_appendix(folder: Folder, out: Path) -> list[Path]:
    """``appendix.tex``, ``references.bib``, ``figures/*.pdf`` and ``tables/*.tex``."""
    from report.plots.draw import draw_all

    tables = all_tables(folder)
    make_folder(out / "figures")
    draw_all(tables, out / "figures", ("pdf",), 300, lambda letter: None)
    written = export_latex(folder, out / "tables")
    replace(out / "references.bib", BIBLIOGRAPHY.encode())
    replace(out / "appendix.tex", document(folder, tables, out).encode())
    return [out / "appendix.tex", out / "references.bib", *written, *sorted((out / "figures").glob("*.pdf"))]


def document(folder: Folder, tables: dict[str, Table], out: Path) -> str:
    """The whole appendix."""
    marks = f" \\textbf{{{escape(', '.join(folder.marks))}.}}" if folder.marks else ""
    trusted = "\n".join(rf"\item {escape(check.sentence)}" for check in trust(folder))
    figures = "\n".join(_figure(table, out) for table in tables.values())
    return (
        f"{PREAMBLE}\\section{{Floating-point configurations on {identifier(folder.device)}}}\n{METHODS}{marks}\n\n"
        f"\\begin{{itemize}}\n{trusted}\n\\end{{itemize}}\n\n{_inputs()}\n{figures}\n"
        "\\bibliographystyle{plain}\n\\bibliography{references}\n\\end{document}\n"
    )


def _figure(table: Table, out: Path) -> str:
    """A figure with its finding and caption, or one line that says why there is none."""
    if table.empty or not (out / "figures" / f"{table.name}.pdf").exists():
        return rf"\paragraph{{{escape(table.letter)}.}} {escape(table.title)} {escape(table.empty or 'No figure.')}" + "\n"
    return (
        f"\\begin{{figure}}[htbp]\n\\centering\n\\includegraphics[width=\\linewidth]{{figures/{table.name}}}\n"
        f"\\caption{{\\textbf{{{escape(table.title)}}} {escape(table.caption)}}}\n\\end{{figure}}\n"
    )


def _inputs() -> str:
    names = {"stability": "Stability.", "throughput": "Throughput.", "efficiency": "Efficiency.", "findings": "Claims."}
    return "\n".join(
        f"\\begin{{table}}[htbp]\n\\centering\\footnotesize\n\\caption{{{caption}}}\n"
        f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{\\input{{tables/{name}}}}}\n"
        "\\end{table}"
        for name, caption in names.items()
    )
