"""Settings of runs that the command line has to be told, since they are not what it would choose."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from bench_cases import PRESETS
from instrument.results.schemas import RunRecord
from report.plots.text import clean

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


def unusual(runs: Sequence[RunRecord], settings: Sequence[str] = ("lr", *ALL_BUT_LR)) -> str:
    """The options for those ``settings`` that all ``runs`` share, with a blank before each; empty where there are none."""
    words: list[str] = []
    for key in settings:
        value = runs[0].config.get(key) if runs else None
        if (
            not isinstance(value, str | int | float)
            or any(run.config.get(key) != value for run in runs)
            or all(value == _usual(run).get(key) for run in runs)
        ):
            continue
        words += spelled_option("--" + SPELLED_OTHERWISE.get(key, key).replace("_", "-"), value)
    return " " + shlex.join(words) if words else ""


def spelled_option(option: str, value: Any) -> list[str]:
    """An option and its value as words; one that begins with a dash would be taken for an option."""
    word = clean(value, 200)
    return [option] if value is True else [f"{option}={word}"] if word.startswith("-") else [option, word]


def _usual(run: RunRecord) -> dict[str, Any]:
    """What the command line would choose for the run's case; as far as the row tells."""
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
