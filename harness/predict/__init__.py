"""``python -m harness predict CASE``: from an fp32 run, what would fail in 16 bits, and whether it did."""

from __future__ import annotations

import argparse
import sys


def predict_command(options: argparse.Namespace) -> int:
    """Print the predictions and what became of them; ``--json`` prints them as one object on standard output.
    The results folder keeps them for the dossier."""
    from bench_cases.own import find_case
    from harness.exit_codes import OK

    case = find_case(options.case)
    import msgspec

    from harness.planning import choose_device, results_folder
    from harness.predict.gather import predictions
    from harness.predict.store import store

    out = results_folder(options.out, choose_device("auto"))
    found = predictions(case.id, options.case, out)
    store(found, out)
    if options.json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
        return OK
    from harness.predict.terminal import show

    show(found)
    return OK
