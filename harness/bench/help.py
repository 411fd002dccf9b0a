"""``bench help``: the command line must be instant, so ``--help`` is measured against torch's import."""

from __future__ import annotations

from harness.bench.child import ChildFailed, run_python
from harness.bench.figure import Figure, summarize

TARGET_RATIO = 0.15
HEAVY = ("torch", "numpy")
PROBE = f"""
import runpy, sys
sys.argv = ["harness", "--help"]
try:
    runpy.run_module("harness", run_name="__main__")
except SystemExit:
    pass
print("\\nheavy:", *[name for name in {HEAVY!r} if name in sys.modules])
"""


def measure(repeats: int) -> list[Figure]:
    """Interleaved, each a fresh process; the first pair warms the disk cache and is not counted."""
    helps_s, imports_s = [], []
    for repeat in range(repeats + 1):
        help_s = run_python("-m", "harness", "--help").wall_s
        import_s = run_python("-c", "import torch").wall_s
        if repeat:
            helps_s.append(help_s)
            imports_s.append(import_s)
    heavy = heavy_imports()
    ratios = [one / other for one, other in zip(helps_s, imports_s, strict=True)]
    return [
        summarize("help", "help_s", helps_s, "s", note="python -m harness --help"),
        summarize("help", "import_torch_s", imports_s, "s", note="python -c 'import torch'"),
        summarize("help", "help_over_import_torch", ratios, "ratio", at_most=TARGET_RATIO, note="per pair"),
        summarize(
            "help",
            "heavy_imports",
            [len(heavy)],
            "count",
            at_most=0,
            note=f"of {', '.join(HEAVY)}: {', '.join(heavy) or 'none'}",
        ),
    ]


def heavy_imports() -> list[str]:
    """Which of `HEAVY` a process holds after ``--help``."""
    last = run_python("-c", PROBE).stdout.rstrip("\n").rpartition("\n")[2]
    if not last.startswith("heavy:"):
        raise ChildFailed(f"--help did not end as expected: {last!r}")
    return last.removeprefix("heavy:").split()
