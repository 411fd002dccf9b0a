"""A figure's SVG fits into a page beside seven others."""

import re
import xml.etree.ElementTree as ET

import pytest

from report.dossier.inline_svg import inline, standalone, without_bare_groups
from report.plots.registry import DRAW
from report.plots.style import theme
from report.plots.write import picture
from tests.report.hand_made_tables import made


@pytest.fixture(scope="module", params="ABCDEFGH")
def svg(request):
    table = made(request.param)
    with theme(table.name):
        return picture(DRAW[request.param](table), "svg", 72).decode()


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
