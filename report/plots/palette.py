"""One look for each configuration, in every figure and on every page.

Family by dtype (bf16 blue, fp16 red, fp32 grey), shades within it. Four of the seven default configurations are blue, so no one
should have to distinguish them by hue: marker, line style and lightness differ too, for colour-blind readers and for grey
printers. Every colour has a light and a dark form with a contrast of at least 3 to 1 against its paper."""

from __future__ import annotations

import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How a series is drawn: ``colour`` on white paper, ``dark`` on the page's dark theme."""

    colour: str
    dark: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]


DASH, DOT, DASHDOT = (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2))
LONG, DOUBLE = (0, (8, 1.6)), (0, (5, 1.2, 1, 1.2, 1, 1.2))

LOOKS: dict[str, Look] = {
    "fp32_true": Look("#3a3f46", "#c9ced6", "o", "-"),
    "amp_fp16": Look("#e2604f", "#ff9c8c", "v", "-"),
    "amp_bf16": Look("#2468b4", "#6cb0f5", "s", "-"),
    "fp16_naive": Look("#a3141c", "#f0525a", "X", "-"),
    "bf16_pure": Look("#0d2a66", "#3f7ad6", "D", DASH),
    "amp_bf16_8bit": Look("#3a97cc", "#a9dcf9", "^", DOT),
    "amp_bf16_fp32_head": Look("#5c62d6", "#a7abff", "P", DASHDOT),
    "fp32_tf32": Look("#7d848c", "#8f969e", "d", DASH),
    "fp16_naive_eps1e4": Look("#cc3d78", "#f58ab5", "<", DASH),
    "fp16_naive_fp32_states": Look("#75183f", "#c95687", ">", DASHDOT),
    "fp16_naive_clip16": Look("#8a3b12", "#d98452", "p", DOT),
    "amp_fp16_unscaled": Look("#c2552d", "#f2a27e", "h", DOUBLE),
    "bf16_pure_sr": Look("#17607f", "#58b4d6", "*", DOUBLE),
    "amp_bf16_fused_adamw": Look("#008190", "#4fd0de", "8", LONG),
}

FAMILIES = {
    "bf16": Look("#2468b4", "#6cb0f5", "s", "-"),
    "fp16": Look("#cf3b34", "#ff8d82", "v", "-"),
    "fp32": Look("#3a3f46", "#c9ced6", "o", "-"),
}
OTHER = Look("#6b4fa0", "#b79df0", "o", "-")
SPARE_MARKERS, SPARE_LINES = "oDs^vPX*", ("-", DASH, DOT, DASHDOT, LONG, DOUBLE)


def look(config: str) -> Look:
    """The look of a configuration. One that the registry does not know keeps the colour of the
    dtype in its name, with a marker and a line chosen by its name, the same in every figure."""
    if config in LOOKS:
        return LOOKS[config]
    family = next((FAMILIES[dtype] for dtype in FAMILIES if dtype in config), OTHER)
    pick = zlib.crc32(config.encode("utf-8", "replace"))
    return Look(family.colour, family.dark, SPARE_MARKERS[pick % len(SPARE_MARKERS)], SPARE_LINES[pick // 8 % len(SPARE_LINES)])


KERNEL_CLASSES = {
    "matmul": ("#332288", "#9483ea"),
    "attention": ("#2f8f80", "#5cc7b5"),
    "elementwise": ("#a68a1e", "#e0cb6a"),
    "reduction": ("#c25468", "#ee8b9b"),
    "optimizer": ("#7d1f4e", "#d0689c"),
    "copy": ("#80878f", "#9aa1a9"),
    "ours": ("#117733", "#57bd77"),
    "other": ("#9a3f8b", "#d184c5"),
}
"""Class of kernel -> colour on paper and in the dark theme (after Paul Tol's muted set): none is a configuration's."""

ARM_LOOKS = {
    "bare": Look("#3a3f46", "#c9ced6", "o", "-"),
    "light": Look("#0f7a6c", "#4fc3b2", "s", DASH),
    "full": Look("#9a5a00", "#e6a84f", "^", DOT),
}
"""Instruments off, light and full."""


def kernel_class_look(name: str) -> str | None:
    """The colour of a class of kernel; that of ``other`` for one this version does not know, None for idle time."""
    return None if name == "idle" else KERNEL_CLASSES.get(name, KERNEL_CLASSES["other"])[0]


@dataclass(frozen=True)
class StateLook:
    """A cell of the stability matrix: fill, ink on it, hatch, and the sign that says it without colour."""

    fill: str
    ink: str
    hatch: str | None
    label: str


STATES: dict[str, StateLook] = {
    "completed": StateLook("#cfeccb", "#10301a", None, "completed"),
    "diverged": StateLook("#a11720", "#fffefe", None, "diverged"),
    "poor": StateLook("#f0a640", "#2b1b02", None, "poor quality"),
    "unjudged": StateLook("#e9ebee", "#22272e", "....", "not judged"),
    "failed": StateLook("#d9cfe6", "#2a1a42", None, "no result"),
    "unsupported": StateLook("#fdfdfe", "#555b63", "////", "unsupported"),
    "unfinished": StateLook("#fdfdfe", "#555b63", "----", "unfinished"),
    "missing": StateLook("#fdfdfe", "#555b63", "////", "missing"),
}
