"""What stands over the dossier: which machine, which data, how much of it."""

from __future__ import annotations

from collections.abc import Iterable

from report.plots.text import clean
from report.words import count, joined

MARK_WORDS = {
    "TINY PRESET": "Two-layer models and some dozen steps: mechanisms show, speeds and scores do not carry over.",
    "EMBEDDED DATA": "Generated documents, not EUR-Lex and OpenWebText.",
    "CPU": "Measured on a processor: its fp16 and bf16 arithmetic says nothing about a GPU's speed.",
    "IMPORTED": "Logs of another program, converted; what it did not record is missing here.",
    "SIMULATED": "These numbers are made up, to measure the report. They say nothing about any device.",
}


def header(folder) -> dict:
    """Device, marks with their meaning, and the facts beneath the title."""
    runs = folder.runs
    gpus = _values(run.env.get("gpu") or run.env.get("cpu") for run in runs)
    facts = [
        ("Hardware", ", ".join(gpus) or "not recorded"),
        ("Preset", ", ".join(_values(run.preset for run in runs))),
        ("Data", ", ".join(_values(run.data_source for run in runs))),
        ("Weights", ", ".join(_values(run.weights_source for run in runs))),
        (
            "Runs",
            f"{len(runs)}: "
            + ", ".join(
                count(len({getattr(run, field) for run in runs}), word)
                for field, word in (("case", "case"), ("dtype_config", "configuration"), ("seed", "seed"))
            ),
        ),
        ("Outcomes", _outcomes(runs)),
    ]
    return {
        "device": clean(folder.device, 60),
        "facts": facts,
        "marks": [{"name": mark, "words": MARK_WORDS.get(mark, "")} for mark in folder.marks],
    }


def _values(values: Iterable[object]) -> list[str]:
    return [clean(value, 60) for value in dict.fromkeys(values) if value]


def _outcomes(runs) -> str:
    numbers: dict[str, int] = {}
    for run in runs:
        numbers[run.status] = numbers.get(run.status, 0) + 1
    return joined(f"{n} {status}" for status, n in sorted(numbers.items(), key=lambda item: -item[1]))
