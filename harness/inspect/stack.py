"""Where in the code a run failed: the innermost frames that are not a library's, out of its row. Torch-free."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Any

from harness.inspect.locate import FoundRun
from instrument.records import RunRecord

MOST_FRAMES = 5
FRAME = re.compile(
    r'^[ |]*File "(?P<file>[^"\n]+)", line (?P<line>\d+),? in (?P<function>[^\n]+)'
    r'(?:\n(?![ |]*File ")[ |]*(?P<code>\S[^\n]*))?',
    re.MULTILINE,
)
"""A frame of a traceback, with its line of code, or of a dump by `faulthandler`, without."""
LIBRARY = re.compile(r"[/\\](?:site|dist)-packages[/\\]|^<")
BETWEEN = re.compile(r"\n\n(?:During handling of the above|The above exception was)[^\n]*\n\n")
ROOT = Path(__file__).resolve().parents[2]


def stack_of(run: FoundRun, record: RunRecord | None) -> dict[str, Any] | None:
    """``frames``, outermost first: at most `MOST_FRAMES` of the project's or the model's own code, and the one that failed
    when it is a library's; ``whole``: where all of them are. None where the row has no stack."""
    if record is None:
        return None
    death = record.flags.get("death")
    dumped = death.get("stack") if isinstance(death, dict) else None
    if isinstance(traceback := record.flags.get("traceback"), str):
        frames, whole = _frames(_block(traceback, record.error or "")), f"flags.traceback in {run.path / 'run.json'}"
    elif isinstance(dumped, list) and all(isinstance(line, str) for line in dumped):
        frames, whole = _frames("\n".join(reversed(dumped))), str(run.path / "output.log")  # a dump is innermost first
    else:
        return None
    own = [frame for frame in frames[:-1] if not _is_a_librarys(frame["file"])][-MOST_FRAMES:] + frames[-1:]
    return {"frames": own, "whole": whole} if own else None


def _block(traceback: str, error: str) -> str:
    """Of a chain of exceptions the one that the row speaks of, else the last."""
    blocks = BETWEEN.split(traceback)
    return next((block for block in blocks if error and error in block), blocks[-1])


def _frames(text: str) -> list[dict[str, Any]]:
    return [{**found.groupdict(), "file": _short(found["file"]), "line": int(found["line"])} for found in FRAME.finditer(text)]


def _short(file: str) -> str:
    """The project's own files as they are called in it."""
    path = Path(file)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else file


def _is_a_librarys(file: str) -> bool:
    standard = Path(sysconfig.get_paths()["stdlib"])
    return LIBRARY.search(file) is not None or Path(file).is_relative_to(standard)
