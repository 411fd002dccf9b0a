"""The kinds of reliability trials: each injects faults, recovers, and counts what was lost. All of them take about an hour
on two cores; a share of the trials is a sample.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.status import Status
from rich.text import Text

from harness.figures import CONSOLE, machine
from harness.settings import SettingsError
from instrument.results.files import replace
from instrument.terminal import count

FILE = "reliability.json"


@dataclass(frozen=True)
class Kind:
    """``trials(share, folder)`` in ``tests.soak.reliability.<module>`` yields a `Trial` for each that was made in an empty
    folder; a share of 1 is all of them."""

    name: str
    what: str
    module: str
    trials: str

    def load(self) -> Callable[[float, Path], Iterator[Trial]]:
        """The function; most of them need torch."""
        return getattr(import_module(f"{__package__}.{self.module}"), self.trials)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("crash", "death at every file operation of a run with checkpoints", "interrupted_runs", "sweep"),
        Kind("crash-again", "death at every file operation of a resumed run", "interrupted_runs", "sweep_resumed"),
        Kind("crash-twice", "two deaths, each at a random file operation", "interrupted_runs", "twice"),
        Kind("crash-repair", "death at every file operation of repair", "crashed_repair", "in_repair"),
        Kind("crash-index", "death at every file operation of a terminal row and the index", "crashed_repair", "in_index"),
        Kind("kill", "SIGKILL at random moments", "interrupted_runs", "kills"),
        Kind("signal", "SIGTERM and SIGINT at random moments", "interrupted_runs", "signals"),
        Kind("death", "17 kinds of faults in a run: a row each, with its cause", "faults", "all_faults"),
        Kind("full-disk", "a disk that fills up, at a random byte", "bad_disks", "full"),
        Kind("read-only", "a results folder that cannot be written", "bad_disks", "read_only"),
        Kind("gone", "a results folder or a log that disappears after a random step", "bad_disks", "disappearing"),
        Kind(
            "calls",
            "a failing, cut or fatal call of open, write, fsync, flock, rename, link, unlink",
            "failing_calls",
            "trials",
        ),
        Kind("cut", "a log cut at every byte", "logs_and_claims", "truncations"),
        Kind("bit", "random bits flipped in a log", "logs_and_claims", "flipped_bits"),
        Kind("claims", "16 processes want the same 500 runs, free and of dead owners", "logs_and_claims", "claims"),
        Kind("writers", "8 processes add 2,000 lines each to one log", "logs_and_claims", "writers"),
        Kind("nodes", "runs on a Ray cluster of two nodes, against one after the other", "ray_nodes", "alike"),
        Kind("lost-node", "the same, and one node is killed in the middle", "ray_nodes", "one_killed"),
        Kind("ranks", "one run on two and four processes under torchrun, DDP and FSDP, against one process", "ranks", "alike"),
        Kind("lost-rank", "one run on two processes, and one is killed, fails or hangs", "ranks", "one_fails"),
        Kind("secrets", "artefacts searched for tokens planted in the environment", "planted_secrets", "secrets"),
    )
}
"""In the order in which they run."""


def chosen_kinds(only: Sequence[str]) -> list[Kind]:
    """The kinds to try, in order; all where none is named. Raises `SettingsError`."""
    unknown = [name for name in only if name not in KINDS]
    if unknown:
        raise SettingsError(f"no kind of trial {unknown[0]!r}; allowed: {', '.join(KINDS)}")
    return [kind for name, kind in KINDS.items() if name in only or not only]


def measure(share: float, only: Sequence[str] = (), out: Path | None = None) -> list[Tally]:
    """Run the trials, or a ``share`` of them, and show progress; ``out`` gets ``reliability.json`` after each kind."""
    done = []
    with Screen() as screen:
        for kind in chosen_kinds(only):
            with tempfile.TemporaryDirectory(prefix="ddb-reliability-") as folder:
                trials = kind.load()(share, Path(folder))
                done.append(tally(kind.name, kind.what, trials, screen.progress))
            screen.done(done[-1])
            if out is not None:
                replace(out / FILE, json.dumps(as_json(share, done), indent=1, allow_nan=False).encode() + b"\n")
    return done


def as_json(share: float, done: list[Tally]) -> dict[str, Any]:
    """Plain data."""
    return {
        "schema": 1,
        "share": share,
        "machine": machine(),
        "trials": sum(tally.trials for tally in done),
        "losses": sum(len(tally.losses) for tally in done),
        "kinds": [tally.as_row() for tally in done],
    }


@dataclass(frozen=True)
class Trial:
    """One injected fault and the recovery. ``name`` finds it again (operation 17, seed 3); ``losses``: what was lost or
    wrong, a message each; ``counts`` are summed over the trials; ``stands_for``: trials that are one here."""

    name: str
    losses: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    stands_for: int = 1


@dataclass
class Tally:
    """All trials of one kind. ``losses``: a message each, after the trial's name."""

    name: str
    what: str
    trials: int = 0
    losses: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds_s: float = 0.0

    def as_row(self) -> dict[str, Any]:
        """Plain data for ``--json`` and ``reliability.json``."""
        return {
            "name": self.name,
            "what": self.what,
            "trials": self.trials,
            "losses": len(self.losses),
            "lost": self.losses,
            "counts": dict(self.counts),
            "duration_s": round(self.seconds_s, 1),
        }


def tally(name: str, what: str, trials: Iterable[Trial], progress: Callable[[Tally], None] = lambda so_far: None) -> Tally:
    """Sum up trials as they come; ``progress`` is called after each."""
    total, began_s = Tally(name, what), time.monotonic()
    for trial in trials:
        total.trials += trial.stands_for
        total.losses += [f"{trial.name}: {loss}" for loss in trial.losses]
        total.counts.update(trial.counts)
        total.seconds_s = time.monotonic() - began_s
        progress(total)
    return total


def share_of(count: int, share: float) -> int:
    """How many of ``count`` trials a share is: at least one."""
    return max(1, round(count * share))


MOST_LOSSES = 10
SECONDS_BETWEEN_LINES = 60.0
"""Where nobody watches a terminal."""
WIDTHS = (24, 9, 7, 9)


class Screen:
    """Progress on standard error: a line that changes on a terminal, one a minute elsewhere, and a row per kind."""

    def __init__(self) -> None:
        self._status: Status | None = CONSOLE.status("") if CONSOLE.is_terminal else None
        self._printed_s = time.monotonic()

    def __enter__(self) -> Screen:
        CONSOLE.print(_row("reliability", "trials", "lost", "seconds"), style="bold", markup=False)
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_) -> None:
        if self._status:
            self._status.stop()

    def progress(self, so_far: Tally) -> None:
        """A trial is over."""
        line = f"{so_far.name}: {count(so_far.trials, 'trial')}, {len(so_far.losses):,} lost, {so_far.seconds_s:.0f} s"
        if self._status:
            self._status.update(line)
        elif time.monotonic() - self._printed_s > SECONDS_BETWEEN_LINES:
            CONSOLE.print(f"  {line}", style="dim", markup=False)
            self._printed_s = time.monotonic()

    def done(self, tally: Tally) -> None:
        """A kind is over: its row, and what was lost."""
        CONSOLE.print(
            _row(tally.name, f"{tally.trials:,}", f"{len(tally.losses):,}", f"{tally.seconds_s:.0f}"),
            style="red" if tally.losses else None,
            markup=False,
        )
        _below(tally.what)
        if tally.counts:
            _below(", ".join(f"{n:,} {name}" for name, n in tally.counts.items()))
        for loss in tally.losses[:MOST_LOSSES]:
            CONSOLE.print(f"  lost: {loss}", markup=False)
        if len(tally.losses) > MOST_LOSSES:
            CONSOLE.print(f"  and {len(tally.losses) - MOST_LOSSES:,} more")


def _row(name: str, *numbers: str) -> str:
    return f"{name:<{WIDTHS[0]}}" + "".join(f"{number:>{width}}" for number, width in zip(numbers, WIDTHS[1:], strict=True))


def _below(text: str) -> None:
    """Beneath a row, wrapped to the terminal's width."""
    CONSOLE.print(Padding(Text(text, style="dim"), (0, 0, 0, 2), expand=False))
