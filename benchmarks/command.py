"""``python -m harness bench``: the harness measures itself, each figure beside its target."""

from __future__ import annotations

import argparse
import json
import os
import sys

from harness.settings import SettingsError

NAMES = ("help", "run", "matrix", "trainer", "forensics", "overhead", "reliability")
ONLY_BY_NAME = {"reliability"}
"""Not among all that run when none is named: it takes about an hour, and finds losses, not speeds."""


def bench_command(options: argparse.Namespace) -> int:
    """Run the named benchmarks (all but reliability when none is named); a missed target is a result, not an error.

    Exit code 5 when a benchmark needs a package that is missing, 3 when the measured work itself
    failed, two compared arms did not do the same work, or a trial of reliability lost something.
    """
    from benchmarks.process import ChildFailed
    from benchmarks.trainer import BenchUnavailable, UnfairComparison
    from harness.exit_codes import ENVIRONMENT, OK, RUN_FAILED
    from harness.overhead.figure import show, show_machine
    from tests.soak.reliability import command

    names = asked(options.what, options.repeats)
    if options.only and "reliability" not in names:
        raise SettingsError("--only goes with `bench reliability`")
    command.asked(options.only)
    here = machine()
    show_machine(here, None if options.what == ["reliability"] else options.repeats)
    rows, code = [], OK
    for name in names:
        if name == "reliability":
            tallies = command.measure(options.trials_share, options.only, options.out)
            rows += [tally.as_row() for tally in tallies]
            code = RUN_FAILED if any(tally.losses for tally in tallies) else code
            continue
        try:
            figures = run_one(name, options)
        except BenchUnavailable as error:
            print(f"bench {name}: {error}", file=sys.stderr)
            code = ENVIRONMENT
        except (ChildFailed, UnfairComparison) as error:
            print(f"bench {name} failed: {error}", file=sys.stderr)
            code = RUN_FAILED
        else:
            show(name, figures)
            rows += [figure.as_row() for figure in figures]
    if options.json:
        sys.stdout.write(json.dumps({"machine": here, "repeats": options.repeats, "rows": rows}, allow_nan=False) + "\n")
    return code


def asked(what: list[str], repeats: int) -> list[str]:
    """The benchmarks to run, in their order; raises `SettingsError`."""
    unknown = [name for name in what if name not in NAMES]
    if unknown:
        raise SettingsError(f"no benchmark {unknown[0]!r}; allowed: {', '.join(NAMES)}")
    if repeats < 1:
        raise SettingsError(f"repeats is {repeats}; it must be at least 1")
    return [name for name in NAMES if name in what or not (what or name in ONLY_BY_NAME)]


def run_one(name: str, options: argparse.Namespace) -> list:
    """The figures of one benchmark. The matrix takes minutes, so ``--repeats`` leaves it at one."""
    from benchmarks import trainer, whole_runs
    from harness.overhead import command as overhead
    from tests.soak.forensics import command as forensics

    if name == "matrix":
        return whole_runs.measure_matrix(1)
    if name == "forensics":
        return forensics.measure(options.trials)
    if name == "overhead":
        return overhead.measure(options.pairs, options.out, options.at_most)
    measure = {"help": whole_runs.measure_help, "run": whole_runs.measure_run, "trainer": trainer.measure}[name]
    return measure(options.repeats)


def machine() -> dict[str, object]:
    """Where the figures hold: processor, usable cores, memory, load before the start, versions."""
    import platform

    import psutil

    from instrument.environment import cpu_name, version

    return {
        "cpu": cpu_name(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "accelerate": version("accelerate"),
    }
