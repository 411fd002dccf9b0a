"""The contributors' guide walks through real code: its files exist, define what it names, and know each other."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

import ddbench

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
MOST_FILES = {"A setting": 9, "A batch": 9, "A matrix option": 9, "A non-finite value": 12}
STATION = re.compile(r"^\d+\. `([\w/]+\.py)` `(\w+(?:\.\w+)?)`", re.MULTILINE)


def walk(title: str) -> list[tuple[str, str]]:
    """(file, name) of every station of a walk, in order."""
    section = next(part for part in GUIDE.split("\n### ") if part.startswith(title))
    return STATION.findall(section)


def defines(file: str, name: str) -> bool:
    """Whether a file defines a function, a class, or a method or field of a class."""
    nodes = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [
            node
            for node in nodes
            if getattr(node, "name", None) == part
            or (isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == part)
            or (isinstance(node, ast.Assign) and any(getattr(target, "id", None) == part for target in node.targets))
        ]
        if not found:
            return False
        nodes = getattr(found[0], "body", [])
    return True


def mentions(file: str, other: str) -> bool:
    """Whether ``file`` imports ``other``, or names it as a module (registries load commands by name)."""
    module = other.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package, _, last = module.rpartition(".")
    source = (ROOT / file).read_text(encoding="utf-8")
    return bool(
        re.search(rf"\b{re.escape(module)}\b", source)
        or re.search(rf"from {re.escape(package)} import [^\n]*\b{last}\b", source)
        or re.search(rf"from {re.escape(package)} import \([^)]*\b{last}\b", source)
    )


@pytest.mark.parametrize("title", MOST_FILES)
def test_a_walk_names_what_is_there_and_is_short(title):
    stations = walk(title)
    assert len(stations) >= 6
    assert not [station for station in stations if not defines(*station)]
    assert len({file for file, _ in stations}) <= MOST_FILES[title]


@pytest.mark.parametrize("title", MOST_FILES)
def test_neighbours_of_a_walk_know_each_other(title):
    files = [file for file, _ in walk(title)]
    apart = [(a, b) for a, b in pairwise(files) if a != b and not mentions(a, b) and not mentions(b, a)]
    assert not apart, "no import between them: a station is missing"


def test_the_changelog_begins_with_the_version_of_the_package():
    first = re.search(r"(?m)^## (\S+) ", (ROOT / "CHANGELOG.md").read_text())
    assert first[1] == ddbench.__version__
