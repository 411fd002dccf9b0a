"""``bench run``: one tiny run as a fresh process, broken down."""

from __future__ import annotations

import json
import tempfile

from harness.bench.child import ChildFailed, run_python
from harness.bench.figure import Figure, summarize

TARGET_WALL_S = 12.0
TARGET_PEAK_RSS_BYTES = 1.5e9
COMMAND = ("case", "gpt2_multi_cls", "amp_fp16", "--preset", "tiny", "--data", "embedded", "--device", "cpu")
PARTS = ("data", "model", "steps", "evaluation")


def measure(repeats: int) -> list[Figure]:
    """The first run fills the data cache where it is empty, and counts as the others do."""
    runs = [one_run() for _ in range(repeats)]
    command = " ".join(COMMAND)
    figures = [
        summarize("run", f"{part}_s", [run[f"{part}_s"] for run in runs], "s", note=note)
        for part, note in (
            ("startup", "interpreter, imports, and what the parts leave over"),
            ("data", "from the record"),
            ("model", "from the record"),
            ("steps", "from the record"),
            ("evaluation", "from the record"),
        )
    ]
    return [
        *figures,
        summarize("run", "cpu_s", [run["cpu_s"] for run in runs], "s", note="processor time"),
        summarize("run", "wall_s", [run["wall_s"] for run in runs], "s", at_most=TARGET_WALL_S, note=command),
        summarize(
            "run",
            "peak_rss_bytes",
            [run["peak_rss_bytes"] for run in runs],
            "bytes",
            at_most=TARGET_PEAK_RSS_BYTES,
            note="wait4",
        ),
    ]


def one_run() -> dict[str, float]:
    """Seconds of each part and peak memory of one run into a temporary folder."""
    with tempfile.TemporaryDirectory() as out:
        finished = run_python("-m", "harness", *COMMAND, "--json", "--out", out)
    record = json.loads(finished.stdout)
    if record["status"] != "completed":
        raise ChildFailed(f"the measured run ended {record['status']}: {record['error']}")
    return break_down(record["flags"]["timings_s"], finished.wall_s) | {
        "cpu_s": finished.cpu_s,
        "peak_rss_bytes": finished.peak_rss_bytes,
    }


def break_down(timings_s: dict[str, float], wall_s: float) -> dict[str, float]:
    """Parts that add up to the wall time; start-up is what the record's parts leave over, so that
    nothing is counted twice and nothing is lost."""
    parts = {f"{part}_s": timings_s[part] for part in PARTS}
    return {"startup_s": wall_s - sum(parts.values()), **parts, "wall_s": wall_s}
