"""``python -m harness diff RUN RUN``: where two runs part, and what each of them costs."""

from __future__ import annotations

import argparse

from harness.exit_codes import OK


def diff_command(options: argparse.Namespace) -> int:
    """Print the comparison; ``--json`` prints it as one object on standard output."""
    from harness.diff.compare import compare
    from harness.diff.two_runs import load

    found = compare(load(options.runs, options.out))
    if options.json:
        from harness.inspect.strict_json import strict_json

        print(strict_json(found))
    else:
        from harness.diff.terminal import show

        show(found)
    return OK
