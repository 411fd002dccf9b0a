"""What is wrong with a results folder, named where it stands."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_TEXT = 300
"""Characters of a defect: a broken line may hold a megabyte."""


class NoResults(Exception):
    """There is nothing to report on; ``missing`` tells a folder that is not there from an empty one."""

    def __init__(self, message: str, *, missing: bool, defects: tuple[Defect, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing
        self.defects = defects


@dataclass(frozen=True)
class Defect:
    """One thing that was left out or repaired. ``line`` counts from 1; None: the whole file."""

    file: str
    line: int | None
    what: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.what}"


def defect(file: str, line: int | None, what: object) -> Defect:
    """A defect whose text stays short and on one line."""
    words = "".join(c if c.isprintable() else "?" for c in " ".join(str(what)[: 4 * LONGEST_TEXT].split()))
    return Defect(file, line, words if len(words) <= LONGEST_TEXT else words[:LONGEST_TEXT] + " ...")
