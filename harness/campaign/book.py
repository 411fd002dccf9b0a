"""``campaign.json``: what was asked for, what is planned, what is done and what it took. Written whole, so that a cut at any
moment leaves the old one or the new one."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.settings import SettingsError
from instrument.results.files import replace
from instrument.results.folder import OutputError

NAME, SCHEMA = "campaign.json", 1
CHANGEABLE = ("skip", "price_per_hour")
"""Options that a later call may give anew: no run depends on them."""
SETTLED = ("done", "failed", "cut")
"""``cut``: it ran into its own limit, and what it had measured by then is kept. ``pending`` and ``running`` (a call that was
killed) are for this call or the next."""


class Book:
    """The file's content, saved at every change."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    @classmethod
    def open(cls, results: Path, asked: Mapping[str, Any], total_minutes: float) -> Book:
        """The campaign of a results folder, begun here when there is none. ``asked``: the options that make a campaign what
        it is; None is whatever it was begun with. Raises `SettingsError` when one contradicts it."""
        path = results / NAME
        try:
            content = json.loads(path.read_bytes())
            began = content["asked"]
        except FileNotFoundError:
            content = {
                "schema": SCHEMA,
                "began": now(),
                "asked": dict(asked),
                "total_minutes": total_minutes,
                "machine": None,
                "plan": None,
                "stages": {},
                "calls": [],
            }
            return cls(path, content)
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{path} is no campaign's file ({error}); move it away, or give another folder with --results"
            ) from error
        began |= {name: asked[name] for name in CHANGEABLE if asked[name] is not None}
        for name, value in asked.items():
            if value is not None and value != began.get(name):
                raise SettingsError(
                    f"--{name.replace('_', '-')} is {_words(value)}, and the campaign in {path} was begun with "
                    f"{_words(began.get(name))}; leave it out to go on, or give another folder with --results"
                )
        return cls(path, content)

    @property
    def asked(self) -> dict[str, Any]:
        return self.content["asked"]

    @property
    def total_s(self) -> float:
        """Of all calls together, as planned."""
        return 60 * self.content["total_minutes"]

    @property
    def spent_s(self) -> float:
        """By all stages so far, in all calls."""
        return sum(stage["spent_s"] for stage in self.content["stages"].values())

    def stage(self, name: str) -> dict[str, Any]:
        """A stage's entry, made when it is new."""
        return self.content["stages"].setdefault(
            name, {"state": "pending", "spent_s": 0.0, "exit_code": None, "note": None, "pid": None}
        )

    def update(self, name: str, **changes: Any) -> None:
        """Change a stage's entry and save."""
        self.stage(name).update(changes)
        self.save()

    def settled(self, name: str) -> bool:
        """Whether nothing is left to do for a stage."""
        return self.stage(name)["state"] in SETTLED

    def save(self) -> None:
        """Write the file."""
        replace(self.path, json.dumps(self.content, indent=1, allow_nan=False).encode() + b"\n")


@contextmanager
def only_call(results: Path) -> Iterator[None]:
    """Hold the folder: one call at a time. Raises `OutputError` when another living one has it."""
    path = results / ".campaign.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = path.read_text().strip() or "unknown"
            raise OutputError(
                f"another campaign (process {owner}) works in {results}; wait for it, or give another folder with --results"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def now() -> str:
    """The time of day, for people."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "the default" if value is None else str(value)
