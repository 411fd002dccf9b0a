"""``bench matrix``: the tiny matrix of 6 cases x 7 configurations, whole, as one command."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

from harness.bench.child import run_python
from harness.bench.figure import Figure, summarize

TARGET_WALL_S = 200.0
RUNS = 42
COMMAND = ("matrix", "--preset", "tiny", "--data", "embedded", "--device", "cpu", "--no-follow-up")


def measure(repeats: int) -> list[Figure]:
    """``repeats`` whole matrices, each into a folder of its own."""
    runs, rows = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as out:
            runs.append(run_python("-m", "harness", *COMMAND, "--out", out))
            rows.append(statuses(Path(out) / "results.jsonl"))
    ended = [f"{count} {status}" for status, count in sorted(rows[-1].items())]
    return [
        summarize("matrix", "wall_s", [run.wall_s for run in runs], "s", at_most=TARGET_WALL_S, note=" ".join(COMMAND)),
        summarize("matrix", "rows", [sum(counts.values()) for counts in rows], "count", at_least=RUNS, note=", ".join(ended)),
    ]


def statuses(results: Path) -> Counter[str]:
    """How many rows of an index ended in each status."""
    with results.open(encoding="utf-8") as lines:
        return Counter(json.loads(line)["status"] for line in lines)
