"""``python -m harness inspect RUN_ID``: why a run failed, or how far a healthy one stayed from failing."""

from __future__ import annotations

import argparse
import sys

from harness.exit_codes import OK


def inspect_command(options: argparse.Namespace) -> int:
    """Print the findings; ``--json`` prints them as one object on standard output, ``--repro`` writes a script."""
    from harness.inspect.findings import gather
    from harness.inspect.locate import locate

    run = locate(options.run, options.out)
    if options.repro is not None:
        return _repro(run, options)
    found = gather(run)
    if options.json:
        from harness.inspect.strict_json import strict_json

        print(strict_json(found))
    else:
        from harness.inspect.terminal import InspectScreen

        InspectScreen().show(found)
    return OK


def _repro(run, options: argparse.Namespace) -> int:
    """Write the script and say how to run it."""
    import json

    from harness.inspect.repro_script import write_repro
    from harness.inspect.run_files import failure_of, run_record

    record = run_record(run)
    script, tensors = write_repro(run, record, failure_of(run, record), options.repro)
    if options.json:
        sys.stdout.write(json.dumps({"run_id": run.run_id, "script": str(script), "tensors": str(tensors)}) + "\n")
    else:
        print(f"{script} and {tensors}: python {script}")
    return OK
