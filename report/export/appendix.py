"""``--to appendix``: a TeX folder that compiles as it is, to be taken into a paper."""

from __future__ import annotations

from pathlib import Path

from instrument.results.contents import Folder
from instrument.results.files import make_folder, replace
from report.export.latex import export as export_tables
from report.export.tex import escape, identifier
from report.tables import all_tables
from report.tables.table import Table
from report.tables.trust import trust

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
backward~\cite{chowdhery2023palm}, against dense peaks. A run is of poor quality when its loss exceeds that of fp32\_true by
more than 0.2 nats (language models) or 10\,\% (classification), or its micro-F1 falls by more than 2 points. A claim is
decided from three paired seeds upward."""

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


def export(folder: Folder, out: Path) -> list[Path]:
    """``appendix.tex``, ``references.bib``, ``figures/*.pdf`` and ``tables/*.tex``."""
    from report.dossier.figures import draw_all

    tables = all_tables(folder)
    make_folder(out / "figures")
    draw_all(tables, out / "figures", ("pdf",), 300, lambda letter: None)
    written = export_tables(folder, out / "tables")
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
        f"\\begin{{table}}[htbp]\n\\centering\\footnotesize\n\\caption{{{words}}}\n"
        f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{\\input{{tables/{name}}}}}\n"
        "\\end{table}"
        for name, words in names.items()
    )
