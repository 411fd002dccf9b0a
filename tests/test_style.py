"""The field's own words: no name, comment, message or document speaks a dialect that a newcomer must learn first."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INSTEAD = {
    r"behind": "after (in time); under, in (in place)",
    r"told|untold": "reported, a message",
    r"bury|buries|buried|burial|burials": "write_crash_record",
    r"vigil|vigils|watchman|watchmen": "ProcessMonitor, RankMonitor",
    r"pulse|pulses": "heartbeat",
    r"heeded|takers": "a plain verb",
    r"put_together|taken_apart": "gather_full_state, shard_state",
    r"hire|hires|hired|hiring|dismiss|dismissed|dismissal": "start, stop",
    r"where_process_ids_mean_something": "pid_namespace",
    r"last_words": "message",
}
"""What nobody writes here: a pattern of whole words, and what to write instead."""
NAMES = {"Attempt", "Vigil", "Pulse", "Beat", "Death", "Family", "Watchman", "Team", "ALONE", "Share", "WHOLE", "Resumption",
         "Presence", "Book"}  # fmt: skip
"""Names that stand in no code: the table in the contributors' guide has the standard ones."""
ON_DISK = {"failed_behind_the_error", "behind_steps", "resumed_behind"}
"""Keys of records that are on disk already keep their spelling."""
EXCEPT = ("tests/test_style.py", "bench_cases/data/embedded_words.py")
"""This list itself, and the embedded corpus: its text is data, with a hash."""
FOLDERS = {
    "bench_cases",
    "benchmarks",
    "cloud",
    "ddbench",
    "docs",
    "harness",
    "instrument",
    "kernels",
    "report",
    "templates",
    "tests",
}
TEXT = (".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".html", ".j2", ".css", ".sbatch", "Makefile")


def files() -> list[Path]:
    """Every text file of the project: what lies at the root, and in its folders without a dot."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name in FOLDERS]
    found = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    return [path for path in found if path.is_file() and path.name.endswith(TEXT) and str(path.relative_to(ROOT)) not in EXCEPT]


def found(pattern: str, flags: int = re.IGNORECASE) -> list[str]:
    """``file:line: text`` of every whole word (parts of a snake_case name count) that fits."""
    word = re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", flags)
    keys = re.compile("|".join(ON_DISK))
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if word.search(keys.sub("", line))
    ]


@pytest.mark.parametrize("pattern", INSTEAD)
def test_no_dialect(pattern):
    assert not found(pattern), f"write instead: {INSTEAD[pattern]}"


def test_names_are_the_standard_ones():
    assert not [line for line in found(rf"class (?:{'|'.join(sorted(NAMES))})", flags=0)]


def test_a_planted_word_is_found(monkeypatch, tmp_path):
    planted = tmp_path / "module.py"
    planted.write_text("step = 3  # what is evaluated is the state behind it\nfailed_behind_the_error = 1\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "files", lambda: [planted])
    assert found("behind") == ["module.py:1: step = 3  # what is evaluated is the state behind it"]
