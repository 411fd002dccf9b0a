"""``bench reliability``: faults are planted and got over, and what was lost is counted. It takes about an hour; a share
of the trials is a sample.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.settings import SettingsError

if TYPE_CHECKING:
    from tests.soak.reliability.trial import Tally, Trial

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
        Kind("crash", "death at every file operation of a run with checkpoints", "crashes", "sweep"),
        Kind("crash-again", "death at every file operation of a continuation", "crashes", "sweep_continued"),
        Kind("crash-twice", "two deaths, each at a random file operation", "crashes", "twice"),
        Kind("crash-repair", "death at every file operation of repair", "crashed_mending", "in_repair"),
        Kind("crash-index", "death at every file operation of a terminal row and the index", "crashed_mending", "in_index"),
        Kind("kill", "SIGKILL at random moments", "kills", "kills"),
        Kind("signal", "SIGTERM and SIGINT at random moments", "interruptions", "signals"),
        Kind("death", "17 kinds of faults in a run: a row each, with its cause", "deaths", "deaths"),
        Kind("full-disk", "a disk that fills up, at a random byte", "bad_disks", "full"),
        Kind("read-only", "a results folder that cannot be written", "bad_disks", "read_only"),
        Kind("gone", "a results folder or a log that disappears behind a random step", "bad_disks", "disappearing"),
        Kind("cut", "a log cut at every byte", "damage", "truncations"),
        Kind("bit", "random bits flipped in a log", "damage", "flipped_bits"),
        Kind("claims", "16 processes want the same 500 runs, free and of dead owners", "contention", "claims"),
        Kind("writers", "8 processes add 2,000 lines each to one log", "contention", "writers"),
        Kind("nodes", "runs on a Ray cluster of two nodes, against one after the other", "ray_nodes", "alike"),
        Kind("lost-node", "the same, and one node is killed in the middle", "ray_nodes", "one_killed"),
        Kind("ranks", "one run on two and four processes under torchrun, DDP and FSDP, against one process", "ranks", "alike"),
        Kind("lost-rank", "one run on two processes, and one is killed, fails or hangs", "ranks", "one_fails"),
        Kind("secrets", "artefacts searched for tokens planted in the environment", "planted_secrets", "secrets"),
    )
}
"""In the order in which they run."""


def asked(only: Sequence[str]) -> list[Kind]:
    """The kinds to try, in their order; all where none is named. Raises `SettingsError`."""
    unknown = [name for name in only if name not in KINDS]
    if unknown:
        raise SettingsError(f"no kind of trial {unknown[0]!r}; allowed: {', '.join(KINDS)}")
    return [kind for name, kind in KINDS.items() if name in only or not only]


def measure(share: float, only: Sequence[str] = (), out: Path | None = None) -> list[Tally]:
    """Make the trials, or a ``share`` of them, and say how it goes; ``out`` gets ``reliability.json`` after each kind."""
    from instrument.results.files import replace
    from tests.soak.reliability.terminal import Screen
    from tests.soak.reliability.trial import tally

    done = []
    with Screen() as screen:
        for kind in asked(only):
            with tempfile.TemporaryDirectory(prefix="ddb-reliability-") as folder:
                trials = kind.load()(share, Path(folder))
                done.append(tally(kind.name, kind.what, trials, screen.tell))
            screen.done(done[-1])
            if out is not None:
                replace(out / FILE, json.dumps(as_json(share, done), indent=1, allow_nan=False).encode() + b"\n")
    return done


def as_json(share: float, done: list[Tally]) -> dict[str, Any]:
    """Plain data."""
    from benchmarks.command import machine

    return {
        "schema": 1,
        "share": share,
        "machine": machine(),
        "trials": sum(tally.trials for tally in done),
        "losses": sum(len(tally.losses) for tally in done),
        "kinds": [tally.as_row() for tally in done],
    }
