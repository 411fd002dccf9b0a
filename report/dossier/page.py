"""The dossier's page: the context in the templates, with the figures' dark theme, and the same page as a PDF.

Autoescape is on for every template: no value of a run is ever markup. WeasyPrint, which makes the PDF, may load nothing but
what the page carries."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from instrument.results.files import replace
from report import TEMPLATES
from report.plots import palette, style
from report.plots.write import font_faces
from report.text import bracketed, clean

LONGEST_TEXT = 3_000
DARK_FURNITURE = {
    style.INK: "#e7eaee",
    style.MUTED: "#a3abb5",
    style.GRID: "#333941",
    style.PAPER: "#15181d",
    style.SHADE: "#262c34",
    style.WARNING_INK: "#ffcf7d",
    style.WARNING_PAPER: "#3b2c0e",
    palette.STATES["unsupported"].fill: "#1d2127",
    palette.STATES["unsupported"].ink: "#aab1ba",
}


def dark_colours() -> dict[str, str]:
    """Light -> dark for everything a figure may be drawn in; a state's cell keeps its colours."""
    looks = [*palette.LOOKS.values(), *palette.FAMILIES.values(), palette.OTHER]
    looks += palette.ARM_LOOKS.values()
    return {look.colour: look.dark for look in looks} | dict(palette.KERNEL_CLASSES.values()) | DARK_FURNITURE


def dark_rules() -> str:
    """One rule per colour and property; a hatch has its colours as attributes. Without an ancestor in the selector: what a
    ``<use>`` shows has none, and a hollow marker would stay dark."""
    return "\n".join(
        f'[style*="{name}: {light}"],[{name}="{light}"]{{{name}:{dark}!important}}'
        for light, dark in dark_colours().items()
        for name in ("fill", "stroke")
    )


@cache
def environment() -> Environment:
    """Jinja with autoescape always on (`select_autoescape` is off for ``*.html.j2``), and an error for a name that the context
    lacks. Whatever a template prints is `clean`, so that no text of a file acts on the page or fills it."""
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else clean(value, LONGEST_TEXT),
    )
    jinja.filters["bracketed"] = lambda low, high, form: Markup(bracketed(low, high, form))
    return jinja


def page(context: dict[str, Any]) -> str:
    """The whole dossier as one HTML file that loads nothing."""
    script = (TEMPLATES / "page.js").read_text()
    styles = "\n".join((TEMPLATES / name).read_text() for name in ("screen.css", "print.css"))
    dark = f"@media screen and (prefers-color-scheme: dark){{\n{dark_rules()}\n}}"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        environment()
        .get_template("dossier.html.j2")
        .render(
            context,
            script=Markup(script),
            styles=Markup("\n".join((font_faces(), styles, dark))),
            policy=f"default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        )
    )


class PdfUnavailable(RuntimeError):
    """WeasyPrint, or a library that it needs, is not installed."""


def require_pdf() -> None:
    """Raise `PdfUnavailable` with the way out when no PDF can be made here."""
    way_out = "install weasyprint (pip install 'datatype-dynamics-bench[pdf]') or give --no-pdf"
    if find_spec("weasyprint") is None:
        raise PdfUnavailable(f"no PDF without WeasyPrint: {way_out}")
    try:
        import weasyprint  # noqa: F401
    except OSError as error:  # pango is a system library
        raise PdfUnavailable(f"WeasyPrint does not load ({error}): {way_out}") from error


def write_pdf(html: str, path: Path) -> None:
    """Write ``html`` as a PDF: no date, no random identifier, so the same page gives the same bytes."""
    from weasyprint import HTML

    whole = links_as_names(figures_as_images(html))
    document = HTML(string=whole, base_url=None, url_fetcher=data_only_fetcher(), media_type="print")
    with _dateless_fonts():
        content = document.write_pdf(pdf_identifier=b"datatype-dynamics-bench", full_fonts=False)
    replace(path, content)


@contextmanager
def _dateless_fonts() -> Iterator[None]:
    """fontTools, which cuts the fonts to the glyphs in use where HarfBuzz cannot, stamps them with the time of day unless
    SOURCE_DATE_EPOCH names another."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = given or "0"
    try:
        yield
    finally:
        if given is None:
            del os.environ["SOURCE_DATE_EPOCH"]


def figures_as_images(html: str) -> str:
    """The page with every inline figure as an image of the same SVG: WeasyPrint then styles the page's
    own elements only, and not the tens of thousands inside the figures."""

    def as_image(svg: re.Match) -> str:
        label = re.search(r'aria-label="([^"]*)"', svg[0])
        source = base64.b64encode(svg[0].encode()).decode()
        return f'<img class="figure" alt="{label[1] if label else ""}" src="data:image/svg+xml;base64,{source}">'

    return re.sub(r"<svg\b.*?</svg>", as_image, html, flags=re.DOTALL)


def links_as_names(html: str) -> str:
    """The page with links to other files as plain names: a PDF is mailed without them. Links inside the page stay."""
    return re.sub(r'<a href="(?!#)[^"]*">(.*?)</a>', r"\1", html, flags=re.DOTALL)


def data_only_fetcher():
    """A fetcher that answers ``data:`` URLs and refuses all others: WeasyPrint's own reads ``file://`` and the network."""
    from weasyprint.urls import URLFetcher

    return URLFetcher(allowed_protocols=("data",), allow_redirects=False)
