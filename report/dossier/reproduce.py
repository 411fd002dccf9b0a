"""What it takes to make each row again: its command, and one for all of them."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence

from instrument.results.schemas import RunRecord
from report.dossier.rows import RowNumbers
from report.harness_commands import case_arguments, setting_arguments, settings_of, usual
from report.tables.selection import in_order
from report.text import clean

RARE = (
    *("text_field", "label_field", "eval_every", "documents", "validation_documents", "threads"),
    *("trace_steps", "memory_snapshot", "checkpoint_every", "mtbf_s"),
)
"""Settings that are spelled out only where the command line would choose others."""


def commands(runs: Sequence[RunRecord], numbers: RowNumbers) -> dict:
    """``matrix``: lines that make all of them again, each with the rows that it makes; ``rows``: number and command of every
    row that this program's harness can make again; ``foreign``: the citations of those that it did not make; ``unnamed``: of
    those whose case has no name on its command line."""
    found = [(run, command(run)) for run in in_order(runs)]
    return {
        "matrix": [
            {"command": line, "rows": numbers.cite(run.run_id for run in made)}
            for line, made in matrix_commands([run for run, line in found if line])
        ],
        "rows": [{"number": numbers[run.run_id], "command": line} for run, line in found if line],
        "foreign": numbers.cite(run.run_id for run, line in found if not line and _is_foreign(run)),
        "unnamed": numbers.cite(run.run_id for run, line in found if not line and not _is_foreign(run)),
    }


def matrix_commands(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """As few command lines as make the runs: a ``harness matrix`` for every set of cases that share settings, configurations
    and seeds, with every setting spelled out that it would not choose; runs on several ranks have their own."""
    alone = [run for run in runs if run.config.get("world") in (None, 1)]
    by_case: dict[tuple, list[RunRecord]] = defaultdict(list)
    for run in alone:
        by_case[tuple(case_arguments(run) or ()), _options(run)].append(run)
    plans: dict[tuple, list[list[RunRecord]]] = defaultdict(list)
    for (case, options), made in by_case.items():
        for configs, seeds, part in _products(made):
            one_model = case if len(case) > 1 else ()  # a matrix takes one --model, and any number of --cases
            plans[one_model, options, configs, seeds].append(part)
    lines = []
    for (model, options, configs, seeds), parts in plans.items():
        cases = model or ("--cases", *(argument for part in parts for argument in case_arguments(part[0]) or ()))
        words = [*cases, "--configs", *configs, "--seeds", *map(str, seeds), *options, "--no-follow-up"]
        lines.append((f"python -m harness matrix {shlex.join(words)}", [run for part in parts for run in part]))
    return lines + [(line, [run]) for run in runs if run not in alone and (line := command(run))]


def _options(run: RunRecord) -> tuple[str, ...]:
    """A run's settings as arguments, where the command line would choose others; the preset always."""
    usually = usual(run) | {"preset": None}
    unusual = {name: value for name, value in settings_of(run).items() if usually.get(name) != value}
    return tuple(argument for name, value in unusual.items() for argument in setting_arguments(name, value))


def _products(runs: Sequence[RunRecord]) -> list[tuple[tuple[str, ...], tuple[int, ...], list[RunRecord]]]:
    """One case's runs as products of configurations and seeds: configurations with the same seeds together."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for run in runs:
        seeds[run.dtype_config].add(run.seed)
    by_seeds: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for config, own in seeds.items():
        by_seeds[tuple(sorted(own))].append(config)
    return [
        (tuple(clean(config, 80) for config in configs), own, [run for run in runs if run.dtype_config in configs])
        for own, configs in by_seeds.items()
    ]


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
