"""The n-th call of open, write, fsync, flock, rename, link or unlink on a results folder fails with an errno, is cut short or
kills its process, whoever calls: by an interposed C library. A command ends in a sentence, and the next one loses nothing.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.exit_codes import BAD_DATA, ENVIRONMENT, OK, RUN_FAILED
from harness.settings import RunSettings
from instrument.results.folder import finished_runs
from tests.harness.commands import Forked
from tests.soak.reliability.crashed_repair import damage
from tests.soak.reliability.processes import SMALL, ProcessResult, asked_to_stop, run, small
from tests.soak.reliability.same_run import contents, differences, finished_well, left_alone, lost_rows
from tests.soak.reliability.trials import Trial

CALLS = ("open", "write", "fsync", "flock", "rename", "link", "unlink")
EVERY, KILL, SHORT = (1 << len(CALLS)) - 1, -1, -2
"""Of the C source, as the order of ``CALLS`` is."""
FAULTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "EIO": (errno.EIO, CALLS),
    "ENOSPC": (errno.ENOSPC, ("open", "write", "fsync", "rename", "link")),
    "EINTR": (errno.EINTR, CALLS),
    "EMFILE": (errno.EMFILE, ("open",)),
    "ENOLCK": (errno.ENOLCK, ("flock",)),
    "cut short": (SHORT, ("write",)),
    "SIGKILL": (KILL, CALLS),
}
"""What befalls which calls: those that POSIX or a network file system lets fail so."""
MATRIX_TRIALS = 300
LIBRARY, ORDERS = "LD_PRELOAD", "DDB_FAILING_CALLS"
LONGEST_S = 300.0
HEAD = struct.Struct("6q")


class Orders:
    """The page that all processes map: nothing befalls a call until `give`, and after `count`."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), HEAD.size + 2048)

    def give(self, below: Path, fault: str = "EIO", nth: int = 0) -> None:
        """``fault`` befalls the ``nth`` (0: none) of its calls on files whose path begins with ``below``."""
        number, names = FAULTS[fault]
        name = os.fsencode(below)
        self._page[HEAD.size : HEAD.size + len(name) + 1] = name + b"\0"
        self._page[: HEAD.size] = HEAD.pack(1, 0, nth, number, sum(1 << CALLS.index(call) for call in names), 0)

    def count(self) -> tuple[int, str]:
        """Take the order back; how many calls there were, and which was hit (empty: none)."""
        _, count, _, _, _, hit = HEAD.unpack(self._page[: HEAD.size])
        self._page[: HEAD.size] = bytes(HEAD.size)
        return count, CALLS[hit.bit_length() - 1] if hit else ""


def compiled(folder: Path) -> Path | None:
    """The library; None where there is no C compiler."""
    library = folder / "failing_calls.so"
    if (compiler := shutil.which("cc")) is None:
        return None
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def trials(share: float, folder: Path, only: str = "") -> Iterator[Trial]:
    """The sweep, in a process that has the library, as all that it starts. ``only``: of one command."""
    if (library := compiled(folder)) is None:
        return
    (orders := folder / "orders").write_bytes(bytes(HEAD.size + 2048))
    environment = os.environ | {LIBRARY: str(library), ORDERS: str(orders)}
    command = [sys.executable, "-m", __name__, str(share), str(folder / "trials"), only]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            yield Trial(**json.loads(line))
    if process.returncode:
        raise RuntimeError(f"the sweep ended with exit code {process.returncode}")


@dataclass
class Command:
    """``give(out)`` executes it on a folder that begins as ``begun``; ``losses(out, parts)`` says what is wrong after a part
    that exited 0, or after the next one that does; ``kept(out, part)`` after a part that did not; ``codes``: how it may end."""

    name: str
    begun: Path
    give: Callable[[Path], ProcessResult]
    losses: Callable[[Path, list[ProcessResult]], list[str]]
    kept: Callable[[Path, ProcessResult], list[str]] = lambda out, part: []
    codes: tuple[int, ...] = (ENVIRONMENT,)


def sweep(command: Command, orders: Orders, folder: Path, share: float, most: int | None = None) -> Iterator[Trial]:
    """A trial for every call and every fault that may befall it, or a random sample."""
    counts: dict[tuple[str, ...], int] = {}
    for fault, (_, calls) in FAULTS.items():
        if calls in counts:
            continue
        out = fresh(command, folder)
        orders.give(out, fault)
        part = command.give(out)
        counts[calls] = orders.count()[0]
        if wrong := part.exit_code != OK or command.losses(out, [part]):
            raise RuntimeError(f"{command.name}, left alone: {wrong} {part.stderr[-2000:]}")
    everything = [(fault, nth) for fault, (_, calls) in FAULTS.items() for nth in range(1, counts[calls] + 1)]
    size = min(most or len(everything), len(everything))
    for fault, nth in random.Random(3).sample(everything, max(1, round(size * share))):
        out = fresh(command, folder)
        orders.give(out, fault, nth)
        part = command.give(out)
        _, hit = orders.count()
        name = f"{command.name}: {fault} at call {nth} ({hit or 'not reached'})"
        losses = ended_well(part, command.codes, killed=fault == "SIGKILL")
        if part.exit_code != OK:
            losses += command.kept(out, part)
            last = command.give(out)
            losses += [] if last.exit_code == OK else [f"did not resume: {last.exit_code}, {last.stderr[-300:]!r}"]
            losses += command.losses(out, [part, last])
        else:
            losses += command.losses(out, [part])
        yield Trial(name, losses, {"reached": int(bool(hit)), "exit code 0": int(part.exit_code == OK)})


def fresh(command: Command, folder: Path) -> Path:
    """The folder as it is before the command."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(command.begun, out)
    return out


def ended_well(part: ProcessResult, codes: tuple[int, ...], *, killed: bool) -> list[str]:
    """What is wrong with how a command ended: another exit code, a traceback, no sentence or several."""
    losses = ["a traceback: " + part.stderr[-700:]] if "Traceback" in part.stderr else []
    if part.exit_code == OK or (killed and part.exit_code == -signal.SIGKILL):
        return losses
    if part.exit_code not in (*codes, *([RUN_FAILED] if killed else [])):
        losses.append(f"exit code {part.exit_code}: {part.sentence}")
    said = [line for line in part.stderr.splitlines() if line.startswith(("harness: ", "report: "))]
    return losses + (
        [f"{len(said)} sentences: {part.stderr[-300:]!r}"] if part.exit_code == ENVIRONMENT and len(said) != 1 else []
    )


def executed(words: list[str], call: Callable[[list[str]], int], printed: Path) -> ProcessResult:
    """A command in a fork."""
    process = Forked(words, printed, call=call)
    _, errors = process.communicate(LONGEST_S)
    return ProcessResult(exit_code=process.returncode, stderr=errors)


def harness(words: list[str]) -> int:
    """The command as ``python -m harness`` calls it."""
    from harness.cli import main

    return main(words, supervised=True)


def report(words: list[str]) -> int:
    """The command as ``python -m report`` calls it."""
    from report.cli import main

    return main(words)


def a_run(folder: Path, *, after_step: int) -> Command:
    """``case``, from the beginning or, after ``after_step``, from a checkpoint."""
    settings = small(max_steps=4, eval_every=2, checkpoint_every=2)
    whole, begun = left_alone(settings, folder), folder / f"begun-{after_step}"
    begun.mkdir()
    before = [run(settings, begun, then=(after_step, asked_to_stop))] if after_step else []
    return Command(
        "resume" if after_step else "run",
        begun,
        partial(run, settings),
        lambda out, parts: finished_well(settings, out, whole, [*before, *parts]),
        lambda out, part: lost_rows([*before, part], settings.run_id, out),
    )


def a_repair(folder: Path) -> Command:
    """``repair`` of a folder with all that it is for; what it leaves is what an undisturbed one leaves."""
    settings = small(max_steps=4, eval_every=2)
    begun, straight = folder / "damaged", folder / "straight"
    shutil.copytree(left_alone(settings, folder), begun)
    damage(begun, settings.run_id)
    shutil.copytree(begun, straight)

    def give(out: Path) -> ProcessResult:
        part = executed(["repair", str(out)], harness, folder / "repair")
        part.exit_code = OK if part.exit_code == BAD_DATA else part.exit_code  # what was planted is lost, and reported
        return part

    give(straight)
    expected = contents(straight)

    def losses(out: Path, parts: list[ProcessResult]) -> list[str]:
        found = contents(out)
        return [f"{name} is not what an undisturbed repair makes of it" for name in {*expected, *found} if differs(name, found)]

    def differs(name: str, found: dict[str, bytes]) -> bool:
        if name.endswith(".torn"):  # a piece that was cut stands there, once or twice
            return not set(expected[name].splitlines()) <= set(found.get(name, b"").splitlines())
        return not name.endswith(".claim") and found.get(name) != expected.get(name)

    return Command("repair", begun, give, losses)


def a_report(folder: Path) -> Command:
    """``report build``: every file of the dossier is there and whole, or the page says what could not be read; the results are
    as before."""
    begun = folder / "reported"
    shutil.copytree(left_alone(small(max_steps=4, eval_every=2), folder), begun)

    def give(out: Path) -> ProcessResult:
        words = ["build", str(out), "--out", str(out / "dossier"), "--no-pdf", "--format", "svg"]
        return executed(words, report, folder / "report")

    straight = folder / "straight-report"
    shutil.copytree(begun, straight)
    give(straight)
    expected = {name: len(content) for name, content in contents(straight).items()}

    def losses(out: Path, parts: list[ProcessResult]) -> list[str]:
        sizes = {name: len(content) for name, content in contents(out).items()}
        admitted = "listed in the dossier and by" in parts[-1].stderr  # a file that could not be read, by name
        wrong = [
            name
            for name in {*expected, *sizes}
            if not admitted and abs(expected.get(name, 1 << 40) - sizes.get(name, 1 << 40)) > 200
        ]
        changed = [name for name, content in contents(begun).items() if (out / name).read_bytes() != content]
        return [f"{name} is not whole" for name in sorted(wrong)] + [f"{name} has changed" for name in changed]

    return Command("report", begun, give, losses)


def a_matrix(folder: Path) -> Command:
    """``matrix`` of three runs, one of them finished before."""
    settings = {"case": "gpt2_clm", "max_steps": 2}
    runs: list[RunSettings] = [small(config, **settings) for config in ("fp32_true", "amp_bf16", "amp_fp16")]
    words = ["matrix", "--cases", "gpt2_clm", "--configs", *(one.config.id for one in runs), "--max-steps", "2", "--jobs", "1"]
    words += [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    whole, begun = folder / "whole-matrix", folder / "begun-matrix"

    def give(out: Path) -> ProcessResult:
        return executed([*words, "--out", str(out)], harness, folder / "matrix")

    if (ended := give(whole)).exit_code != OK:
        raise RuntimeError(ended.stderr)
    run(runs[0], begun)
    before = contents(begun)

    def losses(out: Path, parts: list[ProcessResult]) -> list[str]:
        wrong = [f"{one.config.id}: {what}" for one in runs for what in differences(one.run_id, out, whole)]
        rows = {row.run_id for row in finished_runs(out)}
        return wrong + [f"{one.run_id} has no row" for one in runs if one.run_id not in rows] + kept(out)

    def kept(out: Path, part: Any = None) -> list[str]:
        return [
            f"{name} was lost" for name, content in before.items() if "/run" in name and (out / name).read_bytes() != content
        ]

    return Command("matrix", begun, give, losses, kept, codes=(ENVIRONMENT, RUN_FAILED))


COMMANDS: dict[str, Callable[[Path], Command]] = {
    "run": partial(a_run, after_step=0),
    "resume": partial(a_run, after_step=2),
    "repair": a_repair,
    "report": a_report,
    "matrix": a_matrix,
}


def main(share: str, at: str, only: str) -> None:
    """In the process that has the library: a trial as JSON a line."""
    orders, folder = Orders(Path(os.environ[ORDERS])), Path(at)
    folder.mkdir()
    for name, command in COMMANDS.items():
        if only in ("", name):
            for trial in sweep(command(folder), orders, folder, float(share), MATRIX_TRIALS if name == "matrix" else None):
                print(json.dumps(asdict(trial)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
