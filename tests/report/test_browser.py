"""The page in headless Chromium: quiet, alone, narrow enough, by keyboard, readable."""

import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
RUNS = 126
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.process, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


# Contrast of every visible piece of text against its background (WCAG 2, AA).
LOW_CONTRAST = """() => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const paper = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] > 0) return c; } return parse(getComputedStyle(document.body).backgroundColor); };
  const bad = new Set();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n = walk.nextNode(); n; n = walk.nextNode()) {
    const e = n.parentElement;
    if (!n.data.trim() || e.closest("svg, script, style, .skip") || !e.getClientRects().length) continue;
    const a = light(parse(getComputedStyle(e).color)), b = light(paper(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.add(`${ratio.toFixed(2)} ${e.tagName}.${e.className}: ${n.data.trim().slice(0, 40)}`);
  }
  return [...bad];
}"""


@pytest.fixture(scope="module")
def url(built):
    return (built / "dossier" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def view(browser, url):
    """A function that opens the page and returns it with what it said and asked for."""
    contexts = []

    def open_page(width=1100, scheme="light", scripts=True):
        contexts.append(
            browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=scripts)
        )
        page = contexts[-1].new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", [390, 1100, 1600])
def test_it_is_quiet_loads_nothing_and_does_not_scroll_sideways(view, url, width):
    page = view(width)
    assert page.said == [] and [asked for asked in page.asked if not asked.startswith("data:")] == [url]
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_aa_contrast(view, scheme):
    assert view(scheme=scheme).evaluate(LOW_CONTRAST) == []


def test_dark_recolours_the_figures_and_print_does_not(view):
    page = view(scheme="dark")
    colour = "getComputedStyle(document.querySelector('.plot svg [style*=\"fill: #1b1f24\"]')).fill"
    assert page.evaluate(colour) == "rgb(231, 234, 238)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(colour) == "rgb(27, 31, 36)"


def test_the_run_table_sorts_by_keyboard_and_tells_it(view):
    page = view()
    head = page.locator("table.sortable th", has_text="samples/s").first
    head.locator("button").focus()
    page.keyboard.press("Enter")
    rates = "[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[8].dataset.value)"
    values = [float(value) for value in page.evaluate(rates) if value]
    assert values == sorted(values) and len(values) > 30 and head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert [float(value) for value in page.evaluate(rates) if value] == values[::-1]
    assert head.get_attribute("aria-sort") == "descending"


def test_the_keyboard_reaches_the_skip_link_the_contents_and_the_wide_boxes(view):
    page = view(390)
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className || document.activeElement.getAttribute('href')"))
    assert reached[0] == "skip" and "#reproduce" in reached and "scroll" in reached


def test_it_is_complete_without_scripts(view):
    page = view(scripts=False)
    assert (
        page.locator("table.sortable tbody tr:not(.case-head)").count() == RUNS
        and page.locator("table.sortable th button").count() == 0
    )
    assert page.locator("section").count() == 10 and page.locator(".plot svg").count() >= 8


def test_a_pointer_reads_a_figure_and_configurations_can_be_hidden(view):
    page = view()
    figure = page.locator("#figure-d_grad_norm_heartbeat")
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg").bounding_box()
    said = set()
    for share in range(15, 50):
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + share / 200 * box["height"])
        said.add(page.locator(".tip").text_content())
    assert any("seed" in text and "step" in text for text in said), said
    lines = figure.locator('[data-config="amp_bf16"]')
    figure.locator(".filters button", has_text="amp_bf16").first.click()
    assert lines.count() > 0 and not lines.first.is_visible()


def test_the_table_of_runs_is_filtered_by_words(view):
    page = view()
    page.locator(".filters input").last.fill("gpt2_clm diverged")
    assert (
        page.locator("table.sortable tbody tr:visible").count() == 3
        and f"3 of {RUNS} rows" in page.locator(".filters").last.text_content()
    )
