"""Every figure: its size, its type, its marks, its words, its honesty; drawn from tables made by hand."""

import itertools
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.text import Text

from report.plots.draw import draw
from report.plots.style import MARK_GAP, theme
from report.plots.write import FORMATS, picture
from report.tables import d_grad_norm, g_loss
from tests.report.hand_made_tables import MARKS, SPEED, made

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


def test_the_same_table_gives_the_same_bytes():
    def bytes_of():
        table = made("H")
        with theme(table.name):
            figure = draw(table)
            return [picture(figure, kind, 100) for kind in FORMATS]

    for kind, one, other in zip(FORMATS, bytes_of(), bytes_of(), strict=True):
        assert one == other and len(one) > 5_000, kind


def test_a_states_differ_in_fill_and_sign_and_what_is_missing_is_hatched(figures):
    cells = [patch for patch in figures["A"].axes[0].patches if isinstance(patch, Rectangle)]
    assert len(cells) == 42 and sum(patch.get_hatch() is not None for patch in cells) == 6
    words = [text.get_text() for text in figures["A"].axes[0].texts]
    assert words.count("✗ NaN @ 50\noptim 2/2") == 6 and "– unsupported" in words


def test_b_starts_at_zero_names_every_point_and_shows_the_other_mfu_hollow(figures):
    for axes in figures["B"].axes:
        assert axes.get_ylim()[0] == 0
        assert sum(line.get_markerfacecolor() == "none" for line in axes.lines if line.get_marker() == "o") == 1
        names = [name for text in axes.texts for name in text.get_text().splitlines()]
        assert sorted(names) == sorted(config for config in SPEED if np.isfinite(SPEED[config]))


def test_b_tells_configurations_apart_without_colour(figures):
    markers = [line.get_marker() for line in figures["B"].axes[0].lines if line.get_markersize() == 5]
    assert len(set(markers)) == len(markers) == 6


def test_c_has_a_logarithmic_axis_with_the_interval_and_n_and_a_dead_run_is_a_word(figures):
    axes = figures["C"].axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlim()[0] < 1 < 2 < axes.get_xlim()[1]
    points = {line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 4.6}
    assert points == {speed for speed in SPEED.values() if np.isfinite(speed)}
    words = [text.get_text() for text in axes.texts]
    assert "NaN @ 50" in words and "2.08x 77/s n=2" in words
    assert [text.get_text() for text in figures["C"].axes[-1].get_xticklabels()] == ["1x", "2x"]


def test_c_an_interval_that_two_seeds_cannot_hold_ends_in_an_arrow_and_leaves_room():
    data = made("C").data.assign(low=1e-4, high=1e5)
    axes = drawn(made("C", data=data)).axes[0]
    assert axes.get_xlim()[0] > 1 / 32 and axes.get_xlim()[1] < 32
    assert sum(line.get_marker() == ">" for line in axes.lines) == 6


def test_c_one_seed_has_no_interval(figures):
    data = made("C").data.assign(low=np.nan, high=np.nan)
    with_interval, without = figures["C"].axes[0], drawn(made("C", data=data)).axes[0]
    lines = [len([line for line in axes.lines if line.get_marker() == "None"]) for axes in (with_interval, without)]
    assert lines == [7, 1]  # the line at 1x alone


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


def test_f_draws_a_point_a_batch_with_a_smoother_and_its_words_off_the_data(figures):
    titles = [axes.get_title(loc="left") for axes in figures["F"].axes]
    assert "gpt2_multi_cls, bucketed by length" in titles
    panel = figures["F"].axes[titles.index("gpt2_multi_cls")]
    real = made("F").data.query("case == 'gpt2_multi_cls' and not bucketed")["mfu_real"].to_numpy() * 100
    dots = next(patch.get_path().vertices[::2, 1] for patch in reversed(panel.patches) if isinstance(patch, PathPatch))
    assert dots == pytest.approx(real) and panel.get_ylim()[0] == 0
    assert panel.lines[1].get_ydata() == pytest.approx(pd.Series(real).rolling(10, center=True, min_periods=1).median())
    (words,) = [text for text in panel.texts if "tax" in text.get_text()]
    assert "CV real" in words.get_text() and words.get_window_extent().y0 >= panel.get_window_extent().y1


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


def test_markers_are_not_scatter_clouds(figures):
    assert not [c for axes in figures["B"].axes for c in axes.collections if isinstance(c, PathCollection)]


def test_e_has_its_line_at_one_height_in_every_panel(figures):
    data = made("E").data
    data.loc[data["case"] == "gpt2_clm", "logit_absmax"] *= 1e6
    for figure in (figures["E"], drawn(made("E", data=data))):
        heights = {
            axes.transAxes.inverted().transform(axes.transData.transform((0, 65_504)))[1].round(6) for axes in figure.axes
        }
        assert len(heights) == 1 and 0 < heights.pop() < 1
        assert sum("would overflow" in text.get_text() for text in texts(figure)) == 1


def test_d_neither_hides_the_reference_nor_is_hidden_by_it(figures):
    for axes in figures["D"].axes:
        lines = [line for line in axes.lines if line.get_gid() and line.get_linestyle() != "None"]
        reference = [line for line in lines if line.get_gid().split("|")[2] == "fp32_true"]
        others = [line for line in lines if line not in reference]
        assert min(line.get_zorder() for line in reference) > max(line.get_zorder() for line in others)
        assert max(line.get_linewidth() for line in reference) < min(line.get_linewidth() for line in others)


@pytest.mark.parametrize("low,high", [(1.0, 1.05), (0.3, 2.5), (4.0, 9.0), (1e-9, 1e9), (0.5, 600.0)])
def test_d_has_two_ticks_or_more_on_any_scale(low, high):
    data = made("D").data
    data["grad_norm"] = np.geomspace(low, high, len(data))
    for axes in drawn(made("D", data=data)).axes[:2]:
        bottom, top = axes.get_ylim()
        ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
        labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
        assert 2 <= len(labels) <= 8 and all(labels) and len(set(labels)) == len(labels)


def test_g_has_one_legend_in_the_order_of_the_registry(figures):
    (legend,) = figures["G"].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "fp32_true",
        "amp_bf16",
        "fp16_naive × @ 3",
        "fp16_naive_eps1e4",
    ]
    assert not any("amp_bf16" in text.get_text() for axes in figures["G"].axes for text in axes.texts)


def test_a_short_run_has_ticks_at_whole_steps_only(plant):
    folder = plant(("gpt2_clm", "gpt2_multi_cls"), ("fp32_true", "amp_bf16"), (0,), lambda *_: {"steps": 3})
    for module, frames in ((d_grad_norm, 1), (g_loss, 2)):
        for axes in drawn(module.table(folder)).axes[:frames]:
            low, high = axes.get_xlim()
            ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
            assert len(ticks) > 1 and all(tick == int(tick) for tick in ticks), module
