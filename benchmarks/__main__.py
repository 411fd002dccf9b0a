"""``python -m benchmarks``: how fast the harness and the report are, each figure beside its target.

`help`, `run`, `matrix` and `trainer` measure the harness (all four where none is named); `report` measures a dossier;
`verdicts` measures how often the report's verdicts are false, and writes docs/verdicts.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks import report, trainer, verdicts, whole_runs
from harness.exit_codes import ENVIRONMENT, OK, RUN_FAILED
from harness.figures import machine, show, show_machine
from harness.options import at_least_one

MEASURES = {
    "help": lambda repeats: whole_runs.measure_help(repeats),
    "run": lambda repeats: whole_runs.measure_run(repeats),
    "matrix": lambda repeats: whole_runs.measure_matrix(1),  # it takes minutes
    "trainer": lambda repeats: trainer.measure(repeats),
}


def main(argv: Sequence[str] | None = None) -> int:
    """A missed target is a result, not an error. Exit code 5 when a benchmark needs a package that is missing, 3 when the
    measured work itself failed or two compared arms did not do the same work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n\n")[2])
    parser.add_argument("what", nargs="*", metavar="what", help=", ".join((*MEASURES, "report", "verdicts")))
    parser.add_argument("--repeats", type=at_least_one, metavar="N", help="repetitions (default 5, of the report 3)")
    parser.add_argument("--worlds", type=at_least_one, metavar="N", help="simulated worlds a line of verdicts (default 2,000)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the simulated worlds (default: that of docs/verdicts.md)")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args(argv)
    if options.what == ["report"]:
        return report.bench_command(options.repeats or 3, options.json)
    if options.what == ["verdicts"]:
        return verdicts.bench_command(options.worlds, options.seed, options.json)
    unknown = [name for name in options.what if name not in MEASURES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r} here; allowed: {', '.join(MEASURES)}; or report or verdicts, alone")
    repeats, here, rows, code = options.repeats or 5, machine(), [], OK
    show_machine(here, repeats)
    for name in [name for name in MEASURES if name in options.what or not options.what]:
        try:
            figures = MEASURES[name](repeats)
        except trainer.BenchUnavailable as error:
            print(f"bench {name}: {error}", file=sys.stderr)
            code = ENVIRONMENT
        except (whole_runs.ChildFailed, trainer.UnfairComparison) as error:
            print(f"bench {name} failed: {error}", file=sys.stderr)
            code = RUN_FAILED
        else:
            show(name, figures)
            rows += [figure.as_row() for figure in figures]
    if options.json:
        sys.stdout.write(json.dumps({"machine": here, "repeats": repeats, "rows": rows}, allow_nan=False) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
