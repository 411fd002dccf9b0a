"""What it takes to make each row again: its command, and the versions it ran on."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence

from instrument.results.schemas import RunRecord
from instrument.terminal import count
from report.dossier.rows import RowNumbers
from report.harness_commands import case_arguments, setting_arguments, settings_of, usual
from report.tables.selection import in_order
from report.text import clean, gigabytes

RARE = ("text_field", "label_field", "eval_every", "documents", "validation_documents", "threads")
"""Settings that are spelled out only where the command line would choose others."""
PARTS = ("gpu", "cpu", "cpu_count", "memory_bytes", "system", "python")


def commands(runs: Sequence[RunRecord], numbers: RowNumbers) -> dict:
    """``rows``: number and command of every row that this program's harness can make again; ``foreign``: the
    citations of those that it did not make; ``unnamed``: of those whose case has no name on its command line."""
    found = [(run, command(run)) for run in in_order(runs)]
    return {
        "rows": [{"number": numbers[run.run_id], "command": line} for run, line in found if line],
        "foreign": numbers.cite(run.run_id for run, line in found if not line and _is_foreign(run)),
        "unnamed": numbers.cite(run.run_id for run, line in found if not line and not _is_foreign(run)),
    }


def command(run: RunRecord) -> str | None:
    """The command line that makes this row, every setting spelled out; None for a row that another program made, or
    whose case the command line has no name for."""
    case = case_arguments(run)
    if _is_foreign(run) or case is None:
        return None
    world = run.config.get("world")
    many = isinstance(world, int) and world > 1
    program = f"torchrun --nproc-per-node {world} -m harness" if many else "python -m harness"
    arguments = ["case", *case, clean(run.dtype_config, 80), "--seed", str(run.seed)]
    usually = usual(run)
    for name, value in settings_of(run).items():
        if name not in RARE or value != usually.get(name):
            arguments += setting_arguments(name, value)
    if run.config.get("parallel") is not None:
        arguments += setting_arguments("parallel", run.config["parallel"])
    return f"{program} {shlex.join(arguments)}"


def _is_foreign(run: RunRecord) -> bool:
    return bool(run.flags.get("imported") or run.flags.get("simulated")) or "preset" not in run.config


def versions(runs: Sequence[RunRecord], machine: dict) -> list[tuple[str, str]]:
    """Machine and packages; where rows differ, every value with the number of rows that have it."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        for name, value in run.env.items():
            if value is not None and (name in PARTS or name.endswith("_version") or name.startswith("gpu_")):
                name, value = _printed(name, value)
                found[name][value] += 1
    for item in () if found else machine.items():
        name, value = _printed(*item)
        found[name][value] = 1
    return [
        (
            name.removesuffix("_version").replace("_", " "),
            "; ".join(f"{value} ({count(n, 'row')})" if len(values) > 1 else value for value, n in values.items()),
        )
        for name, values in found.items()
    ]


def _printed(name: str, value: object) -> tuple[str, str]:
    """A fact as it is read: bytes as GB."""
    if name.endswith("_bytes") and isinstance(value, (int, float)):
        return clean(name.removesuffix("_bytes"), 40), gigabytes(value)
    return clean(name, 40), clean(value, 80)
