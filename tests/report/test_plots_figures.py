"""Every figure: its size, its type, its marks, its words, its honesty; drawn from tables made by hand."""

import itertools
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from report.plots.draw import draw
from report.plots.style import MARK_GAP, theme
from report.plots.write import picture
from report.tables import d_grad_norm, g_loss
from tests.report.hand_made_tables import MARKS, made

pytestmark = pytest.mark.slow

LETTERS = "ABCDEFGH"
HOSTILE = ("$\\frac{$", "<script>alert(1)</script>", "a\x00b", "\u202eltr", "x" * 10**6, "&amp;]]>")


def drawn(table):
    with theme(table.name):
        figure = draw(table)
        figure.draw_without_rendering()
    return figure


def texts(figure) -> list[Text]:
    """All text that is drawn: matplotlib keeps labels of ticks beyond the view, and does not draw them."""
    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            beyond |= {
                label
                for tick in axis.get_major_ticks()
                if not low <= tick.get_loc() <= high or not axes.axison
                for label in (tick.label1, tick.label2)
            }
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and text not in beyond]


@pytest.fixture(scope="module")
def figures():
    return {letter: drawn(made(letter)) for letter in LETTERS}


@pytest.mark.parametrize("letter", LETTERS)
def test_it_is_drawn_at_final_size_with_type_and_lines_that_print(figures, letter):
    figure = figures[letter]
    assert figure.get_figwidth() == 7.0 and figure.get_figheight() <= 10
    assert min(text.get_fontsize() for text in texts(figure)) >= 6.5
    lines = [line for axes in figure.axes for line in axes.lines if line.get_linestyle() != "None"]
    assert all(line.get_linewidth() >= 0.6 for line in lines)


@pytest.mark.parametrize("letter", LETTERS)
def test_title_marks_and_what_is_left_out_stand_on_the_figure(figures, letter):
    words = " ".join(text.get_text() for text in texts(figures[letter]))
    assert f"Finding {letter}" in words and MARK_GAP.join(MARKS) in words
    assert "Not drawn (1): 4 timed steps of at least 50: gpt2_clm-fp16_naive" in words


@pytest.mark.parametrize("letter", LETTERS)
def test_no_text_leaves_the_paper(figures, letter):
    figure = figures[letter]
    for text in texts(figure):
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text.get_text()
        assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text.get_text()


@pytest.mark.parametrize("letter", "ABCDGH")
def test_no_text_covers_another(figures, letter):
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figures[letter])]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(across, down) < 0.25 * min(a.height, b.height), f"{one!r} covers {other!r}"


@pytest.mark.parametrize("letter", LETTERS)
def test_an_empty_table_is_a_figure_that_says_why(letter):
    figure = drawn(made(letter, data=pd.DataFrame(), empty="not measured: no run has a step"))
    assert any("not measured: no run has a step" in text.get_text() for text in texts(figure))


@pytest.mark.parametrize("letter", LETTERS)
def test_hostile_names_are_drawn_as_text(letter):
    data, summary = made(letter).data, made(letter).summary
    words = dict(zip(data["dtype_config"].unique(), itertools.cycle(HOSTILE), strict=False))
    words = {name: f"{bad}-{name}" for name, bad in words.items() if name != "fp32_true"}
    for frame in (data, summary):
        if "dtype_config" in frame:  # as categories, like those of the tables: an arrow column would copy a megabyte a row
            categories = frame["dtype_config"].astype("category")
            frame["dtype_config"] = categories.cat.rename_categories(lambda name: words.get(name, name))
    table = made(
        letter,
        data=data,
        summary=summary,
        title=" ".join(HOSTILE[:4]) + "\ud800",
        marks=(*HOSTILE[:4], "lone \ud800"),
        excluded=tuple((bad, bad) for bad in HOSTILE),
    )
    with theme(table.name):
        svg = picture(draw(table), "svg", 72)
    tree = ET.fromstring(svg)
    assert not [node for node in tree.iter() if node.tag.endswith(("script", "foreignObject", "image"))]


@pytest.mark.parametrize("kind", ["svg", "png", "pdf", "eps"])
def test_the_same_table_gives_the_same_bytes(kind):
    def bytes_of():
        table = made("H")
        with theme(table.name):
            return picture(draw(table), kind, 100)

    one, other = bytes_of(), bytes_of()
    assert one == other and len(one) > 5_000


def test_a_states_differ_in_fill_and_sign_and_what_is_missing_is_hatched(figures):
    cells = [patch for patch in figures["A"].axes[0].patches if isinstance(patch, Rectangle)]
    assert len(cells) == 42 and sum(patch.get_hatch() is not None for patch in cells) == 6
    words = [text.get_text() for text in figures["A"].axes[0].texts]
    assert words.count("✗ NaN @ 50\noptim 2/2") == 6 and "– unsupported" in words


def test_b_starts_at_zero_names_every_point_and_shows_the_other_mfu_hollow(figures):
    for axes in figures["B"].axes:
        assert axes.get_ylim()[0] == 0
        assert sum(line.get_markerfacecolor() == "none" for line in axes.lines if line.get_marker() in "os") in (1, 2)
    assert sum(text.get_text() == "bf16_pure" for text in texts(figures["B"])) == 6


def test_c_bars_start_at_zero_and_a_dead_run_is_a_word(figures):
    axes = figures["C"].axes[0]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(bars) == 6 and all(bar.get_x() == 0 for bar in bars) and axes.get_xlim()[0] == 0
    words = [text.get_text() for text in axes.texts]
    assert "NaN @ 50" in words and "2.08x, 77/s" in words


def test_c_one_seed_has_no_interval(figures):
    data = made("C").data.assign(low=np.nan, high=np.nan)
    with_interval, without = figures["C"].axes[0], drawn(made("C", data=data)).axes[0]
    assert len(without.lines) == 1 < len(with_interval.lines)  # the line at 1.0 alone


def test_d_has_both_axes_a_cross_where_it_died_and_keeps_spikes(figures):
    linear, log = figures["D"].axes[:2]
    assert (linear.get_xscale(), log.get_xscale(), linear.get_yscale(), log.get_yscale()) == ("linear", "log", "log", "log")
    crosses = [line for line in log.lines if line.get_marker() == "x"]
    assert crosses and all(list(line.get_xdata()) == [2] for line in crosses)
    spikes = made("D").data.query("case == 'gpt2_clm' and spike")["grad_norm"]
    shown = np.concatenate([line.get_ydata() for line in linear.lines if line.get_linestyle() != "None"])
    assert set(spikes) <= set(shown)
    assert any(line.get_marker() == "v" and min(line.get_ydata()) > 1 for line in linear.lines)  # above the frame


def test_e_has_the_line_at_fp16s_largest_number_a_violin_a_seed_and_its_maximum(figures):
    axes = figures["E"].axes[0]
    assert axes.get_yscale() == "log" and any(set(line.get_ydata()) == {65_504} for line in axes.lines)
    table = made("E")
    words = [text.get_text() for text in axes.texts]
    assert any("would overflow in fp16" in word for word in words) and sum("3 ✗" in word for word in words) == 2
    outlines = next(c for c in axes.collections if isinstance(c, PolyCollection))
    assert len(outlines.get_paths()) == 14
    assert table.summary["max"].gt(1e4).any() and any(word.startswith(("1", "2")) and word.endswith("k") for word in words)


def test_f_sorts_nothing_itself_and_shades_the_tax(figures):
    titles = [axes.get_title(loc="left") for axes in figures["F"].axes]
    assert "gpt2_multi_cls, bucketed by length" in titles
    panel = figures["F"].axes[titles.index("gpt2_multi_cls")]
    assert [c for c in panel.collections if isinstance(c, PolyCollection)] and panel.get_ylim()[0] == 0
    assert any("tax" in text.get_text() and "CV real" in text.get_text() for text in panel.texts)


def test_f_without_mfu_shows_tokens_per_second():
    data = made("F").data.assign(y_kind="tokens/s", mfu_real=np.nan, mfu_all=np.nan, tokens_per_s=2e4, real_tokens_per_s=1e4)
    assert drawn(made("F", data=data)).axes[0].get_ylabel() == "thousand tokens/s"


def test_g_puts_single_beside_multi_and_the_difference_below(figures):
    titles = [axes.get_title(loc="left") for axes in figures["G"].axes]
    assert titles[:2] == ["Single-label · gpt2", "Multi-label · gpt2"] and titles[2] == ""
    upper, _, lower = figures["G"].axes[:3]
    assert lower.get_ylabel() == "minus fp32_true" and upper.get_ylim() != lower.get_ylim()


def test_g_one_wild_step_does_not_set_the_scale():
    data = made("G").data
    data.loc[data["step"].eq(100) & data["dtype_config"].eq("amp_bf16"), "minus_reference"] = 1e6
    lower = drawn(made("G", data=data)).axes[2]
    assert max(map(abs, lower.get_ylim())) < 1 and any("beyond the frame, up to 1e+06" in t.get_text() for t in lower.texts)


def test_h_ties_are_grey_and_bracketed_and_the_interval_of_tau_is_given(figures):
    slope, speed = figures["H"].axes
    assert any("[-0.20, +1.00] over 6 configurations" in text.get_text() for text in texts(figures["H"]))
    assert sum(line.get_color() == "#dde1e6" for line in slope.lines) == 3 and speed.get_xlim()[0] == 0


def test_h_without_tau_says_why():
    summary = pd.DataFrame([{"tau": np.nan, "tau_low": np.nan, "tau_high": np.nan, "n_configs": 3, "note": "no tau below 5"}])
    words = [text.get_text() for text in texts(drawn(made("H", summary=summary)))]
    assert any("no tau below 5" in word for word in words) and not any("Kendall" in word for word in words)


def test_markers_are_not_scatter_clouds():
    assert not [c for axes in drawn(made("B")).axes for c in axes.collections if isinstance(c, PathCollection)]


def test_without_adjusttext_the_frontier_is_drawn_and_says_so(figures, monkeypatch):
    """The names stay at their markers: a machine that lacks the package loses their placement, not the figure."""
    monkeypatch.setattr("report.plots.b_efficiency_frontier.adjust_text", None)
    plain = drawn(made("B"))
    note = "adjustText is not installed"
    assert note in " ".join(text.get_text() for text in texts(plain))
    assert note not in " ".join(text.get_text() for text in texts(figures["B"]))
    assert sum(text.get_text() == "bf16_pure" for text in texts(plain)) == 6


def test_a_short_run_has_ticks_at_whole_steps_only(plant):
    folder = plant(("gpt2_clm", "gpt2_multi_cls"), ("fp32_true", "amp_bf16"), (0,), lambda *_: {"steps": 3})
    for module, frames in ((d_grad_norm, 1), (g_loss, 2)):
        for axes in drawn(module.table(folder)).axes[:frames]:
            low, high = axes.get_xlim()
            ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
            assert len(ticks) > 1 and all(tick == int(tick) for tick in ticks), module
