"""A log that is cut at every byte, and bits that flip in it: every line that was not hit is won back, nothing crashes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

from instrument.results.log import JsonlLog
from instrument.results.schemas import EventRecord, Record, StepRecord, decode, encode
from instrument.results.states import sort_lines
from tests.soak.reliability.trial import Trial, share_of

FLIPS = 10_000
LINES = 20


def truncations(share: float, folder: Path) -> Iterator[Trial]:
    """A log of steps and an event, cut at every byte or at a random share of them: sorted by `repair`'s rules, which keep every
    whole line and set the piece aside, and opened by a writer that goes on behind it."""
    rows = [
        *(step(n, loss) for n, loss in enumerate([2.5, -1e-7, math.nan, 0.0], start=1)),
        EventRecord(step=1, kind="warning", detail={"text": 'naïve "quotes" \\ 数', "list": [True, None, -3]}),
    ]
    lines = [encode(row) for row in rows]
    content = b"".join(line + b"\n" for line in lines)
    for length in sorted(random.Random(3).sample(range(len(content) + 1), share_of(len(content) + 1, share))):
        *whole, rest = content[:length].split(b"\n")
        whole += [rest] * (rest in lines)  # that lacks only its newline
        found, losses = sort_lines(content[:length], None), []
        if found.kept != whole or found.damaged or found.cut != [rest] * (bool(rest) and rest not in lines):
            losses.append(f"kept {found.intact} of {len(whole)} whole lines, cut {len(found.cut)}")
        if sort_lines(found.content, None).content != found.content:
            losses.append("sorting is not idempotent")
        yield Trial(f"cut at byte {length}", losses + _goes_on_behind(content[:length], whole, folder / "log.jsonl"))


def flipped_bits(share: float, folder: Path) -> Iterator[Trial]:
    """One bit at a time in a log of 20 lines: every line that it did not hit is kept as it was."""
    lines, rng = [encode(step(n, loss=n / 7)) for n in range(1, LINES + 1)], random.Random(6)
    content = b"".join(line + b"\n" for line in lines)
    for _ in range(share_of(FLIPS, share)):
        at = rng.randrange(len(content) * 8)
        damaged = flipped(content, at)
        expected = set(lines) - ({lines[content[: at // 8].count(b"\n")]} if content[at // 8] != ord("\n") else set())
        losses = []
        try:
            found = sort_lines(damaged, StepRecord)
        except Exception as error:
            losses.append(f"crashed: {type(error).__name__}: {error}")
        else:
            losses += [f"{len(expected - set(found.kept))} lines lost"] if not expected <= set(found.kept) else []
            losses += ["not idempotent"] if sort_lines(found.content, StepRecord).content != found.content else []
        yield Trial(f"bit {at}", losses, {"lines": len(lines)})


def flipped(content: bytes, *bits: int) -> bytes:
    """The content with these bits turned over."""
    turned = bytearray(content)
    for at in bits:
        turned[at // 8] ^= 1 << at % 8
    return bytes(turned)


def step(number: int, loss: float = 2.5) -> StepRecord:
    """A step's row."""
    return StepRecord(
        step=number,
        loss=loss,
        lr=1e-3,
        grad_norm=1.25,
        grad_absmax=0.1,
        grad_nonfinite=0,
        grad_underflow_frac=0.0,
        logit_absmax=10.0,
        logit_nonfinite=0,
        logit_over_fp16=0,
        loss_scale=None,
        step_skipped=False,
        step_time_s=0.01,
        samples=4,
        tokens=128,
        real_tokens=128,
        seq_len=32,
    )


def _goes_on_behind(content: bytes, whole: list[bytes], path: Path) -> list[str]:
    """A writer opens the cut log and adds a row: the whole lines are there, then its own, and at most one that is neither."""
    path.write_bytes(content)
    with JsonlLog(path) as log:
        log.write(step(99))
    lines = path.read_bytes().split(b"\n")
    torn = [line for line in lines[:-1] if not (_is(line, StepRecord) or _is(line, EventRecord))]
    kept = [line for line in lines[:-1] if line not in torn]
    return (
        []
        if kept == [*whole, encode(step(99))] and len(torn) <= 1 and not lines[-1]
        else [f"behind the cut a writer left {len(kept)} lines, {len(torn)} torn"]
    )


def _is(line: bytes, kind: type[Record]) -> bool:
    try:
        decode(line, kind)
    except ValueError:
        return False
    return True
