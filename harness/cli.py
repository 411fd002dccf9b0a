"""The command line: parses it once, runs the command, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from harness.exit_codes import INTERRUPTED, USAGE, exit_code_of, message_of
from harness.options import parser
from harness.parallel.ranks import is_main_process
from instrument.terminal import printable, reader_may_leave

if TYPE_CHECKING:
    from harness.run.heartbeat import HeartbeatSender

WRITES_FILES = ("case", "matrix", "campaign", "fit", "bench", "repair", "predict")
"""Commands that continue when nobody reads their output any more: their results are files."""
COMMANDS = {
    "list": "harness.commands.list:list_command",
    "case": "harness.commands.case:case_command",
    "matrix": "harness.matrix.command:matrix_command",
    "flops": "harness.commands.flops:flops_command",
    "inspect": "harness.commands.inspect:inspect_command",
    "inspect --try": "harness.commands.inspect:try_command",
    "diff": "harness.commands.diff:diff_command",
    "predict": "harness.predict:predict_command",
    "doctor": "harness.commands.doctor:doctor_command",
    "campaign": "harness.campaign.command:campaign_command",
    "fit": "harness.fit.command:fit_command",
    "repair": "harness.commands.repair:repair_command",
    "bench": "harness.overhead:bench_command",
}
"""Subcommand -> its function, imported when it runs: most of them need torch."""


def main(argv: Sequence[str] | None = None, *, supervised: bool = False) -> int:
    """Run one command; returns its exit code. Errors are one line on standard error. ``supervised``: a single run gets a
    process of its own, and this one records its crash."""
    with reader_may_leave():
        options = parser().parse_args(argv)
    if supervised and options.command == "case":
        from harness.supervisor.case_parent import is_wanted, run_supervised

        if is_wanted(options, os.environ.get):
            try:
                return run_supervised(options, run_command)
            except Exception as error:  # the row of a run that was killed could not be written
                with reader_may_leave():
                    return reported(error)
    return run_command(options)


def reported(error: Exception) -> int:
    """Print an error's one line; returns its exit code. Raises it where it is a defect of ours."""
    code = exit_code_of(error)
    if code is None:
        raise error
    if code != USAGE or is_main_process():  # under torchrun every process would say the same
        print(f"harness: {printable(message_of(error))}", file=sys.stderr)
    return code


def run_command(options: argparse.Namespace, heartbeat: HeartbeatSender | None = None) -> int:
    """Run a parsed command; returns its exit code. ``heartbeat``: to the supervisor of this process, which a single run has."""
    with reader_may_leave() as reader:
        options.heartbeat, reader.needed = heartbeat, not _writes_files(options)
        try:
            if threading.current_thread() is threading.main_thread():
                from harness.run.signals import interrupt_on_signals

                interrupt_on_signals()
            name = "inspect --try" if getattr(options, "changes", None) else options.command
            module, _, function = COMMANDS[name].partition(":")
            return getattr(import_module(module), function)(options)
        except KeyboardInterrupt:
            print("interrupted: give the same command again", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if heartbeat is not None:
                heartbeat.failed(error)
            return reported(error)


def _writes_files(options: argparse.Namespace) -> bool:
    if getattr(options, "dry_run", False):
        return False
    return options.command in WRITES_FILES or getattr(options, "measure", False)
