"""Command lines of the harness: how they name a run's case, and the settings that they would not choose themselves."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from bench_cases import CASES, PRESETS
from instrument.results.schemas import RunRecord
from report.text import clean

LONGEST_ARGUMENT = 400
SIZES = ("batch_size", "micro_batch", "seq_len", "max_steps", "documents", "validation_documents", "threads")
RARE = {
    "text_field": "text",
    "label_field": "labels",
    "eval_every": 0,
    "dropout": 0.0,
    "attention": "auto",
    "compile": False,
    "bucket_by_length": False,
}
ALL_BUT_LR = ("data", "weights", *SIZES, *RARE)
OF_ANY_CASE = tuple(name for name in ALL_BUT_LR if name not in ("seq_len", "text_field", "label_field"))
"""Without what one case may have and another may not."""
SPELLED_OTHERWISE = {"attention": "sdpa"}


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


def unusual_options(runs: Sequence[RunRecord], settings: Sequence[str] = ("lr", *ALL_BUT_LR)) -> str:
    """The options for those ``settings`` that all ``runs`` share, with a blank before each; empty where there are none."""
    arguments: list[str] = []
    for key in settings:
        value = runs[0].config.get(key) if runs else None
        if (
            not isinstance(value, str | int | float)
            or any(run.config.get(key) != value for run in runs)
            or all(value == _usual(run).get(key) for run in runs)
        ):
            continue
        arguments += option_arguments("--" + SPELLED_OTHERWISE.get(key, key).replace("_", "-"), value)
    return " " + shlex.join(arguments) if arguments else ""


def option_arguments(option: str, value: Any) -> list[str]:
    """An option and its value as arguments; one that begins with a dash would be taken for an option."""
    text = clean(value, 200)
    return [option] if value is True else [f"{option}={text}"] if text.startswith("-") else [option, text]


def _usual(run: RunRecord) -> dict[str, Any]:
    """What the command line would choose for the run's case; as far as the row says."""
    preset, config = PRESETS.get(run.preset), run.config
    if preset is None:
        return dict(RARE)
    data = "hub" if preset.id == "full" else "embedded"
    weights = "pretrained" if preset.id == "full" and config.get("data") == "hub" else "scratch"
    rates = _object(_object(config.get("case")).get("lr"))
    rate = "pretrained" if config.get("weights") != "scratch" else "tiny" if preset.id == "tiny" else "scratch"
    return {
        **RARE,
        **{key: getattr(preset, key) for key in SIZES},
        "data": data,
        "weights": weights,
        "lr": rates.get(rate),
        "seq_len": preset.sequence_length(run.case),
        "micro_batch": math.gcd(run.batch_size, preset.micro_batch),
    }


def _object(value: Any) -> dict:
    return value if isinstance(value, dict) else {}
