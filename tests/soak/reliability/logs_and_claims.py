"""Logs that are cut at every byte or have bits flipped, and many processes at once: every line that was not hit is recovered,
every run has one owner, every log has whole lines.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from instrument.results.claims import RunClaimed, claim
from instrument.results.lines import read
from instrument.results.log import JsonlLog
from instrument.results.repair import sort_lines
from instrument.results.schemas import EventRecord, Record, RecordError, StepRecord, decode, encode
from tests.soak.reliability.processes import start
from tests.soak.reliability.trials import Trial, share_of

FLIPS = 10_000
LINES = 20


def truncations(share: float, folder: Path) -> Iterator[Trial]:
    """A log of steps and an event, cut at every byte or at a random share of them: sorted by `repair`'s rules, which keep every
    whole line and set the piece aside, and opened by a writer that appends to it."""
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
        if found.kept != whole or found.state.lost or found.cut != [rest] * (bool(rest) and rest not in lines):
            losses.append(f"kept {found.state.intact} of {len(whole)} whole lines, cut {len(found.cut)}")
        if sort_lines(found.content, None).content != found.content:
            losses.append("sorting is not idempotent")
        yield Trial(f"cut at byte {length}", losses + _appended_to(content[:length], whole, folder / "log.jsonl"))


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


def _appended_to(content: bytes, whole: list[bytes], path: Path) -> list[str]:
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
        else [f"after the cut a writer left {len(kept)} lines, {len(torn)} torn"]
    )


def _is(line: bytes, kind: type[Record]) -> bool:
    try:
        decode(line, kind)
    except ValueError:
        return False
    return True


CLAIMANTS, RUNS = 16, 500
WRITERS, LINES_OF_A_WRITER = 8, 2000


def claims(share: float, folder: Path) -> Iterator[Trial]:
    """16 processes want each of 500 free runs, and each of 500 whose owners have died: a trial a run."""
    for dead in (False, True):
        out, count = folder / ("dead" if dead else "free"), share_of(RUNS, share)
        for number in range(count) if dead else ():
            leave_dead_claim(out, f"run-{number}")
        won = Counter(number for numbers in _together(CLAIMANTS, _claim_all, out, count) for number in numbers)
        left = {path.parent.name for path in out.glob("runs/*/*")}
        for number in range(count):
            losses = [f"{won[number]} winners"] if won[number] != 1 else []
            losses += ["released, and something is left over"] if f"run-{number}" in left else []
            yield Trial(f"run {number}, {'its owner dead' if dead else 'free'}", losses, {"attempts": CLAIMANTS})


def writers(share: float, folder: Path) -> Iterator[Trial]:
    """8 processes add 2,000 lines each, of 1 byte to 100 kB of text, to one log: a trial a line."""
    path, count = folder / "events.jsonl", share_of(LINES_OF_A_WRITER, share)
    _together(WRITERS, _write_all, path, count)
    try:
        steps = [record.step for record in read(path, EventRecord)]
    except RecordError as error:
        yield Trial("the log", [str(error)], stands_for=WRITERS * count)
        return
    for writer in range(WRITERS):
        own = [number for number in steps if number // count == writer]
        missing = set(range(writer * count, (writer + 1) * count)) - set(own)
        losses = [f"line {number} is missing" for number in sorted(missing)]
        losses += ["lines are not in their writer's order, or there twice"] if own != sorted(set(own)) else []
        yield Trial(f"writer {writer}", losses, {"lines": len(own)}, stands_for=count)


def leave_dead_claim(out: Path, run_id: str, **changed: object) -> Path:
    """A claim whose owner is gone: nobody holds its lock."""
    own = claim(out, run_id)
    facts = json.loads(own.path.read_bytes())
    own.release()
    own.path.write_text(json.dumps(facts | changed))
    return own.path


def _together(processes: int, target: Callable, *arguments: object) -> list:
    """Call ``target(reports, barrier, number, *arguments)`` in that many processes; what each of them sent. RuntimeError
    where one died."""
    barrier = multiprocessing.get_context("forkserver").Barrier(processes)
    begun = [start(target, barrier, number, *arguments) for number in range(processes)]
    sent = []
    for process, reports in begun:
        try:
            sent.append(reports.recv())
        except EOFError:
            process.join()
            raise RuntimeError(f"one of {processes} processes died with exit code {process.exitcode}") from None
    for process, _ in begun:
        process.join()
    return sent


def _claim_all(reports: Connection, barrier, number: int, out: Path, count: int) -> None:
    """Try for every run in an order of one's own, and keep what was won until all have tried."""
    order, held, won = random.Random(number).sample(range(count), count), [], []
    barrier.wait()
    for run in order:
        try:
            held.append(claim(out, f"run-{run}"))
            won.append(run)
        except RunClaimed:
            pass
    barrier.wait()
    for own in held:
        own.release()
    barrier.wait()
    reports.send(won)


def _write_all(reports: Connection, barrier, number: int, path: Path, count: int) -> None:
    barrier.wait()
    with JsonlLog(path) as log:
        for line in range(count):
            text = "x" * (100_000 if line % 97 == 0 else line % 700)
            log.write(EventRecord(step=number * count + line, kind="warning", detail={"text": text}))
    reports.send(count)
