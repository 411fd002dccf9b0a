"""What all figures share: seaborn's theme at final print size, and the frame around each picture.

Nothing here knows what is drawn. Text is at least 6.5 pt and lines at least 0.6 pt at the final size (7.0 in wide for a full
column). The colours of ink and paper are named, so that the page can swap them in its dark theme
(`report.dossier.page`)."""

from __future__ import annotations

import logging
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import matplotlib
import numpy as np
import seaborn
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import Locator, MaxNLocator, NullLocator

from report import TEMPLATES
from report.text import clean, log_tick, shortened

FULL_WIDTH_IN = 7.0
TEXT_PT, SMALL_PT, TITLE_PT = 7.5, 6.6, 9.0
LINE_PT, THIN_PT = 1.1, 0.6
INK, MUTED, GRID, PAPER, SHADE = "#1b1f24", "#575e67", "#dde1e6", "#ffffff", "#eef1f4"
WARNING_INK, WARNING_PAPER = "#7a4a00", "#fff1d6"
FAMILY = "Dossier Sans"
FONTS = TEMPLATES / "fonts"

MARK_GAP = "\u00a0 · \u00a0"  # browsers join plain spaces
LEGEND_IN, LEGEND_ROW_IN, LAYOUT_DPI = 0.26, 0.14, 288
MAX_NOTE_LINES = 2
MOST_DECADES = 6
TITLE_LINE_IN, NOTE_LINE_IN, MARKS_IN = 0.165, 0.12, 0.2


def _ticks(*names: str) -> list[str]:
    return [f"{axis}tick.{name}" for axis in "xy" for name in names]


OWN_THEME = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", *_ticks("labelcolor")), INK),
    **dict.fromkeys(("axes.edgecolor", *_ticks("color")), MUTED),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), PAPER),
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), TEXT_PT),
    **dict.fromkeys((*_ticks("labelsize"), "legend.fontsize", "legend.title_fontsize"), SMALL_PT),
    **dict.fromkeys(("axes.linewidth", *_ticks("major.width", "minor.width"), "grid.linewidth", "hatch.linewidth"), THIN_PT),
    **dict.fromkeys(_ticks("major.size"), 2.5) | dict.fromkeys(_ticks("minor.size"), 1.5),
    **dict.fromkeys(_ticks("major.pad"), 2.0) | {"axes.labelpad": 2.5},
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow", "axes.unicode_minus", "path.simplify"), True),
    **{"font.family": [FAMILY, "DejaVu Sans"], "grid.color": GRID, "lines.linewidth": LINE_PT, "lines.markersize": 3.5},
    **{"axes.titleweight": 600, "axes.titlelocation": "left", "axes.titlepad": 4.0},
    "axes.titley": 1.0,  # nothing stands above a frame: looking whether something does costs a tenth of a figure
    **{"text.hinting": "none", "svg.fonttype": "none", "pdf.fonttype": 42, "ps.fonttype": 42, "pdf.compression": 6},
}


@cache
def register_fonts() -> None:
    """Tell matplotlib of the dossier's own font (a subset of Inter), so that text has the same
    width here, in the page and in the PDF."""
    for path in sorted(FONTS.glob("*.ttf")):
        font_manager.fontManager.addfont(path)


@contextmanager
def theme(salt: str) -> Iterator[None]:
    """seaborn's ticks theme, our sizes and ink, and output that is the same byte for byte.

    ``salt`` names the figure: matplotlib derives an SVG's ids from it."""
    register_fonts()
    base = seaborn.axes_style("ticks") | seaborn.plotting_context("paper")
    with warnings.catch_warnings(), matplotlib.rc_context(base | OWN_THEME | {"svg.hashsalt": salt}):
        # A run's name may hold any script: the page's browser has more fonts than this process.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        finder = logging.getLogger("matplotlib.font_manager")
        before, finder.level = finder.level, logging.ERROR  # the fallback font has no semi-bold, and says so each time
        yield
        finder.level = before


def wrap(text: str, width_in: float, size_pt: float, max_lines: int) -> list[str]:
    """``text`` broken to lines of about ``width_in`` at ``size_pt``, at most ``max_lines``."""
    characters = int(width_in * 72 / (0.545 * size_pt))
    return textwrap.wrap(clean(text, 2_000), characters, max_lines=max_lines, placeholder=" …", break_on_hyphens=False)


def new_figure(title: str, height_in: float, *, marks: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> Figure:
    """An empty figure with its finding on top, its marks beneath it and notes at its foot; ``height_in`` is what the drawing
    itself gets between them."""
    heading = wrap(title, FULL_WIDTH_IN - 0.1, TITLE_PT, 3)
    foot = [line for note in notes for line in wrap(note, FULL_WIDTH_IN - 0.1, SMALL_PT, MAX_NOTE_LINES)]
    top_in = 0.08 + TITLE_LINE_IN * len(heading) + (MARKS_IN if marks else 0.0)
    foot_in = NOTE_LINE_IN * len(foot) + (0.1 if foot else 0.0)
    whole_in = height_in + top_in + foot_in
    figure = Figure(figsize=(FULL_WIDTH_IN, whole_in), dpi=LAYOUT_DPI)
    rect = (0.0, foot_in / whole_in, 1.0, height_in / whole_in)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02, rect=rect))
    left = 0.05 / FULL_WIDTH_IN
    for line, text in enumerate(heading):
        y_in = whole_in - 0.05 - TITLE_LINE_IN * (line + 0.78)
        figure.text(left, y_in / whole_in, text, size=TITLE_PT, weight=600, va="baseline")
    if marks:
        figure.text(
            left + 0.03 / FULL_WIDTH_IN,
            1 - (top_in - 0.125) / whole_in,
            MARK_GAP.join(clean(mark) for mark in marks),
            size=SMALL_PT,
            weight=600,
            va="center",
            color=WARNING_INK,
            bbox={"facecolor": WARNING_PAPER, "edgecolor": "none", "pad": 1.8},
        )
    for line, text in enumerate(reversed(foot)):
        figure.text(left, (0.05 + NOTE_LINE_IN * line) / whole_in, text, size=SMALL_PT, color=MUTED, va="baseline")
    return figure


def table_figure(table, height_in: float, *notes: str, legend: Sequence[Artist] = ()) -> Figure:
    """A table's figure, still without a drawing: its finding, its marks, ``notes`` and what it leaves out; and where there are
    handles, a legend between the drawing and the notes, beside ``height_in``."""
    height_in += legend_in([handle.get_label() for handle in legend]) if legend else 0.0
    figure = new_figure(table.title, height_in, marks=table.marks, notes=(*notes, *exclusion_note(table.excluded)))
    if legend:
        _add_legend(figure, legend)
    return figure


def name_rows(axes: Axes, names: Iterable[object], *, limit: int = 24, above: float = 0.6, below: float = 0.6) -> None:
    """A row a name, downwards, with ``above`` and ``below`` the first and the last row's middle as margins."""
    labels = [clean(name, limit) for name in names]
    axes.set(yticks=range(len(labels)), ylim=(len(labels) - 1 + below, -above))
    axes.set_yticklabels(labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


def _legend_columns(labels: Sequence[str]) -> int:
    """How many of a legend's entries stand side by side over the figure's full width."""
    widest_in = max((len(label) for label in labels), default=1) * 0.52 * SMALL_PT / 72 + 0.42
    one_row_in = sum(len(label) * 0.52 * SMALL_PT / 72 + 0.42 for label in labels)
    return len(labels) if one_row_in < FULL_WIDTH_IN else max(1, int(FULL_WIDTH_IN / widest_in))


def legend_in(labels: Sequence[str]) -> float:
    """The height that a figure's legend takes, in inches."""
    return LEGEND_IN + LEGEND_ROW_IN * (-(-len(labels) // _legend_columns(labels)) - 1)


def _add_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """On as few rows as it needs, read row by row; takes its height from the drawing."""
    engine = figure.get_layout_engine()
    left, bottom, width, height = engine.get()["rect"]
    labels = [handle.get_label() for handle in handles]
    row, columns = legend_in(labels) / figure.get_figheight(), _legend_columns(labels)
    engine.set(rect=(left, bottom + row, width, height - row))
    legend = figure.legend(
        handles=[handle for column in range(columns) for handle in handles[column::columns]],  # matplotlib's own order
        loc="lower left",
        bbox_to_anchor=(0.0, bottom),
        ncols=columns,
        handlelength=2.2,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    legend.set_in_layout(False)


def exclusion_note(excluded: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """One note that names what a figure leaves out and why, by reason."""
    if not excluded:
        return ()
    by_reason: dict[str, list[str]] = {}
    for run_id, reason in excluded:
        by_reason.setdefault(clean(reason, 120), []).append(clean(run_id))
    parts = [f"{reason}: {shortened(runs)}" for reason, runs in by_reason.items()]
    return (f"Not drawn ({len(excluded)}): " + "; ".join(parts),)


class LogTicks(Locator):
    """Ticks of a log axis: decades, thinned to six; where fewer than two fit, 1, 2 and 5 times them; then a linear axis's."""

    def __call__(self) -> np.ndarray:
        return self.tick_values(*sorted(self.axis.get_view_interval()))

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        """At least two values from ``vmin`` to ``vmax`` (both above 0, and apart)."""
        decades = np.arange(math.floor(math.log10(vmin)), math.ceil(math.log10(vmax)) + 1)
        for parts in ((1,), (1, 3), (1, 2, 5)):
            ticks = np.sort(np.outer(10.0**decades, parts).ravel())
            ticks = ticks[(ticks >= vmin * (1 - 1e-9)) & (ticks <= vmax * (1 + 1e-9))]
            if len(ticks) > 1:
                return ticks[:: -(-len(ticks) // MOST_DECADES)]
        linear = MaxNLocator(4).tick_values(vmin, vmax)
        return linear[(linear >= vmin) & (linear <= vmax) & (linear > 0)]


def log_axis(axes: Axes, which: str) -> None:
    """A log axis with at least two ticks, in plain text: matplotlib's own labels are mathtext, which is off, and its minor
    ticks cost half of a figure's time."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogTicks())
    axis.set_major_formatter(log_tick)
    axis.set_minor_locator(NullLocator())


def whole_steps(axes: Axes) -> None:
    """Ticks at whole steps only: between two there is none."""
    axes.xaxis.get_major_locator().set_params(integer=True)


def empty_figure(title: str, why: str, marks: tuple[str, ...]) -> Figure:
    """A figure that says why there is nothing to see."""
    figure = new_figure(title, 0.7, marks=marks)
    figure.set_layout_engine("none")  # there is no frame to place
    figure.text(0.5, 0.3 / figure.get_figheight(), "\n".join(wrap(why, 6.4, TEXT_PT, 3)), ha="center", va="center", color=MUTED)
    return figure
