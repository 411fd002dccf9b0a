"""``predictions/<case>.json``: what `predict` found, kept for the dossier."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from harness.inspect.locate import RunNotFound, RunUnreadable
from harness.predict.gather import Predictions, predictions
from instrument.files import replace


def store(found: Predictions, out: Path) -> None:
    """Write one case's predictions."""
    replace(out / "predictions" / f"{found.case}.json", msgspec.json.encode(found) + b"\n")


def store_all(cases: Iterable[str], out: Path) -> None:
    """Predict for every case that has an fp32 run; others have nothing to predict from."""
    for case in cases:
        try:
            store(predictions(case, case, out), out)
        except (RunNotFound, RunUnreadable):
            continue
