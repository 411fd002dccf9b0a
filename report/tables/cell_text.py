"""A cell as text, column by column: the same on the page and on a terminal. Units become GB, points and percent here."""

from __future__ import annotations

import math

from instrument.terminal import count
from report.tables.cells import COMPLETED, Cell, Quality
from report.tables.selection import REFERENCE
from report.text import enough_digits, gigabytes, short, signed, times

HEADS = ("configuration", "state", "speed", "peak memory", "quality", "difference", "headroom", "verdict", "why")
MEMORY_KINDS = {"allocated": "", "rss": " resident", None: ""}
UNKNOWN = "-"


def cell_texts(cell: Cell) -> dict[str, str]:
    """What each of `HEADS` says. Speed and difference are against fp32_true of the same seeds, with 95 % t-intervals."""
    reference = cell.dtype_config == REFERENCE
    shown = shown_qualities(cell)
    values = (
        cell.dtype_config,
        state_text(cell),
        speed_text(cell),
        memory_text(cell),
        ", ".join(value_text(quality) for quality in shown) or UNKNOWN,
        UNKNOWN if reference else ", ".join(difference_text(quality) for quality in shown if quality.difference.n) or UNKNOWN,
        headroom_text(cell),
        cell.verdict,
        cell.why,
    )
    return dict(zip(HEADS, values, strict=True))


def shown_qualities(cell: Cell) -> tuple[Quality, ...]:
    """Every measure where one was compared with fp32_true, and of fp32_true; else the first alone."""
    compared = any(quality.difference.n for quality in cell.qualities) or cell.dtype_config == REFERENCE
    return cell.qualities if compared else cell.qualities[:1]


def state_text(cell: Cell) -> str:
    """``completed, 3 seeds``; ``NaN @ 50, optimizer: 1 of 3 seeds``; ``unhealthy reference``."""
    if cell.n_failed:
        return f"{cell.what}: {cell.n_failed} of {count(cell.n, 'seed')}"
    return f"{cell.state}, {count(cell.n, 'seed')}" if cell.state == COMPLETED else cell.state


def speed_text(cell: Cell) -> str:
    """``2.04x [1.98, 2.10]``; the rate alone where there is no fp32_true to compare with."""
    if cell.dtype_config == REFERENCE and cell.speed.n:
        return "1.00x"
    if cell.speed.n:
        return times(cell.speed)
    return UNKNOWN if math.isnan(cell.samples_per_s) else f"{cell.samples_per_s:,.1f} samples/s"


def memory_text(cell: Cell) -> str:
    """``20.5 GB``, ``at most 20.5 GB`` where other runs of the process may have raised it, ``1.2 GB resident``."""
    if cell.peak_bytes is None:
        return UNKNOWN
    return f"{'at most ' if cell.peak_is_bound else ''}{gigabytes(cell.peak_bytes)}{MEMORY_KINDS[cell.peak_kind]}"


def headroom_text(cell: Cell) -> str:
    """``9.2 bits (largest logit 112)``: doublings to 65,504."""
    if math.isnan(cell.headroom_bits):
        return UNKNOWN
    return f"{signed(cell.headroom_bits, 1).lstrip('+')} bits (largest logit {short(cell.largest_logit)})"


def value_text(quality: Quality, *, baseline: bool = True) -> str:
    """``perplexity 24.1``; ``micro-F1 0.31 (most frequent answer 0.20)``, without it where another row says it."""
    number = f"{quality.value:.2f}" if quality.unit == "F1" else f"{quality.value:.4g}"
    number = "not measured" if math.isnan(quality.value) else number
    known = baseline and quality.baseline is not None
    return f"{quality.name} {number}" + (f" (most frequent answer {quality.baseline:.2f})" if known else "")


def difference_text(quality: Quality) -> str:
    """``loss +0.120 [-0.440, +0.670] nats``: the paired difference from fp32_true with its interval."""
    scale, unit, digits = {"nats": (1, "nats", 3), "share": (100, "%", 1), "F1": (100, "points", 1)}[quality.unit]
    found = quality.difference
    name = quality.name.replace("perplexity", "loss")
    if found.n == 0:
        return f"{name}: no difference measured"
    digits = max(digits, enough_digits(scale * found.low, scale * found.high))
    low, high = (signed(scale * bound, digits) if math.isfinite(bound) else "" for bound in (found.low, found.high))
    interval = f" [{low}, {high}]" if found.known else ""
    return f"{name} {signed(scale * found.value, digits)}{interval} {unit}"


def margin_text(quality: Quality) -> str:
    """``0.02 nats``, ``5 %``, ``1 point``."""
    return {"nats": f"{quality.margin:g} nats", "share": f"{100 * quality.margin:g} %"}.get(
        quality.unit, f"{100 * quality.margin:g} point"
    )
