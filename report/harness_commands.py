"""Command lines of the harness: how they name a run's case, and the settings that they would not choose themselves."""

from __future__ import annotations

import math
import re
import shlex
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
