"""Thinned lines keep every spike, violins are Gaussian densities, labels keep their distance, looks differ without hue."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import gaussian_kde

from bench_cases import DTYPE_CONFIGS
from instrument.kernel_classes import CLASSES
from report.dossier.page import DARK_FURNITURE, dark_colours
from report.plots import palette, style
from report.plots.elements import BINS, decimate, outline, spread
from report.plots.label_placement import place


def test_short_series_are_returned_whole():
    assert (decimate(np.arange(4 * BINS), np.zeros(4 * BINS)) == np.arange(4 * BINS)).all()


@pytest.mark.parametrize("log_x", [False, True])
@given(seed=st.integers(0, 10**6), n=st.integers(1_000, 6_000))
@settings(max_examples=25, deadline=None)
def test_one_planted_spike_survives_at_any_place(log_x, seed, n):
    random = np.random.default_rng(seed)
    y, at = random.normal(size=n), int(random.integers(n))
    y[at] = 100.0
    kept = decimate(np.arange(1, n + 1), y, log_x=log_x)
    assert at in kept and (np.diff(kept) > 0).all() and {0, n - 1} <= set(kept)
    assert len(kept) <= 4 * BINS


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_every_bin_keeps_its_extremes(seed):
    random = np.random.default_rng(seed)
    x = np.sort(random.choice(50_000, 5_000, replace=False))
    y = random.normal(size=5_000)
    kept = decimate(x, y, bins=40)
    bins = np.minimum(((x - x[0]) / (x[-1] - x[0]) * 40).astype(int), 39)
    for number in np.unique(bins):
        inside, shown = y[bins == number], y[kept][bins[kept] == number]
        assert shown.min() == inside.min() and shown.max() == inside.max()


def test_non_finite_points_and_points_asked_for_are_kept():
    y = np.sin(np.arange(5_000) / 50)
    y[[1_234, 4_000]] = np.nan, np.inf
    asked = np.zeros(5_000, bool)
    asked[77] = True
    assert {77, 1_234, 4_000} <= set(decimate(np.arange(5_000), y, keep=asked))


def test_a_series_that_is_nowhere_finite_is_kept():
    assert len(decimate(np.arange(1_000), np.full(1_000, np.nan))) == 1_000


@pytest.mark.parametrize(
    "make",
    [
        lambda r: r.normal(3, 0.4, 900),
        lambda r: r.exponential(1, 400),
        lambda r: np.r_[r.normal(0, 1, 300), r.normal(9, 0.5, 300)],
    ],
)
def test_it_agrees_with_scipy(make):
    values = make(np.random.default_rng(0))
    positions, density = outline(values)
    expected = gaussian_kde(values)(positions)
    assert positions[0] == values.min() and positions[-1] == values.max()
    assert density == pytest.approx(expected / expected.max(), abs=0.04)


@pytest.mark.parametrize("values", [[2.0], [5.0, 5.0, 5.0]])
def test_equal_values_are_a_stroke(values):
    positions, density = outline(np.array(values))
    assert (positions == values[0]).all() and (density == 1).all()


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        outline(np.array([]))


PLACES = st.lists(st.floats(0, 1), min_size=1, max_size=9)


@given(wanted=PLACES)
def test_they_stay_apart_in_order_and_inside(wanted):
    placed = spread(wanted, 0.1, 0.0, 1.0)
    assert placed.min() >= -1e-9 and placed.max() <= 1 + 1e-9
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(placed[order]) >= min(0.1, 1 / max(len(wanted) - 1, 1)) - 1e-9).all()


def test_those_with_room_do_not_move():
    assert spread([0.2, 0.5, 0.9], 0.1, 0, 1) == pytest.approx([0.2, 0.5, 0.9])


@pytest.mark.parametrize("wanted", [[0.5, 0.5, 0.5], [0.4, 0.42, 0.7], [0.3, 0.31, 0.36, 0.6]])
def test_the_moves_are_the_least(wanted):
    gaps = [{"type": "ineq", "fun": lambda x, i=i: x[i + 1] - x[i] - 0.1} for i in range(len(wanted) - 1)]
    best = minimize(lambda x: ((x - wanted) ** 2).sum(), np.linspace(0, 1, len(wanted)), constraints=gaps, tol=1e-12)
    assert spread(wanted, 0.1, 0, 1) == pytest.approx(best.x, abs=1e-4)


def test_nothing_to_place():
    assert len(spread([], 0.1, 0, 1)) == 0


DEFAULT = [config.id for config in DTYPE_CONFIGS.values() if config.in_default_matrix]


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def lightness(colour: str) -> float:
    """CIE L*."""
    y = luminance(colour)
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_every_configuration_has_a_look_of_its_own():
    assert set(palette.LOOKS) == set(DTYPE_CONFIGS)
    looks = palette.LOOKS.values()
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == len(looks)


@pytest.mark.parametrize("config", palette.LOOKS)
def test_colours_are_seen_on_light_and_dark_paper(config):
    look = palette.look(config)
    assert contrast(look.colour, style.PAPER) >= 3
    assert contrast(look.dark, DARK_FURNITURE[style.PAPER]) >= 3


@pytest.mark.parametrize("one,other", list(combinations([c for c in DEFAULT if "bf16" in c], 2)))
def test_the_four_blues_differ_in_lightness_or_line_and_always_in_marker(one, other):
    a, b = palette.look(one), palette.look(other)
    assert a.marker != b.marker and a.line != b.line
    assert abs(lightness(a.colour) - lightness(b.colour)) >= 3


@pytest.mark.parametrize(
    "paper,words",
    [
        (style.PAPER, style.INK),
        (style.PAPER, style.MUTED),
        (style.WARNING_PAPER, style.WARNING_INK),
        *((look.fill, look.ink) for look in palette.STATES.values()),
    ],
)
def test_text_has_aa_contrast_light_and_dark(paper, words):
    assert contrast(paper, words) >= 4.5
    dark = dark_colours()
    assert contrast(dark.get(paper, paper), dark.get(words, words)) >= 4.5


def test_the_states_differ_in_lightness():
    green, red, orange = (lightness(palette.STATES[name].fill) for name in ("completed", "diverged", "poor"))
    assert green - orange > 12 and orange - red > 25


def test_an_unknown_configuration_keeps_its_dtypes_colour_and_its_look():
    assert palette.look("my_bf16_thing") == palette.look("my_bf16_thing")
    assert palette.look("my_bf16_thing").colour == palette.FAMILIES["bf16"].colour
    assert palette.look("posit8").colour == palette.OTHER.colour
    assert palette.look("\ud800 lone surrogate").marker in palette.SPARE_MARKERS


@pytest.mark.parametrize("name", palette.KERNEL_CLASSES)
def test_every_class_of_kernel_has_a_colour_of_its_own_on_both_papers(name):
    colour, dark = palette.KERNEL_CLASSES[name]
    assert contrast(colour, style.PAPER) >= 3 and contrast(dark, DARK_FURNITURE[style.PAPER]) >= 3
    assert colour not in {look.colour for look in palette.LOOKS.values()}


def test_the_classes_of_the_palette_are_those_of_the_traces():
    assert tuple(palette.KERNEL_CLASSES) == CLASSES and palette.kernel_class_look("idle") is None
    assert palette.kernel_class_look("<new>") == palette.kernel_class_look("other")


@given(seed=st.integers(0, 10**6), n=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_names_cover_no_marker_and_no_name_and_leaders_cross_nothing(seed, n):
    random = np.random.default_rng(seed)
    frame = (0.0, 0.0, 900.0, 500.0)
    anchors = random.uniform((40, 40), (860, 460), (n, 2)).round()
    anchors = anchors[[i for i in range(n) if all(np.hypot(*(anchors[i] - anchors[j])) > 25 for j in range(i))]]
    sizes = np.c_[random.uniform(60, 180, len(anchors)), np.full(len(anchors), 30.0)]
    marks = np.c_[anchors - 12, anchors + 12]
    corners = place(sizes, anchors, marks, frame, 10.0)
    boxes = np.c_[corners, corners + sizes]
    for one, other in combinations(boxes.tolist(), 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    for at, box in enumerate(boxes):
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= 900 and box[3] <= 500
        assert not ((box[:2] < marks[:, 2:]) & (marks[:, :2] < box[2:])).all(axis=1).any()
        end = np.clip(anchors[at], box[:2], box[2:])
        leader = anchors[at] + np.linspace(0, 1, 101)[:, None] * (end - anchors[at])
        assert _entered(leader, marks) <= {at} | set(np.flatnonzero(_holds(marks, anchors[at])))
        assert _entered(leader, boxes) <= {at}


def _entered(points, boxes):
    """Indices of the boxes that hold one of ``points`` [n, 2]."""
    inside = (boxes[None, :, :2] < points[:, None]) & (points[:, None] < boxes[None, :, 2:])
    return set(np.flatnonzero(inside.all(axis=2).any(axis=0)))


def _holds(boxes, point):
    return ((boxes[:, :2] <= point) & (point <= boxes[:, 2:])).all(axis=1)
