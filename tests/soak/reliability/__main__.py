"""``python -m tests.soak.reliability``: injects faults, recovers, and counts what was lost."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.exit_codes import OK, RUN_FAILED, USAGE
from harness.figures import machine, show_machine
from harness.settings import SettingsError
from tests.soak.reliability.trials import KINDS, measure


def share(text: str) -> float:
    """A share above 0, up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: above 0, up to 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 3 when a trial lost something."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.reliability", description=__doc__.partition(": ")[2])
    parser.add_argument("--only", nargs="+", default=[], metavar="KIND", help=f"only these kinds: {', '.join(KINDS)}")
    parser.add_argument(
        "--trials-share", type=share, default=1.0, metavar="X", help="this share of the trials (default 1: about an hour)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/reliability.json, too")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args(argv)
    here = machine()
    show_machine(here, None)
    try:
        tallies = measure(options.trials_share, options.only, options.out)
    except SettingsError as error:
        print(f"reliability: {error}", file=sys.stderr)
        return USAGE
    if options.json:
        print(json.dumps({"machine": here, "rows": [tally.as_row() for tally in tallies]}, allow_nan=False))
    return RUN_FAILED if any(tally.losses for tally in tallies) else OK


if __name__ == "__main__":
    sys.exit(main())
