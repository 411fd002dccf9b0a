"""Crashes during a repair or an index write: the next repair finishes what was begun."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from instrument.results.folder import finished_run, indexed_rows, write_terminal
from instrument.results.layout import INDEX
from instrument.results.repair import TORN, repair_folder
from instrument.results.schemas import RunRecord
from tests import crash_hook
from tests.soak.reliability.processes import run, small, start
from tests.soak.reliability.same_run import completed, contents, left_alone, repaired, repaired_twice
from tests.soak.reliability.trials import Trial, share_of

SETTINGS = {"max_steps": 5, "eval_every": 2}


def in_repair(share: float, folder: Path) -> Iterator[Trial]:
    """`repair` of a folder with a torn log, a line that is no JSON, a row that cannot be read and a torn index dies at every
    operation: the next one leaves what an undisturbed one leaves, and what was cut lies beside in one piece."""
    run_id, damaged, straight = small(**SETTINGS).run_id, folder / "damaged", folder / "straight"
    shutil.copytree(left_alone(small(**SETTINGS), folder), damaged)
    cut = damage(damaged, run_id)
    shutil.copytree(damaged, straight)
    repair_folder(straight)
    expected = _contents(straight)
    for nth, out in _deaths(share, damaged, folder, _repair):
        losses = repaired_twice(out)[1]  # what was planted is lost, and reported
        found = _contents(out)
        losses += [
            f"{name} is not what an undisturbed repair makes of it"
            for name, content in expected.items()
            if not name.endswith(TORN) and found.get(name) != content
        ]
        losses += [
            f"{name} is not beside {where}"
            for where, name in cut
            if name.encode() not in found.get(where + TORN, b"").splitlines()
        ]
        yield Trial(f"operation {nth} of repair", losses)


def in_index(share: float, folder: Path) -> Iterator[Trial]:
    """A run's terminal row and the index with it are written, and the process dies at every operation: the rows of the other
    runs stay in the index throughout, the new one is whole or not there, and repair brings both together."""
    begun, one = folder / "begun", left_alone(small(**SETTINGS), folder)
    shutil.copytree(one, begun)
    completed(run(small("fp32_true", **SETTINGS), begun))
    (old,) = indexed_rows(one)
    row = msgspec.structs.replace(finished_run(one, old), run_id="another", steps_done=0)
    for nth, out in _deaths(share, begun, folder, _write_row, row):
        index = (out / INDEX).read_bytes()
        losses = [] if index.count(b"\n") in (2, 3) and index.endswith(b"\n") else ["the index is not whole"]
        losses += [f"{run_id} is not in the index" for run_id in indexed_rows(begun) if run_id not in indexed_rows(out)]
        there = (out / "runs" / row.run_id / "run.json").exists()
        losses += ["run.json is there and cannot be read"] if there and finished_run(out, row.run_id) != row else []
        losses += repaired(out)
        losses += [] if len(indexed_rows(out)) == 2 + there else ["after repair the index is not the runs' rows"]
        yield Trial(f"operation {nth} of a terminal row", losses)


def damage(out: Path, run_id: str) -> list[tuple[str, str]]:
    """What repair is for, all at once, by other means than the program's own: in which file, and what is to lie beside it
    after the repair."""
    log, row = f"training_logs/run_{run_id}.jsonl", f"runs/{run_id}/run.json"
    lines = (out / log).read_bytes().splitlines(keepends=True)
    (out / log).write_bytes(b"".join([*lines[:2], b"no json\n", *lines[2:], b'{"sch']))
    (out / row).write_bytes(b"{")
    with (out / INDEX).open("ab") as index:
        index.write(b'{"torn')
    return [(log, "no json"), (log, '{"sch'), (row, "{"), (INDEX, '{"torn')]


def _deaths(share: float, begun: Path, folder: Path, what: Callable, *arguments: object) -> Iterator[tuple[int, Path]]:
    """A copy of ``begun`` for every operation at which a process that does ``what`` died."""
    out = folder / "out"
    shutil.copytree(begun, out)
    count = _count(what, out, *arguments)
    shutil.rmtree(out)
    for nth in sorted(random.Random(2).sample(range(1, count + 1), share_of(count, share))):
        shutil.copytree(begun, out)
        process, _ = start(what, out, nth, *arguments)
        process.join()
        if process.exitcode != crash_hook.CRASHED:
            raise RuntimeError(f"operation {nth} of {count} did not come: exit code {process.exitcode}")
        yield nth, out
        shutil.rmtree(out)


def _count(what: Callable, out: Path, *arguments: object) -> int:
    process, counted = start(what, out, sys.maxsize, *arguments)
    count = counted.recv()
    process.join()
    return count


def _repair(counted: Connection, out: Path, crash_at: int) -> None:
    crash_hook.crash_at(crash_at)
    repair_folder(out)
    counted.send(crash_hook.operations())


def _write_row(counted: Connection, out: Path, crash_at: int, row: RunRecord) -> None:
    crash_hook.crash_at(crash_at)
    write_terminal(out, row)
    counted.send(crash_hook.operations())


def _contents(out: Path) -> dict[str, bytes]:
    """Every file but claims, which a dead repair leaves until the next run of that id."""
    return {name: content for name, content in contents(out).items() if not name.endswith(".claim")}
