"""A figure's files: no date, full numbers, cells that no spreadsheet runs, an SVG that fits into a page beside seven others."""

import io
import os
import re
import signal
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest

from instrument.results.files import replacing
from report.plots import draw as drawing
from report.plots.draw import draw
from report.plots.style import theme
from report.plots.write import inline, picture, standalone, without_bare_groups, write_csv
from tests.report.hand_made_tables import made


def test_formulas_are_neutralised_and_numbers_are_not(tmp_path):
    frame = pd.DataFrame(
        {"name": ["=cmd|' /C calc'!A0", "+1", "-1", "@x", "\tx", "plain"], "value": [-1.5, 2, np.nan, np.inf, 0, 1]}
    )
    write_csv(frame, tmp_path / "x.csv")
    back = pd.read_csv(tmp_path / "x.csv", keep_default_na=False)
    assert list(back["name"]) == ["'=cmd|' /C calc'!A0", "'+1", "'-1", "'@x", "'\tx", "plain"]
    assert list(back["value"]) == ["-1.5", "2", "", "inf", "0", "1"]


def test_categories_and_nul_are_written(tmp_path):
    frame = pd.DataFrame({"name": pd.Categorical(["=a", "=a", "b\x00"])})
    write_csv(frame, tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text().splitlines() == ["name", "'=a", "'=a", "b"]


@pytest.mark.parametrize("letter", "BDE")
def test_the_csv_is_exactly_the_table(letter, tmp_path):
    data = made(letter).data
    write_csv(data, tmp_path / "x.csv")
    plain = data.map(lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "x.csv"), plain, check_dtype=False, rtol=1e-9)


def test_shortening_outlines_leaves_text_alone():
    table = made("H", title="a step of 0.12345678 s, d=0.98765432")
    with theme(table.name):
        svg = picture(draw(table), "svg", 72).decode()
    assert "0.12345678" in svg and "0.98765432" in svg and "<dc:date>" not in svg
    assert not any(
        len(part.split(".")[-1]) > 4
        for line in svg.splitlines()
        if line.lstrip().startswith("<path d=")
        for part in line.split('"')[1].split()
        if "." in part
    )


@pytest.mark.parametrize("kind,magic", [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF"), ("eps", b"%!PS")])
def test_every_format_is_what_it_says(kind, magic):
    table = made("A")
    with theme(table.name):
        content = picture(draw(table), kind, 300)
    assert content.startswith(magic) and b"CreationDate" not in content
    if kind == "png":
        from PIL import Image

        assert Image.open(io.BytesIO(content)).width == 2100


@pytest.mark.parametrize("letter", "BE")
def test_eps_has_no_transparency_and_keeps_its_shades_pale(letter, caplog):
    table = made(letter)
    with theme(table.name):
        figure = draw(table)
        content = picture(figure, "eps", 72)
    assert content.startswith(b"%!PS") and not [record for record in caplog.records if "transparency" in record.message]
    faces = np.concatenate(
        [
            collection.get_facecolor()
            for axes in figure.axes
            for collection in axes.collections
            if len(collection.get_facecolor())
        ]
    )
    assert set(faces[:, 3]) <= {0.0, 1.0} and (faces[:, :3].min(axis=1) > 0.6).any()


@pytest.fixture(scope="module", params="ABCDEFGH")
def svg(request):
    table = made(request.param)
    with theme(table.name):
        return picture(draw(table), "svg", 72).decode()


def ids_and_references(text):
    return set(re.findall(r' id="([^"]+)"', text)), set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))


def test_ids_are_under_the_prefix_and_every_reference_finds_its_own(svg):
    ids, references = ids_and_references(inline(svg, "a", "label"))
    assert ids == references and all(name.startswith("a-") for name in ids)
    others, _ = ids_and_references(inline(svg, "b", "label"))
    assert not ids & others


def test_it_is_well_formed_scales_and_is_named(svg):
    root = ET.fromstring(inline(svg, "a", 'a "label" <b>'))
    assert root.get("width") is None and root.get("viewBox") and root.get("aria-label") == 'a "label" <b>'
    assert not [node for node in root.iter() if node.tag.endswith("}g") and not node.attrib]


def test_what_is_drawn_stays(svg):
    drawn = [len(re.findall(rf"<{tag}\b", text)) for tag in ("path", "text", "use") for text in (svg, inline(svg, "a", ""))]
    assert drawn[0::2] == drawn[1::2] and drawn[0] > 10


def test_the_file_carries_its_font(svg):
    root = ET.fromstring(standalone(svg))
    style = root[0].text
    assert "font-weight:600" in style and "data:font/ttf;base64," in style


@pytest.mark.parametrize(
    "given,left",
    [
        ("<g><path/></g>", "<path/>"),
        ('<g style="a"><g><path/></g></g>', '<g style="a"><path/></g>'),
        ("<g/>", ""),
        ('<g><g id="x"/><g class="y"><path/></g></g>', '<g class="y"><path/></g>'),
        ("<!-- <g> --><g></g>", ""),
    ],
)
def test_bare_groups_go_and_others_stay(given, left):
    assert without_bare_groups(given) == left


@pytest.mark.process
def test_figures_of_a_worker_that_was_killed_are_drawn_by_the_process_itself(tmp_path, monkeypatch):
    """What the kernel kills for its memory costs time, not the dossier; nothing half-written stays."""
    parent, whole = os.getpid(), drawing.draw_one

    def killed(table, folder, *rest):
        if os.getpid() != parent and table.letter == "B":
            with replacing(folder / "b.csv"):
                os.kill(os.getpid(), signal.SIGKILL)
        return whole(table, folder, *rest)

    monkeypatch.setattr(drawing, "draw_one", killed)
    monkeypatch.setattr(drawing.os, "cpu_count", lambda: 2)
    tables, letters = {letter: made(letter) for letter in "ABC"}, []
    drawn = drawing.draw_all(tables, tmp_path, ("svg",), 72, letters.append)
    assert list(drawn) == ["A", "B", "C"] and sorted(letters) == ["A", "B", "C"]
    assert {path.name for path in tmp_path.iterdir()} == {name for figure in drawn.values() for name in figure.files}
