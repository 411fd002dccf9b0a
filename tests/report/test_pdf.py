"""The PDF: pages, contents, decision within its pages, nothing read from outside, the same bytes."""

import pytest

pytest.importorskip("weasyprint")
pypdf = pytest.importorskip("pypdf")

from benchmarks.simulated_results import simulate  # noqa: E402
from instrument.results.contents import load  # noqa: E402
from report.dossier import build  # noqa: E402
from report.dossier.page import figures_as_images, write_pdf  # noqa: E402


@pytest.fixture(scope="module")
def dossier(tmp_path_factory):
    place = tmp_path_factory.mktemp("pdf") / "results"
    simulate(place, seeds=3, steps=60)
    build(load(place), place, formats=("svg",), dpi=72)
    return place / "dossier"


@pytest.fixture(scope="module")
def pages(dossier):
    return pypdf.PdfReader(dossier / "dossier.pdf").pages


def first_page_with(pages, heading: str) -> int:
    """Number from 1 of the first page behind the contents whose lines hold the heading alone."""
    return next(
        number
        for number, page in enumerate(pages, start=1)
        if heading in [line.strip() for line in page.extract_text().splitlines()]
    )


def test_sections_one_to_three_are_within_four_pages(pages):
    assert first_page_with(pages, "Decision") == 1
    assert first_page_with(pages, "Hypotheses") <= 5


def test_pages_are_numbered_and_name_device_and_section(pages):
    words = pages[2].extract_text()
    assert f"3 / {len(pages)}" in words and "simulated" in words.splitlines()[0]


def test_contents_give_the_page_of_every_section(pages):
    words = pages[0].extract_text().replace(" ", "")
    assert f"Methods{'.' * 3}" in words.replace("\n", "") or "Methods" in words
    assert str(first_page_with(pages, "Methods")) in words


def test_the_run_table_is_on_landscape_pages_and_the_rest_upright(pages):
    wide = [page.mediabox.width > page.mediabox.height for page in pages]
    assert wide[first_page_with(pages, "All runs") - 1] and not wide[0] and not wide[-1]


def test_its_type_is_embedded_and_links_lead_inside(pages):
    fonts = {str(font.get_object()["/BaseFont"]) for page in pages[:3] for font in page["/Resources"]["/Font"].values()}
    assert any("Dossier-Sans" in font or "DossierSans" in font for font in fonts)
    assert sum(len(page.get("/Annots", [])) for page in pages) > 20


def test_the_same_page_gives_the_same_bytes_and_no_date(dossier, tmp_path):
    html = (dossier / "index.html").read_text()
    write_pdf(html, tmp_path / "again.pdf")
    assert (tmp_path / "again.pdf").read_bytes() == (dossier / "dossier.pdf").read_bytes()
    assert "/CreationDate" not in pypdf.PdfReader(tmp_path / "again.pdf").metadata


@pytest.mark.parametrize(
    "element",
    [
        '<img src="file://{path}">',
        '<link rel="stylesheet" href="file://{path}">',
        '<object data="file://{path}"></object>',
        '<style>@import url("file://{path}")</style>',
        '<img src="{path}">',
        '<a rel="attachment" href="file://{path}">x</a>',
    ],
)
def test_no_local_file_is_read(element, tmp_path, monkeypatch):
    secret = tmp_path / "secret.svg"
    secret.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><text>TOPSECRET</text></svg>')
    opened = []
    monkeypatch.setattr("urllib.request.FileHandler.file_open", lambda *a: opened.append(a))
    write_pdf(f"<html><body><p>words</p>{element.format(path=secret)}</body></html>", tmp_path / "x.pdf")
    reader = pypdf.PdfReader(tmp_path / "x.pdf")
    assert not opened and "TOPSECRET" not in reader.pages[0].extract_text() and not reader.attachments


def test_figures_become_images_of_themselves():
    html = figures_as_images('<p>a</p><svg viewBox="0 0 1 1" aria-label="A: &lt;b&gt;"><path d="M0 0"/></svg><p>b</p>')
    assert html.startswith('<p>a</p><img class="figure" alt="A: &lt;b&gt;" src="data:image/svg+xml;base64,')
    assert html.endswith("<p>b</p>") and "<svg" not in html
