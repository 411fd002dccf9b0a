"""Numbers of things in words."""

import ast
import re
from pathlib import Path

import pytest

from instrument.words import count

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("harness", "instrument", "kernels", "bench_cases", "report")


@pytest.mark.parametrize(
    ("n", "words", "told"),
    [
        (0, ("run",), "0 runs"),
        (1, ("run",), "1 run"),
        (2, ("run",), "2 runs"),
        (12_000, ("row",), "12,000 rows"),
        (1, ("process", "processes"), "1 process"),
        (3, ("process", "processes"), "3 processes"),
    ],
)
def test_one_is_singular_and_all_else_is_not(n, words, told):
    assert count(n, *words) == told


def test_no_text_of_the_program_leaves_the_plural_open():
    """``run(s)`` and ``process(es)`` are for programs that cannot count."""
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    texts = [(file, node.value) for file, node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts += [(file, file.read_text()) for file in (ROOT / "templates").rglob("*.j2")]
    assert len(texts) > 5_000
    assert [(file, text) for file, text in texts if re.search(r"\w\((s|es)\)", text)] == []
