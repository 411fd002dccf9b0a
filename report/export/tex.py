"""Text and tables in LaTeX. Everything that comes from files is escaped."""

from __future__ import annotations

from collections.abc import Sequence

SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
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


def escape(text: object, limit: int = 2_000) -> str:
    """Text for LaTeX: special characters escaped, whatever pdfLaTeX's fonts lack shown as ``?``."""
    words = " ".join(str(text)[:limit].split())
    return "".join(SPECIAL.get(c, c if " " <= c <= "~" else "?") for c in words)


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
