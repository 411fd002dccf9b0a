"""The PDF: pages, contents, decision within its pages, nothing read from outside, the same bytes."""

import re
import time

import pytest

pytest.importorskip("weasyprint")
pypdf = pytest.importorskip("pypdf")

from report.dossier.page import figures_as_images, write_pdf  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(built, tmp_path_factory):
    path = tmp_path_factory.mktemp("pdf") / "dossier.pdf"
    write_pdf((built / "dossier" / "index.html").read_text(), path)
    return pypdf.PdfReader(path).pages


@pytest.fixture(scope="module")
def texts(pages):
    return [page.extract_text() for page in pages]


def first_page_with(texts, heading: str) -> int:
    """Number from 1 of the first page after the contents whose lines hold the heading alone."""
    return next(number for number, text in enumerate(texts, start=1) if heading in [line.strip() for line in text.splitlines()])


def test_sections_one_to_three_are_within_four_pages(texts):
    assert first_page_with(texts, "Decision") == 1
    assert first_page_with(texts, "Hypotheses") <= 5


def test_pages_are_numbered_and_name_device_and_section(texts):
    words = texts[2]
    assert f"3 / {len(texts)}" in words and "Which floating-point configuration on simulated?" in words


def test_contents_give_the_page_of_every_section(texts):
    words = texts[0].replace(" ", "")
    assert f"Methods{'.' * 3}" in words.replace("\n", "") or "Methods" in words
    assert str(first_page_with(texts, "Methods")) in words


def test_the_runs_stand_by_case_on_upright_pages(pages, texts):
    assert all(page.mediabox.width < page.mediabox.height for page in pages)
    runs = "\n".join(texts[first_page_with(texts, "All runs") - 1 : first_page_with(texts, "Methods")]).splitlines()
    assert sum(line.strip() == "gpt2_clm" for line in runs) == 1  # over its rows, and not in each of them
    assert not any("gpt2_clm-fp32_true-s0" in line for line in runs)


def test_there_are_at_most_fifteen_pages_and_none_holds_a_single_row(pages, texts):
    """126 runs; `page` of 162 real ones was counted by hand: 15."""
    assert len(pages) <= 15
    assert all(len([line for line in text.splitlines() if line.strip()]) > 8 for text in texts)


def test_links_survive_mailing(pages):
    """None leads to a file beside the PDF: what was such a link is a name."""
    links = [note.get_object() for page in pages for note in page.get("/Annots", [])]
    actions = [link["/A"].get_object() for link in links if "/A" in link]
    assert links and not [action for action in actions if action.get("/S") != "/GoTo"]


def test_its_type_is_embedded_and_links_lead_inside(pages):
    fonts = {str(font.get_object()["/BaseFont"]) for page in pages[:3] for font in page["/Resources"]["/Font"].values()}
    assert any("Dossier-Sans" in font or "DossierSans" in font for font in fonts)
    assert sum(len(page.get("/Annots", [])) for page in pages) > 20


def test_the_same_page_gives_the_same_bytes_at_another_time_and_no_date(built, tmp_path, monkeypatch):
    """On the page without most of its sections; its fonts, marks, tables and a figure are there."""
    html = (built / "dossier" / "index.html").read_text()
    left_out = r'<section id="(summary|hypotheses|failures|time|runs|reproduce)".*?</section>'
    html = re.sub(
        left_out,
        lambda section: re.search(r"<figure.*?</figure>|$", section[0], re.DOTALL)[0] if section[1] == "summary" else "",
        html,
        flags=re.DOTALL,
    )
    assert html.count("<figure") == 4
    write_pdf(html, tmp_path / "one.pdf")
    later = time.time() + 3_601
    monkeypatch.setattr(time, "time", lambda: later)
    write_pdf(html, tmp_path / "other.pdf")
    assert (tmp_path / "one.pdf").read_bytes() == (tmp_path / "other.pdf").read_bytes()
    assert "/CreationDate" not in pypdf.PdfReader(tmp_path / "one.pdf").metadata


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
