"""``python -m tests.soak.forensics``: how often the watch names a planted fault, and reports one in a healthy run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from harness.exit_codes import OK
from harness.figures import machine, show, show_machine
from harness.options import at_least_one
from tests.soak.forensics.trials import measure


def main(argv: Sequence[str] | None = None) -> int:
    """A missed target is a result, not an error."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.forensics", description=__doc__.partition(": ")[2])
    parser.add_argument("--trials", type=at_least_one, default=500, metavar="N", help="faults (default 500)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args(argv)
    here = machine()
    show_machine(here, None)
    figures = measure(options.trials)
    show("forensics", figures)
    if options.json:
        rows = [figure.as_row() for figure in figures]
        print(json.dumps({"machine": here, "rows": rows}, allow_nan=False))
    return OK


if __name__ == "__main__":
    sys.exit(main())
