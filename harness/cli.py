"""The command line: which command, and which exit code an error gets."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench_cases.lookup import missing_package
from harness import options as arguments
from harness.exit_codes import BAD_DATA, ENVIRONMENT, INTERRUPTED, USAGE
from harness.parallel.ranks import is_spokesman
from instrument.terminal import reader_may_leave, sentence_of

if TYPE_CHECKING:
    from harness.supervisor.heartbeat import HeartbeatSender

MAKING = ("case", "matrix", "campaign", "fit", "bench", "repair", "predict")
"""Commands that go on when nobody reads their words any more: what they make goes into files."""


def main(argv: Sequence[str] | None = None, pulse: HeartbeatSender | None = None) -> int:
    """Run one command; returns its exit code. Errors are one line on standard error. ``pulse``: to the supervisor of
    this process, which a single run has."""
    with reader_may_leave() as reader:
        options = arguments.parser().parse_args(argv)
        options.pulse, reader.needed = pulse, not _makes(options)
        return _main(options)


def _main(options: argparse.Namespace) -> int:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: rows written, exit 75
    try:
        return _command(options.command)(options)
    except KeyboardInterrupt:
        print("interrupted: give the same command again", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if options.pulse is not None:
            options.pulse.fault(error)
        code = _exit_code(error)
        if code is None:
            raise
        if code != USAGE or is_spokesman():  # under torchrun every process would say the same
            print(f"harness: {sentence(error)}", file=sys.stderr)
        return code


def _makes(options: argparse.Namespace) -> bool:
    """Whether it leaves more than words."""
    if getattr(options, "dry_run", False):
        return False
    return options.command in MAKING or getattr(options, "measure", False)


def sentence(error: Exception) -> str:
    """An error's one line; of a package that is not installed, what to do."""
    return missing_package(error) or sentence_of(error) or str(error)


def _command(name: str):
    """The function behind a subcommand; imported late, since most of them need torch."""
    if name == "list":
        from harness.commands.list import list_command

        return list_command
    if name == "case":
        from harness.commands.case import case_command

        return case_command
    if name == "matrix":
        from harness.matrix.command import matrix_command

        return matrix_command
    if name == "flops":
        from harness.commands.flops import flops_command

        return flops_command
    if name == "inspect":
        return _inspect
    if name == "diff":
        from harness.diff.command import diff_command

        return diff_command
    if name == "predict":
        from harness.predict.command import predict_command

        return predict_command
    if name == "doctor":
        from harness.doctor.command import doctor_command

        return doctor_command
    if name == "campaign":
        from harness.campaign.command import campaign_command

        return campaign_command
    if name == "fit":
        from harness.fit.command import fit_command

        return fit_command
    if name == "repair":
        from harness.commands.repair import repair_command

        return repair_command
    from benchmarks.command import bench_command

    return bench_command


def _inspect(options) -> int:
    """What was found of a failure, or with ``--try`` what would have helped."""
    from harness.settings import SettingsError

    if options.steps is not None and not options.changes:
        raise SettingsError("--steps goes with --try")
    if options.changes:
        from harness.forensics.counterfactual import try_command

        return try_command(options)
    from harness.inspect.command import inspect_command

    return inspect_command(options)


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that a person can mend; None for a defect of ours."""
    if missing_package(error) or sentence_of(error):
        return ENVIRONMENT
    from bench_cases.data.documents import DataError, DataUnavailable
    from bench_cases.lookup import BadDeclaration, UnknownId
    from bench_cases.models import ModelError
    from bench_cases.reach import WeightsUnavailable
    from harness.forensics.stored import NothingToReplay, RebuildError, SnapshotError
    from harness.matrix.ray_cluster import EngineError
    from harness.settings import SettingsError
    from instrument.results.claims import RunClaimed
    from instrument.results.folder import OutputError
    from instrument.results.read import RunNotFound, RunUnreadable

    codes = {
        UnknownId: USAGE,
        BadDeclaration: USAGE,
        SettingsError: USAGE,
        ModelError: USAGE,
        RunNotFound: USAGE,
        RunUnreadable: BAD_DATA,
        NothingToReplay: USAGE,
        SnapshotError: BAD_DATA,
        RebuildError: ENVIRONMENT,
        DataError: BAD_DATA,
        DataUnavailable: ENVIRONMENT,
        WeightsUnavailable: ENVIRONMENT,
        OutputError: ENVIRONMENT,
        RunClaimed: ENVIRONMENT,
        EngineError: ENVIRONMENT,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), None)
