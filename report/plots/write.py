"""A figure's files: pictures in the formats asked for, its SVG as a page needs it, and a CSV of exactly the data drawn."""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.collections import Collection
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from instrument.results.files import replace
from report.plots.elements import FRAME, SERIES
from report.plots.style import FAMILY, FONTS

FORMATS = ("svg", "png", "pdf", "eps")
NO_DATES = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "eps": {"Creator": "matplotlib"},
}
PNG_COMPRESSION = 3
OUTLINE = re.compile(r' d="[^"]*"')
LONG_NUMBER = re.compile(r"(\d\.\d{2})\d+")
FORMULA = ("=", "+", "-", "@")
SEPARATOR = re.compile('[,;\t\r\n"]')


def picture(figure: Figure, kind: str, dpi: int) -> bytes:
    """The figure as ``svg``, ``png``, ``pdf`` or ``eps``: without a date, so the same bytes each time.
    ``eps`` knows no transparency: its shades are mixed with the paper, in the figure itself, so it comes last."""
    freeze_layout(figure)
    if kind == "eps":
        make_opaque(figure)
    buffer = io.BytesIO()
    extra = {"pil_kwargs": {"compress_level": PNG_COMPRESSION}} if kind == "png" else {}
    figure.savefig(buffer, format=kind, dpi=dpi, metadata=NO_DATES[kind], **extra)
    data = buffer.getvalue()
    if kind == "svg":
        # A hundredth of a point is finer than any printer; six decimals double the file.
        return OUTLINE.sub(lambda path: LONG_NUMBER.sub(r"\1", path[0]), data.decode()).encode()
    if kind == "eps":
        return re.sub(rb"%%CreationDate:[^\n]*\n", b"", data)
    return data


def freeze_layout(figure: Figure) -> None:
    """Place the frames once: each format would do it again, and a look at every text costs as much as the drawing."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def make_opaque(figure: Figure) -> None:
    """Replace every see-through face, edge and line by the colour it has on white paper."""
    boxes = [text.get_bbox_patch() for text in figure.findobj(Text) if text.get_bbox_patch() is not None]
    for artist in [*figure.findobj(lambda artist: isinstance(artist, (Collection, Patch))), *boxes]:
        mixed = {}
        for part in ("facecolor", "edgecolor"):
            colour = np.atleast_2d(to_rgba_array(getattr(artist, f"get_{part}")()))
            mixed[part] = np.c_[colour[:, :3] * colour[:, 3:] + (1 - colour[:, 3:]), np.where(colour[:, 3:] > 0, 1.0, 0.0)]
        artist.set_alpha(None)
        for part, colour in mixed.items():
            if len(colour):
                getattr(artist, f"set_{part}")(colour if isinstance(artist, Collection) else colour[0])
    for line in figure.findobj(Line2D):
        line.set_alpha(None)


def csv_cell(value: object) -> str:
    """A value as a cell: an absent one is empty. A text that a spreadsheet would run as a formula begins with a quote, and one
    that would fall apart at another separator stands between quotes."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        return f"{value:.10g}" if isinstance(value, float) else str(value)
    text = value.replace("\0", "")
    text = "'" + text if text.lstrip().startswith(FORMULA) or text.startswith(("\t", "\r", "\n")) else text
    return '"' + text.replace('"', '""') + '"' if SEPARATOR.search(text) else text


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """``frame`` in base units as CSV; an absent number is an empty cell, infinity is ``inf``."""
    rows = [frame.columns, *zip(*(frame[name].tolist() for name in frame.columns), strict=True)]
    replace(path, "".join(",".join(map(csv_cell, row)) + "\n" for row in rows).encode("utf-8", "replace"))


PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
METADATA = re.compile(r"<metadata>.*?</metadata>\s*", re.DOTALL)
OPENING = re.compile(r"<svg[^>]*>")
SIZE = re.compile(r' width="([\d.]+)pt" height="([\d.]+)pt"')
IDS = re.compile(r' id="([^"]+)"')
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
GROUP = re.compile(r"<g\b[^>]*>|</g>")
BLANK_LINES = re.compile(r"\n\s*\n+")
WEIGHTS = {"Regular": 400, "SemiBold": 600}


def inline(svg: str, prefix: str, label: str) -> str:
    """The ``<svg>`` element: no prologue, every id and reference to one under ``prefix``, scaling with its box, and named
    ``label`` for those who do not see it.

    matplotlib gives every figure the same ids (``figure_1``, ``patch_2``); in one page they would clash, so each is prefixed
    and those that nothing refers to are dropped."""
    body = METADATA.sub("", PROLOGUE.sub("", svg))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = IDS.sub(lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else _attributes(found[1]), body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", body)
    body = without_bare_groups(body)
    name = html.escape(label, quote=True)
    return OPENING.sub(lambda tag: SIZE.sub("", tag[0])[:-1] + f' role="img" aria-label="{name}">', body, count=1)


def _attributes(name: str) -> str:
    """What the page's script looks for, of the id of a series or a frame; nothing of any other."""
    kind, *parts = name.split("|")
    if kind == SERIES and len(parts) == 4:
        return "".join(f' data-{key}="{part}"' for key, part in zip(("case", "config", "seed", "frame"), parts, strict=True))
    return f' data-limits="{" ".join(parts)}"' if kind == FRAME else ""


def without_bare_groups(svg: str) -> str:
    """The SVG without groups that carry nothing: more than half of matplotlib's elements, which every
    browser would keep in memory and WeasyPrint would style one by one."""
    kept: list[bool] = []

    def of_tag(tag: re.Match) -> str:
        if tag[0] == "</g>":
            return tag[0] if kept.pop() else ""
        if tag[0].endswith("/>"):
            return ""  # an empty group draws nothing
        kept.append(tag[0].rstrip("> ") != "<g")
        return tag[0] if kept[-1] else ""

    return BLANK_LINES.sub("\n", GROUP.sub(of_tag, COMMENT.sub("", svg)))


def standalone(svg: str) -> str:
    """The SVG file with the dossier's font inside, so that it looks the same on any machine."""
    return OPENING.sub(lambda tag: tag[0] + f"<style>{font_faces()}</style>", svg, count=1)


def font_faces() -> str:
    """``@font-face`` rules that carry the font files as data."""
    rules = []
    for name, weight in WEIGHTS.items():
        data = base64.b64encode((FONTS / f"DossierSans-{name}.ttf").read_bytes()).decode()
        rules.append(
            f"@font-face{{font-family:'{FAMILY}';font-weight:{weight};font-style:normal;"
            f"src:url(data:font/ttf;base64,{data}) format('truetype')}}"
        )
    return "\n".join(rules)
