"""Configurations differ without hue, and every colour is seen on its paper."""

from itertools import combinations

import pytest

from bench_cases import DTYPE_CONFIGS
from instrument.kernel_classes import CLASSES
from report.dossier.page import DARK_FURNITURE, dark_colours
from report.plots import palette, style

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


def test_architectures_never_share_a_marker():
    archs = ["mamba", "gpt2", "resolvent", "roberta"]
    assert len(set(palette.arch_markers(archs).values())) == 4


@pytest.mark.parametrize("name", palette.KERNEL_CLASSES)
def test_every_class_of_kernel_has_a_colour_of_its_own_on_both_papers(name):
    colour, dark = palette.KERNEL_CLASSES[name]
    assert contrast(colour, style.PAPER) >= 3 and contrast(dark, DARK_FURNITURE[style.PAPER]) >= 3
    assert colour not in {look.colour for look in palette.LOOKS.values()}


def test_the_classes_of_the_palette_are_those_of_the_traces():
    assert tuple(palette.KERNEL_CLASSES) == CLASSES and palette.kernel_class_look("idle") is None
    assert palette.kernel_class_look("<new>") == palette.kernel_class_look("other")
