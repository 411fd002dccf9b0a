"""An SVG file of ours made fit to stand inside a page beside seven others."""

from __future__ import annotations

import base64
import html
import re

from report.plots.style import FAMILY, FONTS

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
    """The ``<svg>`` element: no prologue, every id and reference to one under ``prefix``, scaling
    with its box, and named ``label`` for those who do not see it.

    matplotlib gives every figure the same ids (``figure_1``, ``patch_2``); in one page they would
    clash, so each is prefixed and those that nothing refers to are dropped.
    """
    body = METADATA.sub("", PROLOGUE.sub("", svg))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = IDS.sub(lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", body)
    body = without_bare_groups(body)
    name = html.escape(label, quote=True)
    return OPENING.sub(lambda tag: SIZE.sub("", tag[0])[:-1] + f' role="img" aria-label="{name}">', body, count=1)


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
