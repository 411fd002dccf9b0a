"""Command lines of the harness: how they name a run's case, the settings that they would not choose themselves, and the
commands that make rows again."""

from __future__ import annotations

import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from bench_cases import CASES, PRESETS
from instrument.results.schemas import RunRecord
from report.text import clean

LONGEST_ARGUMENT = 400
SIZES = ("batch_size", "micro_batch", "max_steps", "documents", "validation_documents", "threads")
DEFAULTS = {
    "eval_every": 0,
    "dropout": 0.0,
    "attention": "auto",
    "compile": False,
    "bucket_by_length": False,
    "text_field": "text",
    "label_field": "labels",
    "instrument": "light",
    "trace_steps": 0,
    "memory_snapshot": False,
    "checkpoint_every": 0,
}
"""Of settings that every row has. A setting that was added later is in a row only where it is not at its default."""
OF_ONE_CASE = ("lr", "seq_len", "text_field", "label_field")
NO_OPTION = ("case", "config", "data_fingerprint", "sources_fingerprint", "warmup_steps", "untimed_steps")
OF_RANKS = ("world", "parallel")
"""Spelled for a run alone: a matrix gives every run one process."""
FLAGS = {"attention": "--sdpa", "trace_steps": "--trace", "mtbf_s": "--mtbf"}
"""Options that are not called as their setting. `tests.harness.test_settings` compares all of this with the declaration."""
RARE = (
    *("text_field", "label_field", "eval_every", "documents", "validation_documents", "threads"),
    *("trace_steps", "memory_snapshot", "checkpoint_every", "mtbf_s"),
)
"""Settings that are spelled out only where the command line would choose others."""

SETTING = re.compile("[a-z][a-z0-9_]*")


def case_arguments(run: RunRecord) -> list[str] | None:
    """The arguments after ``harness case``: the id of a case of the project; ``path/to/file.py:NAME`` or ``--model`` and
    ``--task`` of one from outside. None where the row does not say them, or not as text that fits a line."""
    arguments = run.flags.get("case_spelled")
    if arguments is None:
        return [run.case] if run.case in CASES else None
    fine = isinstance(arguments, list) and all(
        isinstance(argument, str) and argument == clean(argument, LONGEST_ARGUMENT) for argument in arguments
    )
    return arguments if fine and arguments else None


def cases_option(runs: Iterable[RunRecord]) -> str | None:
    """The options that name the runs' cases to ``harness matrix``, quoted; a matrix takes one ``--model`` or any number of
    ``--cases``, so what has no room in it is left to the next. None where no case can be named."""
    named = [arguments for run in runs if (arguments := case_arguments(run))]
    ids = [arguments[0] for arguments in named if len(arguments) == 1]
    return shlex.join(["--cases", *ids]) if ids else shlex.join(named[0]) if named else None


def settings_of(run: RunRecord) -> dict[str, str | int | float]:
    """A row's settings for which the command line has an option, by name: those of its ``config`` and those that are in no run
    id, of which rows made before those were kept have the instrument level alone."""
    unhashed = run.flags.get("unhashed")
    known = {**run.config, "instrument": run.instrument, **(unhashed if isinstance(unhashed, dict) else {})}
    return {
        name: value
        for name, value in known.items()
        if name not in (*NO_OPTION, *OF_RANKS) and SETTING.fullmatch(name) and isinstance(value, str | int | float)
    }


def unusual_options(runs: Sequence[RunRecord], leave_out: Sequence[str] = ()) -> str:
    """The options for the settings that all ``runs`` share and the command line would choose otherwise for one of them, with
    a blank before each; empty where there are none. The device is the one that the command is given on."""
    arguments: list[str] = []
    for name, value in settings_of(runs[0]).items() if runs else ():
        shared = name not in (*leave_out, "device") and all(settings_of(run).get(name) == value for run in runs)
        if shared and any(usual(run).get(name) != value for run in runs):
            arguments += setting_arguments(name, value)
    return " " + shlex.join(arguments) if arguments else ""


def setting_arguments(name: str, value: Any) -> list[str]:
    """A setting's option and value as arguments, none for False; a value that begins with a dash would be taken for an
    option."""
    option, text = FLAGS.get(name) or "--" + name.replace("_", "-"), clean(value, 200)
    if isinstance(value, bool):
        return [option] if value else []
    return [f"{option}={text}"] if text.startswith("-") else [option, text]


def usual(run: RunRecord) -> dict[str, Any]:
    """What the command line would choose for the run's case in its preset; as far as the row says."""
    preset, config = PRESETS.get(run.preset), run.config
    if preset is None:
        return {**DEFAULTS, "preset": run.preset}
    data = "hub" if preset.id == "full" else "embedded"
    weights = "pretrained" if preset.id == "full" and config.get("data") == "hub" else "scratch"
    case = config.get("case")
    rates = case.get("lr") if isinstance(case, dict) else None
    rate = "pretrained" if config.get("weights") != "scratch" else "tiny" if preset.id == "tiny" else "scratch"
    return {
        **DEFAULTS,
        "preset": run.preset,
        **{key: getattr(preset, key) for key in SIZES},
        "data": data,
        "weights": weights,
        "lr": rates.get(rate) if isinstance(rates, dict) else None,
        "seq_len": preset.sequence_length(run.case),
        "micro_batch": math.gcd(run.batch_size, preset.micro_batch),
        "log_every": min(run.max_steps, 1 if config.get("device") == "cpu" else 10),
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
    if is_foreign(run) or case is None:
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


def is_foreign(run: RunRecord) -> bool:
    """Whether another program made the row."""
    return bool(run.flags.get("imported") or run.flags.get("simulated")) or "preset" not in run.config
