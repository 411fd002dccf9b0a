"""Many processes at once: one winner for every run, whole lines in every log."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from instrument.results.claims import RunClaimed, claim
from instrument.results.lines import read
from instrument.results.log import JsonlLog
from instrument.results.schemas import EventRecord, RecordError
from tests.soak.reliability.processes import start
from tests.soak.reliability.trial import Trial, share_of

CLAIMANTS, RUNS = 16, 500
WRITERS, LINES = 8, 2000


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
    path, count = folder / "events.jsonl", share_of(LINES, share)
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
