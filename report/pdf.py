"""The PDF of the very same page, by WeasyPrint, which may load nothing but what the page carries."""

from __future__ import annotations

import base64
import re
from importlib.util import find_spec
from pathlib import Path

from instrument.results.files import replace


class PdfUnavailable(RuntimeError):
    """WeasyPrint, or a library that it needs, is not installed."""


def require() -> None:
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

    document = HTML(string=figures_as_images(html), base_url=None, url_fetcher=data_only_fetcher(), media_type="print")
    content = document.write_pdf(pdf_identifier=b"datatype-dynamics-bench", full_fonts=False)
    replace(path, content)


def figures_as_images(html: str) -> str:
    """The page with every inline figure as an image of the same SVG: WeasyPrint then styles the page's
    own elements only, and not the tens of thousands inside the figures."""

    def as_image(svg: re.Match) -> str:
        label = re.search(r'aria-label="([^"]*)"', svg[0])
        source = base64.b64encode(svg[0].encode()).decode()
        return f'<img class="figure" alt="{label[1] if label else ""}" src="data:image/svg+xml;base64,{source}">'

    return re.sub(r"<svg\b.*?</svg>", as_image, html, flags=re.DOTALL)


def data_only_fetcher():
    """A fetcher that answers ``data:`` URLs and refuses all others: WeasyPrint's own reads ``file://``
    and the network."""
    from weasyprint.urls import URLFetcher

    return URLFetcher(allowed_protocols=("data",), allow_redirects=False)
